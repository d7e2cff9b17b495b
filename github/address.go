package github

import (
	"errors"
	"net/url"
	"regexp"
	"strings"
)

// A Remote is a repository on a GitHub.
type Remote struct {
	// API is the base address of the REST API of that GitHub.
	API string
	// Name is owner/name.
	Name string
}

// scp is the short form of ssh's addresses, user@host:path.
var scp = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*@([A-Za-z0-9][A-Za-z0-9.-]*):([^/].*)$`)

// ParseRemote takes an address of git apart: https://HOST/owner/name.git,
// ssh://git@HOST/owner/name.git or git@HOST:owner/name.git. An error never has the
// address, which may have a password.
func ParseRemote(address string) (Remote, error) {
	if m := scp.FindStringSubmatch(address); m != nil {
		address = "ssh://git@" + m[1] + "/" + m[2]
	}
	parsed, err := url.Parse(address)
	if err != nil || parsed.Hostname() == "" || parsed.RawQuery != "" || parsed.Fragment != "" {
		return Remote{}, errors.New("the address of the repository is none of GitHub's: it must be like https://github.com/owner/name.git or git@github.com:owner/name.git")
	}
	name := strings.TrimSuffix(strings.Trim(parsed.Path, "/"), ".git")
	if err := CheckName(name); err != nil {
		return Remote{}, err
	}
	switch parsed.Scheme {
	case "https":
	case "http":
		if !isLoopback(parsed.Hostname()) {
			return Remote{}, errors.New("the address of the repository must begin with https://: a token is sent there")
		}
	case "ssh":
		// The port is that of ssh, and the API has the default one.
		parsed.Scheme, parsed.Host = "https", parsed.Hostname()
	default:
		return Remote{}, errors.New("the address of the repository must begin with https:// or ssh://, or be like git@github.com:owner/name.git")
	}
	return Remote{API: apiOf(parsed), Name: name}, nil
}

// API is the base address of the REST API of a GitHub whose repositories are at server,
// such as https://github.com.
//
//   - https://api.github.com for github.com
//   - https://api.NAME.ghe.com for GitHub Enterprise Cloud at NAME.ghe.com
//   - https://HOST/api/v3 for a GitHub Enterprise Server
func API(server string) (string, error) {
	parsed, err := url.Parse(server)
	if err != nil || parsed.Host == "" {
		return "", errors.New("the address of GitHub must be like https://github.com")
	}
	return apiOf(parsed), nil
}

func apiOf(server *url.URL) string {
	host := strings.ToLower(server.Hostname())
	switch {
	case host == "github.com", host == "www.github.com", host == "ssh.github.com":
		return "https://api.github.com"
	case strings.HasSuffix(host, ".ghe.com"):
		return "https://api." + host
	}
	return server.Scheme + "://" + server.Host + "/api/v3"
}

// GitHub allows these characters only, so that a name can stand in an address as it is.
var repositoryName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]*/[A-Za-z0-9_.][A-Za-z0-9_.-]*$`)

// CheckName returns an error if a text is not the name of a repository, owner/name.
func CheckName(name string) error {
	if !repositoryName.MatchString(name) || len(name) > 150 || strings.HasSuffix(name, "/.") || strings.Contains(name, "..") || strings.HasSuffix(name, ".git") {
		return errors.New("the name of the repository does not have the form owner/name")
	}
	return nil
}

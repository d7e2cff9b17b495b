package github

import (
	"errors"
	"net/url"
	"regexp"
	"strings"
)

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

// RepositoryURL is the address of a repository for git, at a server such as
// https://github.com. name is one that CheckName accepts.
func RepositoryURL(server, name string) string {
	return strings.TrimRight(server, "/") + "/" + name + ".git"
}

// GitHub allows these characters only, so that a name can stand in an address as it is,
// and is never taken for an option.
var repositoryName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]*/[A-Za-z0-9_.][A-Za-z0-9_.-]*$`)

// CheckName returns an error if a text is not the name of a repository, owner/name.
func CheckName(name string) error {
	if !repositoryName.MatchString(name) || len(name) > 150 || strings.Contains(name, "..") || strings.HasSuffix(name, "/.") || strings.HasSuffix(name, ".git") {
		return errors.New("the name of the repository does not have the form owner/name")
	}
	return nil
}

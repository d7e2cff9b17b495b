package gitrepo

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Token is read each time that git is about to talk to the server.
// *credential.Credential implements it.
type Token interface {
	Read(ctx context.Context) (secret.String, error)
}

// A Remote is a repository on a server. [Git.Remote] makes one.
type Remote struct {
	// URL is the address, without a login.
	URL string
	// Token is sent to the server if it asks for a login, nil for none.
	Token Token
	url   *url.URL
}

// Remote checks an address. token may be nil.
func (g *Git) Remote(text string, token Token) (*Remote, error) {
	bad := func(why string) (*Remote, error) {
		return nil, fmt.Errorf("the address of the repository %s: it must be like https://github.com/owner/name.git", why)
	}
	for _, r := range text {
		if r <= ' ' || r == 0x7f {
			return bad("has white space or a control character")
		}
	}
	parsed, err := url.Parse(text)
	switch {
	case err != nil || parsed.Scheme == "" || parsed.Opaque != "":
		return bad("is no URL")
	case !slices.Contains(g.config.Schemes, parsed.Scheme):
		return bad(fmt.Sprintf("has the scheme %.20q, and allowed are %s", parsed.Scheme, strings.Join(g.config.Schemes, ", ")))
	case parsed.RawQuery != "" || parsed.ForceQuery || parsed.Fragment != "":
		return bad("has a query or a fragment")
	case parsed.Scheme == "file" && (parsed.Host != "" || !path.IsAbs(parsed.Path)):
		return bad("has the scheme file and must then have an absolute path and no host")
	case parsed.Scheme != "file" && (parsed.Hostname() == "" || strings.HasPrefix(parsed.Hostname(), "-")):
		return bad("has no valid host")
	case strings.Trim(parsed.Path, "/") == "" || strings.HasPrefix(strings.TrimLeft(parsed.Path, "/"), "-"):
		return bad("has no valid path")
	case slices.Contains(strings.Split(parsed.Path, "/"), ".."):
		return bad("has .. in its path")
	case parsed.User != nil && parsed.Scheme != "ssh":
		return bad("has a login in it, which belongs into the credential's setting")
	}
	if parsed.User != nil {
		if _, has := parsed.User.Password(); has || strings.HasPrefix(parsed.User.Username(), "-") {
			return bad("has a password or a name that is not valid")
		}
	}
	if token != nil && parsed.Scheme == "http" && !address.IsLoopback(parsed.Hostname()) {
		return nil, errors.New("a token is not sent over http to another machine: give the repository's address with https")
	}
	if parsed.Scheme != "https" && parsed.Scheme != "http" {
		token = nil
	}
	return &Remote{URL: parsed.String(), Token: token, url: parsed}, nil
}

func (r *Remote) scheme() string { return r.url.Scheme }

// helper are the settings with which git gets the token. git runs the helper by a
// shell, and only for addresses on this server: a redirect to another one has none. The
// shell's own cat would be enough, but a pipe is read only once: a server that refuses
// the token makes git ask again, and it gets no answer.
func (r *Remote) helper() [][2]string {
	if r.Token == nil {
		return nil
	}
	server := url.URL{Scheme: r.url.Scheme, Host: r.url.Host}
	return [][2]string{{"credential." + server.String() + ".helper", `!f() { test "$1" = get && cat <&3; }; f`}}
}

// pipe returns the end of a pipe from which the helper reads. A credential is shorter
// than what a pipe holds.
func (r *Remote) pipe(token secret.String) (*os.File, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// GitHub ignores the name.
	_, err = fmt.Fprintf(write, "username=x-access-token\npassword=%s\n", token.Reveal())
	if err = errors.Join(err, write.Close()); err != nil {
		_ = read.Close()
		return nil, err
	}
	return read, nil
}

// CheckBranch returns an error that says why git does not accept a name for a branch.
func CheckBranch(name string) error {
	fault := ""
	switch {
	case name == "":
		fault = "is empty"
	case len(name) > 244:
		fault = "has more than 244 bytes"
	case name == "@" || name == "HEAD":
		fault = "is a name of git's own"
	case strings.HasPrefix(name, "-"):
		fault = "begins with a hyphen"
	case strings.HasPrefix(name, "refs/"):
		fault = "begins with refs/"
	case strings.Contains(name, "..") || strings.Contains(name, "@{"):
		fault = "has .. or @{ in it"
	case strings.HasSuffix(name, "."):
		fault = "ends with a dot"
	}
	for _, r := range name {
		if r <= ' ' || r == 0x7f || strings.ContainsRune(`~^:?*[\`, r) || r == '\uFFFD' {
			fault = fmt.Sprintf("has the character %q", r)
		}
	}
	for part := range strings.SplitSeq(name, "/") {
		if fault == "" && (part == "" || strings.HasPrefix(part, ".") || strings.HasSuffix(part, ".lock")) {
			fault = "has a part that is empty, begins with a dot or ends with .lock"
		}
	}
	if fault == "" {
		return nil
	}
	return fmt.Errorf("the branch name %.100q %s: git does not accept it", name, fault)
}

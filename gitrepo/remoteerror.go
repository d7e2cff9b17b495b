package gitrepo

import (
	"errors"
	"fmt"
	"strings"
)

// Refusal says why a server did not do what git has asked for.
type Refusal string

const (
	// RefusedLogin: the server does not accept the token, or needs one.
	RefusedLogin Refusal = "login"
	// RefusedAccess: the token is valid and may not do this.
	RefusedAccess Refusal = "access"
	// RefusedNotFound: the server shows no such repository to the token.
	RefusedNotFound Refusal = "not found"
	// Unreachable: there was no usable answer.
	Unreachable Refusal = "unreachable"
)

// A RemoteError says that git could not talk to a server, or that it refused.
type RemoteError struct {
	Refusal Refusal
	URL     string
	// Err is git's.
	Err error
}

func (e *RemoteError) Error() string {
	text := map[Refusal]string{
		RefusedLogin:    "the git server refuses the login to %s: the token has expired, was revoked or is not complete. Put a new one where the setting points",
		RefusedAccess:   "the git server does not let the token use %s: give it write access to the contents of the repository",
		RefusedNotFound: "the git server has no repository %s that the token may see: correct its name, or give the token access to it",
		Unreachable:     "the git server cannot be used for %s: look whether it can be reached from here",
	}[e.Refusal]
	return fmt.Sprintf(text, e.URL) + " (" + e.Err.Error() + ")"
}

func (e *RemoteError) Unwrap() error { return e.Err }

// IsDiskFull says that the command has failed because this machine's disk is full, and not
// the server's, of which git tells in lines of the server's own.
func (e *Error) IsDiskFull() bool {
	for line := range strings.SplitSeq(e.Output, "\n") {
		if strings.HasPrefix(line, "remote: ") {
			continue
		}
		for _, sign := range []string{"No space left on device", "Out of diskspace", "Disk quota exceeded"} {
			if strings.Contains(line, sign) {
				return true
			}
		}
	}
	return false
}

// failed makes an error of a git command that has talked to the server a *RemoteError,
// unless the server has no part in it. git tells the causes apart by its messages only.
func (r *Remote) failed(err error) error {
	var git *Error
	if !errors.As(err, &git) || git.IsDiskFull() {
		return err
	}
	refusal := Unreachable
	for _, sign := range []struct {
		text    string
		refusal Refusal
	}{
		{"error: 403", RefusedAccess}, {"Permission to ", RefusedAccess}, {"The requested URL returned error: 404", RefusedNotFound},
		{"Repository not found", RefusedNotFound}, {"' not found", RefusedNotFound}, {"does not appear to be a git repository", RefusedNotFound},
		{"Authentication failed", RefusedLogin}, {"could not read Username", RefusedLogin}, {"could not read Password", RefusedLogin},
		{"error: 401", RefusedLogin}, {"Permission denied (publickey", RefusedLogin}, {"Host key verification failed", RefusedLogin},
	} {
		if strings.Contains(git.Output, sign.text) {
			refusal = sign.refusal
			break
		}
	}
	return &RemoteError{Refusal: refusal, URL: r.URL, Err: err}
}

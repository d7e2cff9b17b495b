package github

import (
	"context"
	"net/http"
	"time"
)

// A Repository is what a token sees of a repository, and what GitHub says about the
// token itself.
type Repository struct {
	// Name is owner/name, in GitHub's spelling: a repository may have been renamed.
	Name          string
	DefaultBranch string
	Private       bool
	// Archived repositories, and those that GitHub has disabled, accept no changes.
	Archived, Disabled bool
	// MayPush says that the token's account may push. A fine-grained token may still lack
	// the permission.
	MayPush bool
	// Scopes are those of a classic token.
	Scopes []string
	// Classic says that the token has scopes: it is no fine-grained one.
	Classic bool
	// Expires is when the token ends, zero if GitHub does not say it.
	Expires time.Time
}

// FindRepository asks for a repository, owner/name.
func (c *Client) FindRepository(ctx context.Context, name string) (Repository, error) {
	if err := CheckName(name); err != nil {
		return Repository{}, &Error{Kind: Invalid, text: err.Error(), unsent: true}
	}
	s := c.session()
	var found struct {
		FullName      string `json:"full_name"`
		DefaultBranch string `json:"default_branch"`
		Private       bool   `json:"private"`
		Archived      bool   `json:"archived"`
		Disabled      bool   `json:"disabled"`
		Permissions   *struct {
			Push bool `json:"push"`
		} `json:"permissions"`
	}
	a, err := s.do(ctx, request{does: "see the repository " + name, method: http.MethodGet, path: "/repos/" + name}, &found)
	switch {
	case err != nil:
		return Repository{}, err
	case found.FullName == "":
		return Repository{}, s.unusable(a.status, "its answer for "+name+" is no repository", nil)
	}
	r := Repository{
		Name: found.FullName, DefaultBranch: found.DefaultBranch, Private: found.Private, Archived: found.Archived, Disabled: found.Disabled,
		// Only an answer to a token has permissions.
		MayPush: found.Permissions == nil || found.Permissions.Push, Expires: expires(a.header),
	}
	r.Scopes, r.Classic = scopes(a.header)
	return r, nil
}

// CheckMayOpen returns an error if the token may not open pull requests in a repository.
// No request shows the permissions of a fine-grained token, so this one asks for a pull
// request in which everything is missing. GitHub checks the permission first; then it
// refuses, and nothing is made.
func (c *Client) CheckMayOpen(ctx context.Context, name string) error {
	if err := CheckName(name); err != nil {
		return &Error{Kind: Invalid, text: err.Error(), unsent: true}
	}
	_, err := c.session().do(ctx, request{does: "open a pull request in " + name, method: http.MethodPost, path: "/repos/" + name + "/pulls", body: struct{}{}}, nil)
	if KindOf(err) == Invalid {
		return nil
	}
	return err
}

package githubtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A repository is one of the server's. The server's mutex guards it.
type repository struct {
	name string // owner/name
	Settings
	pulls []*Pull
}

// find returns a repository, nil if there is none. GitHub ignores case.
func (s *Server) find(name string) *repository {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.repositories[strings.ToLower(name)]
}

// AddRepository makes a repository, with main as its default branch and these files in
// a first commit; with no files it is empty.
func (s *Server) AddRepository(ctx context.Context, name string, files map[string]string) error {
	dir := filepath.Join(s.dir, "repositories", filepath.FromSlash(name)+".git")
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	if _, err := run(exec.CommandContext(ctx, "git", "init", "--quiet", "--bare", "--template=", "--initial-branch=main", dir)); err != nil {
		return err
	}
	config, err := os.OpenFile(filepath.Join(dir, "config"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = config.WriteString("[uploadpack]\n\tallowAnySHA1InWant = true\n" + // as GitHub has it
		"[http]\n\treceivepack = true\n[gc]\n\tauto = 0\n[receive]\n\tautogc = false\n")
	if err = errors.Join(err, config.Close()); err != nil {
		return err
	}
	s.mu.Lock()
	s.repositories[strings.ToLower(name)] = &repository{name: name}
	s.mu.Unlock()
	if len(files) == 0 {
		return nil
	}
	_, err = s.Commit(ctx, name, "main", "first", files)
	return err
}

// Commit adds a commit to a branch of a repository, as somebody else would, and returns
// its id. A file whose content is "-" is removed. A branch that does not exist begins
// at main.
func (s *Server) Commit(ctx context.Context, name, branch, message string, files map[string]string) (string, error) {
	refs, err := s.Git(ctx, name, "for-each-ref", "--format=%(refname)", "refs/heads/"+branch, "refs/heads/main")
	if err != nil {
		return "", err
	}
	// Without a work tree: tests make hundreds of commits.
	var in bytes.Buffer
	fmt.Fprintf(&in, "commit refs/heads/%s\nmark :1\ncommitter Somebody <somebody@example.com> now\ndata %d\n%s\n\n", branch, len(message)+1, message)
	existing := strings.Fields(refs)
	for _, from := range []string{"refs/heads/" + branch, "refs/heads/main"} {
		if slices.Contains(existing, from) {
			fmt.Fprintf(&in, "from %s^0\n", from)
			break
		}
	}
	for _, file := range slices.Sorted(maps.Keys(files)) {
		if text := files[file]; text == "-" {
			fmt.Fprintf(&in, "D %s\n", file)
		} else {
			fmt.Fprintf(&in, "M 100644 inline %s\ndata %d\n%s\n", file, len(text), text)
		}
	}
	in.WriteString("get-mark :1\n")
	cmd := s.command(ctx, name, "fast-import", "--quiet", "--date-format=now")
	cmd.Stdin = &in
	return run(cmd)
}

// Read returns the content of a file at a branch or commit.
func (s *Server) Read(ctx context.Context, name, revision, file string) (string, error) {
	return s.Git(ctx, name, "show", revision+":"+file)
}

// Settings are those of a repository.
type Settings struct {
	// Private repositories are there only for those who may see them.
	Private bool
	// Archived repositories accept no pushes and pull requests.
	Archived bool
	// Labels are those that the repository has. GitHub makes a label that a request adds
	// to a pull request.
	Labels []string
	// Collaborators and Teams may be asked for a review.
	Collaborators, Teams []string
	// NoDrafts says that the account's plan has no draft pull requests.
	NoDrafts bool
}

// Set replaces the settings of a repository.
func (s *Server) Set(name string, settings Settings) error {
	repo := s.find(name)
	if repo == nil {
		return fmt.Errorf("no repository %s", name)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	repo.Settings = settings
	return nil
}

// A Pull is a pull request.
type Pull struct {
	Number             int
	Title, Body        string
	Head, Base         string // names of branches
	Draft              bool
	State              string // open or closed
	Merged             bool
	Labels             []string
	RequestedReviewers []string
	RequestedTeams     []string
	// Reviewed are those who have given a review.
	Reviewed []string
	Author   string
	Created  time.Time
}

// copy returns a copy that shares no list.
func (p *Pull) copy() Pull {
	c := *p
	c.Labels, c.RequestedReviewers, c.RequestedTeams, c.Reviewed = slices.Clone(p.Labels), slices.Clone(p.RequestedReviewers), slices.Clone(p.RequestedTeams), slices.Clone(p.Reviewed)
	return c
}

// Pulls returns a copy of the pull requests of a repository.
func (s *Server) Pulls(name string) (list []Pull) {
	repo := s.find(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range repo.pulls {
		list = append(list, p.copy())
	}
	return list
}

// Edit changes a pull request, as somebody else would.
func (s *Server) Edit(name string, number int, edit func(*Pull)) {
	repo := s.find(name)
	s.mu.Lock()
	defer s.mu.Unlock()
	edit(repo.pulls[number-1])
}

// RefusePushes makes a repository refuse every push with a text, as a rule or a
// protected branch does. An empty text ends that.
func (s *Server) RefusePushes(name, text string) error {
	hook := filepath.Join(s.dir, "repositories", filepath.FromSlash(name)+".git", "hooks", "pre-receive")
	if text == "" {
		return os.Remove(hook)
	}
	if err := os.MkdirAll(filepath.Dir(hook), 0o700); err != nil {
		return err
	}
	return os.WriteFile(hook, []byte("#!/bin/sh\ncat >&2 <<'END'\n"+text+"\nEND\nexit 1\n"), 0o700)
}

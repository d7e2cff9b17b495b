package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/mail"
	"strings"
	"time"
)

// A Person is the author or the committer of a commit.
type Person struct{ Name, Email string }

// ParsePerson parses Name <address>.
func ParsePerson(text string) (Person, error) {
	address, err := mail.ParseAddress(text)
	if err != nil || address.Name == "" {
		return Person{}, errors.New("it must have the form Name <name@example.com>")
	}
	p := Person{Name: address.Name, Email: address.Address}
	if strings.ContainsAny(p.Name+p.Email, "<>\n\r\x00") {
		return Person{}, errors.New("a name and an address must not have < or > in them")
	}
	return p, nil
}

func (p Person) String() string { return fmt.Sprintf("%s <%s>", p.Name, p.Email) }

// A Commit is to be made.
type Commit struct {
	// Tree is what Apply has returned.
	Tree string
	// Message is the text: subject, blank line, body, trailers. NUL and other control
	// characters are removed.
	Message string
	// Author and Committer may be the same.
	Author, Committer Person
	// At is the time of both. The same values make the same commit however often.
	At time.Time
}

// CommitTree makes a commit whose parent is the clone's, and returns its id.
func (c *Clone) CommitTree(ctx context.Context, commit Commit) (string, error) {
	at := fmt.Sprintf("@%d +0000", commit.At.Unix())
	return c.git.output(ctx, command{
		dir: c.repository(), stdin: strings.NewReader(cleanMessage(commit.Message)), args: []string{"commit-tree", commit.Tree, "-p", c.Commit, "-F", "-"},
		env: []string{
			"GIT_AUTHOR_NAME=" + commit.Author.Name, "GIT_AUTHOR_EMAIL=" + commit.Author.Email, "GIT_AUTHOR_DATE=" + at,
			"GIT_COMMITTER_NAME=" + commit.Committer.Name, "GIT_COMMITTER_EMAIL=" + commit.Committer.Email, "GIT_COMMITTER_DATE=" + at,
		},
	})
}

// cleanMessage makes a text fit for a commit.
func cleanMessage(text string) string {
	text = strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f {
			return -1
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	return strings.TrimSpace(text) + "\n"
}

// A Tip is the newest commit of a branch on the server.
type Tip struct {
	// ID is "" if the server has no such branch.
	ID string
	// Message is the commit's text, Committer who has made it.
	Message   string
	Committer Person
	// Parents counts the commit's parents.
	Parents int
}

// Tip asks the server for the newest commit of a branch.
func (c *Clone) Tip(ctx context.Context, remote *Remote, branch string) (Tip, error) {
	if err := CheckBranch(branch); err != nil {
		return Tip{}, err
	}
	ref := "refs/heads/" + branch
	out, err := c.git.output(ctx, command{dir: c.repository(), remote: remote, args: []string{"ls-remote", "--quiet", "--", remote.URL, ref}})
	if err != nil {
		return Tip{}, remote.failed(err)
	}
	var id string
	for line := range strings.SplitSeq(out, "\n") {
		if value, name, _ := strings.Cut(line, "\t"); name == ref && commitID.MatchString(value) {
			id = value
		}
	}
	if id == "" {
		return Tip{}, nil
	}
	has, err := c.has(ctx, id)
	if err == nil && !has {
		err = c.git.fetch(ctx, c.repository(), remote, "+"+id+":refs/tips/"+id, 1)
	}
	if err != nil {
		return Tip{}, err
	}
	var text bytes.Buffer
	if err := c.git.run(ctx, command{dir: c.repository(), stdout: &text, args: []string{"cat-file", "commit", id}}); err != nil {
		return Tip{}, err
	}
	tip := Tip{ID: id}
	head, message, _ := strings.Cut(text.String(), "\n\n")
	tip.Message = message
	for line := range strings.SplitSeq(head, "\n") {
		key, value, _ := strings.Cut(line, " ")
		switch key {
		case "parent":
			tip.Parents++
		case "committer":
			name, rest, _ := strings.Cut(value, " <")
			email, _, _ := strings.Cut(rest, ">")
			tip.Committer = Person{name, email}
		}
	}
	return tip, nil
}

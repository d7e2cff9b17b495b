package gitrepo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// PushOutcome says what a push has done to the branch.
type PushOutcome string

const (
	// PushCreated: the server had no such branch.
	PushCreated PushOutcome = "created"
	// PushReplaced: the branch had another commit.
	PushReplaced PushOutcome = "replaced"
	// PushUnchanged: the branch had this commit already.
	PushUnchanged PushOutcome = "unchanged"
)

// A PushError says that the server did not take a push, although it took the login.
type PushError struct {
	Branch string
	// Stale says that somebody has changed the branch since its tip was read.
	Stale bool
	// Reason is git's, such as "pre-receive hook declined", and Output what the server
	// has said.
	Reason, Output string
}

func (e *PushError) Error() string {
	if e.Stale {
		return fmt.Sprintf("somebody has changed the branch %s while it was pushed: retry the run", e.Branch)
	}
	return fmt.Sprintf("the git server refuses the push to %s (%s): %s", e.Branch, e.Reason, e.words())
}

// words are what the server says, in one line.
func (e *PushError) words() string {
	var words []string
	for line := range strings.SplitSeq(e.Output, "\n") {
		if text, isRemote := strings.CutPrefix(line, "remote: "); isRemote {
			words = append(words, strings.Fields(text)...)
		}
	}
	text := strings.Join(words, " ")
	if runes := []rune(text); len(runes) > 600 {
		text = string(runes[:600]) + "…"
	}
	if text == "" {
		return "it says no more"
	}
	return text
}

// Push makes a commit the newest of a branch on the server, if the branch's tip is the
// expected one; "" means that there must be no such branch. log is what git has printed.
//
//   - A repeated push is no error: PushUnchanged.
//   - The error is a *PushError if the server refuses the push, a *RemoteError if it
//     cannot be reached or refuses the login.
func (c *Clone) Push(ctx context.Context, remote *Remote, branch, commit, expected string) (outcome PushOutcome, log string, err error) {
	if err := CheckBranch(branch); err != nil {
		return "", "", err
	}
	if branch == c.Branch {
		return "", "", fmt.Errorf("gitrepo: %s is the branch from which the clone was made", branch)
	}
	if expected == commit {
		return PushUnchanged, "Everything up-to-date\n", nil
	}
	ref := "refs/heads/" + branch
	var out, messages bytes.Buffer
	err = c.git.run(ctx, command{
		dir: c.repository(), remote: remote, stdout: &out, messages: &messages,
		args: []string{"push", "--porcelain", "--no-verify", "--no-follow-tags", "--no-recurse-submodules", "--force-with-lease=" + ref + ":" + expected, "--", remote.URL, commit + ":" + ref},
	})
	printed := c.git.text(out.String(), secret.String{})
	log = strings.TrimSpace(messages.String()+"\n"+printed) + "\n"
	var failed *Error
	for line := range strings.SplitSeq(printed, "\n") {
		fields := strings.Split(line, "\t")
		if len(fields) != 3 || len(fields[0]) != 1 || !strings.HasSuffix(fields[1], ":"+ref) {
			continue
		}
		switch fields[0] {
		case "!":
			if errors.As(err, &failed) {
				_, reason, _ := strings.Cut(fields[2], "(")
				return "", log, &PushError{Branch: branch, Stale: strings.Contains(fields[2], "stale info"), Reason: strings.TrimSuffix(reason, ")"), Output: failed.Output}
			}
		case "*":
			outcome = PushCreated
		case "=":
			outcome = PushUnchanged
		default:
			outcome = PushReplaced
		}
	}
	if err != nil {
		return "", log, remote.failed(err)
	}
	return outcome, log, nil
}

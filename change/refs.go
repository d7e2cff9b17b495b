package change

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
)

// runRefs is the folder of the refs of all runs.
const runRefs = "refs/mm-orchestrator/runs/"

// ErrNotInRepository says that a folder lies in no git repository.
var ErrNotInRepository = errors.New("not a git repository")

// A RunRef is a ref of a run.
type RunRef struct {
	// Name is the whole name.
	Name string
	// ID is the object that it names.
	ID string
}

// SetAside says that the ref keeps work of somebody else, which a rollback has
// moved out of the way.
func (r RunRef) SetAside() bool {
	_, name, _ := strings.Cut(strings.TrimPrefix(r.Name, runRefs), "/")
	return strings.HasPrefix(name, asideName)
}

// asideName begins the names of refs that keep work of somebody else.
const asideName = "aside"

// ListRefs lists the refs of a run in the repository that a folder lies in, by
// name. It returns ErrNotInRepository if the folder lies in none.
func ListRefs(ctx context.Context, git Git, dir, run string) ([]RunRef, error) {
	out, err := gitOutput(ctx, git, dir, "for-each-ref", "--format=%(objectname) %(refname)", runRefs+run+"/")
	if err != nil {
		return nil, err
	}
	var refs []RunRef
	for line := range strings.Lines(out) {
		id, name, found := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if !found || !strings.HasPrefix(name, runRefs+run+"/") {
			return nil, fmt.Errorf("git for-each-ref in %s answers %q, where an object and a ref are expected", dir, line)
		}
		refs = append(refs, RunRef{Name: name, ID: id})
	}
	return refs, nil
}

// RemoveRef removes a ref, and lets git remove what only it has kept. It removes
// nothing, and returns an error, if the ref names another object by now.
func RemoveRef(ctx context.Context, git Git, dir string, ref RunRef) error {
	_, err := gitOutput(ctx, git, dir, "update-ref", "--no-deref", "-d", ref.Name, ref.ID)
	return err
}

// gitOutput runs a git command that must succeed, and returns its output.
func gitOutput(ctx context.Context, git Git, dir string, args ...string) (string, error) {
	var out, message bytes.Buffer
	code, err := git(ctx, GitCommand{Dir: dir, Args: args, Stdout: &out, Stderr: &message})
	switch text := strings.TrimSpace(message.String()); {
	case err != nil:
		return "", err
	case strings.Contains(text, "not a git repository"):
		return "", fmt.Errorf("%w: %s", ErrNotInRepository, text)
	case code != 0:
		return "", fmt.Errorf("git %s in %s failed with code %d: %s", args[0], dir, code, text)
	}
	return out.String(), nil
}

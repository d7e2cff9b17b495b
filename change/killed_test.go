package change

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
)

// A dyingGit works until it has written so many bytes to its output.
type dyingGit struct {
	git  Git
	left int
}

var errDied = errors.New("the worker was killed")

func (d *dyingGit) run(ctx context.Context, command GitCommand) (int, error) {
	if d.left <= 0 {
		return 0, errDied
	}
	if command.Stdout == nil {
		command.Stdout = io.Discard
	}
	into := command.Stdout
	command.Stdout = writerFunc(func(p []byte) (int, error) {
		n := min(len(p), max(d.left, 0))
		d.left -= len(p)
		if _, err := into.Write(p[:n]); err != nil {
			return 0, err
		}
		if n < len(p) {
			return n, errDied
		}
		return n, nil
	})
	d.left -= 20
	code, err := d.git(ctx, command)
	if d.left <= 0 && err == nil {
		err = errDied
	}
	return code, err
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A restore that ends in the middle is repeated by another worker: the repository
// is as before.
func TestRestoreIsRepeatedAfterAKill(t *testing.T) {
	t.Parallel()
	for _, left := range []int{1, 50, 100, 150, 200, 250, 300, 400, 600, 900, 1500} {
		t.Run(fmt.Sprint(left), func(t *testing.T) {
			t.Parallel()
			b := newTestRepository(t)
			b.dirty()
			b.withSubmodule()
			want := b.fingerprint()
			r := b.open(Options{})
			before, id, err := r.Capture(t.Context(), testRun, "baseline")
			if err != nil {
				t.Fatal(err)
			}
			b.shell(`printf x >> lib/b.py; rm lib/c.py notes.txt; chmod 644 lib/run.sh; mv docs other; ln -sf x link; git add -A; git branch new
git commit -q --no-verify -m all; rm -r empty data/one; printf y > data/two; git config user.name x; rm .git/hooks/pre-commit; git stash drop -q`)
			after, err := r.Observe(t.Context(), before)
			if err != nil {
				t.Fatal(err)
			}
			list := Judge(before, after, allowedIn(svc...))
			stored, err := r.StoreChange(t.Context(), testRun, "change", after, list)
			if err != nil {
				t.Fatal(err)
			}
			dying := *r
			dying.git = (&dyingGit{git: b.git, left: left}).run
			if _, err := dying.Restore(t.Context(), before, after, list); err == nil && left < 1000 {
				t.Error("the restore was not interrupted")
			}
			if before, err = r.Load(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if list, err = r.LoadChange(t.Context(), stored); err != nil {
				t.Fatal(err)
			}
			now, err := r.Observe(t.Context(), before)
			if err != nil {
				t.Fatal(err)
			}
			if foreign := Foreign(now, list); len(foreign) > 0 {
				t.Errorf("taken for the work of somebody else: %s", diffText(foreign))
			}
			if _, err := r.Restore(t.Context(), before, now, list); err != nil {
				t.Fatal(err)
			}
			sameFingerprint(t, b.fingerprint(), want)
		})
	}
}

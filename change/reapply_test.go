package change

import (
	"strings"
	"testing"
)

// rolledBack lets a run alter files, stores its change and takes it back. It returns
// what the run had made of the repository, and the id of the change.
func (b *testRepository) rolledBack(r *Repository, rules Rules, script string) (after map[string]string, id string) {
	b.t.Helper()
	before, _, err := r.Capture(b.t.Context(), testRun, "baseline")
	if err != nil {
		b.t.Fatal(err)
	}
	b.shell(script)
	after = b.fingerprint()
	now, err := r.Observe(b.t.Context(), before)
	if err != nil {
		b.t.Fatal(err)
	}
	list := Judge(before, now, rules)
	if id, err = r.StoreChange(b.t.Context(), testRun, "change", now, list); err != nil {
		b.t.Fatal(err)
	}
	if _, err := r.Restore(b.t.Context(), before, now, list); err != nil {
		b.t.Fatal(err)
	}
	return after, id
}

func (b *testRepository) missing(r *Repository, id string) (now *State, missing []Difference) {
	b.t.Helper()
	list, err := r.LoadChange(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	if now, err = r.Observe(b.t.Context(), nil); err != nil {
		b.t.Fatal(err)
	}
	return now, Missing(now, Permitted(list))
}

func TestReapply(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.dirty()
	r := b.open(Options{})
	after, id := b.rolledBack(r, allowedIn("svc/*", "lib/c.py", "new/*", "data/*"), `
printf 'z==2\n' >> svc/requirements.txt
rm svc/Dockerfile
chmod 755 svc/pyproject.toml
printf 'more\n' >> lib/c.py && git add lib/c.py
mkdir -p new/deep && printf 'n\n' > new/deep/n.txt && ln -s n.txt new/deep/l
`)
	before := b.fingerprint()
	b.shell(`git gc -q --prune=now`)
	now, missing := b.missing(r, id)
	if len(missing) != 9 {
		t.Errorf("missing\n%s", diffText(missing))
	}
	done, err := r.Reapply(t.Context(), now, missing)
	if err != nil {
		t.Fatal(err)
	}
	sameFingerprint(t, b.fingerprint(), after)
	if len(done) != len(missing) {
		t.Errorf("altered %q", done)
	}
	// It can be repeated, and is no change then.
	if now, missing = b.missing(r, id); len(missing) != 0 {
		t.Errorf("missing still\n%s", diffText(missing))
	}
	if done, err := r.Reapply(t.Context(), now, missing); err != nil || len(done) != 0 {
		t.Errorf("altered %q, %v", done, err)
	}
	// A rollback takes it back again.
	list, err := r.LoadChange(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	baseline, err := r.Observe(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	state, err := r.Load(t.Context(), strings.TrimSpace(mustTry(t, b, `git rev-parse refs/mm-orchestrator/runs/`+testRun+`/baseline-state:state.json`)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Restore(t.Context(), state, baseline, list); err != nil {
		t.Fatal(err)
	}
	sameFingerprint(t, b.fingerprint(), before)
}

func mustTry(t *testing.T, b *testRepository, script string) string {
	t.Helper()
	out, err := b.try(script)
	if err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	return out
}

// TestReapplyLeavesOthersAlone: what somebody edits after a rollback is drift if the
// run altered the same file, and nothing else is touched.
func TestReapplyLeavesOthersAlone(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.dirty()
	r := b.open(Options{})
	_, id := b.rolledBack(r, allowedIn("svc/*"), `printf 'z==2\n' >> svc/requirements.txt; printf '9\n' >> svc/pyproject.toml; printf 'n\n' > svc/new.txt`)
	b.shell(`printf 'mine\n' >> svc/pyproject.toml; printf 'more\n' >> lib/b.py; rm notes.txt`)
	now, missing := b.missing(r, id)
	list, err := r.LoadChange(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if drift := Foreign(now, Permitted(list)); len(drift) != 1 || drift[0].Path != "svc/pyproject.toml" {
		t.Errorf("drift\n%s", diffText(drift))
	}
	if _, err := r.Reapply(t.Context(), now, missing); err != nil {
		t.Fatal(err)
	}
	got := mustTry(t, b, `cat svc/requirements.txt svc/new.txt; tail -n1 svc/pyproject.toml; tail -n1 lib/b.py; test ! -e notes.txt`)
	if want := "a==1\nz==2\nn\nmine\nmore\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

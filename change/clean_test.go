package change

import (
	"path/filepath"
	"strings"
	"testing"
)

// What is clean without git is clean for git, whatever has happened to the workspace.
func TestCleanIsWhatGitSays(t *testing.T) {
	t.Parallel()
	const settled = `git status >/dev/null`
	for name, c := range map[string]struct {
		script string
		// want is what must be known, so that git is not asked: "tracked", "untracked".
		want string
	}{
		"clean":               {`true`, "tracked untracked"},
		"no commit":           {`rm -rf .git; git init -q`, ""},
		"an empty commit":     {`rm -rf .git * .gitignore; git init -q; git commit -q --allow-empty -m one`, "tracked untracked"},
		"index version 4":     {`git update-index --index-version 4; git reset -q --hard`, "tracked untracked"},
		"a detached head":     {`git checkout -q --detach`, "tracked untracked"},
		"packed":              {`git gc -q`, "tracked untracked"},
		"a linked work tree":  {`git worktree add -q "$BASE/linked"`, "tracked untracked"},
		"an edit":             {`echo z >>x`, "untracked"},
		"an edit of one size": {`echo z >x`, "untracked"},
		"an old time":         {`echo z >x; touch -d 2001-01-01 x`, "untracked"},
		"removed":             {`rm x`, "untracked"},
		"a mode":              {`chmod +x x`, "untracked"},
		"another kind":        {`rm x; ln -s y x`, "untracked"},
		"a link elsewhere":    {`ln -sfn other link`, "untracked"},
		"staged":              {`echo z >x; git add x`, "untracked"},
		"staged new":          {`echo z >z; git add z`, "untracked"},
		"staged removal":      {`git rm -q --cached x`, ""},
		"intended":            {`echo z >z; git add -N z`, "untracked"},
		"hidden":              {`git update-index --assume-unchanged x; echo z >x`, "untracked"},
		"skipped":             {`git update-index --skip-worktree x; rm x`, "untracked"},
		"untracked":           {`echo z >z`, "tracked"},
		"untracked below":     {`mkdir n; echo z >n/z`, "tracked"},
		"ignored":             {`echo z >z.log`, "tracked"},
		"an empty folder":     {`mkdir n`, "tracked untracked"},
		"a pipe":              {`mkfifo p`, "tracked untracked"},
		"another branch":      {`git branch new HEAD~1; git symbolic-ref HEAD refs/heads/new`, "untracked"},
		"a soft reset":        {`git reset -q --soft HEAD~1`, "untracked"},
		"replaced":            {`git replace $(git rev-parse HEAD) $(git rev-parse HEAD~1)`, ""},
		"a repository inside": {`git init -q sub`, ""},
		"a submodule":         {`git init -q "$BASE/m"; git -C "$BASE/m" commit -q --allow-empty -m m; git submodule --quiet add "$BASE/m" m; git commit -qm m`, ""},
		"a split index":       {`git update-index --split-index`, "untracked"},
		"a conflict":          {`git checkout -q -b b HEAD~1; echo b >y; git add y; git commit -qm b; ! git merge -q main`, ""},
		"an empty file":       {`: >x`, "untracked"},
		"an emptied file":     {`git config core.trustctime false; : >empty; git add empty; git commit -qm e; : >empty`, "untracked"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestRepository(t)
			b.shell(`git init -q; echo '*.log' >.gitignore; mkdir d; echo x >x; echo d >d/d; ln -s x link; git add .; git commit -qm one; echo y >y; git add y; git commit -qm two`)
			b.age()
			b.shell(`touch .git/now; git update-index -q --really-refresh; cp .git/index .git/copy; mv .git/copy .git/index; ` + settled) // written after the files
			b.shell(c.script)
			r := b.open(Options{})
			state, err := r.Observe(t.Context(), nil)
			if err != nil {
				t.Fatal(err)
			}
			clean := r.Clean(t.Context(), state, func(string) bool { return false })
			for what, known := range map[string]bool{"tracked": clean.Tracked, "untracked": clean.Untracked} {
				if wanted := strings.Contains(" "+c.want+" ", " "+what+" "); wanted && !known {
					t.Errorf("git is asked about what is %s", what)
				}
			}
			if clean.Tracked {
				if out := b.output(`git diff HEAD --ignore-submodules=untracked; git diff --name-only; git diff --cached --name-only`); out != "" {
					t.Errorf("clean, but git lists\n%s", out)
				}
			}
			if clean.Untracked {
				if out := b.output(`git ls-files --others --exclude-standard`); out != "" {
					t.Errorf("nothing untracked, but git lists\n%s", out)
				}
			}
		})
	}
}

// Artifacts of runs are no edits, and do not keep a workspace from being clean.
func TestArtifactsDoNotCountAsUntracked(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.shell(`git init -q; git commit -q --allow-empty -m one; mkdir run; echo log >run/patch.log`)
	r := b.open(Options{})
	state, err := r.Observe(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	clean := r.Clean(t.Context(), state, func(path string) bool { return path == filepath.Join(b.top, "run/patch.log") })
	if !clean.Tracked || !clean.Untracked {
		t.Errorf("%+v", clean)
	}
}

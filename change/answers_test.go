package change

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// age makes what a script has just written old enough to be remembered: only a ctime
// that lies back proves that a file is the same.
func (b *testRepository) age() {
	b.t.Helper()
	young := func() (found bool) {
		_ = filepath.WalkDir(b.base, func(path string, _ os.DirEntry, _ error) error {
			s := newStamp(func(s *stamp) { s.file(path) })
			found = found || !s.valid
			return nil
		})
		return found
	}
	for young() {
		time.Sleep(50 * time.Millisecond)
	}
}

// An answer about a repository is used again, and asked for again after each change
// that could alter it.
func TestAnswersAreForgottenWhenTheirFilesChange(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ script, asked string }{
		"nothing":                   {`true`, ""},
		"other files":               {`echo z >z; mkdir -p d/e; echo y >d/e/y`, ""},
		"staging":                   {`echo z >z; git add z`, "index"},
		"a commit":                  {`git commit -q --allow-empty -m three`, "head"},
		"another branch":            {`git checkout -q -b new`, "head index place"},
		"a detached head":           {`git checkout -q --detach`, "head index place"},
		"a packed branch":           {`git pack-refs --all`, "head"},
		"packed objects":            {`git repack -q -a -d`, "head"},
		"alternates":                {`echo "$BASE" >.git/objects/info/alternates`, "head"},
		"the commit is gone":        {`id=$(git rev-parse HEAD); rm -f .git/objects/$(echo $id | cut -c1-2)/$(echo $id | cut -c3-)`, "head"},
		"the commit's tree is gone": {`id=$(git rev-parse HEAD:); rm -f .git/objects/$(echo $id | cut -c1-2)/$(echo $id | cut -c3-)`, "head"},
		"settings":                  {`git config core.worktree ..`, "head place"},
		"another repository":        {`mkdir d; mv .git d/old; git init -q`, "head index place"},
		"a repository inside":       {`git init -q sub`, "place"},
		"a repository file":         {`mv .git "$BASE/git"; echo "gitdir: $BASE/git" >.git`, "head index place"},
		"no repository":             {`mv .git old`, "head index place"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestRepository(t)
			b.shell(`git init -q; mkdir sub; echo x >x; git add .; git commit -qm one; echo y >y; git add y; git commit -qm two; git reset -q --hard`)
			b.age()
			answers, asked := new(Answers), map[string]int{}
			git := filepath.Join(b.top, ".git")
			ask := func() {
				count := func(name string) func() (string, error) {
					return func() (string, error) { asked[name]++; return fmt.Sprint(asked[name]), nil }
				}
				for name, answer := range map[string]func() (string, error){
					"place": func() (string, error) {
						return answers.Place("q", filepath.Join(b.top, "sub"), "", count("place"))
					},
					"index": func() (string, error) { return answers.Index("q", git, count("index")) },
					"head": func() (string, error) {
						return "", answers.HeadTree(git, git, func() error { _, err := count("head")(); return err })
					},
				} {
					if got, err := answer(); err != nil || name != "head" && got != fmt.Sprint(asked[name]) {
						t.Errorf("%s: %q, %v", name, got, err)
					}
				}
			}
			ask()
			ask()
			b.shell(c.script)
			ask()
			for _, name := range []string{"place", "index", "head"} {
				want := 1
				if strings.Contains(c.asked, name) {
					want = 2
				}
				if asked[name] != want {
					t.Errorf("%s was asked %d times, want %d", name, asked[name], want)
				}
			}
		})
	}
}

func TestOnlySureAnswersAreRemembered(t *testing.T) {
	t.Parallel()
	b := newTestRepository(t)
	b.shell(`git init -q`)
	asked := 0
	ask := func() (string, error) { asked++; return "", nil }
	answers := new(Answers)
	for range 2 { // git could write the file again within the same tick of the clock
		_, _ = answers.Index("q", filepath.Join(b.top, ".git"), ask)
		_, _ = answers.Place("q", b.top, "", ask)
	}
	if asked != 3 { // there is no index, which is no matter of the clock
		t.Errorf("asked %d times", asked)
	}
	b.age()
	failed := errors.New("git could not be started")
	for range 2 {
		if _, err := answers.Place("other", b.top, "", func() (string, error) { asked++; return "", failed }); !errors.Is(err, failed) {
			t.Errorf("error %v", err)
		}
	}
	if asked != 5 {
		t.Errorf("an error was remembered")
	}
}

// What HEAD is read from may lie elsewhere than in the files of the repository.
func TestNoAnswerAboutHeadIsRememberedThatDependsOnOtherFiles(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ setup, damage string }{
		"the objects of another repository": {`git init -q "$BASE/o"; cd "$BASE/o"; git commit -q --allow-empty -m one; cd "$OLDPWD"; git clone -q --shared "$BASE/o" .`, `rm -r "$BASE/o/.git/objects"`},
		"another commit than HEAD's":        {`git init -q; git commit -q --allow-empty -m one; git replace HEAD $(git commit-tree -m two HEAD:)`, `id=$(git rev-parse refs/replace/$(git rev-parse HEAD)); rm -f .git/objects/$(echo $id | cut -c1-2)/$(echo $id | cut -c3-)`},
		"a commit that is replaced later":   {`git init -q; git commit -q --allow-empty -m one`, `git replace HEAD $(git commit-tree -m two HEAD:); id=$(git rev-parse refs/replace/$(git rev-parse HEAD)); rm -f .git/objects/$(echo $id | cut -c1-2)/$(echo $id | cut -c3-)`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestRepository(t)
			b.shell(c.setup)
			b.age()
			answers, git := new(Answers), filepath.Join(b.top, ".git")
			ask := func() error {
				return answers.HeadTree(git, git, func() error {
					_, err := b.try(`git cat-file -e 'HEAD^{tree}'`)
					return err
				})
			}
			if err := ask(); err != nil {
				t.Fatal(err)
			}
			b.shell(c.damage)
			if err := ask(); err == nil {
				t.Error("git cannot read HEAD, but an answer is remembered")
			}
		})
	}
}

package speckit

import (
	"os"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

func TestTheRepositoryOfARun(t *testing.T) {
	t.Parallel()
	git, err := gitrepo.New(gitrepo.Config{Environ: os.Environ()})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, c := range []struct{ context, row, setting, want string }{
		{"o/context", "o/row", "o/setting", "https://github.com/o/context.git"},
		{"", "o/row", "o/setting", "https://github.com/o/row.git"},
		{"", "", "o/setting", "https://github.com/o/setting.git"},
		{"o_1/a.b-c", "", "", "https://github.com/o_1/a.b-c.git"},
		{"", "", "", "error: the run names no repository: set GITHUB_REPOSITORY"},
		{"--upload-pack=touch x", "", "", "error: the repository"},
		{"--upload-pack=x/y", "", "", "error: the repository"},
		{"o/--upload-pack=x", "", "", "error: the repository"},
		{"o/n.git", "", "", "error: the repository"},
		{"o.x/n", "", "", "error: the repository"},
		{"o/..", "", "", "error: the repository"},
		{"../../x", "", "", "error: the repository"},
		{"o/n/x", "", "", "error: the repository"},
		{"o/n?x", "", "", "error: the repository"},
		{"o/n#x", "", "", "error: the repository"},
		{"https://evil.example.com/o/n", "", "", "error: the repository"},
		{"o/n\n", "", "", "error: the repository"},
		{"user:pass@h/o", "", "", "error: the repository"},
	} {
		context := newObject()
		if c.context != "" {
			context.set("repository", c.context)
		}
		a := &attempt{
			Speckit: &Speckit{config: Config{Repository: c.setting, Repositories: &Repositories{Git: git, Dir: dir}}.WithDefaults()},
			request: request{context: context, task: store.SpecPublish}, run: store.SpecRun{ID: "7f1d", Repository: c.row},
		}
		got := ""
		if _, remote, err := a.remote(); err != nil {
			got = "error: " + err.Error()
		} else {
			got = remote.URL
		}
		if !strings.HasPrefix(got, c.want) {
			t.Errorf("context %q, row %q, setting %q: got %s, want %s", c.context, c.row, c.setting, got, c.want)
		}
		if a.cloneDir() != dir+"/7f1d/apply_and_publish" {
			t.Errorf("clones are made in %s", a.cloneDir())
		}
	}
}

func TestRepositoriesAreValidated(t *testing.T) {
	t.Parallel()
	git, err := gitrepo.New(gitrepo.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for want, r := range map[string]Repositories{
		"Git is nil":              {Dir: "/x"},
		"want an absolute path":   {Git: git, Dir: "x"},
		"git does not accept it":  {Git: git, Dir: "/x", Base: "a..b"},
		"has the scheme":          {Git: git, Dir: "/x", Server: "git://github.com"},
		"the address of the repo": {Git: git, Dir: "/x", Server: "https://user:pass@github.com"},
	} {
		if err := r.validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %s", r, err, want)
		}
	}
}

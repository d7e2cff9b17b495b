package gitrepo_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	token = "ghp_s9Kd02LmvQ7xYbTn4RwZ81cEUaPfHj36gOiX"
	name  = "moonladder/specs"
)

// stored is a token as a credential's setting gives it.
type stored struct{ text string }

func (s *stored) Read(context.Context) (secret.String, error) { return secret.New(s.text), nil }

// A world is a server with a repository, and a Git that may use it.
type world struct {
	*githubtest.Server
	git    *gitrepo.Git
	remote *gitrepo.Remote
	token  *stored
	dir    string
	// seen has the arguments and the environment of every program that was run.
	seen *programs
}

// programs records what a look into /proc could show, of every program.
type programs struct {
	args, env []string
	watch     *leaktest.Watch
}

func (p *programs) run(ctx context.Context, cmd *exec.Cmd) error {
	p.args = append(p.args, strings.Join(cmd.Args, " "))
	p.env = append(p.env, strings.Join(cmd.Env, "\n"))
	p.watch.Text("an argument of git", strings.Join(cmd.Args, " "))
	p.watch.Text("the environment of git", strings.Join(cmd.Env, "\n"))
	cmd.WaitDelay = 0
	if err := cmd.Start(); err != nil {
		return err
	}
	kill := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	defer kill()
	return cmd.Wait()
}

func newWorld(t *testing.T, files map[string]string) *world {
	t.Helper()
	w := &world{Server: githubtest.New(t), token: &stored{token}, dir: t.TempDir(), seen: &programs{}}
	w.seen.watch = leaktest.Guard(t, leaktest.State{Secrets: map[string]string{"token": token}, GitHub: w.Server, GitHubSecrets: []string{"token"}})
	w.SetToken(token, githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	if err := w.AddRepository(t.Context(), name, files); err != nil {
		t.Fatal(err)
	}
	w.git = w.open(t, gitrepo.Config{})
	w.remote = w.address(t, w.URL+"/"+name+".git")
	return w
}

// open returns a Git with this configuration for the server.
func (w *world) open(t *testing.T, config gitrepo.Config) *gitrepo.Git {
	t.Helper()
	config.CAFile, config.Environ, config.Run = w.CAFile, append(os.Environ(), "GITHUB_TOKEN="+token), w.seen.run
	git, err := gitrepo.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return git
}

func (w *world) address(t *testing.T, url string) *gitrepo.Remote {
	t.Helper()
	remote, err := w.git.Remote(url, w.token)
	if err != nil {
		t.Fatal(err)
	}
	return remote
}

func (w *world) clone(t *testing.T) *gitrepo.Clone {
	t.Helper()
	clone, err := w.git.Clone(t.Context(), w.remote, "main", filepath.Join(w.dir, "clone"))
	if err != nil {
		t.Fatal(err)
	}
	return clone
}

// noLeak fails the test if the token is in one of the texts, in any spelling. Files,
// arguments and environments are searched at the end of every test.
func (w *world) noLeak(texts ...string) {
	for _, text := range texts {
		w.seen.watch.Text("a text", text)
	}
}

// write writes files below a directory. Content that begins with "-> " is the target of
// a link.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for file, content := range files {
		path := filepath.Join(dir, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, isLink := strings.CutPrefix(content, "-> "); isLink {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(content), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// inTree runs git as somebody would who works in the clone.
func inTree(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null",
		"GIT_AUTHOR_NAME=m", "GIT_AUTHOR_EMAIL=m@example.com", "GIT_COMMITTER_NAME=m", "GIT_COMMITTER_EMAIL=m@example.com")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
)

// specLimit bounds the whole demo of the Spec workflow.
const specLimit = 10 * time.Minute

// repository is the one that the runs change, on the stand-in of GitHub.
const repository = "octo/widgets"

// A feature is what a run works on. The model answers Codex with one command, which
// writes a file and ticks the task.
type feature struct{ name, tasks, task, file, text string }

var features = []feature{
	{
		name: "001-health-page", task: "T002", file: "docs/health.md",
		tasks: "# Tasks\n\n## Phase 1: Documentation\n- [x] T001 Choose where documentation goes\n- [ ] T002 Describe GET /health\n- [ ] T003 Link to it from the README\n",
		text:  "# Health\n\nGET /health answers 200 as long as the service can serve requests.\n",
	},
	{
		name: "002-retry-guide", task: "T001", file: "docs/retries.md",
		tasks: "# Tasks\n\n## Phase 1: Documentation\n- [ ] T001 Explain retries\n",
		text:  "# Retries\n\nA request that was answered with 503 can be sent again after a second.\n",
	},
}

// specDemo is the demonstration of the Spec workflow.
type specDemo struct {
	*demo
	root   string // what REPO_ROOT names: features, and the files of runs
	github *githubtest.Server
	model  *codextest.Model
	// secrets are the GitHub token and the key of Codex's model, by name.
	secrets map[string]string
	calls   string // file with arguments and environment of each git and codex
	workers int

	// holdCodex makes the model never answer once the first command of Codex has run,
	// and holdPull makes GitHub not answer the next request for a pull request. The
	// channels tell when that is reached.
	holdCodex, holdPull       atomic.Bool
	codexReached, pullReached chan struct{}
	printed                   strings.Builder // by mm-orchestrator spec
}

func (s *specDemo) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, specLimit)
	defer cancel()
	for _, part := range []func(context.Context) error{
		s.check, s.build, s.startStandIns, s.prepare, s.migrate, s.startWorker, s.showRun, s.showKilledRun, s.showSecrets,
	} {
		err := part(ctx)
		switch {
		case err == nil:
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return fmt.Errorf("the demo has not ended within %s: %w", specLimit, err)
		case ctx.Err() != nil: // whatever a command says that was ended
			return ctx.Err()
		default:
			return err
		}
	}
	s.screen.print("")
	s.screen.line("files", s.short(s.folder)+": app/ (features, files of the runs), github/repositories/"+repository+".git, worker-*.log, calls.txt (each git and codex)", "")
	return nil
}

func (s *specDemo) check(ctx context.Context) error {
	codex := os.Getenv(devenv.EnvCodex)
	if codex == "" {
		return errors.New("the environment names no codex: start the demo with `make demo-spec`")
	}
	git, err := output(ctx, "git", "--version")
	if err != nil {
		return err
	}
	version, err := output(ctx, codex, "--version")
	if err != nil {
		return err
	}
	s.screen.line("checking", git+" · "+version, "ok")
	var remove func(context.Context) error
	if s.broker, remove, err = devenv.NewVhost(ctx); err != nil {
		return err
	}
	s.atEnd(remove)
	if s.database, remove, err = devenv.NewDatabase(ctx); err != nil {
		return err
	}
	s.atEnd(remove)
	s.screen.line("using", fmt.Sprintf("rabbitmq %s  postgres %s", place(s.broker), place(s.database)), "")
	return nil
}

func (s *specDemo) build(ctx context.Context) error {
	s.program = filepath.Join(s.module, "bin", "mm-orchestrator")
	return s.goBuild(ctx, "the worker", s.program, "./cmd/mm-orchestrator")
}

// startStandIns starts what answers for GitHub and for Codex's model, and makes a token
// and a key for them.
func (s *specDemo) startStandIns(ctx context.Context) (err error) {
	s.root, s.calls = s.path("app"), s.path("calls.txt")
	credentials := s.path("credentials")
	folders := []string{s.root, s.path("home"), s.path("codex-home"), s.path("clones"), s.path("github"), s.path("programs"), credentials}
	logs, err := filepath.Glob(s.path("worker-*.log"))
	if err != nil {
		return err
	}
	for _, old := range slices.Concat(folders, logs, []string{s.calls}) {
		if err := os.RemoveAll(old); err != nil {
			return err
		}
	}
	for _, folder := range folders {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return err
		}
	}
	s.atEnd(func(context.Context) error { return os.RemoveAll(credentials) })
	s.secrets = map[string]string{"token": "ghp_" + rand.Text() + rand.Text()[:10], "key": "sk-proj-" + rand.Text() + rand.Text()}
	for name, value := range s.secrets {
		if err := os.WriteFile(filepath.Join(credentials, name), []byte(value+"\n"), 0o600); err != nil {
			return err
		}
	}
	s.codexReached, s.pullReached = make(chan struct{}, 1), make(chan struct{}, 1)
	if s.github, err = githubtest.Start(s.path("github")); err != nil {
		return err
	}
	s.atEnd(func(context.Context) error { return s.github.Close() })
	s.github.SetToken(s.secrets["token"], githubtest.Token{Login: "demo", Scopes: []string{"repo"}})
	s.github.Intercept(s.holdPullRequest)
	if s.model, err = codextest.StartModel(s.answer); err != nil {
		return err
	}
	s.atEnd(func(context.Context) error { s.model.Close(); return nil })
	if err := s.model.WriteHome(s.path("codex-home"), "CODEX_API_KEY"); err != nil {
		return err
	}
	s.screen.line("stand-ins", "GitHub: git's own server, and the API: "+s.github.URL, "")
	s.screen.line("", "the model that the real codex asks: "+s.model.URL(), "")
	return nil
}

func (s *specDemo) path(name string) string { return filepath.Join(s.folder, name) }

// answer is the model.
func (s *specDemo) answer(request codextest.Request) codextest.Script {
	for _, f := range features {
		if !strings.Contains(request.Prompt, "Feature: "+f.name+"\n") {
			continue
		}
		script := codextest.Changes(f.file, f.text)
		script.Commands[0] += fmt.Sprintf(" && sed -i.old 's/^- \\[ \\] %s /- [x] %[1]s /' specs/%[2]s/tasks.md && rm specs/%[2]s/tasks.md.old", f.task, f.name)
		if s.holdCodex.Load() {
			script.Stall = true
			script.Before = func(done int) {
				if done > 0 {
					tell(s.codexReached)
				}
			}
		}
		return script
	}
	return codextest.Question
}

// holdPullRequest lets a request for a pull request wait for the end of whoever sends it.
func (s *specDemo) holdPullRequest(_ http.ResponseWriter, r *http.Request) bool {
	if r.Method != http.MethodPost || !strings.HasSuffix(r.URL.Path, "/pulls") || !s.holdPull.CompareAndSwap(true, false) {
		return false
	}
	tell(s.pullReached)
	<-r.Context().Done()
	return true
}

func tell(reached chan struct{}) {
	select {
	case reached <- struct{}{}:
	default: // it is known already
	}
}

// prepare makes the repository and the features, the settings of the workers, and the
// programs git and codex that the workers start: scripts that note each call.
func (s *specDemo) prepare(ctx context.Context) error {
	files := map[string]string{"README.md": "# Widgets\n"}
	for _, f := range features {
		path := "specs/" + f.name + "/tasks.md"
		files[path] = f.tasks
		local := filepath.Join(s.root, filepath.FromSlash(path))
		if err := os.MkdirAll(filepath.Dir(local), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(local, []byte(f.tasks), 0o644); err != nil {
			return err
		}
		s.screen.line("feature", s.short(local), "")
	}
	if err := s.github.AddRepository(ctx, repository, files); err != nil {
		return err
	}
	git, err := exec.LookPath("git")
	if err != nil {
		return err
	}
	for name, program := range map[string]string{"git": git, "codex": os.Getenv(devenv.EnvCodex)} {
		// Codex has the key in a variable, and hands that on to each git that it starts
		// itself. CODEX_HOME tells those from the worker's.
		script := fmt.Sprintf(`#!/bin/sh
{
	echo "%s%s $*"
	env | if [ "$CODEX_HOME" ]; then grep -v ^CODEX_API_KEY=; else cat; fi
} >>'%s'
exec '%s' "$@"
`, callMark, name, s.calls, program)
		if err := os.WriteFile(filepath.Join(s.path("programs"), name), []byte(script), 0o755); err != nil {
			return err
		}
	}
	s.workDir = s.root
	s.environment = []string{
		"PATH=" + s.path("programs") + ":" + os.Getenv("PATH"), "HOME=" + s.path("home"),
		"CELERY_BROKER_URL=" + s.broker, "CELERY_RESULT_BACKEND=" + resultBackend(s.database), "MM_ORCHESTRATOR_DATABASE_URL=" + s.database,
		"MM_ORCHESTRATOR_SPEC_QUEUES=all", "MM_ORCHESTRATOR_SPEC_ONLY=true", "CODEX_SHARDS=1", "REPO_ROOT=" + s.root,
		"MM_ORCHESTRATOR_GITHUB_URL=" + s.github.URL, "MM_ORCHESTRATOR_GITHUB_CA_FILE=" + s.github.CAFile,
		"MM_ORCHESTRATOR_GITHUB_CREDENTIAL=file:" + filepath.Join(s.path("credentials"), "token"),
		"MM_ORCHESTRATOR_CODEX_CREDENTIAL=file:" + filepath.Join(s.path("credentials"), "key"),
		"CODEX_HOME=" + s.path("codex-home"), "MM_ORCHESTRATOR_CLONE_DIR=" + s.path("clones"),
		// Codex's own sandbox does not work in every container. The model is this program.
		"MM_ORCHESTRATOR_CODEX_SANDBOX=danger-full-access",
	}
	return nil
}

func (s *specDemo) startWorker(ctx context.Context) error {
	if s.workers == 0 {
		s.atEnd(s.endWorker)
	}
	s.workers++
	name := fmt.Sprintf("worker-%d", s.workers)
	listen, err := freeAddress()
	if err != nil {
		return err
	}
	took, err := s.launch(ctx, name, listen, "MM_ORCHESTRATOR_LISTEN="+listen, "ORCHESTRATOR_HOSTNAME=spec@"+name)
	if err != nil {
		return err
	}
	s.screen.line(name, fmt.Sprintf("ready on speckit and codex-0 · pid %d · %s", s.worker.Process.Pid, s.short(s.workerLog)), seconds(took))
	return nil
}

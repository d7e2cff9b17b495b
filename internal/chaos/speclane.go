package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// specQueues are the queues of the chain with one shard.
var specQueues = []string{"speckit", "codex-0"}

// specTimeout bounds the waits for a run of kind Spec: git and codex take their time on a
// busy machine.
const specTimeout = 3 * time.Minute

// specLane is what trials of kind Spec have in a lane.
type specLane struct {
	// root is the directory from which relative paths start.
	root string
	// github is a server like GitHub. All runs use the same token and the same key, which
	// are in files.
	github     *githubtest.Server
	token, key string
	// model is what the real codex speaks to.
	model *codextest.Model
	// home is the directory with Codex's settings, clones that for clones.
	home, clones string
	// programs are, by case, the program that the workers start as codex. It adds to the
	// ledger, and to the file calls with its arguments and its environment.
	programs map[string]string
	calls    string
	// hold is a file. While it exists, codex has begun and does nothing.
	hold    string
	secrets *leaktest.Search
}

// tokenScopes are those of the token: as many as a classic one needs.
var tokenScopes = []string{"repo"}

// makeSpec makes it, once.
func (l *lane) makeSpec() error {
	if l.spec != nil {
		return nil
	}
	s := &specLane{root: filepath.Join(l.folder, "spec")}
	if err := os.MkdirAll(filepath.Join(s.root, "specs"), 0o755); err != nil {
		return err
	}
	for _, name := range specQueues {
		if err := l.declare(name); err != nil {
			return err
		}
	}
	if err := s.startServers(l); err != nil {
		return err
	}
	l.spec = s
	return nil
}

// startServers starts the stand-ins of GitHub and of the model, which close ends.
func (s *specLane) startServers(l *lane) (err error) {
	folders := map[string]string{}
	for _, name := range []string{"github", "codex-home", "clones", "credentials"} {
		folders[name] = filepath.Join(l.folder, name)
		if err := os.MkdirAll(folders[name], 0o700); err != nil {
			return err
		}
	}
	s.home, s.clones, s.calls = folders["codex-home"], folders["clones"], filepath.Join(l.folder, "codex-calls")
	s.hold = filepath.Join(l.folder, "codex-hold")
	s.token = filepath.Join(folders["credentials"], "token")
	s.key = filepath.Join(folders["credentials"], "key")
	values := map[string]string{"token": "ghp_" + letters(36), "key": "sk-proj-" + letters(40)}
	for name, value := range values {
		if err := os.WriteFile(filepath.Join(folders["credentials"], name), []byte(value+"\n"), 0o600); err != nil {
			return err
		}
	}
	s.secrets = leaktest.NewSearch(values)
	if s.github, err = githubtest.Start(folders["github"]); err != nil {
		return err
	}
	l.remove = append(l.remove, func(context.Context) error { return s.github.Close() })
	s.github.SetToken(values["token"], githubtest.Token{Login: "chaos", Scopes: tokenScopes})
	if s.model, err = codextest.StartModel(changesFile); err != nil {
		return err
	}
	l.remove = append(l.remove, func(context.Context) error {
		s.model.Close()
		return nil
	})
	if err := s.model.WriteHome(s.home, "CODEX_API_KEY"); err != nil {
		return err
	}
	s.programs = map[string]string{}
	for name, program := range map[string]string{playedCodex: l.config.programs.codex, realCodex: os.Getenv(devenv.EnvCodex)} {
		folder := filepath.Join(l.folder, strings.ReplaceAll(name, " ", "-"))
		if err := os.MkdirAll(folder, 0o755); err != nil {
			return err
		}
		script := fmt.Sprintf(`#!/bin/sh
{ env | grep -v ^CODEX_API_KEY=; echo "$@"; } >> '%s'
case "$1" in
exec) exec '%s' '%s' - - 1 run codex "$0" begun "$@" ;;
begun)
	shift
	while [ -e '%s' ]; do sleep 0.05; done ;;
esac
exec '%s' "$@"
`, s.calls, l.config.programs.ledger, l.ledger, s.hold, program)
		s.programs[name] = filepath.Join(folder, "codex")
		if err := os.WriteFile(s.programs[name], []byte(script), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func letters(n int) string {
	const of = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	text := make([]byte, n)
	for i := range text {
		text[i] = of[rand.IntN(len(of))]
	}
	return string(text)
}

var promptOf = regexp.MustCompile(`\[run ([0-9a-f-]+), attempt \d+\]`)

// changesFile is the model: it writes the same file as the stand-in of codex, and prints
// the key.
func changesFile(request codextest.Request) codextest.Script {
	id := ""
	if of := promptOf.FindStringSubmatch(request.Prompt); of != nil {
		id = of[1]
	}
	script := codextest.Changes(changedFile(id), changedText(id))
	script.Message += " With the key $KEY."
	return script
}

// changedFile is the only file that the task of a run changes, changedText its text.
func changedFile(run string) string { return "docs/" + run + ".md" }
func changedText(run string) string { return "Done by run " + run + ".\n" }

// specSettings are the workers' settings for a case.
func (l *lane) specSettings(of string) []string {
	s := l.spec
	settings := []string{"MM_ORCHESTRATOR_SPEC_QUEUES=all", "MM_ORCHESTRATOR_SPEC_ONLY=true", "CODEX_SHARDS=1", "REPO_ROOT=" + s.root}
	if of == simulated {
		return append(settings, "TEST_MODE=true")
	}
	return append(settings,
		"MM_ORCHESTRATOR_GITHUB_URL="+s.github.URL, "MM_ORCHESTRATOR_GITHUB_CA_FILE="+s.github.CAFile, "MM_ORCHESTRATOR_GITHUB_CREDENTIAL=file:"+s.token,
		"MM_ORCHESTRATOR_CODEX_CREDENTIAL=file:"+s.key, "MM_ORCHESTRATOR_CODEX_PROGRAM="+s.programs[of], "CODEX_HOME="+s.home,
		"MM_ORCHESTRATOR_CODEX_SANDBOX=danger-full-access", "MM_ORCHESTRATOR_CLONE_DIR="+s.clones)
}

// queues are those that the workers of the current trial consume.
func (l *lane) queues() []string {
	if l.trial.Kind == Spec {
		return specQueues
	}
	return []string{l.queue}
}

// feature is the feature of a trial's run, and specTask its only open task.
func feature(t Trial) string { return fmt.Sprintf("%03d-chaos", t.Number) }

const specTask = "T001"

// submitSpec creates a run of the Spec workflow, calls prepare, and publishes the run's
// message.
func (l *lane) submitSpec(ctx context.Context, prepare func(run) error) (run, error) {
	r := run{ID: moonmind.NewID()}
	name := feature(l.trial)
	dir := filepath.Join(l.spec.root, "specs", name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return r, err
	}
	tasks := "# Tasks\n\n## Phase 1: Setup\n- [ ] " + specTask + " Write down what is done\n"
	if err := os.WriteFile(filepath.Join(dir, "tasks.md"), []byte(tasks), 0o644); err != nil {
		return r, err
	}
	var err error
	if r.Tasks, r.first, err = moonmind.SpecChain(r.ID, name); err != nil {
		return r, err
	}
	if err := moonmind.CreateSpec(ctx, l.pool, r.ID, name, repositoryOf(r)); err != nil {
		return r, err
	}
	if l.trial.Case != simulated {
		if err := l.spec.github.AddRepository(ctx, repositoryOf(r), map[string]string{"README.md": "# Widgets\n"}); err != nil {
			return r, err
		}
	}
	if err := prepare(r); err != nil {
		return r, err
	}
	_ = os.Remove(l.spec.hold)
	if l.holdsCodex() {
		if err := os.WriteFile(l.spec.hold, nil, 0o644); err != nil {
			return r, err
		}
	}
	return r, l.publishTo(ctx, specQueues[0], r.first)
}

// repositoryOf is the repository of a run. Each has its own.
func repositoryOf(r run) string { return "octo/" + r.ID }

// specDirectory is the directory with the files of a run.
func (l *lane) specDirectory(r run) string {
	return filepath.Join(l.spec.root, "var/artifacts/spec_workflows", r.ID)
}

// holdsCodex says that codex waits until a second worker has the message of its task:
// however slow the machine is, codex is at work then.
func (l *lane) holdsCodex() bool { return l.trial.Variant == twiceLater && l.trial.Case != simulated }

// duplicateSpec publishes the first message of the chain again.
func (l *lane) duplicateSpec(ctx context.Context, o *outcome) error {
	var wait func() (bool, error)
	switch o.trial.Variant {
	case "":
		return nil
	case twiceLater:
		wait = func() (bool, error) {
			if l.holdsCodex() {
				records, err := ledger.Read(l.ledger, o.run.ID)
				return len(records) > 0, err
			}
			moments, err := l.trace.read()
			return slices.ContainsFunc(moments, func(m moment) bool { return m.about(submit) }), err
		}
	case twiceAtEnd:
		wait = func() (bool, error) {
			_, complete, err := l.status(ctx, o.run.ID)
			return complete, err
		}
	}
	defer os.Remove(l.spec.hold)
	if wait != nil {
		if err := l.untilOfRun(ctx, "the time for "+o.trial.Variant, wait); err != nil {
			return err
		}
	}
	if err := l.publishTo(ctx, specQueues[0], o.run.first); err != nil || !l.holdsCodex() {
		return err
	}
	return l.untilOfRun(ctx, "the message of "+submit+" to come again", func() (bool, error) {
		moments, err := l.trace.read()
		decided := 0
		for _, m := range moments {
			if m.Point == faultpoint.StepDecided && m.about(submit) && m.about(o.run.ID) {
				decided++
			}
		}
		return decided > 1, err
	})
}

// specStatus reads the run's status, and whether the run has ended.
func (l *lane) specStatus(ctx context.Context, id string) (status string, complete bool, err error) {
	err = l.pool.QueryRow(ctx, `
		SELECT status::text, finished_at IS NOT NULL AND status IN ('succeeded', 'failed')
		FROM spec_workflow_runs WHERE id = $1`, id).Scan(&status, &complete)
	return status, complete, err
}

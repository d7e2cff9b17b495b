package chaos

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
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

// specTimeout bounds the waits for a run of the Spec workflow: git and codex take their time on a
// busy machine.
const specTimeout = 3 * time.Minute

// specLane is what trials of the Spec workflow have in a lane.
type specLane struct {
	// root is the directory from which relative paths start.
	root string
	// github is a server like GitHub. All runs use the same key, and the same token until
	// that is rotated; both are in files. credentials are all values so far by their names.
	github      *githubtest.Server
	token, key  string
	credentials map[string]string
	// model is what the real codex speaks to.
	model *codextest.Model
	// home is the directory with Codex's settings, clones that for clones.
	home, clones string
	// programs are, by case, the program that the workers start as codex. It adds to the
	// ledger, and to the file calls with its arguments and its environment.
	programs map[string]string
	calls    string
	// hold is a file. While it exists, codex has begun and does nothing. While the file
	// garbage exists, it prints what nobody understands.
	hold, garbage string
	cloud         *codextest.Cloud
	secrets       *leaktest.Search
	// faults counts the requests that have met the fault of the trial's service.
	faults func() int
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
	s.hold, s.garbage = filepath.Join(l.folder, "codex-hold"), filepath.Join(l.folder, "codex-garbage")
	s.token = filepath.Join(folders["credentials"], "token")
	s.key = filepath.Join(folders["credentials"], "key")
	if s.github, err = githubtest.Start(folders["github"]); err != nil {
		return err
	}
	l.remove = append(l.remove, func(context.Context) error { return s.github.Close() })
	key := "sk-proj-" + letters(40)
	s.credentials = map[string]string{"key": key}
	if err := errors.Join(os.WriteFile(s.key, []byte(key+"\n"), 0o600), s.rotateToken()); err != nil {
		return err
	}
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
	if err := s.makeCloud(l); err != nil {
		return err
	}
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
	while [ -e '%s' ]; do sleep 0.05; done
	[ ! -e '%s' ] || { echo '<html>'; exit 1; } ;;
esac
exec '%s' "$@"
`, s.calls, l.config.programs.ledger, l.ledger, s.hold, s.garbage, program)
		s.programs[name] = filepath.Join(folder, "codex")
		if err := os.WriteFile(s.programs[name], []byte(script), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// rotateToken makes a new token the only one that is valid, and puts it into the file.
func (s *specLane) rotateToken() error {
	name := fmt.Sprintf("token %d", len(s.credentials))
	s.credentials[name] = "ghp_" + letters(36)
	for _, old := range s.credentials {
		s.github.RevokeToken(old)
	}
	s.github.SetToken(s.credentials[name], githubtest.Token{Login: "chaos", Scopes: tokenScopes})
	s.secrets = leaktest.NewSearch(s.credentials)
	return os.WriteFile(s.token, []byte(s.credentials[name]+"\n"), 0o600)
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
	// With two more commands the output has as many lines as that of the stand-in.
	script.Commands = append([]string{"ls"}, append(script.Commands, "git status --short")...)
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
	if of == cloudCodex {
		settings = append(settings, "MM_ORCHESTRATOR_CODEX_BACKEND=cloud", "CODEX_ENVIRONMENT="+cloudEnvironment)
	}
	return append(settings,
		"MM_ORCHESTRATOR_GITHUB_URL="+s.github.URL, "MM_ORCHESTRATOR_GITHUB_CA_FILE="+s.github.CAFile, "MM_ORCHESTRATOR_GITHUB_CREDENTIAL=file:"+s.token,
		"MM_ORCHESTRATOR_CODEX_CREDENTIAL=file:"+s.key, "MM_ORCHESTRATOR_CODEX_PROGRAM="+s.programs[of], "CODEX_HOME="+s.home,
		"MM_ORCHESTRATOR_CODEX_SANDBOX=danger-full-access", "MM_ORCHESTRATOR_CLONE_DIR="+s.clones)
}

// queues are those that the workers of the current trial consume.
func (l *lane) queues() []string {
	if l.trial.Kind.isSpec() {
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
	if err := l.writeTasks(); err != nil {
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
	if err := l.breakServices(&r); err != nil {
		return r, err
	}
	if err := prepare(r); err != nil {
		return r, err
	}
	l.releaseCodex()
	if l.holdsCodex() {
		if err := os.WriteFile(l.spec.hold, nil, 0o644); err != nil {
			return r, err
		}
	}
	return r, l.publishTo(ctx, specQueues[0], r.first)
}

// writeTasks writes the tasks.md of the trial's feature.
func (l *lane) writeTasks() error {
	dir := filepath.Join(l.spec.root, "specs", feature(l.trial))
	tasks := "# Tasks\n\n## Phase 1: Setup\n- [ ] " + specTask + " Write down what is done\n"
	return errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "tasks.md"), []byte(tasks), 0o644))
}

// breakServices prepares the faults of services and what makes the first attempt fail.
func (l *lane) breakServices(r *run) error {
	repo := strings.NewReplacer("REPO", repositoryOf(*r))
	l.spec.faults = nil
	if f, found := findService(l.trial.Service); found {
		l.spec.faults = l.spec.github.Fail(repo.Replace(f.request), f.times, f.fault)
	}
	if l.trial.Case == cloudCodex {
		if err := l.spec.prepareCloud(*r, l.trial.Service); err != nil {
			return err
		}
	}
	if f, found := findFailure(l.trial.Failure); found {
		r.failed = f.task
		return f.cause(l, *r)
	}
	return nil
}

// awaitCodex waits until codex is at work for a run and waits itself. It returns false if
// the run has ended before.
func (l *lane) awaitCodex(ctx context.Context, r run) (at bool, err error) {
	err = l.untilOfRun(ctx, "codex to begin", func() (bool, error) {
		_, complete, err := l.status(ctx, r.ID)
		if complete || err != nil {
			return true, err
		}
		if l.trial.Case == cloudCodex {
			tasks, err := l.spec.cloudTasks(r)
			at = len(tasks) > 0
			return at, err
		}
		records, err := ledger.Read(l.ledger, r.ID)
		at = len(records) > 0
		return at, err
	})
	return at, err
}

// releaseCodex lets a codex go on that waits.
func (l *lane) releaseCodex() {
	if l.spec != nil {
		_ = os.Remove(l.spec.hold)
	}
}

// repositoryOf is the repository of a run. Each has its own.
func repositoryOf(r run) string { return "octo/" + r.ID }

// specDirectory is the directory with the files of a run.
func (l *lane) specDirectory(r run) string {
	return filepath.Join(l.spec.root, "var/artifacts/spec_workflows", r.ID)
}

// holdsCodex says that codex waits until a second worker has the message of its task, or
// until its worker is killed: however slow the machine is, codex is at work then.
func (l *lane) holdsCodex() bool {
	return l.trial.Case != simulated && (l.trial.Variant == twiceLater || slices.ContainsFunc(l.trial.Stages, func(s stage) bool { return s.CodexHeld }))
}

// duplicateSpec publishes a message of the chain again.
func (l *lane) duplicateSpec(ctx context.Context, o *outcome) error {
	var wait func() (bool, error)
	task := discover
	if o.trial.Twice != "" {
		task = o.trial.Twice
	}
	switch o.trial.Variant {
	case "":
		return nil
	case taskAtOnce:
		wait = func() (bool, error) {
			_, found, err := l.specContext(ctx, o.run, task)
			return found, err
		}
	case twiceLater:
		wait = func() (bool, error) {
			if l.holdsCodex() {
				records, err := ledger.Read(l.ledger, o.run.ID)
				return len(records) > 0, err
			}
			moments, err := l.trace.read()
			return slices.ContainsFunc(moments, func(m moment) bool { return m.about(submit) }), err
		}
	case twiceAtEnd, taskAtEnd:
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
	if err := l.publishTask(ctx, o.run, task); err != nil || !l.holdsCodex() {
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

// publishTask publishes the message of a task of the chain as its worker has done it.
func (l *lane) publishTask(ctx context.Context, r run, task string) error {
	if task == discover {
		return l.publishTo(ctx, specQueues[0], r.first)
	}
	context, found, err := l.specContext(ctx, r, task)
	if err != nil || !found {
		return errors.Join(err, fmt.Errorf("the task before %s has not ended: %t", task, !found))
	}
	m := r.first
	var body [3]any
	if err := json.Unmarshal(m.Body, &body); err != nil {
		return err
	}
	embed := body[2].(map[string]any)
	// The chain is stored with its next link last.
	embed["chain"] = embed["chain"].([]any)[:2-slices.Index(moonmind.SpecTasks, task)]
	body[0], body[1] = []json.RawMessage{context}, map[string]any{}
	m.Headers = maps.Clone(m.Headers)
	m.Headers["id"], m.Headers["task"], m.Headers["parent_id"], m.CorrelationId = r.Tasks[task], "spec_workflow_runs."+task, r.Tasks[taskBefore(task)], r.Tasks[task]
	if m.Body, err = json.Marshal(body); err != nil {
		return err
	}
	return l.publishTo(ctx, specQueues[1], m)
}

// taskBefore is the task of the chain before another one, "" for none.
func taskBefore(task string) string {
	if i := slices.Index(moonmind.SpecTasks, task); i > 0 {
		return moonmind.SpecTasks[i-1]
	}
	return ""
}

// specContext is the argument of a task: what the one before it has returned. It returns
// false if that has not ended.
func (l *lane) specContext(ctx context.Context, r run, task string) (context json.RawMessage, found bool, err error) {
	if task == discover {
		return nil, true, nil
	}
	rows, err := l.rows(ctx, `SELECT outcome->>'result' FROM mm_orchestrator.spec_claims WHERE run_id = $1 AND task_id = $2 AND outcome->>'result' IS NOT NULL`, r.ID, r.Tasks[taskBefore(task)])
	if err != nil || len(rows) == 0 {
		return nil, false, err
	}
	return json.RawMessage(rows[0]), true, nil
}

// publishSpecAgain publishes the message of a task again while a worker is paused in it,
// and waits until a worker has it.
func (l *lane) publishSpecAgain(ctx context.Context, o *outcome, task string) error {
	received := func() (n int, err error) {
		moments, err := l.trace.read()
		for _, m := range moments {
			if m.Point == faultpoint.DeliveryReceived && m.about(o.run.Tasks[task]) {
				n++
			}
		}
		return n, err
	}
	before, err := received()
	if err != nil {
		return err
	}
	if err := l.publishTask(ctx, o.run, task); err != nil {
		return err
	}
	return l.untilOfRun(ctx, "the message of "+task+" to be received again", func() (bool, error) {
		now, err := received()
		return now > before, err
	})
}

// specStatus reads the run's status, and whether the run has ended.
func (l *lane) specStatus(ctx context.Context, id string) (status string, complete bool, err error) {
	err = l.pool.QueryRow(ctx, `
		SELECT status::text, finished_at IS NOT NULL AND status IN ('succeeded', 'failed')
		FROM spec_workflow_runs WHERE id = $1`, id).Scan(&status, &complete)
	return status, complete, err
}

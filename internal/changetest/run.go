package changetest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest/command"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// A Result is what a case has shown.
type Result struct {
	Case Case
	// Differences are between the states before and after the run, or what must
	// not be otherwise. None means that the change was taken back.
	Differences []string
	// Status is the run's at its end, Summary that of its steps.
	Status, Summary string
	// Refused says that nothing was changed because the run could not begin.
	Refused bool
	// Rollback is how long the rollback took, 0 for none.
	Rollback time.Duration
	Took     time.Duration
	// Deaths is how often the worker was killed.
	Deaths int
	// Evidence is a folder with logs, set if there are differences.
	Evidence string
}

func (r *Result) differ(format string, args ...any) {
	r.Differences = append(r.Differences, fmt.Sprintf(format, args...))
}

// Run runs a case. An error means that the case itself did not work.
func (l *Lane) Run(ctx context.Context, c Case) (Result, error) {
	began := time.Now()
	r := Result{Case: c}
	err := l.run(ctx, &r)
	r.Took = time.Since(began)
	if err != nil || len(r.Differences) > 0 {
		l.isUp = false
	}
	return r, err
}

func (l *Lane) run(ctx context.Context, r *Result) error {
	random := r.Case.random()
	if !l.isUp {
		// The worker may look at the work tree at any time, so it is stopped while
		// all is made anew.
		if err := l.worker.stop(); err != nil {
			return err
		}
		if err := l.project.up(ctx); err != nil {
			return err
		}
		l.isUp = true
	}
	l.project.assets.off.Store(false)
	if err := l.engine.Tag(ctx, l.project.kept(), l.project.base()); err != nil {
		return err
	}
	if err := l.project.prepare(ctx, r.Case.Workspace, random); err != nil {
		return err
	}
	scenario := l.project.newScenario(r.Case, random, l.docker)
	artifacts := filepath.Join(l.folder, "artifacts")
	if random.IntN(2) == 0 {
		artifacts = filepath.Join(l.project.Workspace, "var", "artifacts")
	}
	if err := os.MkdirAll(artifacts, 0o755); err != nil {
		return err
	}
	subject := l.project.subject("var/artifacts")

	// The state without what the operator deploys, which is what the rollback goes
	// back to.
	head, err := Take(ctx, subject)
	if err != nil {
		return err
	}
	if r.Case.Workspace == Deployed {
		if err := l.edit(ctx, scenario.change, random.IntN(2) == 0); err != nil {
			return err
		}
	}
	before, err := Take(ctx, subject)
	if err != nil {
		return err
	}
	if err := l.worker.start(); err != nil {
		return err
	}
	deaths := l.worker.deaths()
	run := moonmind.NewID()
	folder := filepath.Join(artifacts, run)
	if err := l.submit(ctx, run, folder, scenario); err != nil {
		return err
	}
	stuck := l.await(ctx, run, scenario, r)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	r.Deaths = l.worker.deaths() - deaths
	after, err := Take(ctx, subject)
	if err != nil {
		return err
	}
	if err := l.readRun(ctx, run, r); err != nil {
		return err
	}
	if stuck != nil {
		r.differ("%v; the run is %s: %s", stuck, r.Status, r.Summary)
		_ = l.worker.stop()
		l.broken = true
	} else if r.Status != "rolled_back" {
		r.differ("the run is %s (%s), want rolled_back", r.Status, r.Summary)
	}
	l.compare(ctx, r, scenario, subject, folder, head, before, after)
	if len(r.Differences) > 0 {
		if err := l.keepEvidence(r, folder, before, after); err != nil {
			return err
		}
	}
	return os.RemoveAll(l.trapFolder())
}

// compare looks for differences.
func (l *Lane) compare(ctx context.Context, r *Result, s scenario, subject Subject, folder string, head, before, after State) {
	target := l.project.Name + "-api-1"
	// Until a restart has begun, the target's container is the same.
	restarted := strings.Contains(r.Summary, "restart:succeeded") || strings.Contains(r.Summary, "restart:failed")
	ignore := func(name string) bool { return restarted && identity(name, target) }
	r.Refused = strings.Contains(r.Summary, "patch:failed") && r.Case.Workspace == Merging
	want := before
	built := strings.Contains(r.Summary, "build:succeeded") || strings.Contains(r.Summary, "build:failed")
	aside := r.Case.Workspace == Deployed && built
	if aside {
		// What the run has deployed is set aside.
		want = head
	}
	if r.Case.Workspace == Merging && !r.Refused {
		r.differ("a run in the middle of a merge was not refused: %s", r.Summary)
	}
	differences := Differences(want, after, ignore)
	r.Differences = append(r.Differences, differences...)
	if !aside {
		return
	}
	commands, err := restoreCommands(folder)
	if err != nil || len(commands) == 0 {
		r.differ("the operator's deployed edits are lost: no log names a command that brings them back (%v)", err)
		return
	}
	for _, line := range commands {
		shell := exec.CommandContext(ctx, "sh", "-c", line)
		shell.Dir = subject.Workspace
		shell.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
		if text, err := shell.CombinedOutput(); err != nil {
			r.differ("the command that brings the operator's edits back fails: %s: %v: %s", line, err, text)
		}
	}
	again, err := Take(ctx, subject)
	if err != nil {
		r.differ("%v", err)
		return
	}
	for _, line := range Differences(before, again, func(name string) bool { return !strings.HasPrefix(name, "file ") }) {
		r.differ("after the command that brings the operator's edits back: %s", line)
	}
}

// edit makes the operator's edits. staged says that they are in the index too.
func (l *Lane) edit(ctx context.Context, acts []command.Act, staged bool) error {
	script := filepath.Join(l.folder, "edit.json")
	if err := writeJSON(script, command.Script{Turns: [][]command.Act{acts}}); err != nil {
		return err
	}
	defer os.Remove(script + ".turn-0")
	edit := exec.CommandContext(ctx, l.programs.Command, "act", script)
	edit.Dir = l.project.Workspace
	if text, err := edit.CombinedOutput(); err != nil {
		return fmt.Errorf("the operator's edits: %w: %s", err, text)
	}
	if !staged {
		return nil
	}
	_, err := Git(ctx, l.project.Workspace, "add", "--update")
	return err
}

// submit creates the run and publishes its message.
func (l *Lane) submit(ctx context.Context, run, folder string, s scenario) error {
	plan, err := s.plan(l.trapFolder())
	if err != nil {
		return err
	}
	if _, err := moonmind.Create(ctx, l.pool, moonmind.Run{ID: run, Queue: queue, Plan: plan, ArtifactRoot: folder}); err != nil {
		return err
	}
	_, message, err := moonmind.Chain(queue, run)
	if err != nil {
		return err
	}
	return l.publish(ctx, message)
}

func (l *Lane) publish(ctx context.Context, message amqp.Publishing) error {
	confirm, err := l.channel.PublishWithDeferredConfirmWithContext(ctx, "", queue, true, false, message)
	if err != nil {
		return err
	}
	acked, err := confirm.WaitContext(ctx)
	if err == nil && !acked {
		err = fmt.Errorf("the broker refused a message")
	}
	return err
}

// await waits for the end of the run, and kills the worker at the scenario's time.
func (l *Lane) await(ctx context.Context, run string, s scenario, r *Result) error {
	killed := s.killIn == ""
	return until(ctx, "the run of "+r.Case.String()+" to end", func() (bool, error) {
		if !killed {
			var begun bool
			err := l.pool.QueryRow(ctx, `SELECT started_at IS NOT NULL FROM spec_workflow_task_states
				WHERE orchestrator_run_id = $1 AND plan_step = $2::text::orchestratorplanstep`, run, s.killIn).Scan(&begun)
			if err != nil {
				return false, err
			}
			if begun {
				killed = true
				time.Sleep(time.Duration(s.killAfter) * time.Millisecond)
				l.worker.kill()
			}
		}
		var ended bool
		err := l.pool.QueryRow(ctx, `SELECT completed_at IS NOT NULL FROM orchestrator_runs WHERE id = $1`, run).Scan(&ended)
		return ended, err
	})
}

// readRun reads how the run has ended.
func (l *Lane) readRun(ctx context.Context, run string, r *Result) error {
	var took *float64
	err := l.pool.QueryRow(ctx, `
		SELECT r.status::text,
		       (SELECT string_agg(plan_step::text || ':' || plan_step_status::text, ' ' ORDER BY plan_step) FROM spec_workflow_task_states WHERE orchestrator_run_id = r.id),
		       (SELECT extract(epoch FROM finished_at - started_at)::float8 FROM spec_workflow_task_states WHERE orchestrator_run_id = r.id AND plan_step = 'rollback')
		FROM orchestrator_runs r WHERE r.id = $1`, run).Scan(&r.Status, &r.Summary, &took)
	if err == nil && took != nil {
		r.Rollback = time.Duration(*took * float64(time.Second))
	}
	return err
}

// restoring is a command that brings back what was set aside, in a log of the run.
var restoring = regexp.MustCompile("git [^\n`\\]]*refs/mm-orchestrator/[^\n`\\]]*")

// restoreCommands returns the commands of the run's rollback log that bring back
// what was set aside.
func restoreCommands(folder string) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(folder, "rollback.log"))
	if err != nil {
		return nil, err
	}
	var commands []string
	for _, line := range restoring.FindAllString(string(text), -1) {
		line = strings.TrimSpace(strings.TrimRight(line, ". "))
		if !slices.Contains(commands, line) {
			commands = append(commands, line)
		}
	}
	return commands, nil
}

// keepEvidence copies what helps to explain differences.
func (l *Lane) keepEvidence(r *Result, artifacts string, before, after State) error {
	r.Evidence = filepath.Join(filepath.Dir(l.folder), fmt.Sprintf("case-%d", r.Case.Number))
	if err := os.RemoveAll(r.Evidence); err != nil {
		return err
	}
	if err := os.MkdirAll(r.Evidence, 0o755); err != nil {
		return err
	}
	lines := append([]string{r.Case.String(), r.Status + ": " + r.Summary}, r.Differences...)
	if err := os.WriteFile(filepath.Join(r.Evidence, "differences.txt"), []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		return err
	}
	for name, state := range map[string]State{"before.json": before, "after.json": after} {
		if err := writeJSON(filepath.Join(r.Evidence, name), state); err != nil {
			return err
		}
	}
	for name, path := range map[string]string{"artifacts": artifacts, "traps": l.trapFolder(), "worker.log": l.worker.logPath, "workspace": l.project.Workspace} {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		if text, err := exec.Command("cp", "-a", path, filepath.Join(r.Evidence, name)).CombinedOutput(); err != nil {
			return fmt.Errorf("cp: %w: %s", err, text)
		}
	}
	return nil
}

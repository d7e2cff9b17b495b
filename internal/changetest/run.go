package changetest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

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
		if err := l.project.Up(ctx); err != nil {
			return err
		}
		l.isUp = true
	}
	if err := l.project.provideBase(ctx); err != nil {
		return err
	}
	// The work tree with the refs of earlier cases goes, and so do their pins.
	if err := l.engine.RemovePins(ctx, l.project.Name); err != nil {
		return err
	}
	scenario := l.project.newScenario(r.Case, random, l.docker)
	artifacts := filepath.Join(l.folder, "artifacts")
	if random.IntN(2) == 0 {
		artifacts = filepath.Join(l.project.Workspace, artifactsInside)
	}
	if err := os.MkdirAll(filepath.Join(l.folder, "artifacts"), 0o755); err != nil {
		return err
	}
	watch, err := l.project.Watch(ctx, r.Case.Workspace, random, scenario.change)
	if err != nil {
		return err
	}
	var settings []string
	if r.Case.prunesContainers() {
		settings = append(settings, "MM_ORCHESTRATOR_PIN_DIRECTORY="+filepath.Join(l.folder, "pins"))
	}
	if err := l.worker.use(settings...); err != nil {
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
	r.Refused = strings.Contains(r.Summary, "patch:failed") && r.Case.Workspace == Merging
	if r.Case.Workspace == Merging && !r.Refused {
		r.differ("a run in the middle of a merge was not refused: %s", r.Summary)
	}
	differences, err := watch.TakenBack(ctx, EndOf(r.Summary, folder))
	if err != nil {
		return err
	}
	r.Differences = append(r.Differences, differences...)
	if len(r.Differences) > 0 {
		if err := l.keepEvidence(r, folder, watch); err != nil {
			return err
		}
	}
	return os.RemoveAll(l.trapFolder())
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

// keepEvidence copies what helps to explain differences.
func (l *Lane) keepEvidence(r *Result, artifacts string, watch *Watch) error {
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
	for name, state := range map[string]State{"before.json": watch.before, "after.json": watch.after} {
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

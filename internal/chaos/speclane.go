package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// specQueues are the queues of the chain with one shard.
var specQueues = []string{"speckit", "codex-0"}

// specLane is what trials of kind Spec have in a lane.
type specLane struct {
	// root is the directory from which relative paths start.
	root string
}

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
	l.spec = s
	return nil
}

// specSettings are the workers' settings for a case.
func (l *lane) specSettings(string) []string {
	return []string{
		"MM_ORCHESTRATOR_SPEC_QUEUES=all", "MM_ORCHESTRATOR_SPEC_ONLY=true", "CODEX_SHARDS=1", "REPO_ROOT=" + l.spec.root, "TEST_MODE=true",
	}
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
	if err := prepare(r); err != nil {
		return r, err
	}
	return r, l.publishTo(ctx, specQueues[0], r.first)
}

// repositoryOf is the repository of a run. Each has its own.
func repositoryOf(r run) string { return "octo/" + r.ID }

// specDirectory is the directory with the files of a run.
func (l *lane) specDirectory(r run) string {
	return filepath.Join(l.spec.root, "var/artifacts/spec_workflows", r.ID)
}

// duplicateSpec publishes the first message of the chain again.
func (l *lane) duplicateSpec(ctx context.Context, o *outcome) error {
	var wait func() (bool, error)
	switch o.trial.Variant {
	case "":
		return nil
	case twiceLater:
		wait = func() (bool, error) {
			moments, err := l.trace.read()
			return slices.ContainsFunc(moments, func(m moment) bool { return m.about(submit) }), err
		}
	case twiceAtEnd:
		wait = func() (bool, error) {
			_, complete, err := l.status(ctx, o.run.ID)
			return complete, err
		}
	}
	if wait != nil {
		if err := until(ctx, "the time for "+o.trial.Variant, wait); err != nil {
			return err
		}
	}
	return l.publishTo(ctx, specQueues[0], o.run.first)
}

// specStatus reads the run's status, and whether the run has ended.
func (l *lane) specStatus(ctx context.Context, id string) (status string, complete bool, err error) {
	err = l.pool.QueryRow(ctx, `
		SELECT status::text, finished_at IS NOT NULL AND status IN ('succeeded', 'failed')
		FROM spec_workflow_runs WHERE id = $1`, id).Scan(&status, &complete)
	return status, complete, err
}

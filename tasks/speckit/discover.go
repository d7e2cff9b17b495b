package speckit

import (
	"cmp"
	"context"
	"encoding/json"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// discoverArgs are the arguments of discover_next_phase.
type discoverArgs struct {
	RunID      string          `celery:"run_id"`
	FeatureKey *string         `celery:"feature_key"`
	ForcePhase json.RawMessage `celery:"force_phase,optional"`
	Attempt    int             `celery:"attempt,optional"`
	RetryNotes *string         `celery:"retry_notes"`
}

// allDone is MoonMind's message for a feature without an open task.
const allDone = "All tasks in tasks.md are already complete."

// discover finds the next open task (docs/spec-workflow.md#discover).
func (s *Speckit) discover(ctx context.Context, args discoverArgs) (json.RawMessage, error) {
	r := request{task: store.SpecDiscover, taskID: taskID(ctx), runID: args.RunID, attempt: max(args.Attempt, 1), context: newObject()}
	r.open = func(a *attempt) store.SpecWrite {
		return store.SpecWrite{
			Status: store.SpecRunRunning, Phase: store.SpecPhaseDiscover, Started: true, Placeholders: true,
			State: a.state(store.SpecRunning, statusPayload(store.SpecRunning, "Discovering next Spec Kit task")),
		}
	}
	r.work = func(_ context.Context, a *attempt) (store.SpecWrite, error) { return a.discoverTask(args) }
	return s.run(ctx, r)
}

func (a *attempt) discoverTask(args discoverArgs) (store.SpecWrite, error) {
	feature := a.run.FeatureKey
	if args.FeatureKey != nil && *args.FeatureKey != "" {
		feature = *args.FeatureKey
	}
	text, err := readTasks(a.config.TasksRoot, feature)
	if err != nil {
		return store.SpecWrite{}, err
	}
	next, unread := nextTask(text)
	if len(unread) > 0 {
		a.log.Warn("tasks.md has lines that look like open tasks and are none for MoonMind: write them as `- [ ] ID title`, with one space after the box", "feature", feature, "lines", unread[:min(len(unread), 20)])
	}
	skills := a.context.raw("skill_execution")
	c := newObject()
	c.set("run_id", a.run.ID)
	c.set("feature_key", a.run.FeatureKey)
	c.set("artifacts_path", a.base)
	if repository := cmp.Or(a.run.Repository, a.config.Repository); repository != "" {
		c.set("repository", repository)
	}
	if a.run.CodexVolume != "" {
		c.set("codex_volume", a.run.CodexVolume)
	}
	if len(args.ForcePhase) == 0 {
		args.ForcePhase = json.RawMessage("null")
	}
	c.setRaw("force_phase", args.ForcePhase)
	c.set("attempt", a.attempt)
	c.setRaw("skill_execution", skills)
	if args.RetryNotes != nil {
		c.set("retry_notes", *args.RetryNotes)
	}
	c.set("retry", a.attempt > 1)
	*a.context = *c
	if next == nil {
		a.context.set("no_work", true)
		a.context.set("message", allDone)
		payload := statusPayload(store.SpecSucceeded, allDone)
		payload.set("result", "no_work")
		return store.SpecWrite{
			Status: store.SpecRunSucceeded, Phase: store.SpecPhaseComplete, Ended: true,
			State: a.state(store.SpecSucceeded, payload),
		}, nil
	}
	next.title, next.phase = a.redact(next.title), a.redact(next.phase)
	task := next.object()
	a.context.set("task", task)
	payload := statusPayload(store.SpecSucceeded, "Discovered next task")
	for _, key := range task.keys {
		if string(task.values[key]) != "null" {
			payload.setRaw(key, task.values[key])
		}
	}
	return store.SpecWrite{State: a.state(store.SpecSucceeded, payload)}, nil
}

// taskID is Celery's id of the task of a handler's context.
func taskID(ctx context.Context) string {
	if task := worker.TaskFromContext(ctx); task != nil {
		return task.ID
	}
	return ""
}

package speckit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// cloud gives the task to Codex Cloud and waits for it. A task is submitted once: before,
// it is recorded which tasks there were, so that a worker that does not know whether one
// was submitted can look for it (docs/spec-workflow.md#s16).
func (t *codexTask) cloud(ctx context.Context) error {
	log, err := t.dir.Continue(t.fileName(".jsonl"), 0, 0)
	if errors.Is(err, artifacts.ErrNoLog) {
		log, err = t.dir.Log(t.fileName(".jsonl"))
	}
	if err != nil {
		return &failure{class: "OSError", text: err.Error()}
	}
	defer log.Discard()
	cloud, owner := t.config.Codex.Cloud, t.owner()
	over := stall.FromContext(ctx).Wait()
	defer over()
	if t.progress.Stage == store.CodexSubmitting {
		t.progress.TaskID, err = cloud.Find(ctx, owner, t.prompt.mark(), t.progress.KnownTasks)
	}
	if err == nil && t.progress.TaskID == "" {
		err = t.submitToCloud(ctx)
	}
	if err == nil && t.progress.Stage != store.CodexSubmitted {
		faultpoint.Hit(faultpoint.CodexSubmitted, t.run.ID, string(t.task))
		t.progress.Stage, t.progress.KnownTasks = store.CodexSubmitted, nil
		if err := t.record(ctx, store.SpecWrite{}); err != nil {
			return err
		}
		t.log.Info("codex cloud has the task", "codex_task_id", t.progress.TaskID)
	}
	output := log.Output()
	var result codex.Result
	if err == nil {
		result, err = cloud.Wait(ctx, owner, t.progress.TaskID, t.config.Codex.Login.Writer(t.counted(output.Stdout)))
	}
	var diff []byte
	if err == nil && result.Outcome == codex.Finished {
		diff, err = cloud.Diff(ctx, owner, t.progress.TaskID)
	}
	over()
	t.config.Codex.Login.Read() // Codex renews it
	output.Close()
	var failed *codex.Failure
	switch {
	case err == nil:
		t.take(result)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.As(err, &failed):
		t.take(failed.Result)
	case errors.Is(err, codex.ErrUncertain):
		t.progress.Outcome, t.progress.Message = outcomeUncertain, t.redact(err.Error())
	case errors.Is(err, codex.ErrDiffTooLarge):
		t.progress.Outcome, t.progress.Message = outcomeUnusable, t.redact(err.Error())
	case errors.Is(err, errNotRecorded):
		return err
	default:
		return t.notRun(ctx, err)
	}
	faultpoint.Hit(faultpoint.CodexExited, t.run.ID, string(t.task))
	file, err := log.Finish()
	if err != nil {
		return &failure{class: "OSError", text: err.Error()}
	}
	full := t.artifact("codex_logs", file)
	t.progress.Log = &full
	switch {
	case len(diff) > 0 && t.config.Codex.Secrets != nil && t.isSecret(bytes.NewReader(diff)):
		t.progress.Outcome, t.progress.Message = outcomeSecret, "it has a credential of this worker"
	case len(diff) > 0:
		if err := t.storePatch(diff, 0); err != nil {
			return err
		}
	}
	return t.ended(ctx)
}

// errNotRecorded: the progress could not be recorded, so nothing may follow from it.
var errNotRecorded = errors.New("the progress of the task is not recorded")

// submitToCloud submits the task, and looks for it if there was no answer.
func (t *codexTask) submitToCloud(ctx context.Context) error {
	cloud, owner := t.config.Codex.Cloud, t.owner()
	if t.progress.Stage != store.CodexSubmitting {
		tasks, err := cloud.Tasks(ctx, owner)
		if err != nil {
			return err
		}
		t.progress = store.CodexProgress{Stage: store.CodexSubmitting, Runs: t.progress.Runs + 1}
		for _, task := range tasks {
			t.progress.KnownTasks = append(t.progress.KnownTasks, task.ID)
		}
		if err := t.record(ctx, store.SpecWrite{}); err != nil {
			return fmt.Errorf("%w: %w", errNotRecorded, err)
		}
	}
	faultpoint.Hit(faultpoint.CodexStarting, t.run.ID, string(t.task))
	id, err := cloud.Submit(ctx, codex.CloudRequest{Owner: owner, Prompt: t.prompt.String(), Branch: cmp.Or(t.config.Codex.Branch, "main")})
	var failed *codex.Failure
	if errors.As(err, &failed) && !failed.Refused {
		found, findErr := cloud.Find(ctx, owner, t.prompt.mark(), t.progress.KnownTasks)
		if found != "" || errors.Is(findErr, codex.ErrUncertain) {
			id, err = found, findErr
		}
	}
	t.progress.TaskID = id
	return err
}

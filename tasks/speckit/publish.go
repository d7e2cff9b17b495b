package speckit

import (
	"cmp"
	"context"
	"encoding/json"
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// publish publishes what Codex has changed (docs/spec-workflow.md#publish).
func (s *Speckit) publish(ctx context.Context, args contextArgs) (json.RawMessage, error) {
	r, err := s.chained(ctx, store.SpecPublish, args)
	if err != nil {
		return nil, err
	}
	r.open = func(a *attempt) store.SpecWrite {
		return a.begin(store.SpecPhaseApply, "Retrieving Codex diff and publishing to GitHub")
	}
	r.work = func(ctx context.Context, a *attempt) (store.SpecWrite, error) {
		if err := a.ready(ctx); err != nil {
			return store.SpecWrite{}, err
		}
		return a.publishTask(ctx)
	}
	return s.run(ctx, r)
}

func (a *attempt) publishTask(ctx context.Context) (store.SpecWrite, error) {
	noWork := a.context.truthy("no_work")
	if !noWork && !a.credentials.valid() {
		return store.SpecWrite{}, a.credentials.failure()
	}
	a.applyResumeToken()
	dir, err := a.directory()
	if err != nil {
		return store.SpecWrite{}, err
	}
	defer dir.Close()
	if noWork {
		summary, err := a.writeSummary(dir)
		if err != nil {
			return store.SpecWrite{}, err
		}
		payload := statusPayload(store.SpecSkipped, "Skipped publish because no work was required")
		payload.set("reason", "no_work")
		return store.SpecWrite{
			Status: store.SpecRunSucceeded, Phase: store.SpecPhaseComplete, Ended: true, CodexQueue: a.context.text("codex_queue"),
			Artifacts: []store.SpecArtifact{summary}, State: a.state(store.SpecSkipped, payload, summary.Path),
		}, nil
	}
	if !a.config.TestMode {
		a.config.Codex.Login.Read() // the patch must not have it
		return a.publishPatch(ctx, dir)
	}
	patch, description, err := a.patch(dir)
	if err != nil {
		return store.SpecWrite{}, err
	}
	progress := store.SpecWrite{Phase: store.SpecPhasePublish, CodexPatchPath: patch.Path, Artifacts: []store.SpecArtifact{patch}}
	applied := a.context.text("apply_output_path")
	if applied == "" {
		output, err := a.writeApplyOutput(dir, patch.Path, description)
		if err != nil {
			return store.SpecWrite{}, err
		}
		applied = output.Path
		progress.Artifacts = append(progress.Artifacts, output)
	}
	if err := a.config.Runs.WriteSpec(ctx, a.claim, progress); err != nil {
		return store.SpecWrite{}, err
	}
	id, _ := a.openTask()
	feature := a.context.text("feature_key")
	branch := feature + "/" + strings.ToLower(id)
	url := "https://example.com/" + feature + "/" + a.derived("pull request", 6)
	response, err := a.writeResponse(dir, branch, filepath.Base(patch.Path), url)
	if err != nil {
		return store.SpecWrite{}, err
	}
	a.context.set("branch_name", branch)
	a.context.set("pr_url", url)
	a.context.set("codex_patch_path", patch.Path)
	a.context.set("github_response_path", response.Path)
	a.context.set("apply_output_path", applied)
	summary, err := a.writeSummary(dir)
	if err != nil {
		return store.SpecWrite{}, err
	}
	payload := statusPayload(store.SpecSucceeded, "Pull request published")
	payload.set("branch", branch)
	payload.set("prUrl", url)
	payload.set("patchPath", patch.Path)
	payload.set("responsePath", response.Path)
	payload.set("applyOutputPath", applied)
	a.credentials.addTo(payload)
	payload.set("resumed", string(a.context.raw("resume_token")) != "null")
	return store.SpecWrite{
		Status: store.SpecRunSucceeded, Phase: store.SpecPhaseComplete, Ended: true,
		Branch: branch, PRURL: url, CodexPatchPath: patch.Path, CodexQueue: a.context.text("codex_queue"),
		Artifacts: []store.SpecArtifact{response, summary},
		State:     a.state(store.SpecSucceeded, payload, patch.Path, response.Path, applied, summary.Path),
	}, nil
}

// applyResumeToken completes the context by what the API's retry has found in the
// run, and makes its paths begin with the run's directory.
func (a *attempt) applyResumeToken() {
	if token := a.context.inner("resume_token"); token != nil {
		for _, field := range []struct{ key, from string }{
			{"codex_task_id", "codexTaskId"}, {"codex_logs_path", "codexLogsPath"}, {"codex_patch_path", "codexPatchPath"},
			{"branch_name", "branchName"}, {"pr_url", "prUrl"},
		} {
			if !a.context.truthy(field.key) && token.truthy(field.from) {
				a.context.setRaw(field.key, token.raw(field.from))
			}
		}
	}
	for _, key := range []string{"codex_logs_path", "codex_patch_path", "apply_output_path", "github_response_path"} {
		if path := a.context.text(key); path != "" {
			a.context.set(key, a.inRun(path))
		}
	}
}

// inRun makes a path begin with the run's directory. MoonMind puts the directory in
// front of every relative path, also of one that has it (docs/spec-workflow.md#s5).
func (a *attempt) inRun(path string) string {
	path = filepath.Clean(path)
	if filepath.IsAbs(path) || path == a.base || strings.HasPrefix(path, a.base+"/") {
		return path
	}
	return filepath.Join(a.base, path)
}

// patch returns the patch of the run. A retry uses the stored one.
func (a *attempt) patch(dir *artifacts.Run) (patch store.SpecArtifact, description string, err error) {
	if path := a.context.text("codex_patch_path"); path != "" && a.context.truthy("retry") {
		patch, err = a.storedPatch(path)
		return patch, "resume_from_retry_context", err
	}
	id, title := a.openTask()
	patch, err = a.write(dir, "codex_patch", a.context.text("codex_task_id")+".patch",
		"--- a/README.md\n+++ b/README.md\n@@\n-Pending task: "+id+"\n+Completed task: "+id+"\n")
	return patch, "Simulated Codex patch for " + id + ": " + artifacts.Trim(title), err
}

// storedPatch checks the patch of an earlier attempt.
func (a *attempt) storedPatch(path string) (store.SpecArtifact, error) {
	return a.storedFile("codex_patch", path)
}

// writeJSON writes an object as MoonMind does, with an indent of 2.
func (a *attempt) writeJSON(dir *artifacts.Run, kind, name string, o *object) (store.SpecArtifact, error) {
	text, err := o.python(true)
	if err != nil {
		return store.SpecArtifact{}, valueError("the context of the chain cannot be written: %v", err)
	}
	return a.write(dir, kind, name, text)
}

func (a *attempt) writeApplyOutput(dir *artifacts.Run, patch, description string) (store.SpecArtifact, error) {
	o := newObject()
	o.set("description", description)
	o.set("hasChanges", true)
	o.set("patchPath", patch)
	return a.writeJSON(dir, "apply_output", "apply_output.json", o)
}

func (a *attempt) writeResponse(dir *artifacts.Run, branch, patch, url string) (store.SpecArtifact, error) {
	o := newObject()
	o.set("repository", cmp.Or(a.config.Repository, "moonmind/test-repo"))
	o.set("branch", branch)
	o.set("patch", patch)
	o.set("url", url)
	return a.writeJSON(dir, "gh_pr_response", strings.ReplaceAll(branch, "/", "_")+"_pr.json", o)
}

// writeSummary writes run_summary.json and puts its path into the context.
func (a *attempt) writeSummary(dir *artifacts.Run) (store.SpecArtifact, error) {
	o := newObject()
	for _, field := range []struct{ key, from string }{
		{"runId", "run_id"}, {"featureKey", "feature_key"}, {"task", "task"}, {"codexTaskId", "codex_task_id"}, {"codexQueue", "codex_queue"},
		{"skillExecution", "skill_execution"}, {"branch", "branch_name"}, {"pullRequestUrl", "pr_url"},
		{"codexPatchPath", "codex_patch_path"}, {"codexLogsPath", "codex_logs_path"},
	} {
		o.setRaw(field.key, a.context.raw(field.from))
	}
	o.set("noWork", a.context.truthy("no_work"))
	summary, err := a.writeJSON(dir, "pr_payload", "run_summary.json", o)
	if err == nil {
		a.context.set("run_summary_path", summary.Path)
	}
	return summary, err
}

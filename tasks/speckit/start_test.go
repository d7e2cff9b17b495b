package speckit

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// failedAt is the recorded run after a task has failed.
func failedAt(failed store.SpecTask) store.SpecRunDetail {
	d := store.SpecRunDetail{Run: store.SpecRunRow{ID: recordedRun, FeatureKey: feature, Repository: "octo/widgets", Status: store.SpecRunFailed, ArtifactsPath: runPath}}
	for _, task := range store.SpecTasks {
		row := store.SpecTaskRow{Task: task, Attempt: 1, Status: store.SpecSucceeded, Payload: json.RawMessage(`{}`)}
		if task == store.SpecDiscover {
			row.Payload = json.RawMessage(`{"status":"succeeded","message":"Discovered next task","taskId":"T012","title":"[P] [US2] Document the retry endpoint in ` + "`docs/api.md`" + `","phase":"Phase 4: User Story 2","lineNumber":57}`)
		}
		if task == failed {
			row.Status = store.SpecFailed
			d.Tasks = append(d.Tasks, row)
			break
		}
		d.Tasks = append(d.Tasks, row)
	}
	if failed == store.SpecPublish {
		d.Run.CodexTaskID, d.Run.CodexLogsPath = "TEST-7c1e09ab", runPath+"/TEST-7c1e09ab.jsonl"
	}
	return d
}

// The context of a resumed chain, the token of the retry and its file are those that
// MoonMind's API publishes and writes.
func TestARetryIsAsTheAPIPublishesIt(t *testing.T) {
	t.Parallel()
	c := Config{TasksRoot: "/specs"}
	retry, err := c.PlanRetry(failedAt(store.SpecPublish), ResumeFailedTask, "GitHub token renewed", "/srv/moonmind/"+runPath)
	if err != nil {
		t.Fatal(err)
	}
	stages := recordedAs(t, "spec_context_stages.json", "TEST-7c1e09ab", "")
	var context, token any
	if err := errors.Join(json.Unmarshal(retry.Start.Args[0], &context), json.Unmarshal([]byte(retry.Token), &token)); err != nil {
		t.Fatal(err)
	}
	spectest.Same(t, "context", context, stages["retry_resumed_at_publish_first_argument"])
	spectest.Same(t, "token", token, stages["retry_context_attempt_2.json"])
	if retry.File != "retry_context_attempt_2.json" || !strings.HasPrefix(retry.Token, "{\n  \"runId\": \"") {
		t.Errorf("file %s: %s", retry.File, retry.Token)
	}
	if text := fmt.Sprintf("%s %d %s %s %v %v", retry.From, retry.Attempt, retry.Start.Task, retry.Start.Queue, retry.Start.Headers, retry.Start.Next); text !=
		"apply_and_publish 2 spec_workflow_runs.apply_and_publish codex-0 map[codex-affinity:octo/widgets|014-refresh-docs|T012 codex-queue:codex-0] []" {
		t.Errorf("start %s", text)
	}
}

func TestWhereARetryBegins(t *testing.T) {
	t.Parallel()
	twice := failedAt(store.SpecSubmit)
	twice.Tasks = append(twice.Tasks, store.SpecTaskRow{Task: store.SpecSubmit, Attempt: 2, Status: store.SpecFailed, Payload: json.RawMessage(`{}`)})
	skipped := failedAt(store.SpecPublish)
	skipped.Tasks[1].Status = store.SpecSkipped
	never := failedAt(store.SpecDiscover)
	never.Tasks = nil
	running, done, lost := failedAt(store.SpecSubmit), failedAt(""), failedAt(store.SpecSubmit)
	running.Run.Status = store.SpecRunRunning
	lost.Tasks[0].Payload = json.RawMessage(`{}`)
	for name, test := range map[string]struct {
		run  store.SpecRunDetail
		mode RetryMode
		want string
		err  error
	}{
		"discovery failed":   {failedAt(store.SpecDiscover), ResumeFailedTask, "discover_next_phase 2 speckit 2", nil},
		"submit failed":      {failedAt(store.SpecSubmit), ResumeFailedTask, "submit_codex_job 2 codex-0 1", nil},
		"failed twice":       {twice, ResumeFailedTask, "submit_codex_job 3 codex-0 1", nil},
		"skipped counts":     {skipped, ResumeFailedTask, "submit_codex_job 2 codex-0 1", nil},
		"from the beginning": {failedAt(store.SpecPublish), RestartFromDiscovery, "discover_next_phase 2 speckit 2", nil},
		"never began":        {never, ResumeFailedTask, "discover_next_phase 1 speckit 2", nil},
		"still running":      {running, ResumeFailedTask, "", ErrRetryNotAllowed},
		"all succeeded":      {done, ResumeFailedTask, "", ErrRetryNotApplicable},
		"no task is known":   {lost, ResumeFailedTask, "", ErrRetryNotApplicable},
	} {
		retry, err := (Config{}).PlanRetry(test.run, test.mode, "", "/x")
		got := ""
		if err == nil {
			got = fmt.Sprint(retry.From, " ", retry.Attempt, " ", retry.Start.Queue, " ", len(retry.Start.Next))
		}
		if !errors.Is(err, test.err) || got != test.want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, test.want)
		}
	}
}

package e2e

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
)

// capturedSpec are the messages of a chain as MoonMind has published them.
type capturedSpec struct {
	Publish    map[string]any  `json:"publish"`
	Properties map[string]any  `json:"properties"`
	Headers    map[string]any  `json:"headers"`
	Body       json.RawMessage `json:"body"`
}

const capturedSpecMessages = "celery_messages_spec_workflow.json"

// The producer of these tests must send the same message as MoonMind's API, with every
// Celery release.
func TestSpecProducerPublishesWhatTheAPIPublishes(t *testing.T) {
	t.Parallel()
	var captured map[string]json.RawMessage
	readJSON(t, filepath.Join(recordedValues, capturedSpecMessages), &captured)
	var message map[string]any
	if err := json.Unmarshal(captured["discover_from_the_api"], &message); err != nil {
		t.Fatal(err)
	}
	// The capture leaves out how the arguments print.
	neutral := func(headers map[string]any) {
		for _, name := range []string{"argsrepr", "kwargsrepr", "origin"} {
			if headers[name] == nil {
				t.Errorf("no header %s", name)
			}
			delete(headers, name)
		}
	}
	neutral(message["headers"].(map[string]any))
	want := plainIDs(t, message)

	s := newSpecStack(t, specConfig{TestMode: true})
	for _, version := range versions {
		run := s.submitSpec(version, "--no-wait")
		delivery := s.take("speckit")
		var body any
		if err := json.Unmarshal(delivery.Body, &body); err != nil {
			t.Fatal(err)
		}
		headers := map[string]any(delivery.Headers)
		neutral(headers)
		got := map[string]any{
			"publish": map[string]any{"exchange": delivery.Exchange, "routing_key": delivery.RoutingKey},
			"properties": map[string]any{
				"content_type": delivery.ContentType, "content_encoding": delivery.ContentEncoding, "delivery_mode": delivery.DeliveryMode,
				"correlation_id": delivery.CorrelationId, "reply_to": delivery.ReplyTo, "priority": delivery.Priority,
			},
			"headers": headers, "body": body,
		}
		for _, difference := range differences(want, plainIDs(t, got)) {
			t.Errorf("celery %s: %s", version, difference)
		}
		if delivery.CorrelationId != run.TaskIDs["discover_next_phase"] || run.ChainID != run.TaskIDs["apply_and_publish"] {
			t.Errorf("celery %s: message %s of %+v", version, delivery.CorrelationId, run)
		}
	}
}

// A chain of an unmodified Python producer must end with the change on its branch and one
// pull request, in rows, files, results and metrics that MoonMind reads.
func TestSpecChainOfAPythonProducer(t *testing.T) {
	t.Parallel()
	for version, apart := range map[string]bool{versions[0]: false, newest: true} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			// The commands of the orchestrator's steps have the environment of their worker.
			s := newSpecStack(t, specConfig{Files: !apart})
			var step submission
			if apart {
				// One worker for each part, as in MoonMind's compose file.
				s.startWorker()
				s.startSpecWorker([]string{"speckit"}, "MM_ORCHESTRATOR_SPEC_QUEUES=speckit", "MM_ORCHESTRATOR_SPEC_ONLY=true", "WORKSPACE_ROOT=/nowhere")
				s.startSpecWorker(codexQueues, "MM_ORCHESTRATOR_SPEC_QUEUES="+strings.Join(codexQueues, ","), "MM_ORCHESTRATOR_SPEC_ONLY=true", "WORKSPACE_ROOT=/nowhere")
				step = s.submit(version, s.withoutDocker()...)
			} else {
				s.startSpecWorker(everyQueue(), "MM_ORCHESTRATOR_SPEC_QUEUES=all")
			}
			answer := s.submitSpec(version)
			s.requireSuccess(answer, 3)
			s.requirePublished()
			run := s.spec(answer.RunID, answer.results())
			s.requireRowsForMoonMind(run)
			s.requireResultsForMoonMind(run)
			if run.Run["celery_chain_id"] != answer.ChainID || len(run.States) != 3 {
				t.Errorf("run %v with %d tasks", run.Run, len(run.States))
			}
			s.requireMetrics(1, moonmind.SpecTasks...)
			s.requireCalls()
			if !apart {
				return
			}
			for i, want := range []string{"worker-1", "worker-2", "worker-2"} {
				if r := answer.Results[i]; r.Worker != "orchestrator@"+want {
					t.Errorf("task %d ran in %s, want %s", i+1, r.Worker, want)
				}
			}
			if row := s.awaitStep(step); row["status"] != "succeeded" {
				t.Errorf("the orchestrator's run is %v", row)
			}
		})
	}
}

// awaitStep waits for the end of a run of the orchestrator, whichever worker was started
// last.
func (s *specStack) awaitStep(run submission) (row record) {
	s.t.Helper()
	s.await("the orchestrator's run to end", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(r) FROM orchestrator_runs r WHERE id = $1`, run.RunID)
		if err != nil || len(rows) != 1 {
			return false, err
		}
		row = rows[0]
		return row["completed_at"] != nil, nil
	})
	return row
}

// captured publishes a message of the captured chain with the ids of a run of its own.
func (s *specStack) publishCaptured(name, run string) {
	s.t.Helper()
	text := read(s.t, filepath.Join(recordedValues, capturedSpecMessages))
	// The ids of tasks and of the producer's queue stay: they are in a vhost of their own.
	text = strings.ReplaceAll(text, spectest.RecordedRun, run)
	var messages map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &messages); err != nil {
		s.t.Fatal(err)
	}
	var message capturedSpec
	if err := json.Unmarshal(messages[name], &message); err != nil {
		s.t.Fatal(err)
	}
	headers := amqp.Table{}
	for name, value := range message.Headers {
		switch v := value.(type) {
		case float64:
			value = int32(v)
		case map[string]any:
			value = amqp.Table{}
		}
		headers[name] = value
	}
	property := func(name string) string { return fmt.Sprint(message.Properties[name]) }
	s.sendTo(fmt.Sprint(message.Publish["routing_key"]), amqp.Publishing{
		Headers: headers, ContentType: property("content_type"), ContentEncoding: property("content_encoding"), DeliveryMode: amqp.Persistent,
		CorrelationId: property("correlation_id"), ReplyTo: property("reply_to"), Body: message.Body,
	})
}

// capturedTasks are the ids of the captured chain's tasks.
var capturedTasks = []string{"d1238aa9-e826-4ffa-90f4-476dbae7e801", "2ad8de9b-e764-4e93-991a-bc068e0d0202", "0e88ef59-5fce-4291-b12a-b07f56940303"}

// awaitCaptured waits for the end of the captured chain, and reads its results with
// AsyncResult.
func (s *specStack) awaitCaptured(tasks ...string) (results []json.RawMessage) {
	s.t.Helper()
	s.await("the chain to end", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(m) FROM celery_taskmeta m WHERE task_id = $1 AND status IN ('SUCCESS', 'FAILURE')`, tasks[len(tasks)-1])
		return len(rows) == 1, err
	})
	read := s.read(newest, tasks...)
	for _, id := range tasks {
		if r := read[id]; r.State != "SUCCESS" {
			s.t.Errorf("task %s is %s: %s", id, r.State, r.Result)
		}
		results = append(results, read[id].Get.Value)
	}
	s.watch.Text("what Celery reads", fmt.Sprintf("%s", results))
	return results
}

// createSpec inserts the row of a run as MoonMind's API does, with the captured chain's id.
func (s *specStack) createSpec() (run string) {
	s.t.Helper()
	run = moonmind.NewID()
	if err := moonmind.CreateSpec(s.t.Context(), s.conn, run, spectest.Feature, spectest.Repository); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.conn.Exec(s.t.Context(), `UPDATE spec_workflow_runs SET celery_chain_id = $2 WHERE id = $1`, run, capturedTasks[2]); err != nil {
		s.t.Fatal(err)
	}
	return run
}

// The message of MoonMind's API that was captured must run the whole chain, and the one
// that a Python worker has published for the next task must go on from there.
func TestSpecChainOfCapturedMessages(t *testing.T) {
	t.Parallel()
	for name, first := range map[string]int{"discover_from_the_api": 0, "submit_published_by_the_worker": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSpecStack(t, specConfig{Files: true})
			s.startSpecWorker(append([]string{"speckit"}, codexQueues...), "MM_ORCHESTRATOR_SPEC_QUEUES=all", "MM_ORCHESTRATOR_SPEC_ONLY=true")
			run := s.createSpec()
			if first > 0 {
				s.afterDiscovery(run)
			}
			s.publishCaptured(name, run)
			results := s.awaitCaptured(capturedTasks[first:]...)
			s.requirePublished()
			left := s.spec(run, results)
			s.requireRowsForMoonMind(left)
			if first == 0 {
				s.requireResultsForMoonMind(left)
			}
			s.requireMetrics(1, moonmind.SpecTasks[first:]...)
		})
	}
}

// afterDiscovery writes the rows that Python's discovery leaves.
func (s *specStack) afterDiscovery(run string) {
	s.t.Helper()
	recorded := spectest.RecordedAs(s.t, recordedValues, "spec_rows_and_files.json", spectest.Names{Run: run})
	states := recorded["task_states"].(map[string]any)
	rows := append([]any{states["discover_succeeded"]}, states["placeholders"].([]any)[1:]...)
	text, err := json.Marshal(rows)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.conn.Exec(s.t.Context(), `INSERT INTO spec_workflow_task_states SELECT * FROM jsonb_populate_recordset(NULL::spec_workflow_task_states, $1)`, string(text)); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.conn.Exec(s.t.Context(), `UPDATE spec_workflow_runs SET status = 'running', phase = 'discover', started_at = now() WHERE id = $1`, run); err != nil {
		s.t.Fatal(err)
	}
}

// In test mode rows, files and results must equal those that MoonMind's Python worker has
// left, field by field: for a chain of a Python producer, and for the captured message.
func TestSpecRunsInTestModeEqualTheRecordedOne(t *testing.T) {
	t.Parallel()
	for _, producer := range []string{newest, "captured"} {
		t.Run(producer, func(t *testing.T) {
			t.Parallel()
			s := newSpecStack(t, specConfig{TestMode: true})
			s.startSpecWorker(everyQueue(), "MM_ORCHESTRATOR_SPEC_QUEUES=all")
			var run spectest.Run
			if producer == "captured" {
				id := s.createSpec()
				s.publishCaptured("discover_from_the_api", id)
				run = s.spec(id, s.awaitCaptured(capturedTasks...))
			} else {
				answer := s.submitSpec(producer)
				s.requireSuccess(answer, 3)
				run = s.spec(answer.RunID, answer.results())
			}
			spectest.CompareTestMode(t, recordedValues, run)
			s.requireMetrics(1, moonmind.SpecTasks...)
		})
	}
}

// A run that has failed at publishing must go on from there with the stored patch when the
// API retries it, without asking Codex again, and from discovery when the API says so.
func TestSpecRetryOfThePythonAPI(t *testing.T) {
	t.Parallel()
	s := newSpecStack(t, specConfig{})
	s.startSpecWorker(append([]string{"speckit"}, codexQueues...), "MM_ORCHESTRATOR_SPEC_QUEUES=all", "MM_ORCHESTRATOR_SPEC_ONLY=true")
	const refusal = "main is frozen until Monday"
	if err := s.github.RefusePushes(spectest.Repository, refusal); err != nil {
		t.Fatal(err)
	}
	answer := s.submitSpec(newest)
	if len(answer.Results) != 3 || answer.Results[1].State != "SUCCESS" || answer.Results[2].State != "FAILURE" || !strings.Contains(string(answer.Results[2].Result), refusal) {
		t.Fatalf("results are %s", answer.results())
	}
	if run := s.spec(answer.RunID, nil).Run; run["status"] != "failed" || run["branch_name"] != nil || len(s.github.Pulls(spectest.Repository)) != 0 {
		t.Errorf("the failed run is %v", run)
	}
	if err := s.github.RefusePushes(spectest.Repository, ""); err != nil {
		t.Fatal(err)
	}

	const notes = "GitHub token renewed"
	retry := s.retrySpec(newest, answer.RunID, "--notes", notes)
	s.requireSuccess(retry, 1)
	s.requirePublished()
	run := s.spec(answer.RunID, retry.results())
	s.requireRowsForMoonMind(run)
	s.requireMetrics(2, "apply_and_publish")
	// What the script sends is what the API sends; Codex has left more than Python's test mode.
	var sent map[string]any
	if err := json.Unmarshal(retry.Context, &sent); err != nil {
		t.Fatal(err)
	}
	names := spectest.Names{Run: answer.RunID, Job: fmt.Sprint(run.Run["codex_task_id"])}
	recorded := spectest.RecordedAs(t, recordedValues, "spec_context_stages.json", names)["retry_resumed_at_publish_first_argument"].(map[string]any)
	for key := range recorded {
		if sent[key] == nil {
			t.Errorf("the retry was sent without %s", key)
		}
	}
	for key, want := range map[string]any{"attempt": 2.0, "retry": true, "retry_notes": notes, "codex_queue": "codex-0", "codex_affinity_key": recorded["codex_affinity_key"]} {
		if sent[key] != want {
			t.Errorf("the retry was sent with %s %v, want %v", key, sent[key], want)
		}
	}
	at := slices.IndexFunc(run.States, func(row spectest.Row) bool { return row["attempt"] == 2.0 })
	if at < 0 || run.States[at]["payload"].(map[string]any)["resumed"] != true {
		t.Errorf("tasks are %v", run.States)
	}

	// The change is published already: from discovery, Codex does the task again.
	if _, err := s.conn.Exec(t.Context(), `UPDATE spec_workflow_runs SET status = 'failed' WHERE id = $1`, answer.RunID); err != nil {
		t.Fatal(err)
	}
	again := s.retrySpec(versions[0], answer.RunID, "--mode", "restart_from_discovery", "--notes", "once more")
	s.requireSuccess(again, 3)
	if n := s.model.Turns(); n != 2 {
		t.Errorf("codex was asked %d times, want once more", n)
	}
	if !strings.Contains(s.model.Requests()[len(s.model.Requests())-1].Prompt, "once more") {
		t.Error("the prompt does not have the notes of the retry")
	}
	if pulls := s.github.Pulls(spectest.Repository); len(pulls) != 1 || pulls[0].State != "open" {
		t.Errorf("pull requests are %+v", pulls)
	}
}

// Somebody at a terminal checks the credentials, submits a run, watches it, looks at it,
// and retries what has failed.
func TestSpecCommandsAgainstARealStack(t *testing.T) {
	t.Parallel()
	s := newSpecStack(t, specConfig{})
	s.environment = append(append(s.environment, s.credentials...), "MM_ORCHESTRATOR_SPEC_QUEUES=all", "MM_ORCHESTRATOR_SPEC_ONLY=true", "GITHUB_REPOSITORY="+spectest.Repository)
	run := func(code int, args ...string) string {
		t.Helper()
		text, err := s.command(append([]string{"spec"}, args...)...).CombinedOutput()
		s.watch.Text(fmt.Sprintf("the output of spec %q", args), string(text))
		got := 0
		if exit, is := err.(*exec.ExitError); is {
			got = exit.ExitCode()
		} else if err != nil {
			t.Fatal(err)
		}
		if got != code {
			t.Fatalf("spec %q: exit code %d, want %d: %s", args, got, code, text)
		}
		return string(text)
	}
	says := func(text string, parts ...string) {
		t.Helper()
		for _, part := range parts {
			if !strings.Contains(text, part) {
				t.Errorf("%q is missing in\n%s", part, text)
			}
		}
	}

	says(run(0, "preflight"), "valid          codex", "codex-cli", "with the key in env:CODEX_API_KEY", "valid          github", "may push to "+spectest.Repository, "with the scope repo")
	says(run(1, "preflight", "--repository", "octo/other"), "scope_missing", "octo/other")
	says(run(0, "runs"), "no runs")

	s.startSpecWorker(append([]string{"speckit"}, codexQueues...))
	if err := s.github.RefusePushes(spectest.Repository, "main is frozen until Monday"); err != nil {
		t.Fatal(err)
	}
	text := run(1, "submit", spectest.Feature, "--follow")
	says(text, "main is frozen until Monday", "mm-orchestrator spec retry")
	id := regexp.MustCompile(uuids.String()).FindString(text)
	says(run(0, "runs"), id[:8], "failed", "the git server refuses the push to "+specBranch)
	if err := s.github.RefusePushes(spectest.Repository, ""); err != nil {
		t.Fatal(err)
	}
	says(run(0, "retry", id, "--notes", "not frozen any more", "--follow"), "goes on from apply_and_publish, attempt 2", "has succeeded", s.github.URL+"/octo/widgets/pull/1")
	s.requirePublished()
	s.requireRowsForMoonMind(s.spec(id, nil))
	says(run(0, "runs", id[:8]), "succeeded, phase complete", specBranch, "pull/1", "submit_codex_job", "gh_push.log", "Codex", "valid")

	says(run(1, "retry", id), "only a failed run can be retried")
	var list []struct {
		ID     string `json:"id"`
		Status string `json:"status"`
	}
	if err := json.Unmarshal([]byte(run(0, "runs", "--json")), &list); err != nil || len(list) != 1 || list[0].ID != id || list[0].Status != "succeeded" {
		t.Errorf("runs --json: %+v, %v", list, err)
	}
}

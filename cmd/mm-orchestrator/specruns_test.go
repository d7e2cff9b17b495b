package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// The message that `spec submit` publishes has the fields and values of the one that
// MoonMind's API publishes, except for its ids and its origin.
func TestSpecSubmitPublishesWhatTheAPIPublishes(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../tasks/speckit/testdata/celery_messages_spec_workflow.json")
	if err != nil {
		t.Fatal(err)
	}
	var recorded struct {
		Message struct {
			Publish    struct{ Exchange, RoutingKey string }
			Properties map[string]any
			Headers    map[string]any
			Body       []any
		} `json:"discover_from_the_api"`
	}
	if err := json.Unmarshal(text, &recorded); err != nil {
		t.Fatal(err)
	}
	c := mustLoad(t, nil)
	config, err := c.worker(nil, discardLogger())
	if err != nil {
		t.Fatal(err)
	}
	c.Spec.Consume = c.speckit().Queues()
	c.addSpec(&config)
	sender, err := client.New(client.FromWorker(config))
	if err != nil {
		t.Fatal(err)
	}
	defer sender.Close()
	const chain = "0e88ef59-5fce-4291-b12a-b07f56940303"
	messages, _, err := sender.Messages(t.Context(), specChainOf(c.speckit().NewRun("e2b7c4d0-19af-4c55-8b3e-0a6d5f4c3b2a", "014-refresh-docs")), client.TaskID(chain))
	if err != nil || len(messages) != 1 {
		t.Fatalf("%d messages, %v", len(messages), err)
	}
	got := messages[0]
	if got.RoutingKey != "speckit" || got.Exchange != "" {
		t.Errorf("published to %q with %q", got.Exchange, got.RoutingKey)
	}
	var body []any
	if err := json.Unmarshal(got.Body, &body); err != nil {
		t.Fatal(err)
	}
	// Ids differ, and so does the name of the process.
	links := body[2].(map[string]any)["chain"].([]any)
	if len(links) != 2 || links[0].(map[string]any)["options"].(map[string]any)["task_id"] != chain {
		t.Errorf("chain %v", links)
	}
	want := recorded.Message
	neutral(links)
	neutral(want.Body[2].(map[string]any)["chain"].([]any))
	if !reflect.DeepEqual(body, want.Body) {
		t.Errorf("body\n%v, want\n%v", body, want.Body)
	}
	headers := map[string]any{}
	encoded, err := json.Marshal(got.Headers)
	if err == nil {
		err = json.Unmarshal(encoded, &headers)
	}
	if err != nil {
		t.Fatal(err)
	}
	if headers["id"] != headers["root_id"] || headers["id"] != got.Properties.CorrelationID {
		t.Errorf("id %v, root_id %v, correlation_id %v", headers["id"], headers["root_id"], got.Properties.CorrelationID)
	}
	for _, name := range []string{"id", "root_id", "origin", "argsrepr", "kwargsrepr"} {
		if headers[name] == nil || headers[name] == "" {
			t.Errorf("no header %s", name)
		}
		headers[name], want.Headers[name] = nil, nil
	}
	if !reflect.DeepEqual(headers, want.Headers) {
		t.Errorf("headers\n%v, want\n%v", headers, want.Headers)
	}
	if p := got.Properties; p.ContentType != want.Properties["content_type"] || p.ContentEncoding != want.Properties["content_encoding"] || p.ReplyTo == "" || fmt.Sprint(p.DeliveryMode) != fmt.Sprint(want.Properties["delivery_mode"]) {
		t.Errorf("properties %+v, want %v", p, want.Properties)
	}
}

// neutral removes the ids of links.
func neutral(links []any) {
	for _, link := range links {
		link.(map[string]any)["options"] = nil
	}
}

// A run is submitted, shown, fails, is retried with its stored patch, and succeeds; its
// feature has one active run at a time.
func TestSpecCommands(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.guard(t)
	s.writeTasks(t, "014-refresh-docs", "- [ ] T002 Write it\n")
	env := s.specEnv("API_TOKEN=" + apiToken)
	command := func(code int, args ...string) (stdout, stderr string) {
		t.Helper()
		p := start(t, env, args...)
		if got := p.exit(); got != code {
			t.Fatalf("%s: exit code %d, want %d: %s%s", args, got, code, p.stdout.String(), p.stderr.String())
		}
		return p.stdout.String(), p.stderr.String()
	}
	d := &storetest.Database{URL: s.database, Pool: pool(t, s.database)}

	var submitted specSubmitted
	text, _ := command(exitOK, "spec", "submit", "014-refresh-docs", "--repository", "octo/widgets", "--json")
	if err := json.Unmarshal([]byte(text), &submitted); err != nil {
		t.Fatal(err)
	}
	run := submitted.RunID
	row := d.Rows(t, `SELECT status::text, phase::text, repository, celery_chain_id, artifacts_path FROM spec_workflow_runs WHERE id = $1`, run)[0]
	if row["status"] != "pending" || row["phase"] != "discover" || row["repository"] != "octo/widgets" || row["celery_chain_id"] != submitted.ChainID || row["artifacts_path"] != "var/artifacts/spec_workflows/"+run {
		t.Errorf("row %v", row)
	}
	_, stderr := command(exitFailure, "spec", "submit", "014-refresh-docs")
	if !strings.Contains(stderr, "Workflow already active for feature '014-refresh-docs' (run_id="+run+")") || !strings.Contains(stderr, "spec runs "+run) {
		t.Errorf("conflict: %s", stderr)
	}
	if text, _ := command(exitOK, "spec", "runs", "--status", "pending"); !strings.Contains(text, run) || !strings.Contains(text, "its next task waits in a queue") {
		t.Errorf("runs: %s", text)
	}
	if _, stderr := command(exitFailure, "spec", "retry", run); !strings.Contains(stderr, "only a failed run can be retried") {
		t.Errorf("retry of a pending run: %s", stderr)
	}

	start(t, env, "worker").logLine("worker ready")
	s.awaitSpecRun(t, d, run, "succeeded")
	text, _ = command(exitOK, "spec", "runs", run[:8])
	for _, want := range []string{run, "succeeded, phase complete", "014-refresh-docs/t002", "https://example.com/", "submit_codex_job", "Pull request published", "run_summary.json", "Codex", "valid"} {
		if !strings.Contains(text, want) {
			t.Errorf("run: %q is missing in\n%s", want, text)
		}
	}
	if text, _ := command(exitOK, "spec", "submit", "014-refresh-docs", "--follow"); !strings.Contains(text, "has succeeded: https://example.com/") {
		t.Errorf("submit --follow: %s", text)
	}

	// As after a failure of publishing: the stored patch is used.
	d.Rows(t, `UPDATE spec_workflow_runs SET status = 'failed' WHERE id = $1 RETURNING id`, run)
	d.Rows(t, `UPDATE spec_workflow_task_states SET status = 'failed', message = 'GitHub did not answer' WHERE workflow_run_id = $1 AND task_name = 'apply_and_publish' RETURNING id`, run)
	if text, _ := command(exitOK, "spec", "runs", "--feature", "014-refresh-docs", "-s", "failed"); !strings.Contains(text, "GitHub did not answer") {
		t.Errorf("failed runs: %s", text)
	}
	text, _ = command(exitOK, "spec", "retry", run[:8], "--notes", "GitHub answers", "--follow")
	if !strings.Contains(text, "goes on from apply_and_publish, attempt 2") || !strings.Contains(text, "has succeeded") {
		t.Errorf("retry: %s", text)
	}
	kept := filepath.Join(s.workspace, "var/artifacts/spec_workflows", run, "retry_context_attempt_2.json")
	if text, err := os.ReadFile(kept); err != nil || !strings.Contains(string(text), `"notes": "GitHub answers"`) {
		t.Errorf("%v: %s", err, text)
	}
	artifact := d.Rows(t, `SELECT path, size_bytes, digest FROM workflow_artifacts WHERE workflow_run_id = $1 AND artifact_type = 'retry_context'`, run)
	if len(artifact) != 1 || artifact[0]["path"] != kept || !strings.HasPrefix(fmt.Sprint(artifact[0]["digest"]), "sha256:") {
		t.Errorf("artifact %v", artifact)
	}
	payload := d.Rows(t, `SELECT payload->>'resumed' AS resumed, payload->>'patchPath' AS patch FROM spec_workflow_task_states WHERE workflow_run_id = $1 AND task_name = 'apply_and_publish' AND attempt = 2`, run)[0]
	if payload["resumed"] != "true" || !strings.HasPrefix(fmt.Sprint(payload["patch"]), "var/artifacts/spec_workflows/"+run+"/TEST-") {
		t.Errorf("payload %v", payload)
	}

	// From discovery the next task is a new one.
	s.writeTasks(t, "014-refresh-docs", "- [x] T002 Write it\n- [ ] T003 And this\n")
	d.Rows(t, `UPDATE spec_workflow_runs SET status = 'failed' WHERE id = $1 RETURNING id`, run)
	if text, _ := command(exitOK, "spec", "retry", run, "--from-discovery", "--follow"); !strings.Contains(text, "goes on from discover_next_phase, attempt 2") || !strings.Contains(text, "has succeeded") {
		t.Errorf("retry from discovery: %s", text)
	}
	if branch := d.Rows(t, `SELECT branch_name FROM spec_workflow_runs WHERE id = $1`, run)[0]["branch_name"]; branch != "014-refresh-docs/t003" {
		t.Errorf("branch %v", branch)
	}

	// What cannot be a feature or a repository, and what does not exist.
	for _, test := range []struct {
		code int
		args []string
		want string
	}{
		{exitUsage, []string{"spec"}, "give spec submit"},
		{exitUsage, []string{"spec", "submit"}, "needs the name of a feature"},
		{exitUsage, []string{"spec", "submit", "../../etc"}, "below the tasks root"},
		{exitUsage, []string{"spec", "submit", "/etc"}, "below the tasks root"},
		{exitUsage, []string{"spec", "submit", "f", "--repository", "--upload-pack=x"}, "it must have the form owner/name"},
		{exitUsage, []string{"spec", "submit", "f", "--repository", "a/../b"}, "it must have the form owner/name"},
		{exitFailure, []string{"spec", "retry", "00000000"}, "there is no Spec workflow run"},
		{exitUsage, []string{"spec", "runs", "--status", "stuck"}, "it must be pending"},
	} {
		if _, stderr := command(test.code, test.args...); !strings.Contains(stderr, test.want) {
			t.Errorf("%s: %s", test.args, stderr)
		}
	}
}

// A chain that cannot be published fails its run, which so does not block its feature.
func TestSpecSubmitWithoutABroker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.guard(t)
	p := start(t, append(s.specEnv("API_TOKEN="+apiToken), "CELERY_BROKER_URL=amqp://127.0.0.1:1//"), "spec", "submit", "f")
	if code := p.exit(); code != exitUnavailable || !strings.Contains(p.stderr.String(), "has failed, because its chain could not be published") {
		t.Errorf("exit code %d: %s", code, p.stderr.String())
	}
	d := &storetest.Database{URL: s.database, Pool: pool(t, s.database)}
	if rows := d.Rows(t, `SELECT status::text, finished_at FROM spec_workflow_runs`); len(rows) != 1 || rows[0]["status"] != "failed" || rows[0]["finished_at"] == nil {
		t.Errorf("rows %v", rows)
	}
}

// --follow says why a run has succeeded without a pull request.
func TestWhatASpecRunHasPublished(t *testing.T) {
	t.Parallel()
	row := func(task store.SpecTask, attempt int, status store.SpecStatus, message string) store.SpecTaskRow {
		return store.SpecTaskRow{Task: task, Attempt: attempt, Status: status, Message: message}
	}
	discovered := row(store.SpecDiscover, 1, store.SpecSucceeded, "No open task")
	merged := row(store.SpecPublish, 2, store.SpecSucceeded, "Nothing to publish: main has the change already")
	for want, d := range map[string]store.SpecRunDetail{
		"https://github.com/o/w/pull/7":                   {Run: store.SpecRunRow{PRURL: "https://github.com/o/w/pull/7"}, Tasks: []store.SpecTaskRow{discovered, merged}},
		"Nothing to publish: main has the change already": {Tasks: []store.SpecTaskRow{discovered, row(store.SpecPublish, 1, store.SpecFailed, "GitHub did not answer"), merged}},
		"the feature has no open task":                    {Tasks: []store.SpecTaskRow{discovered, row(store.SpecPublish, 1, store.SpecSkipped, "Skipped publish because no work was required")}},
	} {
		if got := publishedText(d); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A run whose message was lost is found by a worker, and can be retried.
func TestAStuckSpecRunIsFailed(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.guard(t)
	s.writeTasks(t, "f", "- [ ] T1 x\n")
	d := &storetest.Database{URL: s.database, Pool: pool(t, s.database)}
	const run = "7e5b9f7a-3d76-4cb2-9b1b-3f2f4e2b1a11"
	d.Rows(t, `INSERT INTO spec_workflow_runs (id, feature_key) VALUES ($1, 'f') RETURNING id`, run)
	env := append(s.specEnv(), "MM_ORCHESTRATOR_SPEC_STUCK_AFTER=2s", "MM_ORCHESTRATOR_SPEC_ONLY=true")
	start(t, env, "worker").logLine("run was lost")
	s.awaitSpecRun(t, d, run, "failed")
	p := start(t, env, "spec", "retry", run, "--follow")
	if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "goes on from discover_next_phase, attempt 1") {
		t.Errorf("exit code %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
}

func (s testEnv) awaitSpecRun(t *testing.T, d *storetest.Database, run, status string) {
	t.Helper()
	eventually(t, "run "+run+" is "+status, func() error {
		if got := d.Rows(t, `SELECT status::text FROM spec_workflow_runs WHERE id = $1`, run)[0]["status"]; got != status {
			return fmt.Errorf("it is %v", got)
		}
		return nil
	})
}

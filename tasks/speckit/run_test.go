package speckit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

const (
	recordedRun = spectest.RecordedRun
	feature     = spectest.Feature
	apiToken    = "very-secret-value"
	runPath     = "var/artifacts/spec_workflows/" + recordedRun
)

// chain is a run in a database of its own, and a worker's configuration.
type chain struct {
	t      *testing.T
	db     *storetest.Database
	config Config
	root   string
	next   int
	// watch looks for tokens and keys in all that the test leaves.
	watch *leaktest.Watch
	// runID is recordedRun, or that of a run with programs: those of tests in other
	// processes must not be taken for its own.
	runID string
}

func newChain(t *testing.T, tasks string, change ...func(*Config)) *chain {
	t.Helper()
	c := &chain{t: t, db: storetest.New(t), root: t.TempDir(), runID: recordedRun}
	c.exec(`INSERT INTO spec_workflow_runs (id, feature_key, repository, artifacts_path) VALUES ($1, $2, 'octo/widgets', $3) RETURNING id`, recordedRun, feature, runPath)
	c.writeTasks(tasks)
	c.watch = leaktest.Guard(t, leaktest.State{
		Secrets:  map[string]string{"token": gitToken, "key": codexKey, "API_TOKEN": apiToken},
		Files:    []string{filepath.Join(c.root, "specs")}, // what a user writes
		Database: c.db.OwnerURL, Environments: map[string][]leaktest.Program{"key": {{Name: "codex", Children: true}}},
	})
	c.config = Config{
		Runs: c.db.Open(t), Logger: slog.New(slog.NewTextHandler(io.MultiWriter(t.Output(), c.watch.Output("the log")), nil)), Redactor: artifacts.NewRedactor([]string{"API_TOKEN=" + apiToken}),
		TasksRoot: filepath.Join(c.root, "specs"), Artifacts: artifacts.DirectoryConfig{WorkingDir: c.root}, TestMode: true, Skills: SkillsPolicy{Canary: 100},
	}
	for _, f := range change {
		f(&c.config)
	}
	return c
}

func (c *chain) exec(sql string, args ...any) []storetest.Row {
	c.t.Helper()
	return c.db.Rows(c.t, sql, args...)
}

func (c *chain) writeTasks(text string) {
	c.t.Helper()
	dir := filepath.Join(c.root, "specs", feature)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tasks.md"), []byte(text), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

func (c *chain) speckit() *Speckit {
	c.t.Helper()
	s, err := New(c.config)
	if err != nil {
		c.t.Fatal(err)
	}
	return s
}

// task returns the context of a handler.
func (c *chain) task(id string) context.Context {
	return worker.ContextWithTask(c.t.Context(), &worker.Task{Message: &protocol.Message{ID: id}})
}

// id is a new task id.
func (c *chain) id() string { c.next++; return fmt.Sprintf("task-%d", c.next) }

func (c *chain) discover(args discoverArgs) (json.RawMessage, error) {
	args.RunID = c.runID
	context, err := c.speckit().discover(c.task(c.id()), args)
	return context, c.watch.Error("the error of discover_next_phase", err)
}

// follow carries a task out with the context that its worker would get.
func (c *chain) follow(task store.SpecTask, context json.RawMessage) (json.RawMessage, error) {
	c.t.Helper()
	s := c.speckit()
	prepared, err := s.prepare(protocol.NewSignature("any", nil, nil), []json.RawMessage{context})
	if err != nil {
		c.t.Fatal(err)
	}
	run := s.submit
	if task == store.SpecPublish {
		run = s.publish
	}
	result, err := run(c.task(c.id()), contextArgs{prepared.Args[0]})
	c.watch.Text("the result of "+string(task), string(result))
	return result, c.watch.Error("the error of "+string(task), err)
}

// ok fails the test on an error.
func (c *chain) ok(context json.RawMessage, err error) json.RawMessage {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
	return context
}

// takeOver repeats a task until PostgreSQL has noticed that the worker that had it is
// dead, as the broker would by delivering the message again.
func (c *chain) takeOver(run func() (json.RawMessage, error)) (json.RawMessage, error) {
	for {
		context, err := run()
		var again worker.Reject
		if !errors.As(err, &again) || c.t.Context().Err() != nil {
			return context, err
		}
	}
}

func (c *chain) run() storetest.Row {
	c.t.Helper()
	return c.exec(`SELECT * FROM spec_workflow_runs WHERE id = $1`, c.runID)[0]
}

func (c *chain) state(task store.SpecTask, attempt int) storetest.Row {
	c.t.Helper()
	rows := c.exec(`SELECT * FROM spec_workflow_task_states WHERE workflow_run_id = $1 AND task_name = $2 AND attempt = $3`, c.runID, string(task), attempt)
	if len(rows) != 1 {
		c.t.Fatalf("%d rows of %s, attempt %d", len(rows), task, attempt)
	}
	return rows[0]
}

// path is the run's directory, as rows have it.
func (c *chain) path() string { return filepath.Dir(runPath) + "/" + c.runID }

// ownRun gives the run an id that no other test has.
func (c *chain) ownRun() {
	c.t.Helper()
	id := fmt.Sprint(c.exec(`SELECT gen_random_uuid()::text AS id`)[0]["id"])
	c.exec(`UPDATE spec_workflow_runs SET id = $1, artifacts_path = $2 RETURNING id`, id, filepath.Dir(runPath)+"/"+id)
	c.runID = id
}

// file reads a file of the run.
func (c *chain) file(name string) string {
	c.t.Helper()
	text, err := os.ReadFile(filepath.Join(c.root, c.path(), name))
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

// recordedAs is spectest.RecordedAs for the recorded run.
func recordedAs(t *testing.T, name, job, url string) map[string]any {
	t.Helper()
	return spectest.RecordedAs(t, "testdata", name, spectest.Names{Run: recordedRun, Job: job, URL: url})
}

// A run in test mode leaves the rows, files and results that MoonMind's Python worker
// leaves.
func TestARunInTestModeIsThatOfMoonMind(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	contexts := []json.RawMessage{c.ok(c.discover(discoverArgs{}))}
	contexts = append(contexts, c.ok(c.follow(store.SpecSubmit, contexts[0])))
	contexts = append(contexts, c.ok(c.follow(store.SpecPublish, contexts[1])))
	spectest.CompareTestMode(t, "testdata", spectest.Run{
		Run: c.run(), States: c.exec(`SELECT * FROM spec_workflow_task_states WHERE workflow_run_id = $1`, recordedRun),
		Artifacts: c.exec(`SELECT * FROM workflow_artifacts WHERE workflow_run_id = $1`, recordedRun),
		Audits:    c.exec(`SELECT * FROM workflow_credential_audits WHERE workflow_run_id = $1`, recordedRun),
		Results:   contexts, File: c.file,
	})
}

// A run without an open task ends as succeeded, and the tasks after discovery keep it
// so.
func TestNoOpenTask(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Config){"test mode": func(*Config) {}, "no credentials": func(c *Config) { c.TestMode = false }} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newChain(t, "- [x] T1 done\n", change)
			first := c.ok(c.discover(discoverArgs{}))
			if run := c.run(); run["status"] != "succeeded" || run["phase"] != "complete" {
				t.Errorf("after discover: %v", run)
			}
			second := c.ok(c.follow(store.SpecSubmit, first))
			if run := c.run(); run["status"] != "succeeded" || run["phase"] != "complete" {
				t.Errorf("after submit: %v", run)
			}
			c.ok(c.follow(store.SpecPublish, second))
			rows := recordedAs(t, "spec_rows_and_files.json", "", "")
			states := rows["task_states"].(map[string]any)
			spectest.CompareRow(t, "discover", c.state(store.SpecDiscover, 1), states["discover_no_work"])
			spectest.CompareRow(t, "submit", c.state(store.SpecSubmit, 1), states["submit_skipped"])
			spectest.CompareRow(t, "publish", c.state(store.SpecPublish, 1), states["publish_skipped"])
			spectest.Same(t, "context", spectest.WithoutSkills(t, "context", first), recordedAs(t, "spec_context_stages.json", "", "")["1_no_work"])
			if run := c.run(); run["status"] != "succeeded" || run["phase"] != "complete" || run["pr_url"] != nil {
				t.Errorf("after publish: %v", run)
			}
		})
	}
}

func (c *chain) fails(class, text string, err error) {
	c.t.Helper()
	c.watch.Text("the error", fmt.Sprintf("%v %+v", err, err))
	var python *worker.Error
	if !errors.As(err, &python) || python.Type != class || !strings.Contains(fmt.Sprint(python.Args...), text) {
		c.t.Errorf("got %v, want %s: …%s…", err, class, text)
	}
}

// Outside of test mode submit fails before it changes anything, and the rows say why
// and what to do.
func TestOutsideOfTestMode(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks(), func(c *Config) { c.TestMode = false })
	first := c.ok(c.discover(discoverArgs{}))
	_, err := c.follow(store.SpecSubmit, first)
	const text = "Credential validation failed: this worker has neither a Codex backend nor a way to publish, and TEST_MODE is not set"
	c.fails("RuntimeError", text, err)
	state := c.state(store.SpecSubmit, 1)
	spectest.CompareRow(t, "submit", state, map[string]any{"status": "failed", "started_at": nil, "finished_at": "set"})
	if message := fmt.Sprint(state["message"]); !strings.HasPrefix(message, text) || strings.Contains(message, "WORKFLOW_TEST_MODE") {
		t.Errorf("message is %s", message)
	}
	if run := c.run(); run["status"] != "failed" || run["finished_at"] == nil || run["phase"] != "submit" {
		t.Errorf("run is %v", run)
	}
	audit := c.exec(`SELECT codex_status, github_status, notes FROM workflow_credential_audits`)[0]
	if audit["codex_status"] != "invalid" || audit["github_status"] != "invalid" || !strings.HasPrefix(fmt.Sprint(audit["notes"]), "Credential validation detected issues:\n- ") {
		t.Errorf("audit is %v", audit)
	}
}

// A message that is delivered again changes nothing and has the same result.
func TestARepeatedTaskChangesNothing(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	s := c.speckit()
	again := func(what string, do func() (json.RawMessage, error)) json.RawMessage {
		t.Helper()
		first := c.ok(do())
		before := c.exec(`SELECT to_json(s)::text AS s FROM spec_workflow_task_states s UNION ALL SELECT to_json(r)::text FROM spec_workflow_runs r UNION ALL SELECT to_json(a)::text FROM workflow_artifacts a ORDER BY 1`)
		c.writeTasks("- [ ] T999 something else\n")
		if second := c.ok(do()); string(second) != string(first) {
			t.Errorf("%s: second result %s, first %s", what, second, first)
		}
		spectest.Same(t, what+": rows", c.exec(`SELECT to_json(s)::text AS s FROM spec_workflow_task_states s UNION ALL SELECT to_json(r)::text FROM spec_workflow_runs r UNION ALL SELECT to_json(a)::text FROM workflow_artifacts a ORDER BY 1`), before)
		return first
	}
	first := again("discover", func() (json.RawMessage, error) {
		return s.discover(c.task("d"), discoverArgs{RunID: recordedRun})
	})
	second := again("submit", func() (json.RawMessage, error) { return s.submit(c.task("s"), contextArgs{first}) })
	again("publish", func() (json.RawMessage, error) { return s.publish(c.task("p"), contextArgs{second}) })

	// A failure is repeated too.
	c2 := newChain(t, "")
	if err := os.RemoveAll(filepath.Join(c2.root, "specs", feature)); err != nil {
		t.Fatal(err)
	}
	s2 := c2.speckit()
	for range 2 {
		_, err := s2.discover(c2.task("d"), discoverArgs{RunID: recordedRun})
		c2.fails("FileNotFoundError", "Spec task file not found: ", err)
		c2.writeTasks(spectest.Tasks())
	}
	spectest.CompareRow(t, "discover", c2.state(store.SpecDiscover, 1), map[string]any{"status": "failed", "finished_at": "set"})
}

// While a live worker runs a task, a second delivery waits; a worker that dies leaves
// the task to the next, which ends it once.
func TestOneWorkerAtATime(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	other := c.db.Open(t, func(config *store.Config) { config.Worker = "other@box" })
	begin := func(s *store.Store, id string) (store.SpecDecision, error) {
		return s.BeginSpec(t.Context(), store.SpecRequest{RunID: recordedRun, Task: store.SpecDiscover, Attempt: 1, TaskID: id},
			func(store.SpecStart) store.SpecWrite { return store.SpecWrite{} })
	}
	decision, err := begin(other, "d")
	held, started := decision.(store.SpecStart)
	if err != nil || !started {
		t.Fatalf("%v, %v", decision, err)
	}
	for _, id := range []string{"d", "another task of the run"} {
		_, err = c.speckit().discover(c.task(id), discoverArgs{RunID: recordedRun})
		var reject worker.Reject
		if !errors.As(err, &reject) || !reject.Requeue || !strings.Contains(reject.Reason, "other@box") {
			t.Errorf("%s: %v", id, err)
		}
	}
	other.Close() // as if the worker had died
	c.ok(c.takeOver(func() (json.RawMessage, error) {
		return c.speckit().discover(c.task("d"), discoverArgs{RunID: recordedRun})
	}))
	if rows := c.exec(`SELECT starts, outcome IS NOT NULL AS ended FROM mm_orchestrator.spec_claims`); len(rows) != 1 || fmt.Sprint(rows[0]["starts"]) != "2" || rows[0]["ended"] != true {
		t.Errorf("claims: %v", rows)
	}
	// The token of the dead worker is a fence.
	if err := c.db.Open(t).WriteSpec(t.Context(), held.Claim, store.SpecWrite{Status: store.SpecRunFailed}); !errors.Is(err, store.ErrClaimLost) {
		t.Errorf("write with a lost claim: %v", err)
	}
	if run := c.run(); run["status"] != "running" {
		t.Errorf("run is %v", run)
	}
}

func TestATaskThatKillsItsWorkerFails(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	for range 3 {
		dead := c.db.Open(t)
		decision, err := dead.BeginSpec(t.Context(), store.SpecRequest{RunID: recordedRun, Task: store.SpecDiscover, Attempt: 1, TaskID: "d"},
			func(store.SpecStart) store.SpecWrite { return store.SpecWrite{} })
		if _, started := decision.(store.SpecStart); err != nil || !started {
			t.Fatalf("%v, %v", decision, err)
		}
		dead.Close()
	}
	_, err := c.takeOver(func() (json.RawMessage, error) {
		return c.speckit().discover(c.task("d"), discoverArgs{RunID: recordedRun})
	})
	c.fails("RuntimeError", "was started 3 times", err)
	if run := c.run(); run["status"] != "failed" {
		t.Errorf("run is %v", run)
	}
}

// A retry as MoonMind's API sends it continues with the stored patch, if that is still
// the one that was recorded.
func TestRetryWithTheStoredPatch(t *testing.T) {
	t.Parallel()
	const attempt = `{"run_id": "` + recordedRun + `", "feature_key": "014-refresh-docs", "artifacts_path": "` + runPath + `", "repository": "octo/widgets", "attempt": 2, "retry": true,
		"task": {"taskId": "T012", "title": "x", "phase": null, "lineNumber": 57}, "codex_task_id": %q, "resume_token": {"codexPatchPath": %q, "codexLogsPath": %q, "branchName": null}}`
	for name, test := range map[string]struct {
		// change happens after the first attempt; path is the patch of the token.
		change      func(t *testing.T, patch string)
		path        func(c *chain, patch string) string
		class, want string
	}{
		"as it was":     {},
		"name only":     {path: func(_ *chain, patch string) string { return filepath.Base(patch) }},
		"absolute path": {path: func(c *chain, patch string) string { return filepath.Join(c.root, patch) }},
		"missing":       {change: func(t *testing.T, patch string) { check(t, os.Remove(patch)) }, class: "FileNotFoundError", want: "does not exist any more: retry the run from discovery"},
		"changed":       {change: func(t *testing.T, patch string) { check(t, os.WriteFile(patch, []byte("other"), 0o644)) }, class: "ValueError", want: "has changed since it was recorded"},
		"replaced by link": {change: func(t *testing.T, patch string) {
			check(t, os.Remove(patch))
			check(t, os.Symlink("/etc/passwd", patch))
		}, class: "ValueError", want: "is not a regular file"},
		"of another run":    {path: func(*chain, string) string { return "../other/x.patch" }, class: "ValueError", want: "is not in the directory of run"},
		"outside":           {path: func(*chain, string) string { return "/etc/passwd" }, class: "ValueError", want: "is not in the directory of run"},
		"the directory":     {path: func(*chain, string) string { return runPath }, class: "ValueError", want: "is not in the directory of run"},
		"the directory's .": {path: func(*chain, string) string { return "." }, class: "ValueError", want: "is not in the directory of run"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newChain(t, spectest.Tasks())
			c.ok(c.follow(store.SpecPublish, c.ok(c.follow(store.SpecSubmit, c.ok(c.discover(discoverArgs{}))))))
			run := c.run()
			patch, logs := run["codex_patch_path"].(string), run["codex_logs_path"].(string)
			if test.change != nil {
				test.change(t, filepath.Join(c.root, patch))
			}
			path := patch
			if test.path != nil {
				path = test.path(c, patch)
			}
			result, err := c.follow(store.SpecPublish, json.RawMessage(fmt.Sprintf(attempt, run["codex_task_id"], path, logs)))
			if test.class != "" {
				c.fails(test.class, test.want, err)
				return
			}
			var context map[string]any
			check(t, json.Unmarshal(c.ok(result, err), &context))
			if context["codex_logs_path"] != logs {
				t.Errorf("codex_logs_path is %v", context["codex_logs_path"])
			}
			var payload map[string]any
			check(t, json.Unmarshal(rawOf(c.state(store.SpecPublish, 2)["payload"]), &payload))
			if payload["resumed"] != true || !strings.Contains(c.file("apply_output.json"), "resume_from_retry_context") {
				t.Errorf("payload is %v", payload)
			}
		})
	}
}

// A second attempt from discovery counts its own rows; those that the first left
// queued are marked.
func TestRetryFromDiscovery(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	c.ok(c.discover(discoverArgs{}))
	notes := "try again"
	context := c.ok(c.discover(discoverArgs{Attempt: 2, RetryNotes: &notes}))
	for _, task := range []store.SpecTask{store.SpecSubmit, store.SpecPublish} {
		if state := c.state(task, 1); state["status"] != "skipped" || state["message"] != "Not run: the run was retried as attempt 2" {
			t.Errorf("%s, attempt 1: %v", task, state)
		}
		if state := c.state(task, 2); state["status"] != "queued" {
			t.Errorf("%s, attempt 2: %v", task, state)
		}
	}
	c.ok(c.follow(store.SpecSubmit, context))
	if audit := c.exec(`SELECT notes, codex_checked_at = checked_at AS same FROM workflow_credential_audits`)[0]; audit["notes"] != notes || audit["same"] != true {
		t.Errorf("audit is %v", audit)
	}
	// A chain whose attempt an earlier chain has had runs all the same.
	c.ok(c.discover(discoverArgs{Attempt: 2}))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Messages, rows and files that nobody should send give a clear error and leave nothing
// behind.
func TestHostileInput(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks())
	s := c.speckit()
	outside := filepath.Join(t.TempDir(), "tasks.md")
	check(t, os.WriteFile(outside, []byte("- [ ] T1 secret\n"), 0o644))
	check(t, os.MkdirAll(filepath.Join(c.config.TasksRoot, "link"), 0o755))
	check(t, os.Symlink(outside, filepath.Join(c.config.TasksRoot, "link", "tasks.md")))
	check(t, os.Symlink(filepath.Dir(outside), filepath.Join(c.config.TasksRoot, "dir")))
	check(t, os.MkdirAll(filepath.Join(c.config.TasksRoot, "folder", "tasks.md"), 0o755))
	check(t, os.MkdirAll(filepath.Join(c.config.TasksRoot, "big"), 0o755))
	check(t, os.WriteFile(filepath.Join(c.config.TasksRoot, "big", "tasks.md"), make([]byte, maxTasksFile+1), 0o644))
	check(t, os.MkdirAll(filepath.Join(c.config.TasksRoot, "latin"), 0o755))
	check(t, os.WriteFile(filepath.Join(c.config.TasksRoot, "latin", "tasks.md"), []byte("- [ ] T1 \xe4\n"), 0o644))
	for key, want := range map[string][2]string{
		"../" + feature:      {"ValueError", traversal},
		"/etc":               {"ValueError", traversal},
		"a/../../b":          {"ValueError", traversal},
		"nul\x00":            {"ValueError", traversal},
		"link":               {"ValueError", traversal},
		"dir":                {"ValueError", traversal},
		"folder":             {"OSError", "is not a regular file"},
		"big":                {"ValueError", "is larger than 8 MiB"},
		"latin":              {"ValueError", "is not UTF-8"},
		"very-secret-value":  {"FileNotFoundError", "/***/tasks.md"},
		"none-of-our-making": {"FileNotFoundError", "Spec task file not found: "},
	} {
		_, err := s.discover(c.task(c.id()), discoverArgs{RunID: recordedRun, FeatureKey: &key})
		c.fails(want[0], want[1], err)
	}
	for _, context := range []string{
		`null`, `[]`, `"text"`, `{}`, `{"run_id": null}`, `{"run_id": "x"}`, `{"run_id": {"a": 1}}`, `{"run_id": "00000000-0000-4000-8000-000000000000"}`,
		`{"run_id": "` + recordedRun + `", "attempt": 0}`, `{"run_id": "` + recordedRun + `", "attempt": 1e99}`, `{"run_id": "` + recordedRun + `", "attempt": "x"}`,
		`{"run_id": "` + recordedRun + `", "attempt": [1]}`, `{"run_id": "` + recordedRun + `", "x": "` + strings.Repeat("x", maxContext) + `"}`,
		`{"run_id": "` + recordedRun + `", "codex_task_id": "../../../x", "task": {"taskId": "T1"}}`,
		`{"run_id": "` + recordedRun + `", "codex_task_id": "a\u0000b"}`,
		`{"run_id": "` + recordedRun + `", "codex_task_id": "` + strings.Repeat("a", 300) + `"}`,
	} {
		_, err := s.publish(c.task(c.id()), contextArgs{json.RawMessage(context)})
		var python *worker.Error
		if !errors.As(err, &python) || python.Type == "" {
			t.Errorf("%.80s: %v", context, err)
		}
	}
	if files, _ := filepath.Glob(filepath.Join(c.root, "*")); len(files) != 2 { // specs and var
		t.Errorf("files: %v", files)
	}
	// Odd values that are no error.
	c.ok(s.submit(c.task(c.id()), contextArgs{json.RawMessage(`{"run_id": "` + recordedRun + `", "attempt": "7", "task": [], "skill_execution": 3, "skill_overrides": {"submit_codex_job": " other "}, "retry_notes": {}}`)}))
	var payload map[string]any
	check(t, json.Unmarshal(rawOf(c.state(store.SpecSubmit, 7)["payload"]), &payload))
	if payload["selectedSkill"] != "other" {
		t.Errorf("payload is %v", payload)
	}
}

func TestSkillsPolicy(t *testing.T) {
	t.Parallel()
	context := newObject()
	policy := SkillsPolicy{Canary: 100, Default: "speckit", Stages: map[store.SpecTask]string{store.SpecSubmit: "coder"}}
	for name, test := range map[string]struct {
		change func(*SkillsPolicy)
		want   decision
	}{
		"stage":          {func(*SkillsPolicy) {}, decision{"coder", true, false}},
		"not allowed":    {func(p *SkillsPolicy) { p.Allowed = []string{"speckit"} }, decision{"speckit", true, false}},
		"allowed":        {func(p *SkillsPolicy) { p.Allowed = []string{"coder"} }, decision{"coder", true, false}},
		"disabled":       {func(p *SkillsPolicy) { p.Disabled = true }, decision{"coder", false, false}},
		"shadow":         {func(p *SkillsPolicy) { p.Shadow = true }, decision{"coder", true, true}},
		"canary of none": {func(p *SkillsPolicy) { p.Canary = 0 }, decision{"coder", false, false}},
	} {
		p := policy
		test.change(&p)
		if got := p.decide(recordedRun, store.SpecSubmit, context); got != test.want {
			t.Errorf("%s: got %+v, want %+v", name, got, test.want)
		}
	}
	// int(sha256("run-123:stage-a").hexdigest()[:8], 16) % 100 in Python
	for canary, want := range map[int]bool{bucketOfRun123: false, bucketOfRun123 + 1: true} {
		if got := (SkillsPolicy{Canary: canary}).decide("run-123", "stage-a", context); got.useSkills != want {
			t.Errorf("canary of %d: %v", canary, got.useSkills)
		}
	}
}

// bucketOfRun123 is what Python computes.
const bucketOfRun123 = 60

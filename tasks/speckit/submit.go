package speckit

import (
	"cmp"
	"context"
	"encoding/json"
	"math"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// contextArgs is the argument of submit_codex_job and apply_and_publish.
type contextArgs struct {
	Context json.RawMessage `celery:"context"`
}

// chained prepares a task whose argument is the context of the chain.
func (s *Speckit) chained(ctx context.Context, task store.SpecTask, args contextArgs) (request, error) {
	r := request{task: task, taskID: taskID(ctx)}
	var err error
	if r.context, err = parseObject(args.Context); err != nil {
		return r, s.pythonError(&failure{class: "TypeError", text: "the context of the chain is no object: " + err.Error()})
	}
	if _, has := r.context.values["run_id"]; !has {
		return r, s.pythonError(&failure{class: "KeyError", text: "run_id"})
	}
	r.runID, r.attempt = pythonText(r.context, "run_id"), 1
	if text, has := r.context.values["attempt"]; has {
		var n float64
		text = json.RawMessage(strings.Trim(string(text), `"`))
		if json.Unmarshal(text, &n) != nil || n < 1 || n > math.MaxInt32 {
			return r, s.pythonError(valueError("attempt of the context is %s, not a number from 1", head(string(text))))
		}
		r.attempt = int(n)
	}
	r.context.set("attempt", r.attempt)
	r.context.set("retry", r.context.truthy("retry") || r.attempt > 1)
	return r, nil
}

// credentials is what a check of the credentials found.
type credentials struct {
	codex, github string // labels of the audit row; codex is "" if this task does not check it
	// codexBefore is what an earlier task has found about Codex, as the audit row says.
	codexBefore string
	// codexMessage and githubMessage are for the audit row, "" for none.
	codexMessage, githubMessage string
	issues                      []string
}

// checkCredentials checks whether this worker has what the task needs. What the
// context says about an earlier check is not trusted: whoever publishes a message
// writes it (docs/spec-workflow.md#s15).
func (s *Speckit) checkCredentials() *credentials {
	if s.config.TestMode {
		return &credentials{codex: "valid", github: "valid"}
	}
	if s.config.Codex.configured() { // and no preflight
		return &credentials{codex: "valid", github: "valid"}
	}
	return &credentials{codex: "invalid", github: "invalid", issues: []string{
		"this worker has neither a Codex backend nor a way to publish, and " + s.config.SettingName("TEST_MODE") + " is not set: set it to true to simulate both",
	}}
}

func (c *credentials) valid() bool { return len(c.issues) == 0 }

// audit is the row of the check, with MoonMind's notes.
func (c *credentials) audit(retryNotes string) *store.SpecAudit {
	var notes []string
	if own := strings.TrimSpace(retryNotes); own != "" {
		notes = append(notes, own)
	}
	if !c.valid() {
		notes = append(notes, "Credential validation detected issues:\n- "+strings.Join(c.issues, "\n- "))
	}
	return &store.SpecAudit{Codex: c.codex, GitHub: c.github, CodexMessage: c.codexMessage, GitHubMessage: c.githubMessage, Notes: strings.Join(notes, "\n\n")}
}

func (c *credentials) failure() error {
	return runtimeError("Credential validation failed: %s", strings.Join(c.issues, "; "))
}

// addTo adds the statuses to a payload.
func (c *credentials) addTo(payload *object) {
	if codex := cmp.Or(c.codex, c.codexBefore); codex != "" {
		payload.set("codexCredentialStatus", codex)
	}
	payload.set("githubCredentialStatus", c.github)
}

// begin is what is written when submit or publish starts. A run without an open task
// keeps its end (docs/spec-workflow.md#s3): its phase stays, and its credentials are
// checked for the record only.
//
// Where a preflight is configured, the credentials are checked after this was written,
// by ready: a check asks other computers, and takes seconds.
func (a *attempt) begin(phase store.SpecPhase, message string) store.SpecWrite {
	a.opening = message
	queue := pythonText(a.context, "codex_queue")
	if a.run.QueueRegistered {
		a.context.set("_persistable_codex_queue", queue)
	} else {
		a.context.set("_persistable_codex_queue", nil)
	}
	if a.checksLater() {
		w := store.SpecWrite{Phase: phase, CodexQueue: queue, State: a.state(store.SpecRunning, statusPayload(store.SpecRunning, message))}
		if a.context.truthy("no_work") {
			w.Phase = ""
		}
		return w
	}
	a.credentials = a.checkCredentials()
	w := store.SpecWrite{Phase: phase, CodexQueue: queue, Audit: a.credentials.audit(a.redact(a.context.text("retry_notes")))}
	if a.context.truthy("no_work") {
		w.Phase = ""
	} else if !a.credentials.valid() {
		return w
	}
	w.State = a.checked()
	return w
}

// checked puts what the check of the credentials has found into the context, and returns
// the row of the task that begins.
func (a *attempt) checked() *store.SpecState {
	a.context.set("credentials_validated", a.credentials.valid())
	status := newObject()
	if codex := cmp.Or(a.credentials.codex, a.credentials.codexBefore); codex != "" {
		status.set("codex", codex)
	}
	status.set("github", a.credentials.github)
	a.context.set("credential_audit_status", status)
	payload := statusPayload(store.SpecRunning, a.opening)
	a.credentials.addTo(payload)
	return a.state(store.SpecRunning, payload)
}

// submit has Codex do the task (docs/spec-workflow.md#submit).
func (s *Speckit) submit(ctx context.Context, args contextArgs) (json.RawMessage, error) {
	r, err := s.chained(ctx, store.SpecSubmit, args)
	if err != nil {
		return nil, err
	}
	r.open = func(a *attempt) store.SpecWrite {
		w := a.begin(store.SpecPhaseSubmit, "Submitting task to Codex")
		if !a.checksLater() && a.credentials.valid() && !a.context.truthy("no_work") {
			w.PreflightStatus, w.PreflightMessage, w.CodexVolume = string(preflight.LoginSkipped), preflight.NoVolume, a.context.text("codex_volume")
			a.context.setDefault("codex_volume", nil)
			a.context.set("codex_preflight_status", w.PreflightStatus)
			a.context.set("codex_preflight_message", w.PreflightMessage)
			a.context.set("codex_preflight_exit_code", nil)
		}
		return w
	}
	r.work = func(ctx context.Context, a *attempt) (store.SpecWrite, error) {
		if err := a.ready(ctx); err != nil {
			return store.SpecWrite{}, err
		}
		return a.submitTask(ctx)
	}
	return s.run(ctx, r)
}

func (a *attempt) submitTask(ctx context.Context) (store.SpecWrite, error) {
	if a.context.truthy("no_work") {
		payload := statusPayload(store.SpecSkipped, "Skipped because discovery found no remaining work")
		payload.set("reason", "no_work")
		return store.SpecWrite{State: a.state(store.SpecSkipped, payload)}, nil
	}
	if !a.credentials.valid() {
		return store.SpecWrite{}, a.credentials.failure()
	}
	dir, err := a.directory()
	if err != nil {
		return store.SpecWrite{}, err
	}
	defer dir.Close()
	if !a.config.TestMode {
		return a.runCodex(ctx, dir)
	}
	id, title := a.openTask()
	job := "TEST-" + a.derived("codex", 8)
	event := newObject()
	event.set("event", "submitted")
	event.set("taskId", job)
	event.set("feature", a.context.text("feature_key"))
	event.set("taskIdentifier", id)
	event.set("summary", title)
	line, err := event.python(false)
	if err != nil {
		return store.SpecWrite{}, valueError("the context of the chain cannot be written: %v", err)
	}
	logs, err := a.write(dir, "codex_logs", job+".jsonl", line+"\n")
	if err != nil {
		return store.SpecWrite{}, err
	}
	a.context.set("codex_task_id", job)
	a.context.set("codex_logs_path", logs.Path)
	payload := statusPayload(store.SpecSucceeded, "Codex job submitted")
	payload.set("codexTaskId", job)
	payload.set("summary", "Submitted "+id+" for "+a.context.text("feature_key"))
	payload.set("logsPath", logs.Path)
	a.credentials.addTo(payload)
	return store.SpecWrite{
		CodexTaskID: job, CodexLogsPath: logs.Path, Artifacts: []store.SpecArtifact{logs},
		State: a.state(store.SpecSucceeded, payload, logs.Path),
	}, nil
}

// openTask returns identifier and title of the task that the chain works on.
func (a *attempt) openTask() (id, title string) {
	if task := a.context.inner("task"); task != nil {
		return pythonText(task, "taskId"), pythonText(task, "title")
	}
	return "", ""
}

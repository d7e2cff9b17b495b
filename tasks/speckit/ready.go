package speckit

import (
	"cmp"
	"context"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// checksLater says that the credentials are checked by ready, and not while the task's
// claim is written.
func (s *Speckit) checksLater() bool { return s.config.Preflight != nil && !s.config.TestMode }

// ready finds out whether the task can work, before it does anything else, and records
// what it has found (docs/spec-workflow.md#preflight). A run without an open task needs
// nothing: then a check that fails is only recorded.
func (a *attempt) ready(ctx context.Context) error {
	if !a.checksLater() {
		return nil
	}
	submits := a.task == store.SpecSubmit
	noWork := a.context.truthy("no_work")
	request := preflight.Request{Repository: cmp.Or(a.context.text("repository"), a.run.Repository, a.config.Repository), Codex: submits}
	if submits && !noWork {
		request.Volume = cmp.Or(a.context.text("codex_volume"), a.run.CodexVolume)
	}
	report, err := a.check(ctx, request)
	if err != nil {
		return err
	}
	a.credentials = a.credentialsOf(report)
	a.credentials.codexBefore = a.run.CodexStatus
	write := store.SpecWrite{Audit: a.credentials.audit(a.redact(a.context.text("retry_notes"))), State: a.checked()}
	if login := report.Login; submits && !noWork {
		write.PreflightStatus, write.PreflightMessage = string(login.Status), a.redact(login.Message)
		write.CodexVolume = request.Volume
		a.context.set("codex_volume", nil)
		if request.Volume != "" {
			a.context.set("codex_volume", request.Volume)
		}
		a.context.set("codex_preflight_status", write.PreflightStatus)
		a.context.set("codex_preflight_message", write.PreflightMessage)
		a.context.set("codex_preflight_exit_code", nil)
		if login.ExitCode != nil {
			a.context.set("codex_preflight_exit_code", *login.ExitCode)
		}
		if login.Output != "" {
			a.log.Info("codex login status", "volume", request.Volume, "status", login.Status, "output", login.Output)
		}
	}
	if err := a.config.Runs.WriteSpec(ctx, a.claim, write); err != nil {
		return err
	}
	switch {
	case noWork:
		return nil
	case !a.credentials.valid():
		return a.credentials.failure()
	case report.Login.Status == preflight.LoginFailed:
		more := newObject()
		more.set("codexPreflightStatus", string(report.Login.Status))
		more.set("codexVolume", request.Volume)
		return &failure{class: "RuntimeError", text: report.Login.Message, code: "codex_preflight_failed", payload: more}
	}
	return nil
}

// check finds out whether the task can work. The error is that of the context.
func (a *attempt) check(ctx context.Context, request preflight.Request) (preflight.Report, error) {
	defer waitAtMost(ctx, serversLimit)()
	return a.config.Preflight.Check(ctx, request)
}

// credentialsOf is a report as the rows have it.
func (s *Speckit) credentialsOf(report preflight.Report) *credentials {
	c := &credentials{
		codex: string(report.Codex.Status), github: string(report.GitHub.Status),
		codexMessage: s.redact(report.Codex.Message), githubMessage: s.redact(report.GitHub.Message),
	}
	for _, finding := range []preflight.Finding{report.Codex, report.GitHub} {
		if finding.Status.Fails() {
			c.issues = append(c.issues, s.redact(finding.Message))
		}
	}
	return c
}

package speckit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// findings are what a preflight finds, one after the other.
type findings struct {
	reports  []preflight.Report
	requests []preflight.Request
}

func (f *findings) Check(ctx context.Context, request preflight.Request) (preflight.Report, error) {
	f.requests = append(f.requests, request)
	if ctx.Err() != nil {
		return preflight.Report{}, context.Cause(ctx)
	}
	return f.reports[min(len(f.requests), len(f.reports))-1], nil
}

func checkedBy(f *findings) func(*Config) {
	return func(c *Config) { c.TestMode, c.Preflight = false, f }
}

// A run that cannot work fails before it does anything, the rows have what was found,
// and nothing is left in the run's directory.
func TestARunThatCannotWorkFailsAtOnce(t *testing.T) {
	t.Parallel()
	code := 1
	for name, test := range map[string]struct {
		report              preflight.Report
		text, code          string
		codex, github, note string
		login               any
	}{
		"scope missing": {
			report: preflight.Report{
				Codex:  preflight.Finding{Status: preflight.Valid, Message: "codex 1.2.3 has the key of very-secret-value"},
				GitHub: preflight.Finding{Status: preflight.ScopeMissing, Message: "the token very-secret-value must not push: give it the scope repo"},
				Login:  preflight.Login{Status: preflight.LoginSkipped, Message: preflight.NoVolume},
			},
			text: "Credential validation failed: the token *** must not push: give it the scope repo", code: "submit_codex_job_failed",
			codex: "valid", github: "scope_missing", note: "Credential validation detected issues:\n- the token *** must not push: give it the scope repo", login: "skipped",
		},
		"both invalid": {
			report: preflight.Report{Codex: preflight.Finding{Status: preflight.Invalid, Message: "no login"}, GitHub: preflight.Finding{Status: preflight.Invalid, Message: "no token"}, Login: preflight.Login{Status: preflight.LoginSkipped}},
			text:   "Credential validation failed: no login; no token", code: "submit_codex_job_failed",
			codex: "invalid", github: "invalid", note: "Credential validation detected issues:\n- no login\n- no token", login: "skipped",
		},
		"login failed": {
			report: preflight.Report{
				Codex: preflight.Finding{Status: preflight.ExpiresSoon, Message: "expires"}, GitHub: preflight.Finding{Status: preflight.Valid, Message: "may push"},
				Login: preflight.Login{Status: preflight.LoginFailed, Message: "Codex login status failed for volume 'v'.", ExitCode: &code, Output: "Not logged in"},
			},
			text: "Codex login status failed for volume 'v'.", code: "codex_preflight_failed", codex: "expires_soon", github: "valid", login: "failed",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			found := &findings{reports: []preflight.Report{test.report}}
			c := newChain(t, spectest.Tasks(), checkedBy(found))
			first := c.ok(c.discover(discoverArgs{}))
			if len(found.requests) != 0 {
				t.Errorf("discovery checked %v", found.requests)
			}
			_, err := c.follow(store.SpecSubmit, first)
			c.fails("RuntimeError", test.text, err)
			if want := (preflight.Request{Repository: "octo/widgets", Codex: true}); len(found.requests) != 1 || found.requests[0] != want {
				t.Errorf("requests %+v", found.requests)
			}
			run := c.run()
			if run["status"] != "failed" || run["finished_at"] == nil || run["codex_preflight_status"] != test.login || run["codex_task_id"] != nil || run["branch_name"] != nil {
				t.Errorf("run is %v", run)
			}
			payload, is := c.state(store.SpecSubmit, 1)["payload"].(map[string]any)
			if !is || payload["code"] != test.code || payload["message"] != test.text {
				t.Errorf("payload is %v", payload)
			}
			audit := c.exec(`SELECT codex_status, github_status, COALESCE(notes, '') AS notes, codex_message, github_message FROM workflow_credential_audits`)[0]
			if audit["codex_status"] != test.codex || audit["github_status"] != test.github || audit["notes"] != test.note || audit["github_message"] == nil {
				t.Errorf("audit is %v", audit)
			}
			if text := fmt.Sprint(run, payload, audit); strings.Contains(text, "very-secret-value") {
				t.Errorf("a row has the secret: %s", text)
			}
			if files, err := os.ReadDir(filepath.Join(c.root, runPath)); !errors.Is(err, os.ErrNotExist) && len(files) > 0 {
				t.Errorf("the run's directory has %v, %v", files, err)
			}
		})
	}
}

// apply_and_publish checks GitHub again, and keeps what was found about Codex.
func TestPublishChecksGitHubOnly(t *testing.T) {
	t.Parallel()
	found := &findings{reports: []preflight.Report{{GitHub: preflight.Finding{Status: preflight.Invalid, Message: "the token was revoked"}}}}
	c := newChain(t, spectest.Tasks())
	second := c.ok(c.follow(store.SpecSubmit, c.ok(c.discover(discoverArgs{}))))
	checkedBy(found)(&c.config)
	_, err := c.follow(store.SpecPublish, second)
	c.fails("RuntimeError", "Credential validation failed: the token was revoked", err)
	if !slices.Equal(found.requests, []preflight.Request{{Repository: "octo/widgets"}}) {
		t.Errorf("requests %+v", found.requests)
	}
	audit := c.exec(`SELECT codex_status, github_status, github_checked_at > codex_checked_at AS later FROM workflow_credential_audits`)[0]
	if audit["codex_status"] != "valid" || audit["github_status"] != "invalid" || audit["later"] != true {
		t.Errorf("audit is %v", audit)
	}
}

// A publication's row says what was found about Codex, as MoonMind's does, also in a retry,
// whose message does not say it.
func TestPublishSaysWhatWasFoundAboutCodex(t *testing.T) {
	t.Parallel()
	p := newPublishChain(t, func(c *Config) {
		c.Preflight = &findings{reports: []preflight.Report{{GitHub: preflight.Finding{Status: preflight.Valid}}}}
	})
	p.exec(`INSERT INTO workflow_credential_audits (id, workflow_run_id, codex_status, github_status, codex_checked_at) VALUES (gen_random_uuid(), $1, 'expires_soon', 'invalid', now()) RETURNING id`, recordedRun)
	p.store("drei")
	context := p.published("task-1", 2)
	if payload := p.payload(store.SpecPublish, 2); payload["codexCredentialStatus"] != "expires_soon" || payload["githubCredentialStatus"] != "valid" {
		t.Errorf("payload is %v", payload)
	}
	if status := fmt.Sprint(context["credential_audit_status"]); status != "map[codex:expires_soon github:valid]" {
		t.Errorf("context has %s", status)
	}
	if audit := p.exec(`SELECT codex_status, github_status FROM workflow_credential_audits`)[0]; audit["codex_status"] != "expires_soon" || audit["github_status"] != "valid" {
		t.Errorf("audit is %v", audit)
	}
}

// Without an open task nothing is needed: what is missing is only recorded.
func TestARunWithoutAnOpenTaskNeedsNoCredentials(t *testing.T) {
	t.Parallel()
	found := &findings{reports: []preflight.Report{{Codex: preflight.Finding{Status: preflight.Invalid, Message: "no login"}, GitHub: preflight.Finding{Status: preflight.Invalid, Message: "no token"}}}}
	c := newChain(t, "- [x] T1 done\n", checkedBy(found))
	c.ok(c.follow(store.SpecPublish, c.ok(c.follow(store.SpecSubmit, c.ok(c.discover(discoverArgs{}))))))
	if run := c.run(); run["status"] != "succeeded" || run["phase"] != "complete" {
		t.Errorf("run is %v", run)
	}
	if audit := c.exec(`SELECT codex_status, github_status FROM workflow_credential_audits`)[0]; audit["codex_status"] != "invalid" {
		t.Errorf("audit is %v", audit)
	}
}

// A worker that stops while it checks returns the message: the run has not failed.
func TestAStopDuringTheCheckIsNoFailure(t *testing.T) {
	t.Parallel()
	c := newChain(t, spectest.Tasks(), checkedBy(&findings{reports: []preflight.Report{{}}}))
	first := c.ok(c.discover(discoverArgs{}))
	stopping := errors.New("the worker stops")
	ctx, stop := context.WithCancelCause(c.task(c.id()))
	s := c.speckit()
	s.config.Preflight = stopped{stop, stopping}
	_, err := s.submit(ctx, contextArgs{first})
	var python *worker.Error
	if !errors.Is(err, stopping) || errors.As(err, &python) {
		t.Errorf("error %v", err)
	}
	if run := c.run(); run["status"] != "running" {
		t.Errorf("run is %v", run)
	}
}

// stopped stops the worker while it checks.
type stopped struct {
	stop context.CancelCauseFunc
	why  error
}

func (s stopped) Check(ctx context.Context, _ preflight.Request) (preflight.Report, error) {
	s.stop(s.why)
	return preflight.Report{}, context.Cause(ctx)
}

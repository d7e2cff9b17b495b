package orchestrator

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// trail reads the audit trail of a run from the database, checks it, and returns its
// records and its text.
func (r *liveEnv) trail(t *testing.T, run string) ([]audit.Record, string) {
	t.Helper()
	var records []audit.Record
	var text strings.Builder
	var v *audit.Verifier
	err := r.db.Open(t).ReadTrail(t.Context(), run, func(trail store.Trail) error {
		v = audit.NewVerifier(run, trail.Removed, &trail.Head)
		return nil
	}, func(e audit.Entry) error {
		v.Add(e)
		text.Write(append(e.Text, '\n'))
		record, err := audit.Decode(e.Text)
		records = append(records, record)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if report := v.End(); !report.Good() {
		t.Errorf("the trail is broken: %v", report.Findings)
	}
	return records, text.String()
}

// brief lists the step, the kind and the main thing of records.
func brief(records []audit.Record) []string {
	var lines []string
	for _, r := range records {
		line := strings.TrimSpace(r.Step + " " + string(r.Kind))
		switch {
		case r.Command != nil:
			line += " " + strings.Join(r.Command.Argv, " ")
			if r.Command.Exit != nil {
				line += fmt.Sprint(" ", *r.Command.Exit)
			}
		case r.File != nil:
			line += " " + r.File.Path
		case r.Approval != nil:
			line = strings.TrimSpace(line + " " + r.Approval.Approver)
		case r.Status != "":
			line += " " + r.Status
		}
		lines = append(lines, line)
	}
	return lines
}

const audited = `
cd "$(dirname "$0")"
echo "begin $2 $1" >> ledger
case $1 in patch) echo "2 $SECRET_TOKEN" > "$WORKSPACE/services/api.py"; echo new > "$WORKSPACE/services/new.py"; echo "the token is $SECRET_TOKEN";; esac
while [ -e "hold-$2-$1" ]; do sleep 0.02; done
echo "end $2 $1" >> ledger
[ ! -e "fail-$2-$1" ]`

const auditedPlan = `[
	{"name": "analyze", "parameters": {}},
	{"name": "patch", "parameters": {"commands": [["docker", "patch", "run", "--token=hunter2hunter2"]], "allowlist": ["services/**"]}},
	{"name": "build", "parameters": {"command": ["docker", "build", "run"]}},
	{"name": "restart", "parameters": {"command": ["docker", "restart", "run"]}},
	{"name": "rollback", "parameters": {"strategies": [{"type": "t", "commands": [["docker", "rollback", "run"]]}]}}
]`

// auditedEnv is an approvalEnv whose patch alters files, one of them with a secret.
func newAuditedEnv(t *testing.T) *approvalEnv {
	t.Helper()
	e := newApprovalEnv(t, "pre-run")
	e.fromRecord = true
	e.file("services/api.py", "1\n")
	e.git("add", ".")
	e.git("commit", "-q", "-m", "y")
	e.config.Environ = append(e.config.Environ, "SECRET_TOKEN=hunter2hunter2", "WORKSPACE="+e.workspace)
	e.config.Redactor = artifacts.NewRedactor(e.config.Environ)
	e.config.AuditDirectory = filepath.Join(t.TempDir(), "audit")
	e.program("docker", audited)
	return e
}

// createApproved submits the run with an approval.
func (e *approvalEnv) createApproved(t *testing.T, plan string) {
	t.Helper()
	e.runs++
	e.id = fmt.Sprintf("00000000-0000-4000-8000-%012d", e.runs)
	e.db.Create(t, storetest.Seed{ID: e.id, Plan: []byte(plan), ArtifactRoot: filepath.Join(e.base, e.id)})
	e.set(t, `status = 'awaiting_approval', metrics_snapshot = '{"approval": {"required": true, "requirement": "pre-run", "status": "awaiting"}}'`)
	e.db.Approve(t, e.id)
	e.names["run"] = e.id
}

// start submits the run and publishes its chain.
func (e *approvalEnv) start(t *testing.T) {
	t.Helper()
	e.createApproved(t, auditedPlan)
	e.publish(e.chain(t, "run", "analyze", "patch", "build", "restart"))
}

// TestTrailOfARolledBackRun: every effect is in the trail, with the files' checksums, and
// no secret is.
func TestTrailOfARolledBackRun(t *testing.T) {
	t.Parallel()
	e := newAuditedEnv(t)
	e.mark(t, "fail-run-restart")
	e.worker(t, "one", 1, false)
	e.start(t)
	e.await(t, "the run is rolled back", func() bool { return e.status(t) == "rolled_back" })
	file := filepath.Join(e.config.AuditDirectory, e.id+".jsonl")
	ended := time.Now()
	e.await(t, "the copy of the trail is there", func() bool { _, err := os.Stat(file); return err == nil })
	if took := time.Since(ended); took > time.Second {
		t.Errorf("the copy is there %s after the end", took)
	}
	records, text := e.trail(t, e.id)
	want := []string{
		"analyze approval-granted ops-417", "analyze run-started", "analyze step-started", "analyze approval-granted ops-417", "analyze step-ended succeeded",
		"patch step-started", "patch command-started docker patch run --token=***", "patch command-ended docker patch run --token=*** 0",
		"patch file-changed services/api.py", "patch file-changed services/new.py", "patch step-ended succeeded",
		"build step-started", "build command-started docker build run", "build command-ended docker build run 0", "build step-ended succeeded",
		"restart step-started", "restart command-started docker restart run", "restart command-ended docker restart run 1", "restart step-ended failed",
		"rollback step-started", "rollback files-changing", "rollback file-restored services/api.py", "rollback file-restored services/new.py",
		"rollback command-started docker rollback run", "rollback command-ended docker rollback run 0", // the engine was not seen
		"rollback step-ended succeeded", "rollback run-ended rolled_back",
	}
	got := brief(records)
	if !slices.Equal(got, want) {
		t.Errorf("trail is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, r := range records {
		if r.File != nil && r.Kind == audit.FileChanged && r.File.Path == "services/api.py" {
			// sha256sum of "1\n", and of the file with the secret.
			same(t, "before", r.File.Before.SHA256, "4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865")
			same(t, "mode", r.File.After.Mode, "100644")
		}
		if r.Kind == audit.CommandEnded && r.Step == "patch" && (r.Command.OutputBytes == 0 || r.Command.Number != 1 || r.Command.Dir != e.workspace) {
			t.Errorf("end of the patch's command: %+v", r.Command)
		}
	}
	if strings.Contains(text, "hunter2") {
		t.Errorf("the trail has a secret:\n%s", text)
	}
	written, err := os.ReadFile(file)
	if err != nil || string(written) != text {
		t.Errorf("the copy differs from the database: %v\n%s", err, written)
	}
	logged := fmt.Sprintf("audit_length=%d", len(records))
	if log := e.logged.String(); log != "" && !strings.Contains(log, logged) {
		t.Errorf("the log does not have %s", logged)
	}
}

// TestTrailIsCompleteAfterAKill: the worker that runs a command dies. The trail has the
// intent, and what its successor does.
func TestTrailIsCompleteAfterAKill(t *testing.T) {
	t.Parallel()
	e := newAuditedEnv(t)
	e.worker(t, "one", 1, false)
	e.start(t)
	e.await(t, "the run ends", func() bool { return e.count(t, unfinished) == 0 })

	// The same run again, in the database: a worker begins patch, announces its command
	// and dies.
	e.runs++
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d", e.runs)
	e.git("checkout", "-q", ".")
	e.git("clean", "-q", "-d", "-f", "services")
	plan := bytes.ReplaceAll([]byte(auditedPlan), []byte(`"run"`), []byte(`"second"`))
	e.db.Create(t, storetest.Seed{ID: id, Plan: plan, ArtifactRoot: filepath.Join(e.base, id)})
	e.id = id
	e.set(t, `status = 'awaiting_approval', metrics_snapshot = '{"approval": {"required": true, "requirement": "pre-run", "status": "awaiting"}}'`)
	e.db.Approve(t, id)
	e.names["second"] = id
	dying := e.db.Open(t, func(c *store.Config) { c.Worker, c.TakeoverGrace = "dying", 10*time.Millisecond })
	e.run(t, dying, "second", "analyze")
	claim := e.begin(t, dying, "second", "patch").(store.Start).Claim
	command := audit.Command{Number: 1, Argv: []string{"docker", "patch", "second"}, Dir: e.workspace}
	if err := dying.Record(t.Context(), claim, audit.Record{Kind: audit.CommandStarted, Command: &command}); err != nil {
		t.Fatal(err)
	}
	dying.Close()
	_, _ = e.trail(t, id) // good as it is
	e.publish(e.chain(t, "second", "patch", "build", "restart"))
	e.await(t, "the second run ends", func() bool { return e.count(t, unfinished) == 0 })
	records, _ := e.trail(t, id)
	var starts, ends int
	for _, r := range records {
		switch {
		case r.Step != "patch":
		case r.Kind == audit.CommandStarted:
			starts++
		case r.Kind == audit.CommandEnded:
			ends++
		case r.Kind == audit.StepStarted && r.Start == 2 && r.Text != "worker dying has left the step unfinished":
			t.Errorf("second start: %+v", r)
		}
	}
	if starts != 2 || ends != 1 {
		text, _ := json.Marshal(brief(records))
		t.Errorf("patch has %d starts of a command and %d ends, want 2 and 1: %s", starts, ends, text)
	}
}

// TestTrailOfAPauseBeforeVerify: who approved a run that has paused is in the trail, and
// that nobody did in time.
func TestTrailOfAPauseBeforeVerify(t *testing.T) {
	t.Parallel()
	pause := func(wait time.Duration) *approvalEnv {
		e := newApprovalEnv(t, "pre-verify")
		e.config.ApprovalWait = wait
		e.worker(t, "one", 1, true)
		e.submit(t, "pending")
		e.send(t)
		return e
	}
	of := func(e *approvalEnv, kinds ...audit.Kind) (found []audit.Record) {
		records, _ := e.trail(t, e.id)
		for _, r := range records {
			if slices.Contains(kinds, r.Kind) {
				found = append(found, r)
			}
		}
		return found
	}
	t.Run("approved", func(t *testing.T) {
		t.Parallel()
		e := pause(time.Hour)
		e.await(t, "the run pauses", func() bool { return e.status(t) == "awaiting_approval" })
		_, err := e.db.Open(t).Approve(t.Context(), store.ApproveRequest{
			RunID: e.id, Approver: store.Approver{ID: "ops-417", Role: "sre"}, Token: []byte("token"), Queue: e.config.Queue,
			Workspace: func(run store.Run) string { return Workspace(e.config.Queue, e.workspace, run) },
		}, func(run store.Run) (string, protocol.Delivery, error) {
			return ChainMessage(run, e.config.Queue, "node", time.Now(), nil)
		})
		if err != nil {
			t.Fatal(err)
		}
		e.await(t, "the run ends", func() bool { return slices.Contains([]string{"succeeded", "rolled_back"}, e.status(t)) })
		got := brief(of(e, audit.RunStarted, audit.Paused, audit.ApprovalGiven, audit.ApprovalGranted, audit.Resumed, audit.RunEnded))
		want := []string{"analyze run-started", "verify paused", "approval-given ops-417", "verify approval-granted ops-417", "verify resumed"}
		if len(got) != len(want)+1 || !slices.Equal(got[:len(want)], want) {
			t.Errorf("trail has %q, want %q and the end", got, want)
		}
	})
	t.Run("not in time", func(t *testing.T) {
		t.Parallel()
		e := pause(time.Second)
		e.await(t, "the run ends", func() bool { return slices.Contains([]string{"succeeded", "rolled_back"}, e.status(t)) })
		got := of(e, audit.Paused, audit.LimitReached, audit.RunEnded)
		if len(got) != 3 || got[1].Kind != audit.LimitReached || *got[1].Rule != (audit.Rule{Name: "approval.wait", Limit: "1s"}) || got[1].Step != "verify" ||
			!strings.Contains(got[1].Text, "waited before verify for an approval from 2") || got[2].Status != "rolled_back" {
			t.Errorf("trail has %+v", got)
		}
	})
}

// TestTrailOfWhatWasRefused: what the worker did not do is in the trail, with who or what
// has refused it.
func TestTrailOfWhatWasRefused(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		plan func(string) string
		// arrange is called before the run's message is published, act when the run has
		// begun to build.
		arrange, act func(*testing.T, *approvalEnv)
		status       string
		kind         audit.Kind
		check        func(audit.Record) bool
	}{
		"without an approval": {
			arrange: func(t *testing.T, e *approvalEnv) { e.set(t, "approval_token = NULL") },
			status:  "awaiting_approval", kind: audit.ApprovalRefused,
			check: func(r audit.Record) bool {
				return r.Step == "analyze" && strings.Contains(r.Text, "approv") && r.Approval.Requirement == "pre-run"
			},
		},
		"a command": {
			plan: func(plan string) string {
				return strings.Replace(plan, `["docker", "build", "run"]`, `["docker", "run", "-v", "/:/host", "--env=SECRET_TOKEN=hunter2hunter2", "x"]`, 1)
			},
			arrange: func(_ *testing.T, e *approvalEnv) {
				e.config.Permissions = []programs.Permission{{Command: "docker patch", Options: []string{"*"}}}
			},
			status: "rolled_back", kind: audit.CommandRefused,
			check: func(r audit.Record) bool {
				return r.Step == "patch" && r.Rule.Name == "docker.runs" && slices.Equal(r.Command.Argv[:2], []string{"docker", "run"}) && strings.Contains(r.Text, "Command not allowed")
			},
		},
		"a file": {
			plan:   func(plan string) string { return strings.Replace(plan, `"services/**"`, `"other/**"`, 1) },
			status: "rolled_back", kind: audit.Refused,
			check: func(r audit.Record) bool {
				return r.Step == "patch" && r.Rule.Name == "allow-list" && strings.Contains(r.Text, "services/new.py is not allow-listed")
			},
		},
		"by an operator": {
			arrange: func(t *testing.T, e *approvalEnv) { e.mark(t, "hold-run-build") },
			act: func(t *testing.T, e *approvalEnv) {
				if _, err := e.db.Open(t).RevokeRun(t.Context(), store.Revocation{RunID: e.id, By: "ann", Reason: "wrong branch"}); err != nil {
					t.Fatal(err)
				}
			},
			status: "rolled_back", kind: audit.Revoked,
			check: func(r audit.Record) bool { return r.By == "ann" && r.Text == "wrong branch" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newAuditedEnv(t)
			plan := auditedPlan
			if test.plan != nil {
				plan = test.plan(plan)
			}
			e.createApproved(t, plan)
			if test.arrange != nil {
				test.arrange(t, e)
			}
			e.worker(t, "one", 1, false)
			e.publish(e.chain(t, "run", "analyze", "patch", "build", "restart"))
			if test.act != nil {
				e.await(t, "the build begins", func() bool { return slices.Contains(e.ledger(), "begin run build") })
				test.act(t, e)
			}
			e.await(t, "the run is "+test.status, func() bool { return e.status(t) == test.status })
			records, text := e.trail(t, e.id)
			i := slices.IndexFunc(records, func(r audit.Record) bool { return r.Kind == test.kind })
			if i < 0 || !test.check(records[i]) {
				t.Errorf("trail has %q", brief(records))
			}
			if strings.Contains(text, "hunter2") {
				t.Errorf("the trail has a secret:\n%s", text)
			}
			for _, r := range records {
				if r.Kind == audit.CommandStarted && r.Step == "build" && test.kind != audit.Revoked {
					t.Errorf("a command was started: %+v", r)
				}
			}
		})
	}
}

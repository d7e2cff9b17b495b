package orchestrator

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// approvalEnv is a liveEnv with a repository and a service that has an approval gate.
type approvalEnv struct {
	*liveEnv
	id   string
	sent int
}

const approvedPlan = `[
	{"name": "analyze", "parameters": {}},
	{"name": "patch", "parameters": {"commands": [["docker", "patch", "run"]], "allowlist": ["*"]}},
	{"name": "build", "parameters": {"command": ["docker", "build", "run"]}},
	{"name": "restart", "parameters": {"command": ["docker", "restart", "run"]}},
	{"name": "verify", "parameters": {"runningIsEnough": true}},
	{"name": "rollback", "parameters": {"strategies": [{"type": "t", "commands": [["docker", "rollback", "run"]]}]}}
]`

// verifyEnds makes verify quick: without an engine it cannot succeed.
func newApprovalEnv(t *testing.T, requirement string) *approvalEnv {
	t.Helper()
	e := &approvalEnv{liveEnv: newLiveEnv(t)}
	e.file("README", "x\n")
	e.file("api.py", "1\n")
	e.git("init", "-q", "-b", "main")
	e.git("add", ".")
	e.git("commit", "-q", "-m", "x")
	e.gate(t, requirement)
	e.config.ApprovalWait = time.Hour
	return e
}

func (e *approvalEnv) gate(t *testing.T, requirement string) {
	t.Helper()
	e.db.Rows(t, `INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes)
		VALUES (gen_random_uuid(), 'api', $1::text::orchestratorapprovalrequirement, '{sre}', 60)
		ON CONFLICT (service_name) DO UPDATE SET requirement = EXCLUDED.requirement RETURNING id`, requirement)
}

// submit creates the run as the API does for a service with a gate, without a token.
func (e *approvalEnv) submit(t *testing.T, status string) {
	t.Helper()
	e.runs++
	e.id = fmt.Sprintf("00000000-0000-4000-8000-%012d", e.runs)
	e.db.Create(t, storetest.Seed{ID: e.id, Plan: []byte(approvedPlan), ArtifactRoot: filepath.Join(e.base, e.id)})
	e.set(t, `status = '`+status+`', approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'api'),
		metrics_snapshot = '{"approval": {"required": true, "requirement": "pre-run", "status": "awaiting"}}'`)
	e.names["run"] = e.id
}

func (e *approvalEnv) set(t *testing.T, assignments string) {
	t.Helper()
	e.db.Rows(t, `UPDATE orchestrator_runs SET `+assignments+` WHERE id = $1 RETURNING id`, e.id)
}

// send publishes the chain of the API, with new task ids.
func (e *approvalEnv) send(t *testing.T) {
	t.Helper()
	e.sent++
	name := fmt.Sprint("chain", e.sent)
	e.names[name] = e.id
	e.publish(e.chain(t, name, "analyze", "patch", "build", "restart", "verify"))
}

func (e *approvalEnv) status(t *testing.T) string {
	t.Helper()
	status, _ := e.db.Run(t, e.id)["status"].(string)
	return status
}

func (e *approvalEnv) message(t *testing.T, step store.Step) string {
	t.Helper()
	text, _ := e.db.State(t, e.id, step)["message"].(string)
	return text
}

// presented waits until a sweep has recorded what the waiting run would do.
func (e *approvalEnv) presented(t *testing.T) {
	t.Helper()
	e.await(t, "a sweep records what the run would do", func() bool {
		return e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.approvals WHERE presented IS NOT NULL`) == 1
	})
}

func TestAnApprovedRunIsCarriedOut(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-run")
	e.worker(t, "one", 1, true)
	e.submit(t, "awaiting_approval")
	e.presented(t)
	e.send(t) // a message that comes before the approval
	e.db.Approve(t, e.id)
	e.send(t)
	e.await(t, "the run ends", func() bool { return e.status(t) == "rolled_back" || e.status(t) == "succeeded" })
	want := []string{"begin run patch", "end run patch", "begin run build", "end run build", "begin run restart", "end run restart"}
	if got := e.ledger(); !slices.Equal(got[:min(len(got), len(want))], want) {
		t.Errorf("ledger %q, want %q. Rows: %v", got, want, e.db.States(t, e.id))
	}
}

func TestARunPausesBeforeVerify(t *testing.T) {
	t.Parallel()
	e := newApprovalEnv(t, "pre-verify")
	e.worker(t, "one", 1, true)
	e.submit(t, "pending")
	e.send(t)
	e.await(t, "the run pauses", func() bool { return e.status(t) == "awaiting_approval" })
	if text := e.message(t, store.StepVerify); !strings.Contains(text, "waits before verify for an approval by sre") {
		t.Errorf("message %q", text)
	}
	if n := e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.claims WHERE outcome IS NULL AND holder IS NOT NULL`); n != 0 {
		t.Errorf("%d claims are held", n)
	}
	e.db.Approve(t, e.id)
	approved := time.Now()
	e.send(t)
	e.await(t, "verify goes on", func() bool {
		return e.count(t, `SELECT count(*) AS n FROM mm_orchestrator.approvals WHERE passed_for <> ''`) == 1
	})
	t.Logf("verify began %s after the approval", time.Since(approved))
	e.await(t, "the run ends", func() bool { return e.status(t) == "rolled_back" || e.status(t) == "succeeded" })
	if got := e.ledger(); slices.Index(got, "begin run patch") != 0 || slices.Contains(got[1:], "begin run patch") {
		t.Errorf("a step was repeated: %q", got)
	}
	if _, err := os.Stat(e.workspace); err != nil {
		t.Error(err)
	}
}

// Git takes a file for unchanged if its size and time are those of the index, unless
// the index is not newer than the file. A copy of the index must not look newer.
func TestAnEditInTheMomentOfACheckoutIsSeen(t *testing.T) {
	t.Parallel()
	e := newTestEnv(t)
	e.file("api.py", "1\n")
	e.repository()
	// As a file system with coarse times leaves it: the file is edited, to the same
	// size, in the moment in which git has written file and index.
	api, index := filepath.Join(e.workspace, "api.py"), filepath.Join(e.workspace, ".git/index")
	moment := time.Now().Add(-time.Hour).Truncate(time.Second)
	at := func(path string) {
		t.Helper()
		if err := os.Chtimes(path, moment, moment); err != nil {
			t.Fatal(err)
		}
	}
	e.git("config", "core.trustctime", "false")
	e.git("config", "core.checkStat", "minimal")
	e.file("api.py", "1\n")
	at(api)
	e.git("update-index", "--refresh")
	e.file("api.py", "2\n")
	at(api)
	at(index)
	o, err := New(e.config)
	if err != nil {
		t.Fatal(err)
	}
	look := &stepRun{Orchestrator: o, log: o.log, runID: testRun, runner: o.runner.of(processes.Owner{Run: testRun, Step: "approval"})}
	if look.place, err = e.config.Artifacts.ForRun("", testRun); err != nil {
		t.Fatal(err)
	}
	files, err := look.workspaceFiles(t.Context(), e.workspace)
	if err != nil || files.Problem != "" {
		t.Fatal(files, err)
	}
	if _, seen := files.Edits["api.py"]; !seen {
		t.Errorf("the edit was not seen: %v", files.Edits)
	}
}

package orchestrator

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A wayBetween is a run that is approved, and whose approval or workspace changes
// between two of its steps.
type wayBetween struct {
	name string
	// after is the last step before the change.
	after  store.Step
	change func(*ways)
	// other says that the next step is not that of the run's chain.
	other bool
	// want is in the message of the next step.
	want string
	// fails says that the step fails and is rolled back: the run has changed
	// something. Otherwise it waits for another approval.
	fails bool
	// repair makes a good approval possible again.
	repair func(*ways)
}

var chainSteps = []store.Step{store.StepAnalyze, store.StepPatch, store.StepBuild, store.StepRestart, store.StepVerify}

// ran is the ledger after a step of the plan.
func ran(step store.Step) string {
	lines := strings.SplitAfter(deployed, "\n")
	switch step {
	case store.StepAnalyze:
		return ""
	case store.StepPatch:
		return strings.Join(lines[:2], "")
	case store.StepBuild:
		return strings.Join(lines[:4], "")
	}
	return deployed
}

func (w *ways) tryBetween(t *testing.T, c wayBetween) {
	w.t = t
	w.reset()
	w.gate("api", "pre-run")
	w.id = w.create()
	w.look()
	w.approve()
	next := chainSteps[0]
	for i, step := range chainSteps {
		if err := w.step("own", string(step)); err != nil {
			t.Fatal(step, err)
		}
		if step == c.after {
			next = chainSteps[i+1]
			break
		}
	}
	c.change(w)
	chain := "own"
	if c.other {
		chain = "another"
	}
	err := w.step(chain, string(next))
	if got := w.ledger(); got != ran(c.after) {
		t.Fatalf("after %s, the ledger is\n%s", next, got)
	}
	if c.fails {
		var failure *Failure
		if !errors.As(err, &failure) || !strings.Contains(failure.Error(), c.want) {
			t.Fatalf("step %s: %v, want a failure that says %q", next, err, c.want)
		}
		if run := w.db.Run(t, w.id); run["status"] != "failed" || run["completed_at"] != nil {
			t.Errorf("the run is %v", run["status"])
		}
		if err := w.step("own", "rollback"); err != nil {
			t.Errorf("rollback: %v", err)
		}
		if got := w.db.Run(t, w.id)["status"]; got != "rolled_back" {
			t.Errorf("after the rollback the run is %v", got)
		}
		return
	}
	if !errors.Is(err, ErrStop) {
		t.Fatalf("step %s: %v, want that it stops", next, err)
	}
	w.checkWaits(string(next), c.want)
	if c.repair != nil {
		c.repair(w)
	}
	w.look()
	w.approve()
	step, err := w.chain()
	if step != "verify" || errors.Is(err, ErrStop) {
		t.Fatalf("after a good approval, step %s: %v", step, err)
	}
	if got := w.ledger(); got != deployed {
		t.Errorf("after a good approval, the ledger is\n%s", got)
	}
	w.step("end", "rollback")
}

func TestWhatChangesBetweenSteps(t *testing.T) {
	t.Parallel()
	w := newWays(t, false)
	const approved, meanwhile, somebody = "changed after the run was approved: ", "Changed while the run was carried out: ", "Changed by somebody else while the run was carried out: "
	restore := edited(`'` + approvedPlan + `'`)
	command := edited(`jsonb_set(steps, '{3,parameters,command,1}', '"more"')`)
	health := edited(`jsonb_set(steps, '{4,parameters,healthcheck}', '{"url": "http://127.0.0.1:1", "timeoutSeconds": 1}')`)
	file := func(w *ways) { w.file("api.py", "other\n") }
	expire := row(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,expiresAt}', to_jsonb(to_char((now() - interval '1 second') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"+00:00"')))`)
	withdraw := row(`approval_token = NULL`)
	target, back := row(`target_service = 'celery-worker'`), row(`target_service = 'api'`)
	var cases []wayBetween
	// Until a step changes something, all that can end an approval ends it.
	for _, c := range []wayBetween{
		{name: "withdrawn", change: withdraw, want: "the run has no token"},
		{name: "expired", change: expire, want: "has expired"},
		{name: "another role", change: row(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,approver,role}', '"developer"')`), want: "has the role"},
		{name: "the gate has other roles", change: statement(`UPDATE approval_gates SET approver_roles = '{security}'`), want: "has the role", repair: statement(`UPDATE approval_gates SET approver_roles = '{sre}'`)},
		{name: "the gate requires pre-verify too", change: func(w *ways) {
			w.gate("celery-worker", "pre-verify")
			w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}, want: approved + "the approval gate", repair: both(statement(`DELETE FROM approval_gates WHERE service_name = 'celery-worker'`), row(`approval_gate_id = NULL`))},
		{name: "the plan", change: command, want: approved + "the plan", repair: restore},
		{name: "the target", change: target, want: approved + "the target service", repair: back},
		{name: "a file", change: file, want: approved + "files of the workspace were edited: api.py"},
		{name: "a commit", change: func(w *ways) { file(w); w.git("commit", "-qam", "y") }, want: approved + "another commit"},
		{name: "the approval of another run", change: func(w *ways) { copied(nil, "")(w); w.set(`status = 'running', started_at = now()`) }, want: "the approval is that of run"},
	} {
		c.name, c.after = "after analyze: "+c.name, store.StepAnalyze
		cases = append(cases, c)
	}
	// From then on the run goes on to its end or back, by the plan that was approved.
	for _, after := range []store.Step{store.StepPatch, store.StepBuild, store.StepRestart} {
		changes := []wayBetween{
			{name: "the health check", change: health, want: meanwhile + "the plan"},
			{name: "how it is rolled back", change: edited(`jsonb_set(steps, '{5,parameters,strategies}', '[]')`), want: meanwhile + "the plan"},
			{name: "the target", change: target, want: meanwhile + "the target service"},
			{name: "the plan, and expired", change: both(expire, health), want: meanwhile + "the plan"},
		}
		if after != store.StepRestart {
			changes = append(changes, wayBetween{name: "a command", change: command, want: meanwhile + "the plan"},
				wayBetween{name: "a file", change: file, want: somebody + "files of the workspace were edited: api.py"},
				wayBetween{name: "a commit", change: func(w *ways) { file(w); w.git("commit", "-qam", "y") }, want: somebody + "another commit"})
		}
		for _, c := range changes {
			c.name, c.after, c.fails = "after "+string(after)+": "+c.name, after, true
			cases = append(cases, c)
		}
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { w.tryBetween(t, c) })
	}
}

// A message that is none of the run's chain must not end what the run is doing, with
// its change in the workspace.
func TestAMessageOfAnotherChainWithoutApproval(t *testing.T) {
	t.Parallel()
	w := newWays(t, false)
	w.gate("api", "pre-run")
	w.id = w.create()
	w.look()
	w.approve()
	for _, step := range []string{"analyze", "patch"} {
		if err := w.step("own", step); err != nil {
			t.Fatal(step, err)
		}
	}
	w.set(`approval_token = NULL`)
	if err := w.step("another", "build"); !errors.Is(err, ErrStop) {
		t.Fatalf("build of another chain: %v, want that it stops", err)
	}
	if status := w.db.Run(t, w.id)["status"]; status != "running" {
		t.Errorf("the run is %v", status)
	}
	if held := w.db.Rows(t, `SELECT workspace FROM mm_orchestrator.holds WHERE run_id = $1`, w.id); len(held) != 1 {
		t.Error("the run has lost its workspace, with its change in it")
	}
	for _, step := range []string{"build", "restart"} {
		if err := w.step("own", step); err != nil {
			t.Errorf("step %s of the run's own chain: %v", step, err)
		}
	}
	same(t, "ledger", w.ledger(), deployed)
}

// An approval that ends in the middle of a deployment does not leave a service
// half-deployed.
func TestAnApprovalThatEndsInTheMiddle(t *testing.T) {
	t.Parallel()
	w := newWays(t, false)
	for name, end := range map[string]func(*ways){
		"expired":   row(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,expiresAt}', '"2020-01-01T00:00:00+00:00"')`),
		"withdrawn": row(`approval_token = NULL`),
		"gate":      statement(`UPDATE approval_gates SET approver_roles = '{security}'`),
	} {
		t.Run(name, func(t *testing.T) {
			w.t = t
			w.reset()
			w.gate("api", "pre-run")
			w.id = w.create()
			w.look()
			w.approve()
			for _, step := range chainSteps[:4] {
				if err := w.step("own", string(step)); err != nil {
					t.Fatal(step, err)
				}
				if step == store.StepPatch {
					end(w)
				}
			}
			if err := w.step("own", "verify"); err == nil || errors.Is(err, ErrStop) {
				t.Errorf("verify: %v", err)
			}
			same(t, "ledger", w.ledger(), deployed)
			if err := w.step("own", "rollback"); err != nil {
				t.Errorf("rollback: %v", err)
			}
		})
	}
}

// retried is a run that was approved and carried out, has failed at verify, and is
// rolled back. MoonMind's API lets it be retried without asking for an approval.
func (w *ways) retried(requirement string, from store.Step, before func(*ways)) {
	w.t.Helper()
	if requirement == "pre-run" {
		w.reset()
		w.gate("api", requirement)
		w.id = w.create()
		w.look()
	} else {
		w.pause(requirement)
	}
	w.approve()
	if step, err := w.chain(); step != "verify" || errors.Is(err, ErrStop) {
		w.t.Fatal(step, err)
	}
	if err := w.step("own", "rollback"); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(w.bin, "ledger")); err != nil {
		w.t.Fatal(err)
	}
	before(w)
	w.db.Retry(w.t, w.id, from, "try again")
}

func TestARetryNeedsAnApprovalThatCoversIt(t *testing.T) {
	t.Parallel()
	restore := edited(`'` + lightPlan + `'`)
	w := newWays(t, true)
	for _, c := range []struct {
		name   string
		before func(*ways)
		want   string
		repair func(*ways)
	}{
		{name: "it has expired", before: row(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,expiresAt}', '"2020-01-01T00:00:00+00:00"')`), want: "has expired"},
		{name: "it was withdrawn", before: row(`approval_token = NULL`), want: "the run has no token"},
		{name: "the gate has other roles", before: statement(`UPDATE approval_gates SET approver_roles = '{security}'`), want: "has the role", repair: statement(`UPDATE approval_gates SET approver_roles = '{sre}'`)},
		{name: "the gate's time was shortened", before: both(statement(`UPDATE approval_gates SET valid_for_minutes = 5`), row(`queued_at = queued_at - interval '1 hour'`),
			row(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,grantedAt}', to_jsonb(to_char((now() - interval '6 minutes') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"+00:00"')))`)), want: "has expired"},
		{name: "the plan was changed", before: edited(`jsonb_set(steps, '{0,parameters,command,1}', '"more"')`), want: "changed after the run was approved: the plan", repair: restore},
		{name: "the target was changed", before: row(`target_service = 'celery-worker'`), want: "changed after the run was approved: the target service", repair: row(`target_service = 'api'`)},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.t = t
			w.retried("pre-run", store.StepBuild, c.before)
			if step, err := w.chain(); step != "build" || !errors.Is(err, ErrStop) {
				t.Fatalf("step %s: %v, want that build stops", step, err)
			}
			same(t, "ledger", w.ledger(), "")
			w.checkWaits("build", c.want)
			if c.repair != nil {
				c.repair(w)
			}
			w.look()
			w.approve()
			w.goesOn()
			w.step("end", "rollback")
		})
	}
	t.Run("a good one", func(t *testing.T) {
		w.t = t
		w.retried("pre-run", store.StepBuild, func(*ways) {})
		w.goesOn()
		w.step("end", "rollback")
	})
}

func TestARetryPausesAgain(t *testing.T) {
	t.Parallel()
	w := newWays(t, true)
	for _, c := range []struct {
		name string
		from store.Step
		// change is made in the approval of the first pause, which comes back.
		change string
	}{
		{"from build", store.StepBuild, ""},
		{"from verify", store.StepVerify, ""},
		{"in another zone", store.StepVerify, `metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,grantedAt}', to_jsonb(to_char((metrics_snapshot #>> '{approval,grantedAt}')::timestamptz AT TIME ZONE 'UTC' + interval '2 hours', 'YYYY-MM-DD"T"HH24:MI:SS.US"+02:00"')))`},
	} {
		t.Run(c.name, func(t *testing.T) {
			w.t = t
			take, putBack := keep()
			w.retried("pre-verify", c.from, take)
			want := w.done()
			if c.from == store.StepVerify {
				want = ""
			}
			if step, err := w.chain(); step != "verify" || !errors.Is(err, ErrStop) {
				t.Fatalf("step %s: %v, want that the run pauses again", step, err)
			}
			same(t, "ledger", w.ledger(), want)
			w.checkWaits("verify", "waits before verify for an approval")
			putBack(w)
			if c.change != "" {
				w.set(c.change)
			}
			if step, err := w.chain(); step != "verify" || !errors.Is(err, ErrStop) {
				t.Fatalf("step %s: %v, want that the approval of the first pause does not count", step, err)
			}
			w.checkWaits("verify", "is older than the pause before verify")
			w.look()
			w.approve()
			if step, err := w.chain(); step != "verify" || errors.Is(err, ErrStop) {
				t.Fatalf("after a good approval, step %s: %v", step, err)
			}
			same(t, "ledger after a good approval", w.ledger(), want)
			w.step("end", "rollback")
		})
	}
}

// A run with a gate of each requirement needs two approvals.
func TestTwoGates(t *testing.T) {
	t.Parallel()
	w := newWays(t, true)
	w.gate("api", "pre-run")
	w.id = w.create()
	w.gate("celery-worker", "pre-verify")
	w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker'), status = 'pending'`)
	if step, err := w.chain(); step != "build" || !errors.Is(err, ErrStop) {
		t.Fatalf("step %s: %v, want that build stops", step, err)
	}
	same(t, "ledger without an approval", w.ledger(), "")
	w.look()
	w.approve()
	take, putBack := keep()
	take(w)
	if step, err := w.chain(); step != "verify" || !errors.Is(err, ErrStop) {
		t.Fatalf("step %s: %v, want a pause before verify", step, err)
	}
	w.checkPaused("waits before verify")
	putBack(w)
	if step, err := w.chain(); step != "verify" || !errors.Is(err, ErrStop) {
		t.Fatalf("step %s: %v, want that the first approval does not count", step, err)
	}
	w.checkPaused("is older than the pause before verify")
	w.approve()
	w.goesOn()
}

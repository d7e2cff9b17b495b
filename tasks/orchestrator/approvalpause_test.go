package orchestrator

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A wayPast is a run that has paused before verify and goes on although nobody has
// approved what it has deployed.
type wayPast struct {
	name string
	// gate is the requirement; "" for pre-verify.
	gate string
	// arrange is called when the run has paused.
	arrange func(*ways)
	// steps are the messages that come then; nil for the whole chain of the API.
	steps []string
	// want is in the message of verify.
	want string
	// repair makes a good approval possible again.
	repair func(*ways)
}

// pause creates a run whose gate requires pre-verify and carries it out up to its
// pause. MoonMind's API has it approved before its start too
// (docs/moonmind.md#approval).
func (w *ways) pause(requirement string) {
	w.t.Helper()
	w.reset()
	w.gate("api", requirement)
	w.id = w.create()
	w.look()
	w.approve()
	if step, err := w.chain(); step != "verify" || !errors.Is(err, ErrStop) {
		w.t.Fatalf("step %s: %v, want a pause before verify", step, err)
	}
	w.checkPaused("waits before verify for an approval by release or sre")
}

func (w *ways) reset() {
	w.t.Helper()
	if !w.light {
		w.git("reset", "-q", "--hard", "start")
		w.git("clean", "-qfdx")
	}
	os.Remove(filepath.Join(w.bin, "ledger"))
	w.exec(`DELETE FROM approval_gates`)
	w.exec(`UPDATE mm_orchestrator.holds SET run_id = NULL`)
	w.exec(`DELETE FROM mm_orchestrator.parked`)
}

func (w *ways) done() string {
	if w.light {
		return "begin run build\nend run build\n"
	}
	return deployed
}

// checkPaused checks that the run waits, keeps its workspace, and has done nothing
// beyond its deployment.
func (w *ways) checkPaused(want string) {
	w.t.Helper()
	w.checkWaits("verify", want)
	if got := w.ledger(); got != w.done() {
		w.t.Errorf("the ledger is\n%s", got)
	}
	if held := w.db.Rows(w.t, `SELECT workspace FROM mm_orchestrator.holds WHERE run_id = $1`, w.id); len(held) != 1 {
		w.t.Errorf("a run that has paused holds %d workspaces", len(held))
	}
	if paused := w.db.Rows(w.t, `SELECT passed_for FROM mm_orchestrator.approvals WHERE run_id = $1 AND paused_at IS NOT NULL`, w.id); len(paused) != 1 || paused[0]["passed_for"] != "" {
		w.t.Errorf("the pause is %v", paused)
	}
	if parked := w.db.Rows(w.t, `SELECT step, why FROM mm_orchestrator.parked WHERE run_id = $1`, w.id); len(parked) > 0 {
		w.t.Errorf("parked: %v", parked)
	}
}

func (w *ways) tryPast(t *testing.T, c wayPast) {
	w.t = t
	requirement := c.gate
	if requirement == "" {
		requirement = "pre-verify"
	}
	w.pause(requirement)
	c.arrange(w)
	until := w.waitUntil()
	if step, err := w.chain(c.steps...); !errors.Is(err, ErrStop) {
		t.Fatalf("step %s: %v, want that it stops. Message: %v", step, err, w.db.State(t, w.id, store.StepVerify)["message"])
	}
	w.checkPaused(c.want)
	// Again, with a sweep between: another message changes nothing.
	w.look()
	if _, err := w.chain("verify"); !errors.Is(err, ErrStop) {
		t.Errorf("again: %v", err)
	}
	w.checkPaused(c.want)
	if again := w.waitUntil(); again != until {
		t.Errorf("a refusal has changed how long the run waits, from %s to %s", until, again)
	}
	if c.repair != nil {
		c.repair(w)
	}
	w.look()
	w.approve()
	w.goesOn()
	w.step("end", "rollback")
}

// goesOn sends the chain of the API for a run that is approved now: verify runs,
// and no other step again.
func (w *ways) goesOn() {
	w.t.Helper()
	step, err := w.chain()
	if step != "verify" || err == nil || errors.Is(err, ErrStop) {
		w.t.Fatalf("after a good approval, step %s: %v. Message: %v", step, err, w.db.State(w.t, w.id, store.Step(step))["message"])
	}
	if got := w.ledger(); got != w.done() {
		w.t.Errorf("after a good approval, the ledger is\n%s", got)
	}
	if status := w.db.Run(w.t, w.id)["status"]; status != "failed" {
		w.t.Errorf("verify has ended, and the run is %v", status)
	}
}

func (w *ways) waitUntil() string {
	w.t.Helper()
	return fmt.Sprint(w.db.Rows(w.t, `SELECT wait_until FROM mm_orchestrator.approvals WHERE run_id = $1`, w.id))
}

func tryAllPast(t *testing.T, cases []wayPast, light bool) {
	t.Helper()
	t.Parallel()
	w := newWays(t, light)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { w.tryPast(t, c) })
	}
}

// keep returns functions that keep the run's approval of now, and put it back later.
func keep() (take, putBack func(*ways)) {
	var token, snapshot string
	take = func(w *ways) {
		run := w.db.Run(w.t, w.id)
		token, _ = run["approval_token"].(string)
		snapshot = asJSON(w.t, run["metrics_snapshot"])
	}
	putBack = func(w *ways) {
		w.set(`status = 'pending', approval_token = $1::text::bytea, metrics_snapshot = $2::text::jsonb`, token, snapshot)
	}
	return take, putBack
}

// earlier moves the begin of the pause, and the run, into the past.
func earlier(by string) func(*ways) {
	return func(w *ways) {
		w.exec(`UPDATE mm_orchestrator.approvals SET paused_at = paused_at - interval '` + by + `' WHERE run_id = '` + w.id + `'`)
		w.set(`queued_at = queued_at - interval '` + by + `'`)
	}
}

func TestWaysPastThePauseBeforeVerify(t *testing.T) {
	const noToken, role, older, future, expired = "the run has no token", "has the role", "is older than the pause before verify", "is from the future", "has expired"
	tryAllPast(t, []wayPast{
		{name: "put to pending by hand", arrange: row(`status = 'pending'`), want: noToken},
		{name: "put to running by hand", arrange: row(`status = 'running', started_at = now()`), want: noToken},
		{name: "the message of verify alone", arrange: row(`status = 'pending'`), steps: []string{"verify"}, want: noToken},
		{name: "a message while it waits", arrange: func(*ways) {}, want: "waits before verify"},
		{name: "the message of verify while it waits", arrange: func(*ways) {}, steps: []string{"verify"}, want: "waits before verify"},
		{name: "the rollback while it waits", arrange: func(*ways) {}, steps: []string{"rollback"}, want: "waits before verify"},
		{name: "a token alone", arrange: row(`status = 'pending', approval_token = 'x'`), want: "does not say that the approval was granted"},
		{name: "a snapshot alone", arrange: changed(row(`approval_token = NULL`)), want: noToken},
		{name: "withdrawn before verify", arrange: changed(func(w *ways) {
			if step, err := w.chain("build"); err != nil {
				w.t.Fatal(step, err)
			}
			w.set(`approval_token = NULL`)
		}), want: noToken},
		{name: "another role", arrange: field("approver,role", `"developer"`), want: role},
		{name: "the role in upper case", arrange: field("approver,role", `"SRE"`), want: role},
		{name: "no role", arrange: field("approver", `{"id": "ops-417"}`), want: "name the approver by id and role"},
		{name: "nobody", arrange: withoutField("approver"), want: "names no approver"},
		{name: "a blank name", arrange: field("approver,id", `" "`), want: "name the approver by id and role"},
		{name: "not granted", arrange: field("status", `"awaiting"`), want: "does not say that the approval was granted"},
		{name: "no time", arrange: withoutField("grantedAt"), want: "no time with a time zone"},
		{name: "the gate's roles were changed since", arrange: changed(statement(`UPDATE approval_gates SET approver_roles = '{security}'`)), want: role,
			repair: statement(`UPDATE approval_gates SET approver_roles = '{sre}'`)},
		{name: "the gate's roles were changed before", arrange: both(statement(`UPDATE approval_gates SET approver_roles = '{security}'`), changed(func(*ways) {})), want: role,
			repair: statement(`UPDATE approval_gates SET approver_roles = '{sre}'`)},
		{name: "in an hour", arrange: at("grantedAt", `now() + interval '1 hour'`), want: future},
		{name: "given before the pause", arrange: at("grantedAt", `now() - interval '1 minute'`), want: older},
		{name: "given when the run was queued", arrange: at("grantedAt", `now() - interval '1 hour'`), want: older},
		{name: "it has expired", arrange: at("expiresAt", `now() - interval '1 second'`), want: expired},
		{name: "it expires while its steps are on their way", arrange: changed(func(w *ways) {
			if step, err := w.chain("build"); err != nil {
				w.t.Fatal(step, err)
			}
			w.set(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,expiresAt}', to_jsonb(to_char((now() - interval '1 second') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"+00:00"')))`)
		}), want: expired},
		{name: "it expires while it waits for a message", arrange: both(earlier("2 hours"), at("grantedAt", `now() - interval '61 minutes'`),
			row(`metrics_snapshot = metrics_snapshot #- '{approval,expiresAt}'`)), want: expired},
		{name: "the gate's time was shortened", arrange: both(earlier("10 minutes"), at("grantedAt", `now() - interval '6 minutes'`), statement(`UPDATE approval_gates SET valid_for_minutes = 5`)), want: expired},
		{name: "the approval of another run", arrange: copied(nil, ""), want: "the approval is that of run"},
		{name: "the approval of another run in another zone", arrange: copied(nil, `metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,grantedAt}', to_jsonb(to_char((metrics_snapshot #>> '{approval,grantedAt}')::timestamptz AT TIME ZONE 'UTC' + interval '2 hours', 'YYYY-MM-DD"T"HH24:MI:SS.US"+02:00"')))`),
			want: "the approval is that of run"},
		{name: "the first approval of another run that has paused", arrange: func(w *ways) {
			mine := w.id
			w.id = w.create()
			w.look()
			w.approve()
			take, putBack := keep()
			take(w)
			w.exec(`UPDATE mm_orchestrator.holds SET run_id = NULL`)
			if step, err := w.chain(); !errors.Is(err, ErrStop) {
				w.t.Fatal(step, err)
			}
			w.exec(`UPDATE mm_orchestrator.holds SET run_id = $1`, mine)
			if err := os.WriteFile(filepath.Join(w.bin, "ledger"), []byte(w.done()), 0o644); err != nil {
				w.t.Fatal(err)
			}
			w.id = mine
			putBack(w)
		}, want: "the approval is that of run"},
		{name: "its own first approval", arrange: func(w *ways) {
			w.id = w.create()
			w.exec(`UPDATE mm_orchestrator.holds SET run_id = NULL`)
			os.Remove(filepath.Join(w.bin, "ledger"))
			w.approve()
			take, putBack := keep()
			take(w)
			if step, err := w.chain(); !errors.Is(err, ErrStop) {
				w.t.Fatal(step, err)
			}
			putBack(w)
		}, want: older},
		{name: "the target service", arrange: changed(row(`target_service = 'celery-worker'`)), want: "the target service was changed", repair: row(`target_service = 'api'`)},
		{name: "the target service before the approval", arrange: both(row(`target_service = 'celery-worker'`), changed(func(*ways) {})),
			want: "the target service was changed", repair: row(`target_service = 'api'`)},
		{name: "the gate wants pre-run now", arrange: changed(statement(`UPDATE approval_gates SET requirement = 'pre-run'`)), want: "the approval gate was changed"},
		{name: "the row names a second gate", arrange: changed(func(w *ways) {
			w.gate("celery-worker", "pre-verify")
			w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}), want: "the approval gate was changed"},
		{name: "the row names a second gate with other roles", arrange: changed(func(w *ways) {
			w.gate("celery-worker", "pre-verify")
			w.exec(`UPDATE approval_gates SET approver_roles = '{security}' WHERE service_name = 'celery-worker'`)
			w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}), want: role, repair: row(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'api')`)},
		{name: "the row names no gate any more", arrange: row(`status = 'pending', approval_gate_id = NULL`), want: noToken},
		{name: "the gate's service was renamed", arrange: both(statement(`UPDATE approval_gates SET service_name = 'web'`), row(`status = 'pending'`)), want: noToken},
	}, true)
}

func TestWhatChangesDuringThePause(t *testing.T) {
	const plan, files = "changed while the run was paused: the plan was changed", "changed after the run was deployed: files of the workspace were edited: "
	restore := edited(`'` + approvedPlan + `'`)
	health := edited(`jsonb_set(steps, '{4,parameters,healthcheck}', '{"url": "http://127.0.0.1:1", "timeoutSeconds": 1, "intervalSeconds": 0.1}')`)
	file := func(name, text string) func(*ways) { return func(w *ways) { w.file(name, text) } }
	git := func(args ...string) func(*ways) { return func(w *ways) { w.git(args...) } }
	undo := git("reset", "-q", "--hard", "start")
	approve := changed(func(*ways) {})
	tryAllPast(t, []wayPast{
		{name: "the health check, after the approval", arrange: changed(health), want: plan, repair: restore},
		{name: "the health check, before the approval", arrange: both(health, approve), want: plan, repair: restore},
		{name: "the health check, before the approval and seen by no sweep", arrange: func(w *ways) { health(w); w.approve() }, want: plan, repair: restore},
		{name: "the health check, and approved again", arrange: func(w *ways) {
			changed(health)(w)
			if _, err := w.chain(); !errors.Is(err, ErrStop) {
				w.t.Fatal(err)
			}
			approve(w)
		}, want: plan, repair: restore},
		{name: "how it is rolled back", arrange: changed(edited(`jsonb_set(steps, '{5,parameters,strategies}', '[]')`)), want: plan, repair: restore},
		{name: "a step less", arrange: changed(edited(`steps - 1`)), want: plan, repair: restore},
		{name: "another plan in its place", arrange: changed(func(w *ways) {
			w.exec(`WITH p AS (INSERT INTO orchestrator_action_plans (id, steps, service_context) VALUES (gen_random_uuid(), '[{"name": "verify", "parameters": {}}]', '{}') RETURNING id)
				UPDATE orchestrator_runs SET action_plan_id = p.id FROM p WHERE orchestrator_runs.id = $1`, w.id)
		}), want: plan, repair: restore},
		{name: "a file, after the approval", arrange: changed(file("api.py", "2\n")), want: files + "api.py", repair: undo},
		{name: "a file, before the approval", arrange: both(file("api.py", "2\n"), approve), want: files + "api.py", repair: undo},
		{name: "a file, and approved again", arrange: func(w *ways) {
			changed(file("api.py", "2\n"))(w)
			if _, err := w.chain(); !errors.Is(err, ErrStop) {
				w.t.Fatal(err)
			}
			approve(w)
		}, want: files + "api.py", repair: undo},
		{name: "a file that git skips", arrange: changed(both(git("update-index", "--skip-worktree", "api.py"), file("api.py", "2\n"))), want: files + "api.py",
			repair: both(git("update-index", "--no-skip-worktree", "api.py"), undo)},
		{name: "a new file in the index", arrange: changed(both(file("new.py", "2\n"), git("add", "new.py"))), want: files + "new.py", repair: undo},
		{name: "a commit", arrange: changed(both(file("api.py", "2\n"), git("commit", "-qam", "y"))), want: "another commit is checked out", repair: undo},
		{name: "the repository is gone", arrange: changed(func(w *ways) {
			if err := os.Rename(filepath.Join(w.workspace, ".git"), filepath.Join(w.workspace, "../kept")); err != nil {
				w.t.Fatal(err)
			}
		}), want: "the workspace can no longer be read", repair: func(w *ways) {
			if err := os.Rename(filepath.Join(w.workspace, "../kept"), filepath.Join(w.workspace, ".git")); err != nil {
				w.t.Fatal(err)
			}
		}},
	}, false)
}

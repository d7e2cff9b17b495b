package orchestrator

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// A wayAround is a run that nobody has approved as it is carried out.
type wayAround struct {
	name string
	// gate is the requirement of the gate when the run is created; "" for pre-run, "no"
	// for no gate.
	gate string
	// arrange is called after the API has created the run, which waits for approval if
	// it has a gate.
	arrange func(*ways)
	// want is in the message of the step that is refused.
	want string
	// steps are the messages that come; nil for the whole chain.
	steps []string
	// repair makes a good approval possible again.
	repair func(*ways)
	// acted says that the run has been carried out up to verify when it is refused.
	acted bool
}

// ways tries ways around an approval, one after the other, with a real database and a
// real repository.
type ways struct {
	*testEnv
	t     *testing.T
	db    *storetest.Database
	o     *Orchestrator
	sweep *sweeper
	id    string
	n     int
	// light says that runs have only the steps build and verify, and no repository.
	light bool
}

// lightPlan is quick to carry out.
const lightPlan = `[{"name": "build", "parameters": {"command": ["docker", "build", "run"]}}, {"name": "verify", "parameters": {}}, {"name": "rollback", "parameters": {}}]`

func (w *ways) planText() string {
	if w.light {
		return lightPlan
	}
	return approvedPlan
}

func newWays(t *testing.T, light bool) *ways {
	t.Helper()
	w := &ways{testEnv: newTestEnv(t), t: t, db: storetest.New(t), light: light}
	w.program("docker", ledgerScript)
	if !light {
		w.file("README", "x\n")
		w.file("api.py", "1\n")
		w.file("run.sh", "1\n")
		w.git("init", "-q", "-b", "main")
		w.git("add", ".")
		w.git("commit", "-q", "-m", "x")
		w.git("tag", "start")
	}
	w.config.Steps = w.db.Open(t)
	w.config.StateTimeout = time.Second
	o, err := New(w.config)
	if err != nil {
		t.Fatal(err)
	}
	w.o, w.sweep = o, &sweeper{Orchestrator: o}
	return w
}

func (w *ways) exec(sql string, args ...any) {
	w.t.Helper()
	if _, err := w.db.Pool.Exec(w.t.Context(), sql, args...); err != nil {
		w.t.Fatal(err)
	}
}

// set changes the run's row.
func (w *ways) set(assignments string, args ...any) {
	w.t.Helper()
	w.exec(`UPDATE orchestrator_runs AS r SET `+assignments+` WHERE id = '`+w.id+`'`, args...)
}

func (w *ways) gate(service, requirement string) {
	w.t.Helper()
	w.exec(`INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes)
		VALUES (gen_random_uuid(), $1, $2::text::orchestratorapprovalrequirement, '{sre,release}', 60)
		ON CONFLICT (service_name) DO UPDATE
		SET requirement = EXCLUDED.requirement, approver_roles = EXCLUDED.approver_roles, valid_for_minutes = EXCLUDED.valid_for_minutes`, service, requirement)
}

// create creates the run as POST …/runs does, without a token.
func (w *ways) create() string {
	w.t.Helper()
	w.n++
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d", w.n)
	w.db.Create(w.t, storetest.Seed{ID: id, Plan: []byte(w.planText()), ArtifactRoot: filepath.Join(w.base, id)})
	w.exec(`
		UPDATE orchestrator_runs AS r
		SET queued_at = now() - interval '2 hours', approval_gate_id = g.id,
		    status = CASE g.requirement WHEN 'none' THEN 'pending' ELSE 'awaiting_approval' END::orchestratorrunstatus,
		    metrics_snapshot = CASE g.requirement WHEN 'none' THEN metrics_snapshot ELSE jsonb_build_object('approval',
		        jsonb_build_object('required', true, 'requirement', g.requirement::text, 'status', 'awaiting')) END
		FROM approval_gates AS g WHERE g.service_name = 'api' AND r.id = $1`, id)
	return id
}

// look is a worker's sweep.
func (w *ways) look() {
	w.t.Helper()
	w.sweep.approvals = approvals{}
	if err := w.sweep.sweepApprovals(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// approve is POST …/approvals.
func (w *ways) approve() {
	w.t.Helper()
	w.db.Approve(w.t, w.id)
	// Each approval has a token of its own, as callers make them.
	w.set(fmt.Sprintf(`approval_token = 'token-%d-%d'`, w.n, time.Now().UnixNano()))
}

// block replaces the snapshot's key approval after a good approval.
func block(sql string) func(*ways) {
	return func(w *ways) {
		w.look()
		w.approve()
		w.set(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval}', ` + sql + `)`)
	}
}

// field replaces a field of an otherwise good approval.
func field(path, value string) func(*ways) {
	return func(w *ways) {
		w.look()
		w.approve()
		w.set(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,`+path+`}', $1::text::jsonb)`, value)
	}
}

// at replaces a time of an otherwise good approval by SQL for another one.
func at(name, sql string) func(*ways) {
	return func(w *ways) {
		w.look()
		w.approve()
		w.set(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,` + name + `}', to_jsonb(to_char((` + sql + `) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')))`)
	}
}

// without removes a field of an otherwise good approval.
func withoutField(path string) func(*ways) {
	return func(w *ways) {
		w.look()
		w.approve()
		w.set(`metrics_snapshot = metrics_snapshot #- '{approval,` + path + `}'`)
	}
}

// changed makes an approval, and then something else.
func changed(change func(*ways)) func(*ways) {
	return func(w *ways) {
		w.look()
		w.approve()
		change(w)
	}
}

// plan changes the steps of the run's plan.
func edited(sql string) func(*ways) {
	return func(w *ways) {
		w.exec(`UPDATE orchestrator_action_plans SET steps = ` + sql + ` WHERE id = (SELECT action_plan_id FROM orchestrator_runs WHERE id = '` + w.id + `')`)
	}
}

func both(acts ...func(*ways)) func(*ways) {
	return func(w *ways) {
		for _, act := range acts {
			act(w)
		}
	}
}

func row(assignments string) func(*ways) { return func(w *ways) { w.set(assignments) } }

func statement(sql string) func(*ways) { return func(w *ways) { w.exec(sql) } }

// step is one message.
func (w *ways) step(chain, step string) error {
	_, err := w.o.Execute(w.t.Context(), Request{RunID: w.id, Step: step, TaskID: chain + "-" + step, RootTaskID: chain, NoNext: step == "verify"}, nil)
	return err
}

// chain runs the chain that the API sends, up to the first step that does not succeed.
func (w *ways) chain(steps ...string) (step string, err error) {
	w.t.Helper()
	w.n++
	chain := fmt.Sprint("chain", w.n)
	if len(steps) == 0 && w.light {
		steps = []string{"build", "verify"}
	}
	if len(steps) == 0 {
		steps = []string{"analyze", "patch", "build", "restart", "verify"}
	}
	for _, step = range steps {
		if err = w.step(chain, step); err != nil {
			return step, err
		}
	}
	return step, nil
}

func (w *ways) ledger() string {
	data, _ := os.ReadFile(filepath.Join(w.bin, "ledger"))
	return string(data)
}

// checkWaits checks that the run waits where the API approves it, and says why.
func (w *ways) checkWaits(step, want string) {
	w.t.Helper()
	run := w.db.Run(w.t, w.id)
	if run["status"] != "awaiting_approval" || run["approval_token"] != nil || run["completed_at"] != nil && run["started_at"] == nil {
		w.t.Errorf("the run is %v with token %v", run["status"], run["approval_token"])
	}
	snapshot, _ := run["metrics_snapshot"].(map[string]any)
	if approval, _ := snapshot["approval"].(map[string]any); approval["status"] != "awaiting" || approval["required"] != true {
		w.t.Errorf("the snapshot says %v", snapshot)
	}
	state := w.db.State(w.t, w.id, store.Step(step))
	if text, _ := state["message"].(string); !strings.Contains(text, want) || state["plan_step_status"] != "pending" || state["status"] != "queued" {
		w.t.Errorf("step %s is %v/%v with message %q, want %q", step, state["plan_step_status"], state["status"], text, want)
	}
	if held := w.db.Rows(w.t, `SELECT run_id, step FROM mm_orchestrator.claims WHERE outcome IS NULL AND holder IS NOT NULL`); len(held) > 0 {
		w.t.Errorf("claims are held: %v", held)
	}
}

// deployed is the ledger of a run that was carried out once, up to verify.
const deployed = "begin run patch\nend run patch\nbegin run build\nend run build\nbegin run restart\nend run restart\n"

func (w *ways) try(t *testing.T, c wayAround) {
	w.t = t
	if !w.light {
		w.git("reset", "-q", "--hard", "start")
		w.git("clean", "-qfdx")
	}
	os.Remove(filepath.Join(w.bin, "ledger"))
	w.exec(`DELETE FROM approval_gates`)
	w.exec(`UPDATE mm_orchestrator.holds SET run_id = NULL`)
	switch c.gate {
	case "":
		w.gate("api", "pre-run")
	case "no":
	default:
		w.gate("api", c.gate)
	}
	w.id = w.create()
	if c.arrange != nil {
		c.arrange(w)
	}
	step, err := w.chain(c.steps...)
	if !errors.Is(err, ErrStop) {
		t.Fatalf("step %s: %v, want that it stops", step, err)
	}
	if got := w.ledger(); !c.acted && got != "" {
		t.Fatalf("the run was carried out:\n%s", got)
	}
	w.checkWaits(step, c.want)
	if held := w.db.Rows(t, `SELECT workspace FROM mm_orchestrator.holds WHERE run_id = $1`, w.id); !c.acted && len(held) > 0 {
		t.Errorf("a run that has changed nothing holds %v", held)
	}
	// Again: another message changes nothing.
	if _, err := w.chain(step); !errors.Is(err, ErrStop) {
		t.Errorf("again: %v", err)
	}
	if c.repair != nil {
		c.repair(w)
	}
	w.look()
	w.approve()
	if step, err := w.chain(); step != "verify" || errors.Is(err, ErrStop) {
		t.Fatalf("after a good approval, step %s: %v. Message: %v", step, err, w.db.State(t, w.id, store.Step(step))["message"])
	}
	want := deployed
	if w.light {
		want = "begin run build\nend run build\n"
	}
	if got := w.ledger(); got != want {
		t.Errorf("after a good approval, the ledger is\n%s", got)
	}
	w.step("end", "rollback")
}

func tryAll(t *testing.T, cases []wayAround, light bool) {
	t.Helper()
	t.Parallel()
	w := newWays(t, light)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) { w.try(t, c) })
	}
}

func TestNoTokenNoApproval(t *testing.T) {
	const noToken = "the run has no token"
	pending := row(`status = 'pending'`)
	tryAll(t, []wayAround{
		{name: "put to pending by hand", arrange: pending, want: noToken},
		{name: "put to running by hand", arrange: row(`status = 'running', started_at = now()`), want: noToken},
		{name: "an empty token", arrange: changed(row(`approval_token = ''`)), want: noToken},
		{name: "a snapshot without a token", arrange: changed(row(`approval_token = NULL`)), want: noToken},
		{name: "the message of patch alone", arrange: pending, steps: []string{"patch"}, want: noToken},
		{name: "the message of build alone", arrange: pending, steps: []string{"build"}, want: noToken},
		{name: "the message of restart alone", arrange: pending, steps: []string{"restart"}, want: noToken},
		{name: "the message of verify alone", arrange: pending, steps: []string{"verify"}, want: noToken},
		{name: "build alone of a run put to running", arrange: row(`status = 'running', started_at = now()`), steps: []string{"build"}, want: noToken},
		{name: "restart alone of a run put to running", arrange: row(`status = 'running', started_at = now()`), steps: []string{"restart"}, want: noToken},
		{name: "the API retries a run that failed without being approved", arrange: row(`status = 'pending', started_at = now() - interval '1 hour', completed_at = now()`), want: noToken},
		{name: "a gate that was made after the run", gate: "no", arrange: func(w *ways) { w.gate("api", "pre-run") }, want: noToken},
		{name: "a gate that became stricter", gate: "none", arrange: func(w *ways) { w.gate("api", "pre-run") }, want: noToken},
		{name: "the row names no gate any more", arrange: row(`status = 'pending', approval_gate_id = NULL`), want: noToken},
		{name: "the row names the gate of another service", arrange: func(w *ways) {
			w.gate("celery-worker", "none")
			w.set(`status = 'pending', approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}, want: noToken},
		{name: "the service's gate requires nothing, the one in the row does", gate: "none", arrange: func(w *ways) {
			w.gate("celery-worker", "pre-run")
			w.set(`status = 'pending', approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}, want: noToken},
		{name: "the target in upper case", arrange: row(`status = 'pending', target_service = 'API', approval_gate_id = NULL`), want: noToken},
		{name: "the target with spaces", arrange: row(`status = 'pending', target_service = ' api ', approval_gate_id = NULL`), want: noToken},
	}, false)
}

func TestHostileSnapshots(t *testing.T) {
	const noBlock, notGranted, noTime = "does not say who has approved", "does not say that the approval was granted", "no time with a time zone"
	var cases []wayAround
	for _, snapshot := range []string{`NULL`, `'{}'`, `'[]'`, `'["approval"]'`, `'"granted"'`, `'7'`, `'null'`, `'true'`, `'[{"approval": {"status": "granted"}}]'`} {
		cases = append(cases, wayAround{name: "snapshot " + snapshot, arrange: changed(row(`metrics_snapshot = ` + snapshot)), want: noBlock})
	}
	for _, approval := range []string{`'null'`, `'[]'`, `'"granted"'`, `'true'`, `'[{"status": "granted"}]'`} {
		cases = append(cases, wayAround{name: "approval " + approval, arrange: block(approval), want: noBlock})
	}
	cases = append(cases, wayAround{name: "approval {}", arrange: block(`'{}'`), want: notGranted},
		wayAround{name: "no status", arrange: withoutField("status"), want: notGranted})
	for _, status := range []string{`"awaiting"`, `"Granted"`, `" granted"`, `"granted "`, `["granted"]`, `true`, `null`, `{"granted": true}`, `1`, `"expired"`} {
		cases = append(cases, wayAround{name: "status " + status, arrange: field("status", status), want: notGranted})
	}
	cases = append(cases, wayAround{name: "no grantedAt", arrange: withoutField("grantedAt"), want: noTime})
	for _, granted := range []string{`null`, `1769000000`, `""`, `"2026-01-14T09:41:07.220518"`, `"2026-01-14"`, `"now"`, `{}`, `["2026-01-14T09:41:07+00:00"]`, `"infinity"`} {
		cases = append(cases, wayAround{name: "grantedAt " + granted, arrange: field("grantedAt", granted), want: noTime})
	}
	for _, expires := range []string{`7`, `[]`, `""`, `"2099-01-14T09:41:07"`, `"never"`, `{}`, `true`} {
		cases = append(cases, wayAround{name: "expiresAt " + expires, arrange: field("expiresAt", expires), want: "expiresAt is no time with a time zone"})
	}
	tryAll(t, cases, true)
}

func TestWhoApproves(t *testing.T) {
	var cases []wayAround
	for _, approver := range []string{`null`, `{}`, `"sre"`, `["sre"]`, `7`, `{"role": "sre"}`, `{"id": "", "role": "sre"}`, `{"id": "  ", "role": "sre"}`, `{"id": 7, "role": "sre"}`,
		`{"id": null, "role": "sre"}`, `{"id": "ops"}`, `{"id": "ops", "role": null}`, `{"id": "ops", "role": ["sre"]}`, `{"id": "ops", "role": 1}`, `{"id": "ops", "role": {"sre": 1}}`} {
		want := "name the approver by id and role"
		if approver == "null" {
			want = "names no approver"
		}
		cases = append(cases, wayAround{name: "approver " + approver, arrange: field("approver", approver), want: want})
	}
	for _, role := range []string{"", "SRE", " sre", "sre ", "sre,release", "{sre}", "admin", "ѕre", "sre\u200b", "sr", "sre\n", "*"} {
		cases = append(cases, wayAround{name: fmt.Sprintf("role %q", role), arrange: field("approver,role", fmt.Sprintf("%q", role)), want: "has the role"})
	}
	cases = append(cases,
		// docs/moonmind.md#a3: the API asks for no approver there.
		wayAround{name: "a token in the request that creates the run", arrange: withoutField("approver"), want: "names no approver"},
		wayAround{name: "the gate's roles were changed since", arrange: changed(statement(`UPDATE approval_gates SET approver_roles = '{security}'`)), want: "has the role",
			repair: statement(`UPDATE approval_gates SET approver_roles = '{sre}'`)},
		wayAround{name: "the row names a second gate with other roles", arrange: changed(func(w *ways) {
			w.gate("celery-worker", "pre-run")
			w.exec(`UPDATE approval_gates SET approver_roles = '{security}' WHERE service_name = 'celery-worker'`)
			w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}), want: "has the role", repair: row(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'api')`)},
	)
	tryAll(t, cases, true)
}

func TestWhenItWasApproved(t *testing.T) {
	const expired, older, future = "has expired", "is older than the run", "is from the future"
	tryAll(t, []wayAround{
		{name: "in an hour", arrange: at("grantedAt", `now() + interval '1 hour'`), want: future},
		{name: "in ten seconds", arrange: at("grantedAt", `now() + interval '10 seconds'`), want: future},
		{name: "in the year 9999", arrange: field("grantedAt", `"9999-12-31T23:59:59+00:00"`), want: future},
		{name: "before the run was queued", arrange: at("grantedAt", `now() - interval '3 hours'`), want: older},
		{name: "in the year 1", arrange: field("grantedAt", `"0001-01-01T00:00:00+00:00"`), want: older},
		{name: "it has expired", arrange: at("expiresAt", `now() - interval '1 second'`), want: expired},
		{name: "it expires before it was granted", arrange: at("expiresAt", `now() - interval '1 day'`), want: expired},
		{name: "it has expired in another zone", arrange: field("expiresAt", `"2020-01-01T00:00:00+14:00"`), want: expired},
		{name: "the gate's time is over", arrange: both(at("grantedAt", `now() - interval '61 minutes'`), row(`metrics_snapshot = metrics_snapshot #- '{approval,expiresAt}'`)), want: expired},
		{name: "the gate's time is over, and expiresAt absurd", arrange: both(at("grantedAt", `now() - interval '61 minutes'`),
			row(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,expiresAt}', '"9999-12-31T23:59:59+00:00"')`)), want: expired},
		{name: "the gate's time was shortened", arrange: both(at("grantedAt", `now() - interval '6 minutes'`), statement(`UPDATE approval_gates SET valid_for_minutes = 5`)), want: expired},
		{name: "a second gate gives less time", arrange: both(at("grantedAt", `now() - interval '6 minutes'`), func(w *ways) {
			w.gate("celery-worker", "pre-run")
			w.exec(`UPDATE approval_gates SET valid_for_minutes = 5 WHERE service_name = 'celery-worker'`)
			w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'celery-worker')`)
		}), want: expired},
	}, true)
}

// copied gives the run the approval of another one.
func copied(other func(w *ways), change string) func(*ways) {
	return func(w *ways) {
		mine := w.id
		w.id = w.create()
		theirs := w.id
		w.look()
		w.approve()
		if other != nil {
			other(w)
		}
		w.id = mine
		w.look()
		w.exec(`UPDATE orchestrator_runs AS r SET status = 'pending', approval_token = o.approval_token, metrics_snapshot = o.metrics_snapshot
			FROM orchestrator_runs AS o WHERE o.id = $1 AND r.id = $2`, theirs, mine)
		if change != "" {
			w.set(change)
		}
	}
}

func TestTheApprovalOfAnotherRun(t *testing.T) {
	const want = "the approval is that of run"
	carriedOut := func(w *ways) {
		if step, err := w.chain(); step != "verify" {
			w.t.Fatal(step, err)
		}
		w.step("their", "rollback")
		w.git("reset", "-q", "--hard", "start")
		os.Remove(filepath.Join(w.bin, "ledger"))
	}
	granted := `metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,grantedAt}', to_jsonb(`
	tryAll(t, []wayAround{
		{name: "of one that is approved", arrange: copied(nil, ""), want: want},
		{name: "of one that was carried out", arrange: copied(carriedOut, ""), want: want},
		{name: "the time in another notation", arrange: copied(nil, granted+`replace(metrics_snapshot #>> '{approval,grantedAt}', '+00:00', 'Z')))`), want: want},
		{name: "the time in another zone", arrange: copied(nil, granted+`to_char((metrics_snapshot #>> '{approval,grantedAt}')::timestamptz AT TIME ZONE 'UTC' + interval '2 hours', 'YYYY-MM-DD"T"HH24:MI:SS.US"+02:00"')))`), want: want},
		{name: "of one whose token is gone", arrange: func(w *ways) {
			copied(carriedOut, "")(w)
			w.exec(`UPDATE orchestrator_runs SET approval_token = NULL WHERE id <> $1`, w.id)
		}, want: want},
		{name: "with the approver's name and time changed to nothing", arrange: copied(nil, `metrics_snapshot = metrics_snapshot #- '{approval,approver}'`), want: "names no approver"},
	}, false)
}

func TestChangedAfterTheApproval(t *testing.T) {
	const want = "changed after the run was approved: "
	add := edited(`jsonb_set(steps, '{1,parameters,commands}', (steps #> '{1,parameters,commands}') || '[["docker", "more", "run"]]')`)
	restore := edited(`'` + approvedPlan + `'`)
	cases := []wayAround{
		{name: "the plan, seen by no sweep", arrange: func(w *ways) { w.approve(); add(w) }, want: want + "the plan", repair: restore},
		{name: "the plan just before the approval, seen by no sweep since", arrange: func(w *ways) { w.look(); add(w); w.approve() }, want: want + "the plan", repair: restore},
		{name: "another plan in its place", arrange: changed(func(w *ways) {
			w.exec(`WITH p AS (INSERT INTO orchestrator_action_plans (id, steps, service_context) VALUES (gen_random_uuid(), '[{"name": "build", "parameters": {"command": ["docker", "evil", "run"]}}]', '{}') RETURNING id)
				UPDATE orchestrator_runs SET action_plan_id = p.id FROM p WHERE orchestrator_runs.id = $1`, w.id)
		}), steps: []string{"build"}, want: want + "the plan", repair: restore},
		{name: "the target service", arrange: changed(row(`target_service = 'celery-worker'`)), want: want + "the target service was changed from \"api\" to \"celery-worker\"", repair: row(`target_service = 'api'`)},
		{name: "a second gate", arrange: changed(func(w *ways) {
			w.gate("orchestrator", "pre-run")
			w.set(`approval_gate_id = (SELECT id FROM approval_gates WHERE service_name = 'orchestrator')`)
		}), want: want + "the approval gate"},
		{name: "the approval restored after a refusal", arrange: func(w *ways) {
			changed(add)(w)
			w.exec(`CREATE TEMP TABLE IF NOT EXISTS kept AS SELECT NULL::bytea AS token, NULL::jsonb AS snapshot`)
			kept := w.db.Run(w.t, w.id)
			if _, err := w.chain("analyze"); !errors.Is(err, ErrStop) {
				w.t.Fatal(err)
			}
			snapshot := asJSON(w.t, kept["metrics_snapshot"])
			token, _ := kept["approval_token"].(string)
			w.set(`status = 'pending', approval_token = $1::text::bytea, metrics_snapshot = $2::text::jsonb`, token, snapshot)
		}, want: want + "the plan", repair: restore},
		{name: "what the run does was shown again after the approval", arrange: func(w *ways) {
			w.look()
			w.approve()
			w.set(`metrics_snapshot = jsonb_set(metrics_snapshot, '{approval,grantedAt}', to_jsonb(to_char((now() - interval '20 seconds') AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')))`)
			kept := w.db.Run(w.t, w.id)
			w.set(`status = 'awaiting_approval', approval_token = NULL`)
			add(w)
			w.look()
			token, _ := kept["approval_token"].(string)
			w.set(`status = 'pending', approval_token = $1::text::bytea`, token)
		}, want: "what the run does was changed at", repair: restore},
	}
	for name, sql := range map[string]string{
		"a command of patch":    `jsonb_set(steps, '{1,parameters,commands,0,1}', '"more"')`,
		"a diff":                `jsonb_set(steps, '{1,parameters,diff}', '"x"')`,
		"the allow-list":        `jsonb_set(steps, '{1,parameters,allowlist}', '["**"]')`,
		"the workspace":         `jsonb_set(steps, '{1,parameters,workspace}', '"/tmp"')`,
		"the command of build":  `jsonb_set(steps, '{2,parameters,command,1}', '"more"')`,
		"a step less":           `steps - 2`,
		"a step more":           `steps || '[{"name": "build", "parameters": {}}]'`,
		"another order":         `jsonb_build_array(steps -> 0, steps -> 2, steps -> 1, steps -> 3, steps -> 4, steps -> 5)`,
		"how it is rolled back": `jsonb_set(steps, '{5,parameters,strategies}', '[]')`,
		"a health check":        `jsonb_set(steps, '{4,parameters,healthcheck}', '{"url": "http://127.0.0.1:1"}')`,
	} {
		cases = append(cases, wayAround{name: "the plan: " + name, arrange: changed(edited(sql)), want: want + "the plan", repair: restore})
	}
	slices.SortFunc(cases, func(a, b wayAround) int { return strings.Compare(a.name, b.name) })
	tryAll(t, cases, false)
}

func TestTheWorkspaceChangedAfterTheApproval(t *testing.T) {
	const want, files = "changed after the run was approved: ", "files of the workspace were edited: "
	file := func(name, text string) func(*ways) { return func(w *ways) { w.file(name, text) } }
	git := func(args ...string) func(*ways) { return func(w *ways) { w.git(args...) } }
	remove := func(name string) func(*ways) {
		return func(w *ways) {
			if err := os.RemoveAll(filepath.Join(w.workspace, name)); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	link := func(name, to string) func(*ways) {
		return func(w *ways) {
			remove(name)(w)
			if err := os.Symlink(to, filepath.Join(w.workspace, name)); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	mode := func(name string, mode os.FileMode) func(*ways) {
		return func(w *ways) {
			if err := os.Chmod(filepath.Join(w.workspace, name), mode); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	hidden := func(flag string) func(*ways) {
		return both(git("update-index", flag, "api.py"), file("api.py", "hidden\n"))
	}
	before := func(first func(*ways), then func(*ways)) func(*ways) {
		return func(w *ways) { first(w); changed(then)(w) }
	}
	tryAll(t, []wayAround{
		{name: "a file", arrange: changed(file("api.py", "2\n")), want: want + files + "api.py"},
		{name: "a new file", arrange: changed(file("new.py", "2\n")), want: want + files + "new.py"},
		{name: "a new file in a new folder", arrange: changed(file("a/b/new.py", "2\n")), want: want + files + "a/b/new.py"},
		{name: "a staged file", arrange: changed(both(file("api.py", "2\n"), git("add", "api.py"))), want: want + files + "api.py"},
		{name: "a file staged and put back", arrange: changed(both(file("new.py", "2\n"), git("add", "new.py"))), want: want + files + "new.py"},
		{name: "a file that is gone", arrange: changed(remove("api.py")), want: want + files + "api.py"},
		{name: "a file that may be run now", arrange: changed(mode("run.sh", 0o755)), want: want + files + "run.sh"},
		{name: "a link in place of a file", arrange: changed(link("api.py", "/etc/passwd")), want: want + files + "api.py"},
		{name: "a link to elsewhere", arrange: before(link("link", "one"), link("link", "two")), want: want + files + "link"},
		{name: "a folder in place of a file", arrange: changed(both(remove("api.py"), file("api.py/x", "1"))), want: want + files},
		{name: "edited once more", arrange: before(file("api.py", "2\n"), file("api.py", "3\n")), want: want + files + "api.py"},
		{name: "an edit that was taken back", arrange: before(file("api.py", "2\n"), git("checkout", "api.py")), want: want + files + "api.py"},
		{name: "a commit", arrange: changed(both(file("api.py", "2\n"), git("commit", "-qam", "y"))), want: want + "another commit"},
		{name: "an empty repository", arrange: changed(git("update-ref", "-d", "HEAD")), want: want + "another commit"},
		{name: "assumed unchanged", arrange: changed(hidden("--assume-unchanged")), want: want + files + "api.py", repair: git("update-index", "--no-assume-unchanged", "api.py")},
		{name: "skipped by git", arrange: changed(hidden("--skip-worktree")), want: want + files + "api.py", repair: git("update-index", "--no-skip-worktree", "api.py")},
		{name: "the repository is gone", arrange: changed(func(w *ways) {
			if err := os.Rename(filepath.Join(w.workspace, ".git"), filepath.Join(w.workspace, "../kept")); err != nil {
				w.t.Fatal(err)
			}
		}), want: want + "the workspace can no longer be read", repair: func(w *ways) {
			if err := os.Rename(filepath.Join(w.workspace, "../kept"), filepath.Join(w.workspace, ".git")); err != nil {
				w.t.Fatal(err)
			}
		}},
		{name: "a plan that begins with build", arrange: both(edited(`jsonb_build_array('{"name": "build", "parameters": {"command": ["docker", "build", "run"]}}'::jsonb)`), changed(file("api.py", "2\n"))),
			steps: []string{"build"}, want: want + files + "api.py", repair: edited(`'` + approvedPlan + `'`)},
	}, false)
}

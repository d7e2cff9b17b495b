package store_test

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// shared asks for a step of a run in a workspace that others use too.
func shared(workspace, run string, step store.Step, task string) store.BeginRequest {
	return store.BeginRequest{
		RunID: run, Step: step, TaskID: task, RootTaskID: "root-" + run, Queue: "q",
		Workspace: func(store.Run) string { return workspace },
		Message:   protocol.Delivery{Headers: map[string]any{"id": task}, Body: []byte(task)},
	}
}

func ask(t testing.TB, s *store.Store, request store.BeginRequest) store.Decision {
	t.Helper()
	decision, err := s.BeginStep(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	return decision
}

// starts begins a step that must start.
func starts(t testing.TB, s *store.Store, request store.BeginRequest) store.Claim {
	t.Helper()
	start, ok := ask(t, s, request).(store.Start)
	if !ok {
		t.Fatalf("step %s of run %s does not start", request.Step, request.RunID)
	}
	return start.Claim
}

// waits begins a step that must be parked.
func waits(t testing.TB, s *store.Store, request store.BeginRequest, why store.ParkedWhy) store.Parked {
	t.Helper()
	decision := ask(t, s, request)
	parked, ok := decision.(store.Parked)
	if !ok || parked.Why != why || parked.Reason == "" {
		t.Fatalf("step %s of run %s: %T %+v, want parked: %s", request.Step, request.RunID, decision, decision, why)
	}
	return parked
}

func take(t testing.TB, s *store.Store, queue string) []store.ParkedMessage {
	t.Helper()
	messages, err := s.TakeParked(t.Context(), queue)
	if err != nil {
		t.Fatal(err)
	}
	return messages
}

// taken takes the messages that can be published, drops them as if they had been,
// and returns their task ids.
func taken(t testing.TB, s *store.Store, queue string) string {
	t.Helper()
	var ids []string
	for _, m := range take(t, s, queue) {
		ids = append(ids, m.TaskID)
		if err := s.DropParked(t.Context(), m.ID); err != nil {
			t.Fatal(err)
		}
	}
	return strings.Join(ids, " ")
}

func TestOneRunAtATime(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	other := d.Create(t, storetest.Seed{})
	claim := starts(t, one, shared("w", first, store.StepAnalyze, "1a"))
	before := d.States(t, second)
	parked := waits(t, two, shared("w", second, store.StepAnalyze, "2a"), store.ParkedWorkspace)
	if !strings.Contains(parked.Reason, first) || parked.ParkedReady {
		t.Errorf("%+v", parked)
	}
	equal(t, "states of the run that waits", d.States(t, second), before)
	equal(t, "its status", d.Run(t, second)["status"], "pending")
	finish(t, two, starts(t, two, shared("elsewhere", other, store.StepAnalyze, "3a")), good(store.StepAnalyze))
	if ids := taken(t, one, "q"); ids != "" {
		t.Errorf("published while the workspace is held: %s", ids)
	}
	if f := finish(t, one, claim, good(store.StepAnalyze)); f.ParkedReady {
		t.Errorf("%+v", f)
	}
	for _, step := range toVerify[1:] {
		waits(t, two, shared("w", second, store.StepAnalyze, "2a"), store.ParkedWorkspace) // again: one row
		f := finish(t, one, starts(t, one, shared("w", first, step, "1"+string(step))), good(step))
		if f.ParkedReady != (step == store.StepVerify) {
			t.Errorf("%s: %+v", step, f)
		}
	}
	if ids := taken(t, one, "other"); ids != "" {
		t.Errorf("of another queue: %s", ids)
	}
	if ids := taken(t, one, "q"); ids != "2a" {
		t.Errorf("published %q", ids)
	}
	starts(t, two, shared("w", second, store.StepAnalyze, "2a"))
}

func TestTheMessageIsParkedUnchanged(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	zero := uint8(0)
	for _, mode := range []string{"", "?default_query_exec_mode=exec", "?default_query_exec_mode=simple_protocol"} {
		s := d.Open(t, func(c *store.Config) { c.URL = secret.New(d.URL + mode) })
		queue := "q" + mode
		request := shared(queue, first, store.StepAnalyze, "1"+mode)
		if mode == "" {
			starts(t, s, request)
		} else {
			d.Rows(t, `INSERT INTO mm_orchestrator.holds (workspace, queue, run_id) VALUES ('`+queue+`', '`+queue+`', '`+first+`') RETURNING queue`)
		}
		request = shared(queue, second, store.StepAnalyze, "2"+mode)
		request.Queue = queue
		request.Message = protocol.Delivery{
			Headers:    map[string]any{"id": "2", "nothing": nil, "n": int64(1) << 40, "sub": map[string]any{"#": []any{"\x00", []byte{0, 1}}}},
			Properties: protocol.Properties{ContentType: "application/json", DeliveryMode: 2, Priority: &zero, CorrelationID: "c"},
			Body:       []byte("\x00\xff[[], {}, {}]"),
		}
		waits(t, s, request, store.ParkedWorkspace)
		if err := s.PassWorkspace(t.Context(), queue, first); err != nil {
			t.Fatal(err)
		}
		d.Rows(t, `UPDATE mm_orchestrator.holds SET run_id = '`+second+`' WHERE workspace = '`+queue+`' RETURNING queue`)
		messages := take(t, s, queue)
		if len(messages) != 1 {
			t.Fatalf("%s: %+v", mode, messages)
		}
		m := messages[0]
		if !reflect.DeepEqual(m.Headers, request.Message.Headers) || !reflect.DeepEqual(m.Properties, request.Message.Properties) ||
			string(m.Body) != string(request.Message.Body) || m.RunID != second || m.Step != store.StepAnalyze || m.TaskID != "2"+mode || m.Queue != queue {
			t.Errorf("%s: kept %+v", mode, m)
		}
		if err := s.KeepParked(t.Context(), m.ID, false); err != nil {
			t.Error(err)
		}
		if err := s.DropParked(t.Context(), m.ID); err != nil {
			t.Error(err)
		}
	}
}

func TestOrderOfRuns(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	create := func(priority string, minutesAgo int) string {
		run := d.Create(t, storetest.Seed{Priority: priority})
		d.Rows(t, fmt.Sprintf(`UPDATE orchestrator_runs SET queued_at = now() - interval '%d minutes' WHERE id = '%s' RETURNING id`, minutesAgo, run))
		return run
	}
	holder := create("normal", 0)
	claim := starts(t, s, shared("w", holder, store.StepVerify, "holder"))
	runs := map[string]string{
		"old": create("normal", 90), "older": create("normal", 95), "high": create("high", 1), "older high": create("high", 2),
		"ended": create("high", 99), "deleted": create("high", 98),
	}
	for name, run := range runs {
		waits(t, s, shared("w", run, store.StepVerify, name), store.ParkedWorkspace)
	}
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'succeeded', started_at = now(), completed_at = now() WHERE id = $1 RETURNING id`, runs["ended"])
	d.Rows(t, `DELETE FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 RETURNING id`, runs["deleted"])
	d.Rows(t, `DELETE FROM orchestrator_runs WHERE id = $1 RETURNING id`, runs["deleted"])
	var order []string
	for range 5 {
		finish(t, s, claim, good(store.StepVerify))
		var ids []string
		for id := range strings.FieldsSeq(strings.ReplaceAll(taken(t, s, "q"), "older high", "older_high")) {
			ids = append(ids, strings.ReplaceAll(id, "_", " "))
		}
		slices.Sort(ids)
		order = append(order, strings.Join(ids, "+"))
		for _, id := range ids {
			if id != "ended" && id != "deleted" {
				claim = starts(t, s, shared("w", runs[id], store.StepVerify, id))
			}
		}
	}
	equal(t, "order", order, []string{"deleted+ended+older high", "high", "older", "old", ""})
	equal(t, "holder at the end", d.Rows(t, `SELECT run_id FROM mm_orchestrator.holds`), []storetest.Row{{"run_id": nil}})
}

// TestFairness: a later run does not overtake one that waits, even while the
// workspace is free.
func TestFairness(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	holder, early, late := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	starts(t, s, shared("w", holder, store.StepAnalyze, "h"))
	waits(t, s, shared("w", early, store.StepAnalyze, "early"), store.ParkedWorkspace)
	d.Rows(t, `UPDATE mm_orchestrator.holds SET run_id = NULL RETURNING queue`)
	if parked := waits(t, s, shared("w", late, store.StepAnalyze, "late"), store.ParkedWorkspace); !parked.ParkedReady {
		t.Errorf("%+v", parked)
	}
	if ids := taken(t, s, "q"); ids != "early" {
		t.Errorf("published %q", ids)
	}
	starts(t, s, shared("w", early, store.StepAnalyze, "early"))
}

func TestRollbackOfTheHolderNeverWaits(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	failing, high := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{Priority: "high"})
	claim := starts(t, s, shared("w", failing, store.StepBuild, "b"))
	waits(t, s, shared("w", high, store.StepAnalyze, "h"), store.ParkedWorkspace)
	if f := finish(t, s, claim, bad(store.StepBuild)); f.RunEnded || f.ParkedReady {
		t.Errorf("%+v", f)
	}
	waits(t, s, shared("w", high, store.StepAnalyze, "h"), store.ParkedWorkspace)
	if f := finish(t, s, starts(t, s, shared("w", failing, store.StepRollback, "r")), good(store.StepRollback)); !f.ParkedReady || f.Status != store.RunRolledBack {
		t.Errorf("%+v", f)
	}
	if ids := taken(t, s, "q"); ids != "h" {
		t.Errorf("published %q", ids)
	}
}

// TestBusyStepIsParkedUntilItsEnd: the message is not published while the worker is
// alive and runs the step, and it is once the step has ended or the worker is dead.
// A time limit's error callback can come before the step has ended: the
// rollback waits, and is due if the step then fails.
func TestRollbackWaitsForTheStepAtWork(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	for _, fails := range []bool{true, false} {
		run := d.Create(t, storetest.Seed{})
		claim := starts(t, one, shared(run, run, store.StepVerify, "t"))
		rollback := shared(run, run, store.StepRollback, "r")
		parked := waits(t, two, rollback, store.ParkedBusy)
		if !strings.Contains(parked.Reason, "worker one runs step verify") {
			t.Errorf("reason %q", parked.Reason)
		}
		if ids := taken(t, two, "q") + taken(t, one, "q"); ids != "" {
			t.Errorf("published %q while the step runs", ids)
		}
		outcome := good(store.StepVerify)
		if fails {
			outcome.Status = store.StepFailed
		}
		if f := finish(t, one, claim, outcome); !f.ParkedReady {
			t.Errorf("%+v", f)
		}
		if ids := taken(t, two, "q"); ids != "r" {
			t.Errorf("published %q at the end", ids)
		}
		switch decision := ask(t, two, rollback).(type) {
		case store.Start:
			if !fails {
				t.Error("a good run is rolled back")
			}
			finish(t, two, decision.Claim, good(store.StepRollback))
		case store.Stop:
			if fails {
				t.Errorf("the rollback is lost: %s", decision.Reason)
			}
		default:
			t.Errorf("%T", decision)
		}
	}
}

func TestBusyStepIsParkedUntilItsEnd(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	run := d.Create(t, storetest.Seed{})
	claim := starts(t, one, shared("w", run, store.StepBuild, "t"))
	waits(t, two, shared("w", run, store.StepBuild, "t"), store.ParkedBusy)
	if ids := taken(t, two, "q") + taken(t, one, "q"); ids != "" {
		t.Errorf("published %q while the step runs", ids)
	}
	if f := finish(t, one, claim, good(store.StepBuild)); !f.ParkedReady {
		t.Errorf("%+v", f)
	}
	if ids := taken(t, two, "q"); ids != "t" {
		t.Errorf("published %q at the end", ids)
	}
	if done, ok := ask(t, two, shared("w", run, store.StepBuild, "t")).(store.Done); !ok {
		t.Errorf("%+v", done)
	}
	starts(t, one, shared("w", run, store.StepRestart, "u"))
	waits(t, two, shared("w", run, store.StepRestart, "u"), store.ParkedBusy)
	one.Close()
	waitFor(t, "the dead worker's message", func() bool { return taken(t, two, "q") == "u" })
	starts(t, two, shared("w", run, store.StepRestart, "u"))
}

func waitFor(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

// A parked message that was to be published may be in the queue too, until it is parked
// anew. One that was kept after an attempt can be taken at once, by any worker.
func TestAMessageThatWasToBePublishedMayBeInTheQueue(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	claim := starts(t, two, shared("w", first, store.StepVerify, "1"))
	waits(t, two, shared("w", second, store.StepVerify, "2"), store.ParkedWorkspace)
	finish(t, two, claim, good(store.StepVerify))
	sent := func(when string, want bool) {
		t.Helper()
		if state, err := two.LookAtParked(t.Context(), "q"); err != nil || state.Newest == 0 || state.Sent != want {
			t.Errorf("%s: %+v, %v", when, state, err)
		}
	}
	keep := func(m store.ParkedMessage, attempted bool) {
		t.Helper()
		if err := one.KeepParked(t.Context(), m.ID, attempted); err != nil {
			t.Fatal(err)
		}
	}
	sent("parked", false)
	keep(take(t, one, "q")[0], false)
	sent("kept without an attempt", false)
	keep(take(t, one, "q")[0], true)
	sent("kept after an attempt", true)
	if len(take(t, two, "q")) != 1 {
		t.Error("the other worker must get it")
	}
	d.Rows(t, `UPDATE mm_orchestrator.holds SET run_id = $1 RETURNING queue`, d.Create(t, storetest.Seed{}))
	waits(t, two, shared("w", second, store.StepVerify, "2"), store.ParkedWorkspace)
	sent("parked anew", false)
}

// A message that is in the queue and parked is renewed, so that the copy in the queue can
// be removed. If somebody else is publishing it, that one deletes the row: then the copy
// in the queue is all that is left.
func TestAParkedMessageOutlivesItsRenewal(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	claim := starts(t, two, shared("w", first, store.StepVerify, "1"))
	waits(t, two, shared("w", second, store.StepVerify, "2"), store.ParkedWorkspace)
	finish(t, two, claim, good(store.StepVerify))
	here := store.StepMessage{RunID: second, Step: store.StepVerify, TaskID: "2"}
	others := []store.StepMessage{{}, {RunID: first, Step: store.StepVerify, TaskID: "2"}, {RunID: second, Step: store.StepBuild, TaskID: "2"}, {RunID: second, Step: store.StepVerify, TaskID: "1"}}
	renew := func(queue string, want ...bool) {
		t.Helper()
		if renewed, err := two.RenewParked(t.Context(), queue, append(others, here)); err != nil || !slices.Equal(renewed, append([]bool{false, false, false, false}, want...)) {
			t.Errorf("renewed %v, %v; want %v", renewed, err, want)
		}
	}
	renew("other", false)
	renew("q", true)
	published := take(t, one, "q")
	if len(published) != 1 {
		t.Fatalf("taken %+v", published)
	}
	renew("q", false) // one is alive, and will drop it
	d.Rows(t, `UPDATE mm_orchestrator.parked SET taken_at = now() - interval '1 hour' RETURNING id`)
	renew("q", true)
	if err := one.DropParked(t.Context(), published[0].ID); err != nil {
		t.Fatal(err)
	}
	if state, err := two.LookAtParked(t.Context(), "q"); err != nil || state.Newest <= published[0].ID || !state.Sent {
		t.Errorf("%+v, %v: it must still be parked, and may have been published", state, err)
	}
	all, err := two.TakeAllParked(t.Context(), "q", 1<<40)
	if err != nil || len(all) != 1 {
		t.Fatalf("taken %+v, %v", all, err)
	}
	if err := two.DropParked(t.Context(), all[0].ID); err != nil {
		t.Fatal(err)
	}
	renew("q", false)
}

// TestAMessageIsReservedForOneWorker: no other worker gets a message that a live
// worker has taken; the message of a dead worker is returned again.
func TestAMessageIsReservedForOneWorker(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	claim := starts(t, two, shared("w", first, store.StepVerify, "1"))
	waits(t, two, shared("w", second, store.StepVerify, "2"), store.ParkedWorkspace)
	finish(t, two, claim, good(store.StepVerify))
	messages := take(t, one, "q")
	if len(messages) != 1 || len(take(t, two, "q")) != 0 || len(take(t, one, "q")) != 0 {
		t.Fatal("a message must be given to one")
	}
	if err := one.KeepParked(t.Context(), messages[0].ID, false); err != nil {
		t.Fatal(err)
	}
	if messages = take(t, one, "q"); len(messages) != 1 {
		t.Fatal("a message that was kept must be given out again")
	}
	one.Close()
	var again []store.ParkedMessage
	waitFor(t, "taken from the dead", func() bool { again = take(t, two, "q"); return len(again) == 1 })
	// The message is delivered and parked again before the copy is dropped.
	d.Rows(t, `UPDATE mm_orchestrator.holds SET run_id = $1 RETURNING queue`, d.Create(t, storetest.Seed{}))
	waits(t, two, shared("w", second, store.StepVerify, "2"), store.ParkedWorkspace)
	if err := two.DropParked(t.Context(), again[0].ID); err != nil {
		t.Fatal(err)
	}
	equal(t, "parked", d.Rows(t, `SELECT task_id FROM mm_orchestrator.parked`), []storetest.Row{{"task_id": "2"}})
}

// TestPlanWithoutVerify: the run releases the workspace at its last step, and a late
// message does not keep it.
func TestPlanWithoutVerify(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	short := d.Create(t, storetest.Seed{Plan: []byte(`[{"name": "analyze"}, {"name": "patch"}, {"name": "rollback"}]`)})
	next := d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("w", short, store.StepAnalyze, "a")), good(store.StepAnalyze))
	waits(t, s, shared("w", next, store.StepAnalyze, "n"), store.ParkedWorkspace)
	if f := finish(t, s, starts(t, s, shared("w", short, store.StepPatch, "p")), good(store.StepPatch)); !f.ParkedReady || f.RunEnded || f.Status != store.RunRunning {
		t.Errorf("%+v", f)
	}
	if ids := taken(t, s, "q"); ids != "n" {
		t.Errorf("published %q", ids)
	}
	d.Rows(t, `UPDATE mm_orchestrator.holds SET run_id = $1 RETURNING queue`, short)
	waits(t, s, shared("w", next, store.StepAnalyze, "n"), store.ParkedWorkspace)
	if done, ok := ask(t, s, shared("w", short, store.StepPatch, "p")).(store.Done); !ok || !done.ParkedReady {
		t.Errorf("%+v", done)
	}
	if ids := taken(t, s, "q"); ids != "n" {
		t.Errorf("published %q", ids)
	}
}

// TestAReleaseIsNoDeath: only starts whose worker died are counted.
func TestAReleaseIsNoDeath(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	for range 4 {
		claim := starts(t, s, shared("w", run, store.StepBuild, "t"))
		if claim.Deaths() != 0 {
			t.Errorf("%+v", claim)
		}
		for range 2 {
			if err := s.ReleaseClaim(t.Context(), claim); err != nil {
				t.Fatal(err)
			}
		}
	}
	dying := d.Open(t, as("dying", time.Minute))
	starts(t, dying, shared("w", run, store.StepBuild, "t"))
	dying.Close()
	var claim store.Claim
	waitFor(t, "take over", func() bool {
		start, ok := ask(t, s, shared("w", run, store.StepBuild, "t")).(store.Start)
		claim = start.Claim
		return ok
	})
	if claim.Starts != 6 || claim.HandedBack != 4 || claim.Deaths() != 1 {
		t.Errorf("%+v", claim)
	}
}

// TestManyRunsAtOnce: four workers, many runs, every message delivered in any
// order and some twice. No two runs are ever in the workspace at once, and all
// end. What it checks is the database's own account: the intervals of claims.
func TestManyRunsAtOnce(t *testing.T) {
	t.Parallel()
	const runs, workers = 12, 4
	d := storetest.New(t)
	steps := []store.Step{store.StepAnalyze, store.StepBuild, store.StepVerify}
	plan := []byte(`[{"name": "analyze"}, {"name": "build"}, {"name": "verify"}, {"name": "rollback"}]`)
	type message struct {
		run  string
		step int // 3 is the rollback
	}
	queue := make(chan message, 1000)
	failing := map[string]bool{}
	byTask := map[string]message{}
	for i := range runs {
		run := d.Create(t, storetest.Seed{Plan: plan, Priority: []string{"normal", "high"}[i%2]})
		failing[run] = i%4 == 1
		for step := range 4 {
			byTask[fmt.Sprint(run, step)] = message{run, step}
		}
		queue <- message{run, 0}
		queue <- message{run, 0}
	}
	var group sync.WaitGroup
	var mu sync.Mutex
	ended := map[string]bool{}
	allEnded := make(chan struct{})
	for n := range workers {
		s := d.Open(t, as(fmt.Sprint("worker", n), 0), func(c *store.Config) { c.Now = nil })
		unpark := func() {
			for {
				messages, err := s.TakeParked(t.Context(), "q")
				if err != nil {
					t.Error(err)
				}
				if len(messages) == 0 {
					return
				}
				for _, m := range messages {
					queue <- byTask[m.TaskID]
					if err := s.DropParked(t.Context(), m.ID); err != nil {
						t.Error(err)
					}
				}
			}
		}
		group.Go(func() {
			for {
				var m message
				select {
				case m = <-queue:
				case <-allEnded:
					return
				case <-time.After(time.Minute):
					t.Error("nothing to do, and not all runs have ended")
					return
				}
				step := store.StepRollback
				if m.step < 3 {
					step = steps[m.step]
				}
				decision, err := s.BeginStep(t.Context(), shared("w", m.run, step, fmt.Sprint(m.run, m.step)))
				if err != nil {
					t.Error(err)
					return
				}
				switch decision := decision.(type) {
				case store.Start:
					outcome := good(step)
					if failing[m.run] && step == store.StepBuild {
						outcome = bad(step)
					}
					outcome.FinishedAt = time.Now()
					f, err := s.FinishStep(t.Context(), decision.Claim, outcome)
					if err != nil {
						t.Error(err)
						return
					}
					switch {
					case f.RunEnded:
						mu.Lock()
						if ended[m.run] = true; len(ended) == runs {
							close(allEnded)
						}
						mu.Unlock()
					case outcome.Status == store.StepFailed:
						queue <- message{m.run, 3}
					default:
						queue <- message{m.run, m.step + 1}
					}
					if f.ParkedReady {
						unpark()
					}
				case store.Parked:
					if decision.ParkedReady {
						unpark()
					}
				case store.Done:
					if decision.ParkedReady {
						unpark()
					}
				}
			}
		})
	}
	group.Wait()
	overlaps := d.Rows(t, `
		SELECT a.run_id, a.step, b.run_id AS other, b.step AS other_step FROM mm_orchestrator.claims AS a
		JOIN mm_orchestrator.claims AS b ON a.run_id < b.run_id AND a.started_at < b.finished_at AND b.started_at < a.finished_at`)
	if len(overlaps) > 0 {
		t.Errorf("steps of different runs at once: %v", overlaps)
	}
	mixed := d.Rows(t, `
		SELECT a.run_id FROM (SELECT run_id, min(started_at) AS began, max(finished_at) AS ended FROM mm_orchestrator.claims GROUP BY run_id) AS a
		JOIN (SELECT run_id, min(started_at) AS began, max(finished_at) AS ended FROM mm_orchestrator.claims GROUP BY run_id) AS b
		  ON a.run_id < b.run_id AND a.began < b.ended AND b.began < a.ended`)
	if len(mixed) > 0 {
		t.Errorf("runs overlap: %v", mixed)
	}
	equal(t, "most starts", d.Rows(t, `SELECT max(starts) AS most FROM mm_orchestrator.claims`), []storetest.Row{{"most": 1}})
	equal(t, "runs", d.Rows(t, `SELECT status, count(*) AS n FROM orchestrator_runs GROUP BY status ORDER BY status`),
		[]storetest.Row{{"status": "succeeded", "n": runs - runs/4}, {"status": "rolled_back", "n": runs / 4}})
}

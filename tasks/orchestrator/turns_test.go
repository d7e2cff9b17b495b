package orchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// liveEnv is a testEnv with a real broker and a real database. Its docker program
// writes a line to a ledger file when a command begins and ends, such as "begin
// NAME STEP". A command waits while the file hold-NAME-STEP exists, and fails if
// fail-NAME-STEP exists.
type liveEnv struct {
	*testEnv
	url   string
	db    *storetest.Database
	runs  int
	names map[string]string // run id by name
	// fromRecord says that rollbacks do not run the plan's commands.
	fromRecord bool
	workers    []*worker.Worker
	// sweeps are counters of the sweeps of each worker that sweeps.
	sweeps []*sweepCounter
	// passed is what has passed of LostGrace since the start.
	passed atomic.Int64
	// publish is a worker that consumes a queue of its own.
	publish func(protocol.Publishing)
}

const ledgerScript = `
cd "$(dirname "$0")"
echo "begin $2 $1" >> ledger
while [ -e "hold-$2-$1" ]; do sleep 0.02; done
echo "end $2 $1" >> ledger
[ ! -e "fail-$2-$1" ]`

func newLiveEnv(t *testing.T) *liveEnv {
	t.Helper()
	r := &liveEnv{testEnv: newTestEnv(t), url: devenv.Broker(t), db: storetest.New(t), names: map[string]string{}}
	r.program("docker", ledgerScript)
	config := worker.Config{Broker: r.url, Queues: []string{"elsewhere"}, Logger: workertest.Logger(t)}
	w, err := worker.New(config)
	if err != nil {
		t.Fatal(err)
	}
	w.Register("none", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) { return nil, nil }))
	workertest.Start(t, w)
	r.publish = func(m protocol.Publishing) {
		t.Helper()
		if err := w.Publish(t.Context(), m); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// worker starts a worker with its own connections. sweep says whether it sweeps. stop
// ends it before the test's end, without waiting for running tasks.
func (r *liveEnv) worker(t *testing.T, name string, slots int, sweep bool) (stop func()) {
	t.Helper()
	s := r.db.Open(t, func(c *store.Config) {
		c.Worker, c.Connections, c.TakeoverGrace = name, slots+1, 10*time.Millisecond
		c.Redact = r.config.Redactor.String
	})
	config := r.config
	config.Steps, config.Node, config.Logger = s, name, workertest.Logger(t)
	config.SweepInterval, config.RollbackCommands = 100*time.Millisecond, !r.fromRecord
	if sweep {
		counter := &sweepCounter{Steps: s}
		config.Steps, r.sweeps = counter, append(r.sweeps, counter)
	}
	o, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	o.sinceStart = func() time.Duration { return time.Duration(r.passed.Load()) }
	w, err := worker.New(worker.Config{Broker: r.url, Queues: []string{"q"}, Slots: slots, Node: name + "@test", Logger: workertest.Logger(t)})
	if err != nil {
		t.Fatal(err)
	}
	o.Register(w)
	end := workertest.Start(t, w)
	r.workers = append(r.workers, w)
	ctx, endSweep := context.WithCancel(context.Background())
	var group sync.WaitGroup
	if sweep {
		group.Go(func() { o.Sweep(ctx) })
	}
	stop = func() {
		endSweep()
		group.Wait()
		_ = end() // an error of it fails the test at its end
		s.Close()
	}
	t.Cleanup(func() { endSweep(); group.Wait() })
	return stop
}

// A sweepCounter counts the sweeps that have begun.
type sweepCounter struct {
	Steps
	begun atomic.Int64
}

func (c *sweepCounter) ListWorkspaces(ctx context.Context, queue string, unacked []string) ([]store.WorkspaceState, error) {
	c.begun.Add(1)
	return c.Steps.ListWorkspaces(ctx, queue, unacked)
}

// awaitSweeps waits until each worker that sweeps has swept from beginning to end.
func (r *liveEnv) awaitSweeps(t *testing.T) {
	t.Helper()
	for _, c := range r.sweeps {
		before := c.begun.Load()
		r.await(t, "a worker sweeps", func() bool { return c.begun.Load() >= before+2 })
	}
}

// passGrace lets LostGrace pass, in which nothing is seen of a run. The clock of the
// sweeps stands still otherwise: however slow the machine is, no other run is lost.
func (r *liveEnv) passGrace(t *testing.T, run string) {
	t.Helper()
	grace := r.config.WithDefaults().LostGrace
	r.db.Rows(t, fmt.Sprintf(`UPDATE mm_orchestrator.holds SET seen_at = seen_at - interval '%d seconds' WHERE run_id = $1 RETURNING run_id`, 1+int(grace.Seconds())), run)
	r.awaitSweeps(t)
	r.passed.Add(int64(grace))
	r.awaitSweeps(t)
}

// create makes a run with a plan of build, restart and rollback. Each is one
// command, which the ledger has by the name of run and step. workspace may name
// another directory than the repository's root.
func (r *liveEnv) create(t *testing.T, name, priority, workspace string) string {
	t.Helper()
	r.runs++
	id := fmt.Sprintf("00000000-0000-4000-8000-%012d", r.runs)
	parameters := func(step string) map[string]any {
		p := map[string]any{"command": []string{"docker", step, name}}
		if workspace != "" {
			p["workspace"] = workspace
		}
		return p
	}
	rollback := parameters("rollback")
	rollback["strategies"] = []any{map[string]any{"type": "t", "commands": []any{[]string{"docker", "rollback", name}}}}
	plan, err := json.Marshal([]any{
		map[string]any{"name": "build", "parameters": parameters("build")},
		map[string]any{"name": "restart", "parameters": parameters("restart")},
		map[string]any{"name": "rollback", "parameters": rollback},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.db.Create(t, storetest.Seed{ID: id, Priority: priority, Plan: plan, ArtifactRoot: filepath.Join(r.base, id)})
	// The order of runs is that of their creation, however quick that is.
	r.db.Rows(t, fmt.Sprintf(`UPDATE orchestrator_runs SET queued_at = now() - interval '1 hour' + interval '%d seconds' WHERE id = $1 RETURNING id`, r.runs), id)
	r.names[name] = id
	return id
}

// chain is the message with which MoonMind's API submits a run
// (docs/moonmind.md#the-chain), of the steps given.
func (r *liveEnv) chain(t *testing.T, name string, steps ...string) protocol.Publishing {
	t.Helper()
	run := r.names[name]
	signature := func(step string, options map[string]any) map[string]any {
		return map[string]any{"task": TaskExecutePlanStep, "args": []any{run, step}, "kwargs": map[string]any{}, "options": options, "subtask_type": nil, "immutable": true}
	}
	errbacks := []any{signature("rollback", map[string]any{"queue": "q"})}
	errback := workertest.Option("link_error", errbacks)
	var later []any
	for _, step := range slices.Backward(steps[1:]) {
		later = append(later, signature(step, map[string]any{"link_error": errbacks, "task_id": name + "-" + step}))
	}
	options := []protocol.Member{errback, workertest.Option("task_id", name+"-"+steps[0])}
	if len(later) > 0 {
		options = append(options, workertest.Option("chain", later))
	}
	return workertest.Message("q", TaskExecutePlanStep, workertest.Args(run, steps[0]), nil, options...)
}

// mark makes a file that the docker program looks for, clear removes it.
func (r *liveEnv) mark(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(r.bin, name), nil, 0o644); err != nil {
		t.Fatal(err)
	}
}

func (r *liveEnv) clear(t *testing.T, name string) {
	t.Helper()
	if err := os.Remove(filepath.Join(r.bin, name)); err != nil {
		t.Fatal(err)
	}
}

func (r *liveEnv) ledger() []string {
	data, _ := os.ReadFile(filepath.Join(r.bin, "ledger"))
	return strings.FieldsFunc(string(data), func(c rune) bool { return c == '\n' })
}

func (r *liveEnv) await(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(40 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s. The ledger: %q, runs: %v, parked: %v, holds: %v", what, r.ledger(),
				r.db.Rows(t, `SELECT id, status FROM orchestrator_runs WHERE status NOT IN ('succeeded', 'rolled_back')`),
				r.db.Rows(t, `SELECT run_id, step, why, taken_by FROM mm_orchestrator.parked`), r.db.Rows(t, `SELECT * FROM mm_orchestrator.holds`))
		}
	}
}

func (r *liveEnv) count(t *testing.T, sql string) int {
	t.Helper()
	n, _ := r.db.Rows(t, sql)[0]["n"].(float64)
	return int(n)
}

const unfinished = `SELECT count(*) AS n FROM orchestrator_runs AS r WHERE status <> 'rolled_back' AND NOT EXISTS (
	SELECT FROM mm_orchestrator.claims AS c WHERE c.run_id = r.id AND c.step = 'restart' AND c.outcome IS NOT NULL)`

// checkTurns checks that never two runs used the workspace: between the first and
// the last command of a run, the ledger has no command of another.
func (r *liveEnv) checkTurns(t *testing.T) (order []string) {
	t.Helper()
	open := ""
	for _, line := range r.ledger() {
		words := strings.Fields(line)
		what, run, step := words[0], words[1], words[2]
		if len(order) == 0 || order[len(order)-1] != run {
			if slices.Contains(order, run) {
				t.Errorf("run %s continues after others: %q", run, r.ledger())
			}
			order = append(order, run)
		}
		switch {
		case what == "begin" && open == "":
			open = run + " " + step
		case what == "end" && open == run+" "+step:
			open = ""
		default:
			t.Errorf("%s while %s is open", line, open)
		}
	}
	return order
}

func TestRunsTakeTurns(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	for n := range 4 {
		r.worker(t, fmt.Sprint("worker", n), 1+n%2, true)
	}
	var want, messages []string
	var high, normal []string
	for i := range 12 {
		name, priority := fmt.Sprint("n", i), "normal"
		if i%3 == 1 {
			name, priority = fmt.Sprint("h", i), "high"
			high = append(high, name)
		} else {
			normal = append(normal, name)
		}
		r.create(t, name, priority, "")
		messages = append(messages, name)
		if i%4 == 2 {
			r.mark(t, "fail-"+name+"-build")
		}
	}
	// The first step of the first run waits until all other runs are parked.
	r.mark(t, "hold-n0-build")
	r.publish(r.chain(t, "n0", "build", "restart"))
	r.await(t, "the first run begins", func() bool { return len(r.ledger()) == 1 })
	for i, name := range messages[1:] {
		message := r.chain(t, name, "build", "restart")
		for range 1 + i%2 { // every other twice
			r.publish(message)
		}
	}
	r.await(t, "all others are parked", func() bool { return r.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 11 })
	if got := r.ledger(); len(got) != 1 {
		t.Errorf("others began: %q", got)
	}
	r.clear(t, "hold-n0-build")
	r.await(t, "all end", func() bool { return r.count(t, unfinished) == 0 })
	r.await(t, "nothing is parked", func() bool { return r.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 0 })
	want = append([]string{"n0"}, append(high, normal[1:]...)...)
	same(t, "order of runs", strings.Join(r.checkTurns(t), " "), strings.Join(want, " "))
	for _, row := range r.db.Rows(t, `SELECT f.run_id, EXTRACT(EPOCH FROM b.started_at - f.finished_at)::float8 AS late FROM mm_orchestrator.claims AS f
		JOIN mm_orchestrator.claims AS b ON b.run_id = f.run_id AND b.step = 'rollback' WHERE f.step = 'build'`) {
		if late, _ := row["late"].(float64); late > 1 {
			t.Errorf("the rollback of run %v began %.2f s after the failure", row["run_id"], late)
		}
	}
	if n := r.count(t, `SELECT count(*) AS n FROM orchestrator_runs WHERE status = 'rolled_back'`); n != 3 {
		t.Errorf("%d runs were rolled back", n)
	}
	if n := r.count(t, `SELECT max(starts) AS n FROM mm_orchestrator.claims`); n != 1 {
		t.Errorf("a step was started %d times", n)
	}
}

func TestTwoWorkspacesWorkAtTheSameTime(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	r.worker(t, "one", 1, false)
	r.worker(t, "two", 1, false)
	r.create(t, "here", "normal", "")
	r.create(t, "there", "normal", t.TempDir())
	r.file("sub/README", "x")
	r.create(t, "below", "normal", filepath.Join(r.workspace, "sub"))
	r.mark(t, "hold-here-build")
	for _, name := range []string{"here", "below", "there"} {
		r.publish(r.chain(t, name, "build", "restart"))
		if name == "here" {
			r.await(t, "the first run begins", func() bool { return len(r.ledger()) == 1 })
		}
	}
	r.await(t, "the other workspace's run ends", func() bool { return slices.Contains(r.ledger(), "end there restart") })
	if got := strings.Join(r.ledger(), " "); strings.Contains(got, "below") || strings.Contains(got, "end here") {
		t.Errorf("ledger %s", got)
	}
	r.clear(t, "hold-here-build")
	r.await(t, "all end", func() bool { return r.count(t, unfinished) == 0 })
}

// A worker has ended a run and died before it published the parked messages.
func TestSweepRepairsACrash(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	r.create(t, "ended", "normal", "")
	r.create(t, "waits", "normal", "")
	dying := r.db.Open(t, func(c *store.Config) { c.Worker = "dying" })
	r.run(t, dying, "ended", "build")
	claim := r.begin(t, dying, "ended", "restart").(store.Start).Claim
	if _, parked := r.begin(t, dying, "waits", "build").(store.Parked); !parked {
		t.Fatal("not parked")
	}
	if f, err := dying.FinishStep(t.Context(), claim, store.Outcome{Status: store.StepSucceeded, FinishedAt: time.Now()}); err != nil || !f.ParkedReady {
		t.Fatal(f, err)
	}
	if messages, err := dying.TakeParked(t.Context(), "q"); err != nil || len(messages) != 1 {
		t.Fatal(messages, err)
	}
	dying.Close()
	r.worker(t, "heir", 1, true)
	r.await(t, "the run that waited ends", func() bool { return slices.Contains(r.ledger(), "end waits restart") })
	r.await(t, "nothing is parked", func() bool { return r.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 0 })
}

func (r *liveEnv) begin(t *testing.T, s *store.Store, name, step string) store.Decision {
	t.Helper()
	m := r.chain(t, name, step)
	if step == "build" {
		m = r.chain(t, name, "build", "restart")
	}
	decision, err := s.BeginStep(t.Context(), store.BeginRequest{
		RunID: r.names[name], Step: store.Step(step), TaskID: m.TaskID, RootTaskID: name + "-build", Queue: "q",
		Workspace: func(run store.Run) string { return workspaceOf("q", r.workspace, run) },
		Message:   protocol.Delivery{Headers: m.Headers, Properties: m.Properties, Body: m.Body},
	})
	if err != nil {
		t.Fatal(err)
	}
	return decision
}

// run begins and ends a step in the database, without its command.
func (r *liveEnv) run(t *testing.T, s *store.Store, name, step string) {
	t.Helper()
	claim := r.begin(t, s, name, step).(store.Start).Claim
	if _, err := s.FinishStep(t.Context(), claim, store.Outcome{Status: store.StepSucceeded, FinishedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
}

// The next message of a run is lost, as after a purge of the queue.
func TestALostRunEndsAndFreesItsWorkspace(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	lost := r.create(t, "lost", "normal", "")
	r.create(t, "next", "normal", "")
	untouched := r.create(t, "pending", "normal", "")
	r.mark(t, "hold-lost-build")
	r.worker(t, "one", 1, true)
	r.worker(t, "two", 1, true)
	// The message of its restart goes to a queue that nobody consumes.
	breaks := r.chain(t, "lost", "build", "restart")
	breaks.Body = bytes.Replace(breaks.Body, []byte(`"task_id": "lost-restart"`), []byte(`"task_id": "lost-restart", "queue": "nowhere"`), 1)
	r.publish(breaks)
	r.await(t, "the run begins", func() bool { return len(r.ledger()) == 1 })
	r.publish(r.chain(t, "next", "build", "restart"))
	r.await(t, "the next is parked", func() bool { return r.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 1 })
	// A step that takes longer than the grace is not lost.
	for range 2 {
		r.passGrace(t, lost)
	}
	same(t, "status of a run whose step takes long", fmt.Sprint(r.db.Run(t, lost)["status"]), "running")
	r.clear(t, "hold-lost-build")
	r.await(t, "the run is lost", func() bool { r.passGrace(t, lost); return slices.Contains(r.ledger(), "begin lost rollback") })
	r.await(t, "the next run ends", func() bool { return slices.Contains(r.ledger(), "end next restart") })
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin lost build, end lost build, begin lost rollback, end lost rollback, "+
		"begin next build, end next build, begin next restart, end next restart")
	run, state := r.db.Run(t, lost), r.db.State(t, lost, store.StepRestart)
	same(t, "state", fmt.Sprint(run["status"], " ", state["plan_step_status"], " ", state["message"]),
		"rolled_back failed run was lost: step restart did not begin; its message is in no queue, and no worker has it. Retry the run to begin again")
	same(t, "a run that never began", fmt.Sprint(r.db.Run(t, untouched)["status"]), "pending")
}

// A step that has killed three workers fails with that reason, its run is rolled
// back, and its message is acknowledged.
func TestAStepThatKillsWorkersFails(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	id := r.create(t, "poison", "normal", "")
	for range 3 {
		dying := r.db.Open(t, func(c *store.Config) { c.Worker, c.TakeoverGrace = "dying", 10*time.Millisecond })
		r.await(t, "the step starts", func() bool { _, started := r.begin(t, dying, "poison", "build").(store.Start); return started })
		dying.Close()
	}
	r.worker(t, "heir", 1, false)
	r.publish(r.chain(t, "poison", "build", "restart"))
	r.await(t, "the run is rolled back", func() bool { return r.db.Run(t, id)["status"] == "rolled_back" })
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin poison rollback, end poison rollback")
	message, _ := r.db.State(t, id, store.StepBuild)["message"].(string)
	if !strings.HasPrefix(message, "step build was started 3 times and its worker died each time") {
		t.Errorf("message %q", message)
	}
}

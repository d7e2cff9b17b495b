package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

var ranOnce = []string{"patch", "build", "restart"}

// proxiedStack is a stack whose worker reaches its servers through proxies.
type proxiedStack struct {
	*stack
	toBroker, toDatabase *proxy
	commandLog           string
}

func newProxiedStack(t *testing.T) *proxiedStack {
	t.Helper()
	f := &proxiedStack{commandLog: filepath.Join(t.TempDir(), "commands")}
	f.stack = newStack(t, stackConfig{
		WorkerBroker: func(address string) string {
			f.toBroker = newProxy(t, address)
			return f.toBroker.through(address)
		},
		WorkerDatabase: func(address string) string {
			f.toDatabase = newProxy(t, address)
			return f.toDatabase.through(address)
		},
	})
	return f
}

// awaitCommand waits until the command of a step has begun.
func (f *proxiedStack) awaitCommand(step string) {
	f.t.Helper()
	f.await("the command of "+step, func() (bool, error) {
		return slices.Contains(lines(f.t, f.commandLog), step), nil
	})
}

// open lets the waiting command of a step continue.
func (f *proxiedStack) open(step string) {
	f.t.Helper()
	if err := os.WriteFile(gate(f.commandLog, step), nil, 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func (f *proxiedStack) awaitConsumer() {
	f.t.Helper()
	f.await("the worker to consume again", func() (bool, error) {
		consumers, _, err := f.queue()
		return consumers > 0, err
	})
}

// requireOneCleanRun waits for the end of the run and checks that its rows equal
// those of a run without a fault.
func (f *proxiedStack) requireOneCleanRun(run submission) {
	f.t.Helper()
	if row := f.awaitRun(run.RunID); row["status"] != "succeeded" {
		f.t.Errorf("the run is %s, want succeeded", row["status"])
	}
	for range 6 { // a message that was published twice repeats the rest of the chain
		f.barrier()
	}
	if got := summary(f.states(run.RunID)); got != succeeded {
		f.t.Errorf("states: %s\nwant:   %s", got, succeeded)
	}
	if got := lines(f.t, f.commandLog); !slices.Equal(got, ranOnce) {
		f.t.Errorf("commands that ran: %v, want %v", got, ranOnce)
	}
	for _, id := range run.ids() {
		if rows := f.mustRows(`SELECT to_jsonb(m) FROM celery_taskmeta m WHERE task_id = $1`, id); len(rows) != 1 || rows[0]["status"] != "SUCCESS" {
			f.t.Errorf("result of task %s: %v, want SUCCESS", id, rows)
		}
	}
}

// When the connection to the broker breaks while a command runs, the command
// must continue, and the redelivered message must find it running.
func TestBrokerLostDuringAStep(t *testing.T) {
	t.Parallel()
	t.Run("and restored while the command runs", func(t *testing.T) {
		t.Parallel()
		f := newProxiedStack(t)
		run := f.submit(newest, f.recordingPlan(f.commandLog, "build")...)
		f.awaitCommand("build")
		f.toBroker.cut()
		f.toBroker.restore()
		f.awaitConsumer()
		f.open("build")
		f.requireOneCleanRun(run)
		f.requireEmptyQueue()
	})
	t.Run("and restored after the command has ended", func(t *testing.T) {
		t.Parallel()
		f := newProxiedStack(t)
		run := f.submit(newest, f.recordingPlan(f.commandLog, "build")...)
		f.awaitCommand("build")
		f.toBroker.cut()
		f.open("build")
		f.await("build to be recorded", func() (bool, error) {
			rows, err := f.rows(`SELECT to_jsonb(t) FROM spec_workflow_task_states t
				WHERE orchestrator_run_id = $1 AND plan_step = 'build' AND plan_step_status = 'succeeded'`, run.RunID)
			return len(rows) == 1, err
		})
		f.toBroker.restore()
		f.requireOneCleanRun(run)
		f.requireEmptyQueue()
	})
}

// When the connection to the broker breaks at any point between publishing the
// next message and acknowledging a delivery, the run must complete as if it had
// not.
func TestBrokerLostBetweenSteps(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]trap{
		"before the first link is published":     {method: basicPublish, n: 1},
		"before the third link is published":     {method: basicPublish, n: 3},
		"after a link is published":              {method: basicPublish, n: 2, pass: true},
		"before the first acknowledgement":       {method: basicAck, n: 1},
		"before the last acknowledgement":        {method: basicAck, n: 5},
		"after an acknowledgement is on its way": {method: basicAck, n: 3, pass: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newProxiedStack(t)
			c.act = f.toBroker.cut
			f.toBroker.set(c)
			run := f.submit(newest, f.recordingPlan(f.commandLog)...)
			f.await("the cut", func() (bool, error) { return f.toBroker.isCut(), nil })
			f.toBroker.restore()
			f.requireOneCleanRun(run)
			f.requireEmptyQueue()
		})
	}
}

// When the connection to the database breaks, in the middle of a command or
// between steps, the run must wait until the database is available and complete.
func TestDatabaseLost(t *testing.T) {
	t.Parallel()
	t.Run("while a command runs", func(t *testing.T) {
		t.Parallel()
		f := newProxiedStack(t)
		run := f.submit(newest, f.recordingPlan(f.commandLog, "build")...)
		f.awaitCommand("build")
		f.toDatabase.cut()
		f.open("build")
		f.toDatabase.restore()
		f.requireOneCleanRun(run)
		f.requireEmptyQueue()
	})
	for name, c := range map[string]trap{
		"after a step is recorded, before its result is": {method: basicPublish, n: 2},
		"after a result is stored":                       {method: basicAck, n: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newProxiedStack(t)
			c.act = f.toDatabase.cut
			f.toBroker.set(c)
			run := f.submit(newest, f.recordingPlan(f.commandLog)...)
			f.await("the cut", func() (bool, error) { return f.toDatabase.isCut(), nil })
			f.await("the worker to notice", func() (bool, error) { return strings.Contains(f.worker.log(), f.toDatabase.addr), nil })
			f.toDatabase.restore()
			f.requireOneCleanRun(run)
			f.requireEmptyQueue()
		})
	}
}

// When PostgreSQL restarts between two steps, and again in the middle of a step,
// the run must complete.
func TestDatabaseRestarted(t *testing.T) {
	t.Parallel()
	server := devenv.OwnDatabase(t)
	f := &proxiedStack{commandLog: filepath.Join(t.TempDir(), "commands")}
	f.stack = newStack(t, stackConfig{
		Database: server.URL,
		WorkerBroker: func(address string) string {
			f.toBroker = newProxy(t, address)
			return f.toBroker.through(address)
		},
	})
	restarted := make(chan struct{})
	// The worker is about to acknowledge patch: it is recorded, its result
	// is stored, and build has not begun.
	f.toBroker.set(trap{method: basicAck, n: 2, act: func() {
		server.Stop()
		server.Start()
		close(restarted)
	}})
	run := f.submit(newest, f.recordingPlan(f.commandLog, "restart")...)
	<-restarted
	f.reconnect()
	f.awaitCommand("restart")
	server.Stop()
	server.Start()
	f.open("restart")
	f.reconnect()
	f.requireOneCleanRun(run)
	f.requireEmptyQueue()
}

// reconnect opens a new connection of the test itself to the database.
func (f *proxiedStack) reconnect() {
	f.t.Helper()
	f.conn.Close(f.t.Context())
	f.await("the database to answer the test", func() (bool, error) {
		conn, err := pgx.Connect(f.t.Context(), f.database)
		if err != nil {
			return false, nil
		}
		f.conn = conn
		return true, nil
	})
}

// When a worker is killed in the middle of a command, another worker receives
// the message again. It must take over the step and finish the run.
func TestKilledWorkerIsReplaced(t *testing.T) {
	t.Parallel()
	commandLog := filepath.Join(t.TempDir(), "commands")
	s := newStack(t, stackConfig{})
	run := s.submit(newest, s.recordingPlan(commandLog, "build")...)
	s.await("the command of build", func() (bool, error) { return slices.Contains(lines(t, commandLog), "build"), nil })
	s.kill()
	if err := os.WriteFile(gate(commandLog, "build"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.startWorker()
	if row := s.awaitRun(run.RunID); row["status"] != "succeeded" {
		t.Errorf("the run is %s, want succeeded", row["status"])
	}
	if got, want := lines(t, commandLog), []string{"patch", "build", "build", "restart"}; !slices.Equal(got, want) {
		t.Errorf("commands that ran: %v, want %v", got, want)
	}
	s.requireEmptyQueue()
}

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// testQueue gives a test access to the worker's queue.
type testQueue struct {
	t  *testing.T
	ch *amqp.Channel
}

func (s testEnv) queue(t *testing.T) testQueue {
	t.Helper()
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return testQueue{t, ch}
}

// look returns the messages in a queue, and leaves them there.
func (q testQueue) look(name string) (list []amqp.Delivery) {
	q.t.Helper()
	for {
		m, ok, err := q.ch.Get(name, false)
		if err != nil {
			q.t.Fatal(err)
		}
		if !ok {
			break
		}
		list = append(list, m)
	}
	if len(list) > 0 {
		if err := list[len(list)-1].Nack(true, true); err != nil {
			q.t.Fatal(err)
		}
	}
	return list
}

// take removes all messages from a queue, oldest first.
func (q testQueue) take(name string) (list []amqp.Delivery) {
	q.t.Helper()
	for {
		m, ok, err := q.ch.Get(name, true)
		if err != nil {
			q.t.Fatal(err)
		}
		if !ok {
			return list
		}
		list = append(list, m)
	}
}

// contents returns the parts of a message that its producer set.
func contents(m amqp.Delivery) map[string]any {
	return map[string]any{
		"headers": m.Headers, "content type": m.ContentType, "content encoding": m.ContentEncoding, "delivery mode": m.DeliveryMode, "priority": m.Priority,
		"correlation id": m.CorrelationId, "reply to": m.ReplyTo, "expiration": m.Expiration, "message id": m.MessageId, "timestamp": m.Timestamp,
		"type": m.Type, "user id": m.UserId, "app id": m.AppId, "body": string(m.Body),
	}
}

func runOfMessage(t *testing.T, m amqp.Delivery) string {
	t.Helper()
	var body []json.RawMessage
	var args []string
	if err := json.Unmarshal(m.Body, &body); err != nil || len(body) != 3 || json.Unmarshal(body[0], &args) != nil || len(args) != 2 {
		t.Fatalf("body %s", m.Body)
	}
	return args[0]
}

// queryInt returns the number that a query selects.
func (s testEnv) queryInt(t *testing.T, sql string) (n int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func (s testEnv) waitForParked(t *testing.T, want int) {
	t.Helper()
	eventually(t, fmt.Sprint(want, " messages are parked"), func() error {
		if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.parked`); n != want {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
}

// parkedRuns is a run that a worker works on, and three runs whose messages another
// worker has parked. Their turns are in the order third, first, second.
type parkedRuns struct {
	worker, idle *process
	holder       string
	runs         [3]string
	// sent are the contents of their messages as Celery sent them, by run.
	sent map[string]map[string]any
}

// parkThree starts two workers, with env added to their environment, and four runs.
func (s testEnv) parkThree(t *testing.T, env ...string) parkedRuns {
	t.Helper()
	env = append(append(s.env(), "MM_ORCHESTRATOR_ALLOWED_PROGRAMS=sleep"), env...)
	j := parkedRuns{worker: start(t, env, "worker", "--hostname=w1@box"), sent: map[string]map[string]any{}}
	j.worker.logLine("worker ready")
	j.holder = s.submitSleep(t, 600)
	s.waitForStep(t, j.holder, "build", "in_progress")
	for i, priority := range []string{"normal", "normal", "high"} {
		j.runs[i] = s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--without=rollback", `--set=build.command=["sleep","0"]`, "--priority="+priority)
	}
	for _, m := range s.queue(t).look("orchestrator.run") {
		j.sent[runOfMessage(t, m)] = contents(m)
	}
	j.idle = start(t, env, "worker", "--hostname=w2@box")
	s.waitForParked(t, 3)
	return j
}

// The last worker that stops returns parked messages to the queue, unchanged and in the
// order of turns. Of two workers that stop at the same moment, one does.
func TestLastWorkersReturnParkedMessages(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	j := s.parkThree(t)
	workers := []*process{j.worker, j.idle}
	for _, w := range workers {
		w.signal(syscall.SIGTERM)
	}
	var returned float64
	for _, w := range workers {
		w.logLine("stopping: running steps may finish; a second signal cancels them")
		// The step of the first run is handed back. Whoever ran none may have ended.
		_ = w.cmd.Process.Signal(syscall.SIGTERM)
		if code := w.exit(); code != exitOK {
			t.Errorf("exit code %d", code)
		}
		n, _ := w.logLine("worker has stopped")["returned"].(float64)
		returned += n
	}
	if returned != 3 {
		t.Errorf("the logs say that %v were returned", returned)
	}
	s.waitForParked(t, 0)
	var order []string
	for _, m := range s.queue(t).take("orchestrator.run") {
		run := runOfMessage(t, m)
		order = append(order, run)
		if run == j.holder {
			continue
		}
		for what, got := range contents(m) {
			if !reflect.DeepEqual(got, j.sent[run][what]) {
				t.Errorf("%s sent %#v, got back %#v", what, j.sent[run][what], got)
			}
		}
	}
	if want := []string{j.holder, j.runs[2], j.runs[0], j.runs[1]}; !reflect.DeepEqual(order, want) {
		t.Errorf("order %q, want %q", order, want)
	}
}

// A worker that stops while another is alive leaves parked messages to it, and logs
// that.
func TestStoppingWorkerLeavesParkedMessagesToAnother(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	j := s.parkThree(t)
	list := start(t, s.env(), "parked")
	if code, lines := list.exit(), strings.Split(list.stdout.String(), "\n"); code != exitOK || len(lines) != 6 ||
		lines[0] != "queue orchestrator.run: published in turn by w1@box, w2@box" || !strings.HasPrefix(lines[1], "RUN"+strings.Repeat(" ", 35)+"STEP ") || !strings.HasPrefix(lines[2], j.runs[2]+"  build ") {
		t.Errorf("parked: exit %d:\n%s", code, list.stdout.String())
	}
	for _, args := range [][]string{{"parked", "return"}, {"migrate", "--remove"}} {
		p := start(t, s.env(), args...)
		if code, text := p.exit(), p.stderr.String(); code != exitFailure || !strings.Contains(text, "workers w1@box") || !strings.Contains(text, ", w2@box") || !strings.Contains(text, "Stop them with SIGTERM") {
			t.Errorf("%s: exit %d: %s", args, code, text)
		}
	}
	j.idle.signal(syscall.SIGTERM)
	if code := j.idle.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
	line := j.idle.logLine("worker has stopped")
	if line["parked"] != 3.0 || fmt.Sprint(line["left_to"]) != "[w1@box]" {
		t.Errorf("it says %v", line)
	}
	s.waitForParked(t, 3)
	if got := doctorFinding(t, s, "parked"); got.Status != statusOK || !strings.Contains(got.Found, `3 messages of queue "orchestrator.run" are parked until their runs' turn; w1@box will publish them`) {
		t.Errorf("doctor: %+v", got)
	}

	// The command refuses while a worker is alive, and names it.
	for _, args := range [][]string{{"parked", "return"}, {"migrate", "--remove"}} {
		p := start(t, s.env(), args...)
		if code := p.exit(); code != exitFailure || !strings.Contains(p.stderr.String(), "worker w1@box ") {
			t.Errorf("%s: exit %d: %s", args, code, p.stderr.String())
		}
	}
	s.waitForParked(t, 3)
}

// Without a broker a worker stops in time, and one log line says what to do about
// the parked messages.
func TestParkedMessagesStayWithoutBroker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	direct := s.broker
	r := newRelay(t, "tcp", brokerSocket(t, s.broker))
	s.broker = strings.Replace(s.broker, brokerSocket(t, s.broker), r.address, 1)
	j := s.parkThree(t, "MM_ORCHESTRATOR_SHUTDOWN_GRACE=4s")
	workers := []*process{j.worker, j.idle}
	r.close()
	begin := time.Now()
	for _, w := range workers {
		w.signal(syscall.SIGTERM)
	}
	said := 0
	for _, w := range workers {
		if code := w.exit(); code != exitOK {
			t.Errorf("exit code %d", code)
		}
		said += strings.Count(w.stderr.String(), "parked messages stay in the database: before a Python worker takes over, run `mm-orchestrator parked return`")
	}
	if took := time.Since(begin); took > 5*time.Second+slowMachine {
		t.Errorf("the end took %v", took)
	}
	if said != 1 {
		t.Errorf("%d lines say what to do", said)
	}
	s.waitForParked(t, 3)

	s.broker = direct
	p := start(t, s.env(), "parked")
	if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "no mm-orchestrator worker is alive") || !strings.Contains(p.stdout.String(), j.runs[0]) {
		t.Errorf("parked: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	if got := doctorFinding(t, s, "parked"); got.Status != statusNote || !strings.Contains(got.Found, "3 messages") || !strings.Contains(got.Cure, "run `mm-orchestrator parked return`") {
		t.Errorf("doctor: %+v", got)
	}
	p = start(t, s.env(), "migrate", "--remove")
	if code := p.exit(); code != exitFailure || !strings.Contains(p.stderr.String(), "mm-orchestrator parked return") {
		t.Errorf("migrate --remove: exit %d: %s", code, p.stderr.String())
	}
	s.waitForParked(t, 3)
	p = start(t, s.env(), "parked", "return", "--dry-run", "--json")
	var report returnedReport
	if code := p.exit(); code != exitOK || json.Unmarshal([]byte(p.stdout.String()), &report) != nil || len(report.Returned) != 3 || report.Left != 3 || !report.DryRun {
		t.Errorf("dry run: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	p = start(t, append(s.env(), "CELERY_BROKER_URL=amqp://127.0.0.1:1"), "parked", "return")
	if code := p.exit(); code != exitUnavailable || !strings.Contains(p.stdout.String(), "0 messages returned to queue orchestrator.run, 3 still parked") {
		t.Errorf("without a broker: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	p = start(t, s.env(), "parked", "return", "--queue=another")
	if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "3 messages parked for queue orchestrator.run: add --queue orchestrator.run to return them") {
		t.Errorf("another queue: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	p = start(t, s.env(), "parked", "return")
	if code := p.exit(); code != exitOK || !strings.Contains(p.stdout.String(), "3 messages returned to queue orchestrator.run, 0 still parked") {
		t.Errorf("return: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	s.waitForParked(t, 0)
	// The message of the running step is there too: it was never acknowledged.
	if messages := s.queue(t).take("orchestrator.run"); len(messages) != 4 {
		t.Errorf("%d messages in the queue", len(messages))
	}
	p = start(t, s.env(), "parked")
	if code := p.exit(); code != exitOK || p.stdout.String() != "no parked messages\n" {
		t.Errorf("parked: exit %d: %s%s", code, p.stdout.String(), p.stderr.String())
	}
	if got := doctorFinding(t, s, "parked"); got.Status != statusOK {
		t.Errorf("doctor: %+v", got)
	}

	// Now the schema can be removed. The command prints what it removes and keeps.
	p = start(t, s.env(), "migrate", "--remove", "--dry-run")
	for _, want := range []string{"would remove mm_orchestrator.claims, 1 row: which worker ran which step", "would remove mm_orchestrator.parked, 0 rows", "kept: MoonMind's tables", "celery_taskmeta", "children and stamps"} {
		if code := p.exit(); code != exitOK || !strings.Contains(strings.Join(strings.Fields(p.stdout.String()), " "), want) {
			t.Errorf("remove --dry-run: exit %d, lacks %q: %s%s", code, want, p.stdout.String(), p.stderr.String())
		}
	}
	p = start(t, s.env(), "migrate", "--remove")
	if code := p.exit(); code != exitOK {
		t.Errorf("remove: exit %d: %s", code, p.stderr.String())
	}
	if n := s.queryInt(t, `SELECT count(*) FROM pg_namespace WHERE nspname = 'mm_orchestrator'`); n != 0 {
		t.Error("the schema is still there")
	}
	if n := s.queryInt(t, `SELECT count(*) FROM information_schema.columns WHERE table_name = 'celery_taskmeta' AND column_name IN ('children', 'stamps')`); n != 2 {
		t.Errorf("%d of Celery's columns are left", n)
	}
}

// doctorFinding returns the finding of one check of doctor. Other checks may fail: a
// test's workspace is not a repository.
func doctorFinding(t *testing.T, s testEnv, name string) finding {
	t.Helper()
	p := start(t, s.env(), "doctor", "--json")
	p.exit()
	var report struct{ Checks []finding }
	if err := json.Unmarshal([]byte(p.stdout.String()), &report); err != nil {
		t.Fatal(err)
	}
	for _, f := range report.Checks {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("doctor has no check %s", name)
	return finding{}
}

func brokerSocket(t *testing.T, broker string) string {
	t.Helper()
	u, err := amqp.ParseURI(broker)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s:%d", u.Host, u.Port)
}

// A crash while parked messages are returned loses none, and none is in the queue twice
// when the command has been run again.
func TestACrashWhileParkedMessagesAreReturned(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"parked.taken", "parked.published"} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			j := s.parkThree(t)
			runs := j.runs
			for _, w := range []*process{j.worker, j.idle} {
				_ = w.cmd.Process.Kill()
				w.exit()
			}
			q := s.queue(t)
			eventually(t, "the message of the dead worker is back", func() error {
				if state, err := q.ch.QueueDeclarePassive("orchestrator.run", true, false, false, false, nil); err != nil || state.Messages != 1 {
					return fmt.Errorf("%d messages, %v", state.Messages, err)
				}
				return nil
			})
			q.take("orchestrator.run")
			path, err := builtForChaos()
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			trap := fmt.Sprintf(`{"point": %q, "any": [[%q]], "id": 1}`, point, runs[0])
			if err := os.WriteFile(filepath.Join(dir, "trap"), []byte(trap), 0o600); err != nil {
				t.Fatal(err)
			}
			dying := startProgram(t, path, append(s.env(), "MM_CHAOS_DIR="+dir), "parked", "return")
			if code := dying.exit(); code != -1 {
				t.Fatalf("it did not die: exit %d: %s", code, dying.stderr.String())
			}
			if n := s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.parked`); n != 2 {
				t.Errorf("%d parked after the crash, want that one and the one behind it", n)
			}
			eventually(t, "the command does the rest", func() error {
				p := start(t, s.env(), "parked", "return")
				if code := p.exit(); code != exitOK {
					return errors.New(p.stderr.String())
				}
				return nil
			})
			seen := map[string]int{}
			for _, m := range q.take("orchestrator.run") {
				seen[runOfMessage(t, m)]++
			}
			want := map[string]int{runs[0]: 1, runs[1]: 1, runs[2]: 1}
			if !reflect.DeepEqual(seen, want) || s.queryInt(t, `SELECT count(*) FROM mm_orchestrator.parked`) != 0 {
				t.Errorf("in the queue %v, want %v", seen, want)
			}
		})
	}
}

// A worker that is killed between parking a message and acknowledging it leaves the
// message in the queue too. Python finds it there once, with what else the queue has.
func TestAMessageThatADeadWorkerHasParkedIsReturnedOnce(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	path, err := builtForChaos()
	if err != nil {
		t.Fatal(err)
	}
	submit := func() string {
		return s.submit(t, "--without=analyze", "--without=patch", "--without=restart", "--without=verify", "--without=rollback", `--set=build.command=["sleep","0"]`)
	}
	s.command(t, "pause", "--reason", "x") // so that every message is parked
	first, second := submit(), submit()
	dir := t.TempDir()
	trap := fmt.Sprintf(`{"point": "park.committed", "any": [[%q]], "id": 1}`, second)
	if err := os.WriteFile(filepath.Join(dir, "trap"), []byte(trap), 0o600); err != nil {
		t.Fatal(err)
	}
	dying := startProgram(t, path, append(s.env(), "MM_CHAOS_DIR="+dir), "worker", "--concurrency=1")
	if code := dying.exit(); code != -1 {
		t.Fatalf("it did not die: exit %d: %s", code, dying.stderr.String())
	}
	third := submit() // no worker has ever had it
	q := s.queue(t)
	eventually(t, "the message of the dead worker is back", func() error {
		if state, err := q.ch.QueueDeclarePassive("orchestrator.run", true, false, false, false, nil); err != nil || state.Messages != 2 {
			return fmt.Errorf("%d messages, %v", state.Messages, err)
		}
		return nil
	})
	if out := s.command(t, "parked", "return"); !strings.Contains(out, "2 messages returned to queue orchestrator.run, 0 still parked") {
		t.Errorf("parked return: %s", out)
	}
	seen := map[string]int{}
	eventually(t, "three messages are in the queue", func() error {
		for _, m := range q.take("orchestrator.run") {
			seen[runOfMessage(t, m)]++
		}
		if len(seen) < 3 {
			return fmt.Errorf("%v", seen)
		}
		return nil
	})
	if want := map[string]int{first: 1, second: 1, third: 1}; !reflect.DeepEqual(seen, want) {
		t.Errorf("in the queue %v, want %v", seen, want)
	}
}

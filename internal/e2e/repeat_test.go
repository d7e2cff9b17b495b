package e2e

import (
	"crypto/rand"
	"encoding/json"
	"path/filepath"
	"slices"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
)

const succeeded = "analyze:succeeded patch:succeeded build:succeeded restart:succeeded verify:succeeded rollback:skipped"

// A failed run that is retried as MoonMind's API retries it must succeed, in the
// rows that the API has reset, without duplicates (docs/moonmind.md#attempts).
func TestRetriedRunEndsInTheRowsThatTheAPIReset(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackConfig{})
	run := s.submit(newest, append(s.withoutDocker(),
		set("build.command", []string{"git", "rev-parse", "--verify", "repaired"}))...)
	first := s.awaitRun(run.RunID)
	if first["status"] != "rolled_back" {
		t.Fatalf("the first attempt is %s, want rolled_back", first["status"])
	}
	before := s.states(run.RunID)

	git(t, s.workspace, "branch", "repaired")
	var retry submission
	s.python(newest, "retry_run.py", &retry, run.RunID, "--from-step", "build", "--reason", "the branch is there now")
	s.await("the retried run to succeed", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(r) FROM orchestrator_runs r WHERE id = $1 AND status = 'succeeded'`, run.RunID)
		return len(rows) == 1, err
	})
	second := s.awaitRun(run.RunID)
	states := s.states(run.RunID)
	want := "analyze:succeeded patch:succeeded build:succeeded#2 restart:succeeded#2 verify:succeeded#2 rollback:skipped#2"
	if got := summary(states); got != want {
		t.Errorf("states: %s\nwant:   %s", got, want)
	}
	for i, state := range states {
		if state["id"] != before[i]["id"] {
			t.Errorf("the state of %s is row %s, want the row that the API seeded, %s", state["plan_step"], state["id"], before[i]["id"])
		}
	}
	if second["started_at"].(string) > second["completed_at"].(string) || second["completed_at"] == first["completed_at"] {
		t.Errorf("started %s, completed %s (before the retry: %s)", second["started_at"], second["completed_at"], first["completed_at"])
	}
	paths := make(map[string]int)
	for _, artifact := range s.registered(run.RunID) {
		paths[artifact["path"].(string)]++
	}
	if paths["build.log"] != 1 || paths["rollback.log"] != 1 {
		t.Errorf("registered artifacts: %v, want each once", paths)
	}
	for _, result := range s.read(newest, retry.ids()...) {
		if result.State != "SUCCESS" {
			t.Errorf("a task of the retry is %s", result.State)
		}
	}
	s.requireEmptyQueue()
}

// When the first message of a successful run is delivered again, nothing may
// change: neither the run, nor a row, a result or a file (docs/moonmind.md#r1).
func TestFirstMessageAgainAfterTheEndChangesNothing(t *testing.T) {
	t.Parallel()
	commandLog := filepath.Join(t.TempDir(), "commands")
	s := newStack(t, stackConfig{NoWorker: true})
	run := s.submit(newest, s.recordingPlan(commandLog)...)
	first := s.take(queue)
	s.publish(first)
	s.startWorker()
	s.awaitRun(run.RunID)
	before := s.everything(run.RunID)

	s.publish(first)
	// Each repeated step publishes the next one, so there are as many rounds as
	// the chain has steps.
	for range 6 {
		s.barrier()
	}
	for _, d := range differences(before, s.everything(run.RunID)) {
		t.Errorf("after the repeated message: %s", d)
	}
	if got, want := lines(t, commandLog), []string{"patch", "build", "restart"}; !slices.Equal(got, want) {
		t.Errorf("commands that ran: %v, want %v", got, want)
	}
	s.requireEmptyQueue()
}

// When two workers receive copies of a run's first message at the same time, the
// run must execute each command once and succeed, without a rollback.
func TestMessageDeliveredTwiceAtOnceRunsOnce(t *testing.T) {
	t.Parallel()
	commandLog := filepath.Join(t.TempDir(), "commands")
	s := newStack(t, stackConfig{NoWorker: true})
	run := s.submit(newest, s.recordingPlan(commandLog)...)
	first := s.take(queue)
	s.startWorker()
	s.startWorker()
	s.publish(first)
	s.publish(first)
	s.awaitRun(run.RunID)
	for range 12 {
		s.barrier()
	}
	if got := summary(s.states(run.RunID)); got != succeeded {
		t.Errorf("states: %s\nwant:   %s", got, succeeded)
	}
	row := s.awaitRun(run.RunID)
	if row["status"] != "succeeded" {
		t.Errorf("the run is %s, want succeeded", row["status"])
	}
	if got, want := lines(t, commandLog), []string{"patch", "build", "restart"}; !slices.Equal(got, want) {
		t.Errorf("commands that ran: %v, want %v", got, want)
	}
	for _, result := range s.read(newest, run.ids()...) {
		if result.State != "SUCCESS" {
			t.Errorf("a task is %s, want SUCCESS", result.State)
		}
	}
}

// recordingPlan returns options for a run whose commands write their names to a
// file. The commands of the steps in gates wait until the step's gate exists.
func (s *stack) recordingPlan(file string, gates ...string) []string {
	command := func(step string) []string {
		words := []string{"record", file, step}
		if slices.Contains(gates, step) {
			words = append(words, gate(file, step))
		}
		return words
	}
	return append(s.withoutDocker(),
		set("patch.commands", [][]string{command("patch")}),
		set("build.command", command("build")),
		set("restart.command", command("restart")),
		set("rollback.strategies", []any{map[string]any{"type": "rebuild", "commands": [][]string{command("rollback")}}}),
	)
}

// gate returns the file that lets the waiting command of a step continue.
func gate(commandLog, step string) string { return commandLog + "." + step }

// everything returns all that a user can see of a run, as plain JSON.
func (s *stack) everything(run string) any {
	s.t.Helper()
	text, err := json.Marshal(map[string]any{
		"run":       s.mustRows(`SELECT to_jsonb(r) FROM orchestrator_runs r WHERE id = $1`, run),
		"states":    s.states(run),
		"artifacts": s.registered(run),
		"taskmeta":  s.taskmeta(run),
		"files":     s.files(run),
	})
	if err != nil {
		s.t.Fatal(err)
	}
	var plain any
	if err := json.Unmarshal(text, &plain); err != nil {
		s.t.Fatal(err)
	}
	return plain
}

// publish sends a copy of a captured message.
func (s *stack) publish(message amqp.Delivery) {
	s.t.Helper()
	s.send(amqp.Publishing{
		Headers: message.Headers, ContentType: message.ContentType, ContentEncoding: message.ContentEncoding,
		DeliveryMode: message.DeliveryMode, Priority: message.Priority, CorrelationId: message.CorrelationId,
		ReplyTo: message.ReplyTo, Body: message.Body,
	})
}

func (s *stack) send(message amqp.Publishing) {
	s.t.Helper()
	s.sendTo(queue, message)
}

func (s *stack) sendTo(queue string, message amqp.Publishing) {
	s.t.Helper()
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := channel.PublishWithContext(s.t.Context(), "", queue, true, false, message); err != nil {
		s.t.Fatal(err)
	}
}

// barrier sends a health_check and waits for its result. By then all messages
// that were in the queue before it have been received, and settled if there is
// one worker with one slot.
func (s *stack) barrier() {
	s.t.Helper()
	id := "barrier-" + rand.Text()
	s.send(amqp.Publishing{
		Headers: amqp.Table{"lang": "py", "task": "moonmind.workflows.orchestrator.tasks.health_check",
			"id": id, "root_id": id, "argsrepr": "()", "kwargsrepr": "{}", "retries": int32(0)},
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: amqp.Persistent, CorrelationId: id,
		Body: []byte(`[[], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]`),
	})
	s.await("the health check to answer", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(m) FROM celery_taskmeta m WHERE task_id = $1 AND status = 'SUCCESS'`, id)
		return len(rows) == 1, err
	})
}

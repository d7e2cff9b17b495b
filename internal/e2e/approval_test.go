package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
)

// approve approves a run as MoonMind's API does: the row, and a new chain.
func (s *stack) approve(run string) {
	t := s.t
	t.Helper()
	if err := moonmind.Approve(t.Context(), s.conn, run); err != nil {
		t.Fatal(err)
	}
	_, message, err := moonmind.Chain(queue, run)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if err := channel.PublishWithContext(t.Context(), "", queue, true, false, message); err != nil {
		t.Fatal(err)
	}
}

// awaitApproval waits until a run waits for an approval at a step, and returns the
// step's message.
func (s *stack) awaitApproval(run, step string) string {
	s.t.Helper()
	var message string
	s.await("run "+run+" to wait for an approval", func() (bool, error) {
		rows, err := s.rows(`
			SELECT to_jsonb(t) FROM orchestrator_runs r JOIN spec_workflow_task_states t ON t.orchestrator_run_id = r.id AND t.plan_step::text = $2
			WHERE r.id = $1 AND r.status = 'awaiting_approval' AND r.approval_token IS NULL AND t.message IS NOT NULL`, run, step)
		if err != nil || len(rows) == 0 {
			return false, err
		}
		message = fmt.Sprint(rows[0]["message"])
		return true, nil
	})
	return message
}

// output runs a command of the program, which must succeed.
func (s *stack) output(args ...string) string {
	s.t.Helper()
	text, err := s.command(args...).CombinedOutput()
	if err != nil {
		s.t.Errorf("mm-orchestrator %s: %v", strings.Join(args, " "), err)
	}
	s.t.Logf("mm-orchestrator %s\n%s", strings.Join(args, " "), text)
	return string(text)
}

// A repair of a service whose gate requires pre-verify waits before verify, with the
// repaired service running. Approved by the API, it goes on without deploying again.
func TestARepairWaitsForItsApprovalBeforeVerify(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackConfig{Project: true})
	if err := moonmind.SetGate(t.Context(), s.conn, "pre-verify"); err != nil {
		t.Fatal(err)
	}
	if err := s.project.Require(sample.Dependency); err != nil {
		t.Fatal(err)
	}
	run := s.submit(newest, set("verify.healthcheck.timeoutSeconds", 20), set("verify.healthcheck.intervalSeconds", 0.5))
	message := s.awaitApproval(run.RunID, "verify")
	if want := "The run is deployed and waits before verify for an approval by sre, from "; !strings.HasPrefix(message, want) {
		t.Errorf("message of verify: %q, want that it begins with %q", message, want)
	}
	if got, want := summary(s.states(run.RunID)), "analyze:succeeded patch:succeeded build:succeeded restart:succeeded verify:pending rollback:pending"; got != want {
		t.Errorf("states: %s\nwant:   %s", got, want)
	}
	deployed := s.awaitHealth("healthy")
	for _, args := range [][]string{{"runs"}, {"runs", run.RunID}} {
		if shown := s.output(args...); !strings.Contains(shown, "deployed, waiting since 2") || !strings.Contains(shown, "for an approval by sre, until 2") {
			t.Errorf("%v does not say what the run waits for", args)
		}
	}
	s.approve(run.RunID)
	if row := s.awaitRun(run.RunID); row["status"] != "succeeded" {
		t.Errorf("the run is %s, want succeeded", row["status"])
	}
	if got := summary(s.states(run.RunID)); got != succeeded {
		t.Errorf("states: %s\nwant:   %s", got, succeeded)
	}
	if now, err := s.project.Container(t.Context(), "api"); err != nil || now.ID != deployed.ID {
		t.Errorf("after the approval the service has container %.12s, was %.12s (%v)", now.ID, deployed.ID, err)
	}
	trail := s.output("audit", "show", run.RunID)
	for _, words := range []string{" paused ", " gate pre-verify, ", " approval-granted ", " by ops-417 (sre), ", "the run goes on after its pause"} {
		if !strings.Contains(trail, words) {
			t.Errorf("the audit trail does not say %q", words)
		}
	}
	if n := strings.Count(trail, "run-started"); n != 1 {
		t.Errorf("the audit trail says %d times that the run has started", n)
	}
	s.requireEmptyQueue()
}

// A repair of a service whose gate requires pre-run does nothing without an approval. An
// edit that is made after the approval is not deployed. An operator approves by the
// command line.
func TestARepairNeedsAnApprovalThatCoversIt(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackConfig{Project: true, Environment: []string{"ENCRYPTION_MASTER_KEY=key of the API"}})
	if err := moonmind.SetGate(t.Context(), s.conn, "pre-run"); err != nil {
		t.Fatal(err)
	}
	api, _ := s.containers()
	if err := s.project.Require(sample.Dependency); err != nil {
		t.Fatal(err)
	}
	run := s.submit(newest, set("verify.healthcheck.timeoutSeconds", 20), set("verify.healthcheck.intervalSeconds", 0.5))
	if message := s.awaitApproval(run.RunID, "analyze"); message != "Step analyze was not run: there is no approval: the run has no token. The run waits for an approval by sre" {
		t.Errorf("message of analyze: %q", message)
	}
	s.await("the worker to have looked at the workspace", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(a) FROM mm_orchestrator.approvals a WHERE a.presented -> 'files' IS NOT NULL`)
		return len(rows) == 1, err
	})
	if shown := s.output("runs"); !strings.Contains(shown, "for an approval by sre: analyze was refused") {
		t.Error("runs does not say that analyze was refused")
	}
	s.stopWorker(s.worker)
	s.approve(run.RunID)
	const dockerfile = "api_service/Dockerfile"
	before := read(t, filepath.Join(s.project.Dir, dockerfile))
	if err := s.project.Append(dockerfile, "COPY nothing-of-this-name /x"); err != nil {
		t.Fatal(err)
	}
	s.startWorker()
	s.await("the approval to be refused", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(r) FROM orchestrator_runs r WHERE id = $1 AND status = 'awaiting_approval'`, run.RunID)
		return len(rows) == 1, err
	})
	s.output("runs", run.RunID)
	states := s.states(run.RunID)
	i := slices.IndexFunc(states, func(r record) bool { return strings.HasPrefix(fmt.Sprint(r["message"]), "Step ") })
	if want := "was not run: changed after the run was approved: files of the workspace were edited: " + dockerfile; i < 0 || !strings.Contains(fmt.Sprint(states[i]["message"]), want) {
		t.Errorf("no message says %q: %v", want, states)
	}
	if now, _ := s.containers(); now.ID != api.ID {
		t.Error("the service was deployed again")
	}
	git(t, s.project.Dir, "checkout", "--", dockerfile)
	if text := read(t, filepath.Join(s.project.Dir, dockerfile)); text != before {
		t.Errorf("%s is %q", dockerfile, text)
	}
	s.await("the worker to have looked again", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(a) FROM mm_orchestrator.approvals a WHERE NOT (a.presented -> 'files' -> 'edits')::jsonb ? $1`, dockerfile)
		return len(rows) == 1, err
	})
	s.output("runs", "approve", run.RunID, "--dry-run")
	s.output("runs", "approve", run.RunID, "--by", "ops-417", "--role", "sre")
	if row := s.awaitRun(run.RunID); row["status"] != "succeeded" {
		t.Errorf("the run is %s, want succeeded", row["status"])
	}
	s.awaitHealth("healthy")
	s.output("runs", run.RunID)
	s.output("policy", "check")
	s.requireEmptyQueue()
}

// While a run waits before verify, somebody deploys another image. The approval is about
// the one that the run has deployed. Revoked, the run takes the service back to where it
// was before.
func TestAnotherImageDuringThePause(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackConfig{Project: true, Healthy: true})
	if err := moonmind.SetGate(t.Context(), s.conn, "pre-verify"); err != nil {
		t.Fatal(err)
	}
	const dockerfile = "api_service/Dockerfile"
	before, _ := s.containers()
	if err := s.project.Append(dockerfile, "LABEL deployed=by-the-run"); err != nil {
		t.Fatal(err)
	}
	run := s.submit(newest)
	s.awaitApproval(run.RunID, "verify")
	deployed := read(t, filepath.Join(s.project.Dir, dockerfile))
	if err := s.project.Append(dockerfile, "LABEL deployed=by-somebody-else"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.project.Compose(t.Context(), "up", "--build", "--detach", "--no-deps", "api"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.project.Dir, dockerfile), []byte(deployed), 0o644); err != nil {
		t.Fatal(err)
	}
	s.approve(run.RunID)
	var message string
	s.await("the approval to be refused", func() (bool, error) {
		message = s.awaitApproval(run.RunID, "verify")
		return strings.HasPrefix(message, "Step verify "), nil
	})
	if want := "was not run: changed after the run was deployed: the service runs other images: api sha256:"; !strings.Contains(message, want) {
		t.Errorf("message of verify is %q, want %q", message, want)
	}
	s.output("runs", "revoke", run.RunID, "--reason", "somebody else deploys too")
	s.await("the run to be rolled back", func() (bool, error) {
		rows, err := s.rows(`SELECT to_jsonb(r) FROM orchestrator_runs r WHERE id = $1 AND status = 'rolled_back'`, run.RunID)
		return len(rows) == 1, err
	})
	if now := s.awaitHealth("healthy"); now.Image != before.Image {
		t.Errorf("after the rollback the service has image %.19s, had %.19s", now.Image, before.Image)
	}
	s.requireEmptyQueue()
}

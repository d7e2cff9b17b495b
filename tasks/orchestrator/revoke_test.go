package orchestrator

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A run revoked between two steps: the next one fails before it does anything.
func TestARevokedStepDoesNothing(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `echo ran >ran`)
	b.plan(`[{"name": "build"}]`)
	b.steps.revoked = &store.Revocation{Reason: "wrong branch"}
	failure, _ := b.fail("build")
	if failure.Arg != "Revoked by operator: wrong branch" || failure.Type != "TaskRevokedError" || !strings.HasSuffix(failure.Traceback, "TaskRevokedError: Revoked by operator: wrong branch\n") {
		t.Errorf("%+v", failure)
	}
	if log := b.artifact("build.log"); strings.Contains(log, "docker") {
		t.Errorf("log %q", log)
	}
}

// The message of a revoked step has the reason once, although the error of the command
// that was ended has it too.
func TestRevokedMessageHasTheReasonOnce(t *testing.T) {
	t.Parallel()
	reason := errRevoked{store.Revocation{Reason: "wrong branch", By: "ann@box"}}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	const revoked = "Revoked by operator ann@box: wrong branch"
	for _, tt := range []struct{ message, want string }{
		{"Command sleep 12 was ended: " + revoked + " (see build.log)", revoked + ". Command sleep 12 was ended (see build.log)"},
		{"Command false failed", revoked + ". Command false failed"},
		{revoked, revoked},
		{"", revoked},
	} {
		outcome := store.Outcome{Status: store.StepFailed, Message: tt.message}
		revokedOutcome(ctx, &outcome)
		same(t, "message", outcome.Message, tt.want)
	}
}

// The time limit of a step is the shorter of the plan's and the configured one.
func TestAPlanLimitsAStep(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.StepTimeLimit = time.Hour
	b.program("docker", `exec sleep 600`)
	b.plan(`[{"name": "build", "parameters": {"timeoutSeconds": 0.3}}]`)
	failure, _ := b.fail("build")
	if !strings.Contains(failure.Arg, "longer than its limit of 300ms") {
		t.Error(failure.Arg)
	}
	b.plan(`[{"name": "build", "parameters": {"timeoutSeconds": -1}}]`)
	if failure, _ := b.fail("build"); !strings.Contains(failure.Arg, "timeoutSeconds") {
		t.Error(failure.Arg)
	}
}

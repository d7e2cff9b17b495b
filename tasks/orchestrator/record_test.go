package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// recordingStep is a step that can write its record.
func (b *testEnv) recordingStep(lost context.CancelCauseFunc) *stepRun {
	b.t.Helper()
	o, err := New(b.config)
	if err != nil {
		b.t.Fatal(err)
	}
	begun := store.Start{Claim: store.Claim{RunID: testRun, Step: store.StepPatch, Token: 7}, Change: b.steps.change}
	s := &stepRun{Orchestrator: o, log: o.log, journal: o.openJournal(o.log, begun, func(cause endCause) { lost(cause) }), runID: testRun, step: store.StepPatch}
	b.t.Cleanup(s.journal.close)
	if failure := s.loadRecord(begun.Change); failure != nil {
		b.t.Fatal(failure)
	}
	return s
}

func TestSaveRecordWaitsForTheDatabase(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	refusals := []error{store.ErrUnavailable, store.ErrSchema, context.DeadlineExceeded}
	tries := 0
	b.steps.recordChange = func(context.Context) error {
		if tries++; tries <= len(refusals) {
			return refusals[tries-1]
		}
		return nil
	}
	s := b.recordingStep(nil)
	s.record.Files = &change.Files{}
	if failure := s.saveRecord(t.Context()); failure != nil {
		t.Fatal(failure)
	}
	want, _ := s.record.Encode()
	same(t, "record", string(b.steps.change.Record), string(want))
	if n := strings.Count(b.logged.String(), "waiting for the database"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	// The next step has it, and what has not changed is not written.
	next := b.recordingStep(nil)
	if next.record.Files == nil {
		t.Error("the next step does not have the record")
	}
	before := tries
	if failure := next.saveRecord(t.Context()); failure != nil || tries != before {
		t.Errorf("%v, written %d times", failure, tries-before)
	}
}

func TestSaveRecordEndsWithTheStep(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	ctx, cancel := withTimeLimit(t.Context(), 50*time.Millisecond, "timeoutSeconds")
	defer cancel()
	b.steps.recordChange = func(context.Context) error { return store.ErrUnavailable }
	s := b.recordingStep(nil)
	s.record.Undone = true
	failure := s.saveRecord(ctx)
	if failure == nil {
		t.Fatal("it goes on without a record")
	}
	same(t, "failure", failure.Error(), "The step was ended before it could record what it changes: the step took longer than its limit of 50ms")
}

func TestSaveRecordOfAStepThatWasTakenOver(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.steps.recordChange = func(context.Context) error { return store.ErrClaimLost }
	ctx, lost := context.WithCancelCause(t.Context())
	s := b.recordingStep(lost)
	s.record.Undone = true
	if failure := s.saveRecord(ctx); failure == nil || !errors.Is(context.Cause(ctx), store.ErrClaimLost) {
		t.Errorf("%v, the step's work ends with %v", failure, context.Cause(ctx))
	}
}

func TestSaveRecordThatTheTablesRefuse(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.steps.recordChange = func(context.Context) error { return store.ErrRefused }
	s := b.recordingStep(nil)
	s.record.Undone = true
	if failure := s.saveRecord(t.Context()); failure == nil || !strings.Contains(failure.Error(), "cannot be recorded") {
		t.Errorf("%v", failure)
	}
}

// TestARecordOfANewerVersion: a step that cannot tell what the run has changed
// changes nothing.
func TestARecordOfANewerVersion(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	b.program("touch-it", `touch it`)
	b.config.Programs = []string{"touch-it"}
	b.plan(`[{"name":"patch","parameters":{"commands":[["touch-it"]],"allowlist":["*"]}}]`)
	b.steps.change.Record = json.RawMessage(`{"version":99}`)
	failure, _ := b.fail("patch")
	if !strings.Contains(failure.Error(), "a newer mm-orchestrator has recorded what the run changes (format 99, this program knows 2)") {
		t.Error(failure)
	}
	if _, err := os.Stat(filepath.Join(b.workspace, "it")); err == nil {
		t.Error("its command ran")
	}
}

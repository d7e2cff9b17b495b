package store_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// readTrail reads and checks the audit trail of a run.
func readTrail(t *testing.T, s *store.Store, run string) (trail store.Trail, records []audit.Record, report audit.Report) {
	t.Helper()
	var v *audit.Verifier
	err := s.ReadTrail(t.Context(), run, func(found store.Trail) error {
		trail = found
		v = audit.NewVerifier(run, trail.Removed, &trail.Head)
		return nil
	}, func(e audit.Entry) error {
		v.Add(e)
		r, err := audit.Decode(e.Text)
		records = append(records, r)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return trail, records, v.End()
}

// goodTrail fails the test unless the trail is good and has records of these kinds.
func goodTrail(t *testing.T, s *store.Store, run string, kinds ...audit.Kind) []audit.Record {
	t.Helper()
	_, records, report := readTrail(t, s, run)
	if !report.Good() {
		t.Errorf("trail is broken: %v", report.Findings)
	}
	var got []audit.Kind
	for _, r := range records {
		got = append(got, r.Kind)
	}
	if kinds != nil && !slices.Equal(got, kinds) {
		t.Errorf("trail has %v, want %v", got, kinds)
	}
	return records
}

func TestTrailOfARun(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t, func(c *store.Config) {
		c.Redact = func(text string) string { return strings.ReplaceAll(text, "hunter2", "[REDACTED]") }
	})
	run := d.Create(t, storetest.Seed{})
	pass(t, s, run, "t", store.StepAnalyze)
	start := begin(t, s, run, store.StepPatch, "t-patch")
	if err := s.Record(t.Context(), start.Claim, audit.Record{Kind: audit.CommandStarted, Command: &audit.Command{Number: 1, Argv: []string{"git", "hunter2"}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.RecordChange(t.Context(), start.Claim, []byte(`{"version":1}`), audit.Record{Kind: audit.ImagePinned, Text: "x"}); err != nil {
		t.Fatal(err)
	}
	outcome := good(store.StepPatch)
	outcome.Audit = []audit.Record{{Kind: audit.CommandEnded, Command: &audit.Command{Number: 1}}}
	finished := finish(t, s, start.Claim, outcome)
	records := goodTrail(t, s, run, audit.RunStarted, audit.StepStarted, audit.StepEnded, audit.StepStarted, audit.CommandStarted, audit.ImagePinned, audit.CommandEnded, audit.StepEnded)
	trail, _, _ := readTrail(t, s, run)
	if finished.AuditHead != trail.Head || trail.Head.Length != 8 {
		t.Errorf("FinishStep says that the head is %s, the trail has %s", finished.AuditHead, trail.Head)
	}
	equal(t, "arguments", records[4].Command.Argv, []string{"git", "[REDACTED]"})
	if r := records[4]; r.Step != "patch" || r.Attempt != 1 || r.Start != 1 || r.Worker != "orchestrator@test" || r.At.IsZero() || r.Run != run {
		t.Errorf("record is %+v", r)
	}
	if r := records[7]; r.Status != "succeeded" || len(r.Artifacts) != 1 || r.Artifacts[0].SHA256 != "ab" {
		t.Errorf("end of the step is %+v", r)
	}

	// A repeated FinishStep adds nothing.
	if again := finish(t, s, start.Claim, outcome); again.AuditHead != finished.AuditHead {
		t.Errorf("after a second FinishStep the head is %s, want %s", again.AuditHead, finished.AuditHead)
	}
	failed := begin(t, s, run, store.StepBuild, "t-build")
	finish(t, s, failed.Claim, bad(store.StepBuild))
	back := begin(t, s, run, store.StepRollback, "t-back")
	finish(t, s, back.Claim, good(store.StepRollback))
	records = goodTrail(t, s, run)
	if last := records[len(records)-1]; last.Kind != audit.RunEnded || last.Status != "rolled_back" {
		t.Errorf("last record is %+v", last)
	}
	if err := s.ReadTrail(t.Context(), d.Create(t, storetest.Seed{}), nil, nil); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("the trail of a run that has not begun: %v", err)
	}
}

// A worker that has lost its claim appends nothing.
func TestRecordIsFenced(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	claim := begin(t, s, run, store.StepAnalyze, "t").Claim
	lost := claim
	lost.Token++
	record := audit.Record{Kind: audit.CommandStarted}
	if err := s.Record(t.Context(), lost, record); !errors.Is(err, store.ErrClaimLost) {
		t.Errorf("with another token: %v", err)
	}
	if err := s.RecordChange(t.Context(), lost, []byte(`{}`), record); !errors.Is(err, store.ErrClaimLost) {
		t.Errorf("change with another token: %v", err)
	}
	if err := s.ReleaseClaim(t.Context(), lost, record); err != nil {
		t.Errorf("release with another token: %v", err)
	}
	goodTrail(t, s, run, audit.RunStarted, audit.StepStarted)
	if err := s.ReleaseClaim(t.Context(), claim, audit.Record{Kind: audit.StepReleased}); err != nil {
		t.Fatal(err)
	}
	if err := s.ReleaseClaim(t.Context(), claim, audit.Record{Kind: audit.StepReleased}); err != nil {
		t.Fatal(err)
	}
	again := begin(t, s, run, store.StepAnalyze, "t").Claim
	finish(t, s, again, good(store.StepAnalyze))
	if err := s.Record(t.Context(), again, record); !errors.Is(err, store.ErrClaimLost) {
		t.Errorf("after the end of the step: %v", err)
	}
	records := goodTrail(t, s, run, audit.RunStarted, audit.StepStarted, audit.StepReleased, audit.StepStarted, audit.StepEnded)
	if r := records[3]; r.Start != 2 || r.Text != "worker orchestrator@test has left the step unfinished" {
		t.Errorf("second start is %+v", r)
	}
}

// The tables refuse what is not an append, also to their owner and to a superuser.
func TestTrailIsAppendOnly(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	run := d.Create(t, storetest.Seed{})
	pass(t, s, run, "t", toVerify...)
	before := d.Rows(t, `SELECT * FROM mm_orchestrator.audit ORDER BY seq`)
	heads := d.Rows(t, `SELECT * FROM mm_orchestrator.audit_heads`)
	for _, statement := range []string{
		`UPDATE mm_orchestrator.audit SET record = record || ' '`,
		`UPDATE mm_orchestrator.audit SET hash = repeat('0', 64) WHERE seq = 1`,
		`UPDATE mm_orchestrator.audit SET seq = seq + 100`,
		`DELETE FROM mm_orchestrator.audit`,
		`DELETE FROM mm_orchestrator.audit WHERE seq = (SELECT max(seq) FROM mm_orchestrator.audit)`,
		`TRUNCATE mm_orchestrator.audit`,
		`INSERT INTO mm_orchestrator.audit AS a SELECT * FROM mm_orchestrator.audit ON CONFLICT (run_id, seq) DO UPDATE SET record = 'x'`,
		`UPDATE mm_orchestrator.audit_heads SET length = length - 1`,
		`UPDATE mm_orchestrator.audit_heads SET head = repeat('0', 64)`,
		`UPDATE mm_orchestrator.audit_heads SET removed_length = length, removed_head = head, removed_at = now()`,
		`DELETE FROM mm_orchestrator.audit_heads`,
		`TRUNCATE mm_orchestrator.audit_heads`,
	} {
		if _, err := d.Pool.Exec(t.Context(), statement); err == nil || !strings.Contains(err.Error(), "append-only") {
			t.Errorf("%s: %v", statement, err)
		}
	}
	equal(t, "audit", d.Rows(t, `SELECT * FROM mm_orchestrator.audit ORDER BY seq`), before)
	equal(t, "audit_heads", d.Rows(t, `SELECT * FROM mm_orchestrator.audit_heads`), heads)
	// Whoever may switch triggers off can do it, and it shows.
	execute(t, d, `ALTER TABLE mm_orchestrator.audit DISABLE TRIGGER USER`)
	execute(t, d, `UPDATE mm_orchestrator.audit SET record = replace(record, 'succeeded', 'Succeeded') WHERE seq = 3`)
	execute(t, d, `DELETE FROM mm_orchestrator.audit WHERE seq = 5`)
	execute(t, d, `DELETE FROM mm_orchestrator.audit WHERE seq = (SELECT max(seq) FROM mm_orchestrator.audit)`)
	_, records, report := readTrail(t, s, run)
	last := int64(len(records)) + 2
	var found []string
	for _, f := range report.Findings {
		found = append(found, fmt.Sprintf("%d %s", f.Seq, f.Fault))
	}
	equal(t, "findings", found, []string{"3 edited", "5 removed", fmt.Sprintf("%d cut", last)})
}

// Several workers append to one trail at once: it has all records, in one chain.
func TestConcurrentAppends(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	const workers, each = 4, 25
	var wait sync.WaitGroup
	for range workers {
		s := d.Open(t)
		wait.Go(func() {
			for range each {
				if err := s.RecordByHand(t.Context(), run, audit.Record{Kind: audit.BroughtBack}, audit.Record{Kind: audit.BroughtBack}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	if records := goodTrail(t, d.Open(t), run); len(records) != 2*workers*each {
		t.Errorf("%d records, want %d", len(records), 2*workers*each)
	}
}

// When the connection is cut anywhere, the records are in the trail once.
func TestRecordsAreWrittenOnce(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	cutter, address := newConnectionCutter(t, d.URL)
	s := d.Open(t, func(c *store.Config) { c.URL, c.TakeoverGrace = secret.New(address), time.Minute })
	everywhere(t, cutter, func(t *testing.T, armed func()) {
		run := d.Create(t, storetest.Seed{})
		armed()
		claim := begin(t, s, run, store.StepPatch, "t").Claim
		if err := s.Record(t.Context(), claim, audit.Record{Kind: audit.CommandStarted}); err != nil {
			t.Error(err)
		}
		if err := s.RecordChange(t.Context(), claim, []byte(`{}`), audit.Record{ID: "pin", Kind: audit.ImagePinned}); err != nil {
			t.Error(err)
		}
		outcome := good(store.StepPatch)
		outcome.Audit = []audit.Record{{Kind: audit.CommandEnded}}
		finish(t, s, claim, outcome)
		goodTrail(t, s, run, audit.RunStarted, audit.StepStarted, audit.CommandStarted, audit.ImagePinned, audit.CommandEnded, audit.StepEnded)
		if err := s.RecordByHand(t.Context(), run, audit.Record{Kind: audit.BroughtBack, By: "ops"}); err != nil {
			t.Error(err)
		}
		goodTrail(t, s, run, audit.RunStarted, audit.StepStarted, audit.CommandStarted, audit.ImagePinned, audit.CommandEnded, audit.StepEnded, audit.BroughtBack)
	})
}

// The retention removes old trails only, leaves a record of the removal, and a run that
// goes on later goes on with its chain.
func TestRemoveOldTrails(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	old, young := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	pass(t, s, old, "o", toVerify[:2]...)
	pass(t, s, young, "y", toVerify[:2]...)
	if _, err := s.RemoveOldTrails(t.Context(), time.Hour, 10); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("a retention of an hour: %v", err)
	}
	const week = 7 * 24 * time.Hour
	if removed, err := s.RemoveOldTrails(t.Context(), week, 10); err != nil || len(removed) > 0 {
		t.Errorf("removed %v, %v", removed, err)
	}
	execute(t, d, `ALTER TABLE mm_orchestrator.audit_heads DISABLE TRIGGER USER`)
	execute(t, d, `UPDATE mm_orchestrator.audit_heads SET updated_at = now() - interval '8 days' WHERE run_id = '`+old+`'`)
	execute(t, d, `ALTER TABLE mm_orchestrator.audit_heads ENABLE TRIGGER USER`)
	before, _, _ := readTrail(t, s, old)
	if removed, err := s.RemoveOldTrails(t.Context(), week, 10); err != nil || !slices.Equal(removed, []string{old}) {
		t.Errorf("removed %v, %v, want %s", removed, err, old)
	}
	if removed, err := s.RemoveOldTrails(t.Context(), week, 10); err != nil || len(removed) > 0 {
		t.Errorf("removed %v again, %v", removed, err)
	}
	trail, records, report := readTrail(t, s, old)
	if len(records) != 0 || trail.Head != before.Head || trail.Removed != before.Head || trail.RemovedAt.IsZero() || !report.Good() {
		t.Errorf("after the removal: %+v, %d records, %v", trail, len(records), report.Findings)
	}
	goodTrail(t, s, young, audit.RunStarted, audit.StepStarted, audit.StepEnded, audit.StepStarted, audit.StepEnded)
	pass(t, s, old, "o", toVerify[2])
	if records := goodTrail(t, s, old, audit.StepStarted, audit.StepEnded); records[0].Seq != 6 || records[0].Prev != before.Head.Hash {
		t.Errorf("the trail goes on with %+v", records[0])
	}
}

package orchestrator

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// audit adds records to the run's trail. They are written together with what the step
// writes next, at the latest with its end. If the worker dies before, the trail has the
// record of the intent ([stepRun.auditBefore]), and what the next worker finds.
func (s *stepRun) audit(records ...audit.Record) {
	for _, r := range records {
		if r.At.IsZero() {
			r.At = s.config.Now().UTC()
		}
		if r.ID == "" {
			r.ID = rand.Text() // also if it is written twice
		}
		s.unwritten = append(s.unwritten, r)
	}
}

// auditBefore writes records of what the step is about to do, and those that audit has
// added. Do nothing of it if it returns a failure. It waits like saveRecord; where that
// is called anyway, audit before it costs nothing.
func (s *stepRun) auditBefore(ctx context.Context, records ...audit.Record) *Failure {
	s.audit(records...)
	if len(s.unwritten) == 0 {
		return nil
	}
	return s.write(ctx, func(attempt context.Context, records []audit.Record) error {
		return s.config.Steps.Record(attempt, s.journal.claim, records...)
	})
}

// commandRecord is the record about a command that has started or ended.
func (s *stepRun) commandRecord(kind audit.Kind, number int, workspace string, command []string) audit.Record {
	return audit.Record{Kind: kind, Command: &audit.Command{Number: number, Argv: command, Dir: workspace}}
}

// commandEnded is the record about the end of the command at next. Its ID is the same
// for the worker that has run the command and for one that finds its end recorded.
func (s *stepRun) commandEnded(workspace string, command []string, code int, at time.Time) audit.Record {
	r := s.commandRecord(audit.CommandEnded, s.journal.next, workspace, command)
	r.Command.Exit = &code
	r.At = at.UTC().Truncate(time.Microsecond)
	r.ID = fmt.Sprintf("%s-%s-%d-%d-%d", audit.CommandEnded, s.step, s.journal.claim.Attempt, s.journal.next, r.At.UnixMicro())
	return r
}

// refusedRecord is the record about something that the run must not do.
func refusedRecord(kind audit.Kind, rule string, failure *Failure) audit.Record {
	r := audit.Record{Kind: kind, Text: cut(failure.Error())}
	if rule != "" {
		r.Rule = &audit.Rule{Name: rule}
	}
	return r
}

// fileRecords are the records about the files of a run's change.
func fileRecords(kind audit.Kind, files []changedFile) []audit.Record {
	version := func(v *fileVersion) *audit.Version {
		if v == nil {
			return nil
		}
		return &audit.Version{SHA256: v.SHA256, Mode: v.Mode}
	}
	records := make([]audit.Record, len(files))
	for i, f := range files {
		records[i] = audit.Record{Kind: kind, File: &audit.File{Path: f.Path, Before: version(f.Before), After: version(f.After)}}
	}
	return records
}

// releasedRecords are those of a step that is given up: what is not written yet, and why.
func releasedRecords(outcome store.Outcome, reason string) []audit.Record {
	return append(outcome.Audit, audit.Record{Kind: audit.StepReleased, Text: cut(reason)})
}

package orchestrator

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// loadRecord reads what is recorded about the change of the run.
func (s *stepRun) loadRecord(known store.ChangeState) *Failure {
	record, err := change.Decode(known.Record)
	if err != nil {
		return unexpected(err)
	}
	s.record, s.recorded, s.ranElsewhere = record, known.Record, known.RunElsewhere
	return nil
}

// saveRecord records s.record. Call it before the act that the record describes,
// and do not act if it returns a failure.
//
//   - While the database is unavailable it waits, as the act must not come first.
//     The wait ends with ctx.
//   - If another worker has taken the step over, it ends the step's work.
//   - A record that has not changed is not written again.
func (s *stepRun) saveRecord(ctx context.Context) *Failure {
	if s.step == store.StepPatch {
		s.record.Submission = s.submission
	}
	text, err := s.record.Encode()
	if err != nil {
		return unexpected(err)
	}
	if bytes.Equal(text, s.recorded) {
		return nil
	}
	failure := s.write(ctx, func(attempt context.Context, records []audit.Record) error {
		return s.config.Steps.RecordChange(attempt, s.journal.claim, text, records...)
	})
	if failure == nil {
		s.recorded = text
	}
	return failure
}

// write calls to with the records of the audit trail that are not written yet, until the
// database has taken them. See saveRecord for how it waits and ends.
func (s *stepRun) write(ctx context.Context, to func(attempt context.Context, records []audit.Record) error) *Failure {
	if cause := context.Cause(ctx); cause != nil {
		return recordEnded(cause)
	}
	logged := false
	var err error
	retryWrite(ctx, maxRecordPause, func() bool {
		attempt, cancel := context.WithTimeout(ctx, s.config.FinishTimeout)
		defer cancel()
		err = to(attempt, s.unwritten)
		if !mayRecover(err) || ctx.Err() != nil {
			return true
		}
		if !logged {
			s.log.Error("what the step changes cannot be recorded yet, waiting for the database before it goes on", "error", err)
			logged = true
		}
		return false
	})
	switch cause := context.Cause(ctx); {
	case err == nil:
		s.unwritten = nil
		return nil
	case cause != nil:
		return recordEnded(cause)
	case errors.Is(err, store.ErrClaimLost):
		s.log.Warn("step was taken over by another worker, ending it here", "error", err)
		s.journal.endWork(endCause{takenOver, err})
		return recordEnded(err)
	}
	return unexpected(fmt.Errorf("what the step changes cannot be recorded, so that it changes nothing more: %w", err))
}

// recordEnded is the failure of a step that ends before the record is written.
func recordEnded(cause error) *Failure {
	return commandError(fmt.Sprintf("The step was ended before it could record what it changes: %s", cause))
}

package orchestrator

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
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

// auditChange adds records about the files that the run has altered.
func (f *runFiles) auditChange(ctx context.Context, list []change.Difference) *Failure {
	files, failure := f.describe(ctx, list)
	if failure == nil {
		f.audit(fileRecords(audit.FileChanged, files)...)
	}
	return failure
}

// auditViolations adds the records about what the run must not have altered, and that it
// is taken back next.
func (f *runFiles) auditViolations(violations []change.Difference) {
	if len(violations) > 0 {
		f.audit(refusedRecord(audit.Refused, "allow-list", allowListViolation(cut(f.violationText(violations)))),
			audit.Record{Kind: audit.FilesChanging, Text: "take back what the run must not alter"})
	}
}

// auditRefused adds the record about a command that may not run.
func (s *stepRun) auditRefused(workspace string, command []string, failure *Failure) {
	r := s.commandRecord(audit.CommandRefused, 0, workspace, command)
	r.Text = cut(failure.Error())
	if failure.rule != "" {
		r.Rule = &audit.Rule{Name: failure.rule}
	}
	s.audit(r)
}

// auditRestored adds records about files that are as before again. list is the change
// that was taken back.
func (f *runFiles) auditRestored(ctx context.Context, list []change.Difference) {
	back := slices.Clone(list)
	for i := range back {
		back[i].Before, back[i].After = back[i].After, back[i].Before
	}
	f.auditFiles(ctx, audit.FileRestored, back)
}

// auditFiles adds records about files. Where their checksums cannot be had, one record
// names them: that ends no rollback.
func (f *runFiles) auditFiles(ctx context.Context, kind audit.Kind, list []change.Difference) {
	files, failure := f.describe(ctx, list)
	if failure != nil {
		f.audit(audit.Record{Kind: kind, Text: cut(strings.Join(f.shownPaths(list), ", ") + ". " + failure.Error())})
		return
	}
	f.audit(fileRecords(kind, files)...)
}

// auditHealth adds the record about a verdict.
func (s *stepRun) auditHealth(r requirements, v verdict) {
	record := audit.Record{Kind: audit.Health, Status: "not healthy", Text: cut(v.reason), Container: &audit.Container{Service: r.service}}
	switch {
	case v.ended:
		record.Status = "ended"
	case v.health == healthy:
		record.Status = "healthy"
	case v.health == unproven:
		record.Status = "not proven"
	}
	s.audit(record)
}

// auditPins adds records about the images that are kept.
func (s *stepRun) auditPins(image *change.Image) {
	for _, pin := range image.Pins {
		s.audit(audit.Record{Kind: audit.ImagePinned, Text: "pin " + pin.Name, Image: &audit.Image{Before: pin.ImageID, Digests: pin.RepoDigests},
			Container: &audit.Container{Service: pin.Service, Before: pin.Container}})
	}
}

// auditContainers adds a record for each container of now that was not there before,
// and for each service that has none any more.
func (s *stepRun) auditContainers(before, now change.Project) {
	for _, service := range before.Services() {
		if len(now.Of(service)) == 0 {
			for _, c := range before.Of(service) {
				s.audit(audit.Record{Kind: audit.ContainerReplaced, Container: &audit.Container{Service: service, Before: c.ID, ImageBefore: c.ImageID}})
			}
		}
	}
	for _, c := range now.Containers {
		if _, same := before.ByID(c.ID); same {
			continue
		}
		r := audit.Container{Service: c.Service, After: c.ID, ImageAfter: c.ImageID}
		for _, old := range before.Of(c.Service) {
			if old.Number == c.Number {
				r.Before, r.ImageBefore = old.ID, old.ImageID
			}
		}
		s.audit(audit.Record{Kind: audit.ContainerReplaced, Container: &r})
	}
}

// writeTrail writes the audit trail of a run that has ended to RUN.jsonl in the
// configured directory. The database has the trail anyway.
func (o *Orchestrator) writeTrail(ctx context.Context, log *slog.Logger, run string) {
	if o.config.AuditDirectory == "" {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
	defer cancel()
	dir, err := artifacts.Open(o.config.AuditDirectory, o.config.Redactor)
	if err == nil {
		defer dir.Close()
		err = dir.WriteExact(run+".jsonl", func(file io.Writer) error {
			return o.config.Steps.ReadTrail(ctx, run, func(store.Trail) error { return nil }, func(e audit.Entry) error {
				_, err := fmt.Fprintf(file, "%s\n", e.Text)
				return err
			})
		})
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		log.Warn("the copy of the audit trail cannot be written; `mm-orchestrator audit show --json` prints it", "directory", o.config.AuditDirectory, "error", err)
	}
}

// writeTrailAgain writes the copy of a run's trail for a worker that was killed after
// the run's end was recorded. A run that has not ended gets none.
func (o *Orchestrator) writeTrailAgain(ctx context.Context, log *slog.Logger, run string) {
	if o.config.AuditDirectory == "" {
		return
	}
	var last audit.Kind
	err := o.config.Steps.ReadTrail(ctx, run, func(store.Trail) error { return nil }, func(e audit.Entry) error {
		r, err := audit.Decode(e.Text)
		last = r.Kind
		return err
	})
	if err == nil && last == audit.RunEnded {
		o.writeTrail(ctx, log, run)
	}
}

package orchestrator

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// RemovedChange is what RemoveChange has removed.
type RemovedChange struct {
	RunID string
	// Refs are the refs that were removed, SetAside those that were kept, because
	// they have work of somebody else.
	Refs, SetAside []string
	// Pins are the names of containers that kept an image, Archives the paths of
	// saved images.
	Pins, Archives []string
}

// RemoveOptions say what RemoveChange removes.
type RemoveOptions struct {
	// SetAside removes also work of somebody else that was set aside.
	SetAside bool
	// DryRun removes nothing.
	DryRun bool
}

// errDryRun ends the transaction of a dry run.
var errDryRun = errors.New("dry run")

// RemoveChange removes what is kept to take back the change of a run: refs, pins,
// saved images and the record, in that order. filter selects the run, and says in
// what state it must be; see [store.Store.RemoveChange].
//
// It can be repeated after an error or a crash: what is removed already is no
// error.
func (o *Orchestrator) RemoveChange(ctx context.Context, filter store.ChangeFilter, options RemoveOptions) (RemovedChange, error) {
	removed := RemovedChange{RunID: filter.RunID}
	err := o.config.Steps.RemoveChange(ctx, filter, func(ctx context.Context, c store.Change) (json.RawMessage, error) {
		removed = RemovedChange{RunID: c.RunID}
		record, err := change.Decode(c.Record)
		if err != nil {
			return nil, err
		}
		if record.Image != nil {
			if err := o.removePins(ctx, c.RunID, record.Image, options, &removed); err != nil {
				return nil, err
			}
		}
		if record.Helper != nil && o.config.Helpers != nil && !options.DryRun {
			// They have ended long ago.
			if err := o.config.Helpers.RemoveHelpers(ctx, c.RunID); err != nil {
				return nil, err
			}
		}
		if record.Files != nil {
			dir := cmp.Or(record.Files.Top, workspacePath(c))
			if err := o.removeRefs(ctx, c.RunID, dir, options, &removed); err != nil {
				return nil, err
			}
		}
		switch {
		case options.DryRun:
			return nil, errDryRun
		case len(removed.SetAside) == 0:
			return nil, nil
		}
		return change.Record{Files: record.Files}.Encode()
	})
	if errors.Is(err, errDryRun) {
		err = nil
	}
	return removed, err
}

// workspacePath is the path in the name of a workspace, see workspaceOf.
func workspacePath(c store.Change) string { return strings.TrimPrefix(c.Workspace, c.Queue+":") }

func (o *Orchestrator) removeRefs(ctx context.Context, run, dir string, options RemoveOptions, removed *RemovedChange) error {
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("refs of run %s cannot be removed: workspace %s cannot be used: %s", run, dir, preflight.Reason(err))
	}
	git := o.runner.of(processes.Owner{}).git
	refs, err := change.ListRefs(ctx, git, dir, run)
	if errors.Is(err, change.ErrNotInRepository) {
		return nil // the refs went with their repository
	}
	if err != nil {
		return err
	}
	for _, ref := range refs {
		if ref.SetAside() && !options.SetAside {
			removed.SetAside = append(removed.SetAside, ref.Name)
			continue
		}
		if !options.DryRun {
			if err := change.RemoveRef(ctx, git, dir, ref); err != nil {
				return err
			}
		}
		removed.Refs = append(removed.Refs, ref.Name)
	}
	return nil
}

// removePins removes the pins of a run, whose names the label of the run tells, and
// its folder of saved images.
func (o *Orchestrator) removePins(ctx context.Context, run string, image *change.Image, options RemoveOptions, removed *RemovedChange) error {
	if o.config.Engine == nil || !image.EngineSeen {
		return nil
	}
	pins, err := o.config.Engine.ListPins(ctx, run)
	if err != nil {
		return err
	}
	for _, pin := range pins {
		if !options.DryRun {
			if err := o.config.Engine.RemovePin(ctx, pin.Name); err != nil {
				return err
			}
		}
		removed.Pins = append(removed.Pins, pin.Name)
	}
	for _, pin := range image.Pins {
		dir := filepath.Dir(pin.Archive)
		if pin.Archive == "" || filepath.Base(dir) != run {
			continue
		}
		if _, err := os.Stat(pin.Archive); err == nil {
			removed.Archives = append(removed.Archives, pin.Archive)
		}
		if options.DryRun {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("the saved images in %s cannot be removed: %s", dir, preflight.Reason(err))
		}
	}
	return nil
}

const (
	// changesInterval is the time between two looks for changes that are to be
	// removed.
	changesInterval = time.Minute
	// changesAtOnce is how many one sweep removes at most, so that it does not keep
	// messages waiting.
	changesAtOnce = 5
	// changesRetry is the time before a removal is tried again that has failed.
	changesRetry = time.Hour
)

// oldChanges is what a sweeper knows about changes to remove.
type oldChanges struct {
	// next is when to look again.
	next time.Time
	// failed says until when a run is left alone because its removal has failed.
	failed map[string]time.Time
}

// removeOldChanges removes what is kept of runs that have been over for
// KeepChanges. What it cannot remove it leaves for later: nobody waits for it.
func (s *sweeper) removeOldChanges(ctx context.Context) error {
	now := time.Now()
	if now.Before(s.changes.next) {
		return nil
	}
	filter := store.ChangeFilter{Queue: s.config.Queue, Over: true, Age: s.config.KeepChanges, NotReduced: true}
	list, err := s.config.Steps.ListChanges(ctx, filter)
	if err != nil {
		return err
	}
	tried := 0
	for _, c := range list {
		if now.Before(s.changes.failed[c.RunID]) {
			continue
		}
		if tried++; tried > changesAtOnce {
			return nil // the next sweep continues
		}
		stall.FromContext(ctx).Progress("")
		filter.RunID = c.RunID
		removed, err := s.RemoveChange(ctx, filter, RemoveOptions{})
		log := s.log.With("run_id", c.RunID)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, store.ErrNotFound): // retried, or another worker removes it
		case err != nil:
			s.changes.failed[c.RunID] = now.Add(changesRetry)
			log.Warn("what was kept to take back the change of a run cannot be removed, trying again later", "retry_after", changesRetry, "error", err)
		default:
			delete(s.changes.failed, c.RunID)
			log.Info("removed what was kept to take back the change of a run", "over_since", c.LastAt, "refs", len(removed.Refs), "pins", len(removed.Pins), "set_aside", len(removed.SetAside))
		}
	}
	if err := s.removeOldTrails(ctx); err != nil {
		return err
	}
	s.changes.next = now.Add(changesInterval)
	return nil
}

// removeOldTrails removes audit trails that are older than KeepAudit, at most
// changesAtOnce of them.
func (s *sweeper) removeOldTrails(ctx context.Context) error {
	if s.config.KeepAudit == 0 {
		return nil
	}
	removed, err := s.config.Steps.RemoveOldTrails(ctx, s.config.KeepAudit, changesAtOnce)
	for _, run := range removed {
		s.log.Info("removed the audit trail of a run, as configured", "run_id", run, "kept_for", s.config.KeepAudit)
	}
	return err
}

package orchestrator

import (
	"context"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// lookForPause logs once that the queue is paused, and once that it no longer is, and
// sets the metric. It decides nothing: BeginStep and TakeParked read the pause
// themselves.
func (s *sweeper) lookForPause(ctx context.Context) error {
	now, err := s.config.Steps.FindPause(ctx, s.config.Queue)
	if err != nil {
		return err
	}
	before := s.pause
	s.pause = now
	s.config.Metrics.Paused(now != nil)
	switch {
	case now != nil && (before == nil || before.Reason != now.Reason || before.Mode != now.Mode || !before.Since.Equal(now.Since)):
		s.log.Warn("queue is paused: no new run begins until `mm-orchestrator resume`",
			"since", now.Since, "by", now.By, "reason", now.Reason, "mode", string(now.Mode))
	case now == nil && before != nil:
		s.log.Info("pause of the queue has ended", "since", before.Since, "reason", before.Reason)
	}
	return nil
}

// findPause is for a worker that leaves the queue.
func (o *Orchestrator) findPause(ctx context.Context) (*store.Pause, error) {
	ctx, cancel := context.WithTimeout(ctx, leaveTimeout)
	defer cancel()
	return o.config.Steps.FindPause(ctx, o.config.Queue)
}

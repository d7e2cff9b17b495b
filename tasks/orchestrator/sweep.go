package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Broker is what parked messages need of the engine. [worker.Worker] is it;
// its methods say what they promise.
type Broker interface {
	Publish(ctx context.Context, message protocol.Publishing) error
	QueueDepth(ctx context.Context, queue string) (int, error)
	QueueConsumers(ctx context.Context, queue string) (worker.QueueConsumers, error)
	Unacked() []*protocol.Message
}

// publishTimeout bounds the publication of one parked message. Should the
// broker be away for longer, the next sweep tries again.
const publishTimeout = 10 * time.Second

// Sweep looks after the workspaces of the queue until ctx ends, every
// SweepInterval with some jitter. What it mends is what a crash or a fault has
// left: in ordinary life a workspace is passed on, and the messages of the
// next run published, by the step that ends a run.
//
//   - Parked messages whose turn has come are published.
//   - A workspace whose run has ended or is gone passes to the next one.
//   - A run that has a workspace, while no worker has anything of it in hand
//     and the queue is empty, is lost. When that has been so for LostGrace, the
//     run fails and is rolled back; or, if only a step of it was lost whose
//     worker is gone, and a retry waits for that, the retry goes on. It is not
//     so while a consumer is on the queue that is no worker of this program,
//     while anybody has a row of the run locked, or while one is at a step of
//     any run (foreign.go).
//
// It is called once, while the worker runs, after Register, and ends at Leave
// too. Every worker of a queue may sweep: each act is one transaction that looks
// again.
func (o *Orchestrator) Sweep(ctx context.Context) {
	ctx, done, ok := o.sweeping.begin(ctx)
	if !ok {
		return
	}
	defer done()
	s := sweeper{Orchestrator: o, suspects: map[string]suspect{}}
	activity := o.stalls.Start("sweep of queue "+o.config.Queue, "looking for messages whose turn has come")
	defer activity.End()
	ctx = activity.Context(ctx)
	for {
		if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
			if text := err.Error(); text != s.told {
				s.told = text
				o.log.Warn("parked messages cannot be looked after, trying again", "error", err)
			}
		} else {
			s.told = ""
		}
		interval := o.config.SweepInterval
		timer := time.NewTimer(interval*3/4 + rand.N(interval/2+1))
		over := activity.Wait()
		select {
		case <-timer.C:
			over()
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// Stuck names the steps in hand, and the sweep, that have neither moved nor
// waited for something outside (a command, a service that is not up yet) for so
// long, or is nil. It returns at once.
func (o *Orchestrator) Stuck(after time.Duration) error { return o.stalls.Stuck(after) }

// sweeper is what one call of Sweep remembers.
type sweeper struct {
	*Orchestrator
	// suspects are the holders that seemed lost at the last look, by
	// workspace.
	suspects map[string]suspect
	// told is the last error that was logged.
	told string
	// foreign are the consumers of the queue that are not ours.
	foreign foreignConsumers
}

// suspect is a holder that seems lost. It must stay so, seen by this process
// with an empty queue at every look, for the whole grace: after a start of all
// workers, say, the messages of hours ago are only just being taken.
//
// Whatever is done with the run in that time begins the suspicion anew: Python's
// worker, which says nothing of what it has in hand, is known by its commits.
type suspect struct {
	runID   string
	seenAt  time.Time
	version string
	since   time.Time
}

// mend is what a sweep does about a workspace.
type mend int

const (
	mendNothing mend = iota
	// mendPass: nobody holds it, or a run that has no more use for it.
	mendPass
	// mendIdle: nothing of the holder is anywhere to be seen but, perhaps, in
	// the queue.
	mendIdle
)

// mendingOf says what is to be done about a workspace. Pure.
func mendingOf(w store.WorkspaceState) mend {
	switch {
	case w.RunID == "" && w.Waiting > 0, w.RunID != "" && !w.RunGoesOn:
		return mendPass
	case w.RunID == "", w.Working, w.Parked > 0 && !w.Blocked:
		return mendNothing
	}
	switch w.RunStatus {
	case store.RunRunning, store.RunFailed, store.RunPending:
		return mendIdle
	}
	// One that waits for approval keeps what it has done so far.
	return mendNothing
}

func (s *sweeper) sweep(ctx context.Context) error {
	// Each time: the row may be lost with the schema, or with the session.
	if err := s.config.Steps.RegisterWorker(ctx, s.config.Queue); err != nil {
		return err
	}
	foreignErr := s.findForeign(ctx)
	s.tellForeign()
	var inHand []string
	for _, m := range s.broker.Unacked() {
		if run := runOf(m); run != "" {
			inHand = append(inHand, run)
		}
	}
	list, err := s.config.Steps.ListWorkspaces(ctx, s.config.Queue, inHand)
	if err != nil {
		return err
	}
	problems := []error{foreignErr}
	parked, still := false, map[string]suspect{}
	for _, w := range list {
		parked = parked || w.Parked+w.Waiting > 0
		switch mendingOf(w) {
		case mendPass:
			err = s.config.Steps.PassWorkspace(ctx, w.Workspace, w.RunID)
		case mendIdle:
			err = s.idle(ctx, w, still)
		default:
			err = nil
		}
		problems = append(problems, err)
	}
	s.suspects = still
	if parked {
		problems = append(problems, s.unpark(ctx))
	}
	return errors.Join(problems...)
}

// idle keeps or confirms the suspicion that a holder is lost.
func (s *sweeper) idle(ctx context.Context, w store.WorkspaceState, still map[string]suspect) error {
	if !s.foreign.none() || w.LongStep {
		return nil
	}
	ready, err := s.broker.QueueDepth(ctx, s.config.Queue)
	if err != nil || ready > 0 {
		return err
	}
	now := time.Now() // monotonic
	before, known := s.suspects[w.Workspace]
	if !known || before.runID != w.RunID || !before.seenAt.Equal(w.SeenAt) || before.version != w.Version {
		before = suspect{runID: w.RunID, seenAt: w.SeenAt, version: w.Version, since: now}
	}
	still[w.Workspace] = before
	if now.Sub(before.since) < s.config.LostGrace || w.Idle < s.config.LostGrace {
		return nil
	}
	// Somebody may have come since, and taken a message before the queue was
	// found empty.
	if err := s.findForeign(ctx); err != nil || !s.foreign.none() {
		delete(still, w.Workspace)
		return err
	}
	found := store.Suspect{Workspace: w.Workspace, Queue: s.config.Queue, RunID: w.RunID, Version: before.version, Grace: s.config.LostGrace}
	err = s.end(ctx, w, found)
	if errors.Is(err, store.ErrLocked) {
		delete(still, w.Workspace)
		return nil
	}
	return err
}

// end is what becomes of a run that is lost.
func (s *sweeper) end(ctx context.Context, w store.WorkspaceState, found store.Suspect) error {
	switch {
	case w.Blocked:
		if err := s.config.Steps.FreeClaims(ctx, found); err != nil {
			return err
		}
		s.log.Warn("a step was lost with its worker, the other steps of its run go on", "run_id", found.RunID)
		return s.unpark(ctx)
	case w.RunStatus == store.RunPending:
		return s.config.Steps.PassPending(ctx, found)
	}
	faultpoint.Hit(faultpoint.LostBefore, found.RunID)
	lost, err := s.config.Steps.FailLost(ctx, found, s.rollbackMessage)
	if err != nil || lost == nil {
		return err
	}
	faultpoint.Hit(faultpoint.LostFailed, found.RunID, string(lost.Step))
	log := s.log.With("run_id", found.RunID)
	if lost.Step == "" {
		log.Warn("the rollback's message was lost and is sent again")
	} else {
		log.Error("run was lost", "step", string(lost.Step), "rollback", lost.RollbackSent, "error", lost.Message)
		s.config.Metrics.StepFinished(string(lost.Step), false, 0)
		if lost.Finished.RunEnded {
			s.config.Metrics.RunFinished(string(lost.Finished.Status), lost.Finished.Duration)
		} else {
			s.config.Metrics.RunStatus(string(lost.Finished.Status))
		}
	}
	return s.unpark(ctx)
}

// unpark publishes every parked message whose turn has come.
func (o *Orchestrator) unpark(ctx context.Context) error {
	for {
		messages, err := o.config.Steps.TakeParked(ctx, o.config.Queue)
		if err != nil || len(messages) == 0 {
			return err
		}
		for i, m := range messages {
			if err := o.publishParked(ctx, m); err != nil {
				for _, kept := range messages[i:] {
					err = errors.Join(err, o.config.Steps.KeepParked(context.WithoutCancel(ctx), kept.ID))
				}
				return err
			}
		}
	}
}

// publishParked gives one message back to the broker. A crash in between
// leaves it in both places, which is harmless.
func (o *Orchestrator) publishParked(ctx context.Context, m store.ParkedMessage) error {
	stall.FromContext(ctx).Progress("")
	faultpoint.Hit(faultpoint.ParkedTaken, m.RunID, string(m.Step))
	publish, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := o.broker.Publish(publish, publishingOf(m)); err != nil {
		return err
	}
	faultpoint.Hit(faultpoint.ParkedPublished, m.RunID, string(m.Step))
	o.log.Info("parked message is back in the queue", "run_id", m.RunID, "step", string(m.Step), "task_id", m.TaskID,
		"why", string(m.Why), "waited", max(0, time.Since(m.Since)).Round(time.Millisecond))
	return o.config.Steps.DropParked(context.WithoutCancel(ctx), m.ID)
}

// unparkNow publishes at the end of a step what it has let in. What it cannot,
// the sweep does.
func (o *Orchestrator) unparkNow(ctx context.Context, log *slog.Logger) {
	if o.broker == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
	defer cancel()
	if err := o.unpark(ctx); err != nil {
		log.Warn("parked messages cannot be published yet", "error", err)
	}
}

// runOf is the run that a message is about, "" if it is about none.
func runOf(m *protocol.Message) string {
	if m.Task != TaskExecutePlanStep {
		return ""
	}
	text := m.Kwargs.Get("run_id")
	if len(m.Args) > 0 {
		text = m.Args[0]
	}
	var run string
	if json.Unmarshal(text, &run) != nil {
		return ""
	}
	return canonicalID(run)
}

// canonicalID writes a run's id as the database does. It may still be none.
func canonicalID(id string) string {
	return strings.ToLower(strings.Trim(strings.TrimPrefix(id, "urn:uuid:"), "{}"))
}

// rollbackMessage is what the worker of a failed step would have published
// (docs/moonmind.md#the-chain): protocol 2, with a task id of its own, and
// nothing follows it.
func (s *sweeper) rollbackMessage(run store.Run, rootTaskID, parentTaskID string) (string, protocol.Delivery, error) {
	args := make([]json.RawMessage, 2)
	for i, text := range []string{run.ID, string(store.StepRollback)} {
		var err error
		if args[i], err = protocol.EncodeJSON(text); err != nil {
			return "", protocol.Delivery{}, err
		}
	}
	message, _, err := protocol.NewSignature(TaskExecutePlanStep, args, nil).Apply(protocol.ApplyOptions{
		RootID: rootTaskID, ParentID: parentTaskID, Origin: s.config.Node, Now: s.config.Now(),
	})
	if err != nil {
		return "", protocol.Delivery{}, err
	}
	message.Headers["ignore_result"] = false
	message.Properties.Priority = nil
	return message.TaskID, protocol.Delivery{Headers: message.Headers, Properties: message.Properties, Body: message.Body}, nil
}

var _ Broker = (*worker.Worker)(nil)

package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Broker is the part of [worker.Worker] that the sweep uses. The methods are
// documented there.
type Broker interface {
	QueueOfParked
	QueueDepth(ctx context.Context, queue string) (int, error)
	QueueConsumers(ctx context.Context, queue string) (worker.QueueConsumers, error)
	Unacked() []*protocol.Message
}

// publishTimeout bounds the publication of one parked message. If the broker is
// unavailable for longer, the next sweep tries again.
const publishTimeout = 10 * time.Second

// Sweep checks the workspaces of the queue every SweepInterval, with some jitter,
// until ctx ends or Leave is called. It repairs what a crash or a fault has left.
// Without one, the step that ends a run passes its workspace on and publishes the
// messages of the next run.
//
//   - It publishes parked messages whose turn has come.
//   - It passes a workspace whose run has ended, or was deleted, to the next run.
//   - It ends lost runs. A run that holds a workspace is lost if, for LostGrace,
//     no worker of this program has a message or a claim of it and the queue is
//     empty. Sweep fails such a run and has it rolled back. If only a step was
//     lost with its worker, and a retry of the run waits for it, Sweep lets the
//     retry continue instead. It does none of this while the queue has a consumer
//     that is no worker of this program, while anybody has locked a row of the
//     run, or while a Python worker is at a step of any run (foreign.go).
//   - It records what the runs that wait for an approval would do, and ends those that
//     have waited before verify for too long.
//   - It removes what is kept to take back the changes of runs that have been over
//     for KeepChanges.
//
// Call it once, after Register, while the worker runs. Every worker of a queue may
// sweep: each repair is one transaction that checks its condition again.
func (o *Orchestrator) Sweep(ctx context.Context) {
	ctx, done, ok := o.sweeping.begin(ctx)
	if !ok {
		return
	}
	defer done()
	s := sweeper{Orchestrator: o, suspects: map[string]suspect{}, changes: oldChanges{failed: map[string]time.Time{}}}
	activity := o.stalls.Start("sweep of queue "+o.config.Queue, "looking for messages whose turn has come")
	defer activity.End()
	ctx = activity.Context(ctx)
	for {
		if err := s.sweep(ctx); err != nil && ctx.Err() == nil {
			if text := err.Error(); text != s.logged {
				s.logged = text
				o.log.Warn("sweep has failed, trying again", "error", err)
			}
		} else {
			s.logged = ""
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

// Stuck returns an error that names the running steps, and the sweep, that have
// made no progress for so long although they wait for nothing outside, such as a
// command or a service that starts. It is nil if there are none. It does not
// block.
func (o *Orchestrator) Stuck(after time.Duration) error { return o.stalls.Stuck(after) }

// sweeper is the state of one call of Sweep.
type sweeper struct {
	*Orchestrator
	// suspects are the runs that seemed lost at the last sweep, by workspace.
	suspects map[string]suspect
	// logged is the last error that was logged, "" after a success.
	logged string
	// foreign are the consumers of the queue that are no workers of this program.
	foreign foreignConsumers
	changes oldChanges
	// approvals is what the runs that wait for an approval were seen with.
	approvals approvals
	// pause is that of the queue at the last sweep, nil for none.
	pause *store.Pause
}

// suspect is a run that holds a workspace and seems lost. It must seem so at every
// sweep of this process for all of LostGrace, with an empty queue each time. What
// the database says of the past is not enough: after a start of all workers, for
// instance, they only begin to take messages that are hours old.
//
// Any change to the run restarts the grace: its commits are the only trace of a
// Python worker.
type suspect struct {
	runID string
	// seenAt and version are those of [store.WorkspaceState].
	seenAt  time.Time
	version string
	// since is when this process first saw the run like this, by sinceStart.
	since time.Duration
}

// repair is what a sweep does to a workspace.
type repair int

const (
	repairNothing repair = iota
	// repairPass: no run holds it, or one that does not need it any more. It is
	// passed to the next run.
	repairPass
	// repairIdle: no worker has a message or claim of the run that holds it, but
	// the queue may have one. If that lasts, the run is lost.
	repairIdle
)

// repairOf decides what a sweep does to a workspace. Pure.
func repairOf(w store.WorkspaceState) repair {
	switch {
	case w.RunID == "" && w.Waiting, w.RunID != "" && !w.RunGoesOn:
		return repairPass
	case w.RunID == "", w.Working, w.Parked && !w.Blocked:
		return repairNothing
	}
	switch w.RunStatus {
	case store.RunRunning, store.RunFailed, store.RunPending:
		return repairIdle
	}
	// A run that waits for approval before verify keeps its workspace, with what it has
	// done: see sweepApprovals.
	return repairNothing
}

func (s *sweeper) sweep(ctx context.Context) error {
	// At every sweep: the row is lost with the schema and with the session.
	if err := s.config.Steps.RegisterWorker(ctx, s.config.Queue); err != nil {
		return err
	}
	foreignErr := s.countForeign(ctx)
	s.logForeign()
	var unacked []string
	for _, m := range s.broker.Unacked() {
		if run := runOf(m); run != "" {
			unacked = append(unacked, run)
		}
	}
	list, err := s.config.Steps.ListWorkspaces(ctx, s.config.Queue, unacked)
	if err != nil {
		return err
	}
	problems := []error{foreignErr, s.lookForPause(ctx)}
	parked, still := false, map[string]suspect{}
	for _, w := range list {
		parked = parked || w.Parked || w.Waiting
		switch repairOf(w) {
		case repairPass:
			err = s.config.Steps.PassWorkspace(ctx, w.Workspace, w.RunID)
		case repairIdle:
			err = s.checkIdle(ctx, w, still)
		default:
			err = nil
		}
		problems = append(problems, err)
	}
	s.suspects = still
	if parked {
		problems = append(problems, s.publishParked(ctx))
	}
	problems = append(problems, s.sweepApprovals(ctx), s.removeOldChanges(ctx))
	return errors.Join(problems...)
}

// checkIdle adds an idle run to the suspects still, or ends it if it has been one
// for LostGrace.
func (s *sweeper) checkIdle(ctx context.Context, w store.WorkspaceState, still map[string]suspect) error {
	if !s.foreign.none() || w.LongStep {
		return nil
	}
	ready, err := s.broker.QueueDepth(ctx, s.config.Queue)
	if err != nil || ready > 0 {
		return err
	}
	now := s.sinceStart()
	before, known := s.suspects[w.Workspace]
	if !known || before.runID != w.RunID || !before.seenAt.Equal(w.SeenAt) || before.version != w.Version {
		before = suspect{runID: w.RunID, seenAt: w.SeenAt, version: w.Version, since: now}
	}
	still[w.Workspace] = before
	if now-before.since < s.config.LostGrace || w.Idle < s.config.LostGrace {
		return nil
	}
	// Count again: a foreign consumer may have started after the first count, and
	// have taken a message before the queue was found empty.
	if err := s.countForeign(ctx); err != nil || !s.foreign.none() {
		delete(still, w.Workspace)
		return err
	}
	found := store.Suspect{Workspace: w.Workspace, Queue: s.config.Queue, RunID: w.RunID, Version: before.version, Grace: s.config.LostGrace}
	err = s.endLost(ctx, w, found)
	if errors.Is(err, store.ErrLocked) {
		delete(still, w.Workspace)
		return nil
	}
	return err
}

// endLost fails a lost run, or lets the rest of it continue.
func (s *sweeper) endLost(ctx context.Context, w store.WorkspaceState, found store.Suspect) error {
	switch {
	case w.Blocked:
		if err := s.config.Steps.FreeClaims(ctx, found); err != nil {
			return err
		}
		s.log.Warn("a step was lost with its worker, the other steps of its run continue", "run_id", found.RunID)
		return s.publishParked(ctx)
	case w.RunStatus == store.RunPending && !w.Paused:
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
		log.Warn("message of the rollback was lost, it is sent again")
	} else {
		log.Error("run was lost", "step", string(lost.Step), "rollback", lost.RollbackSent, "error", lost.Message)
		s.config.Metrics.StepFinished(string(lost.Step), false, 0)
		if lost.Finished.RunEnded {
			s.writeTrail(ctx, log, found.RunID)
			s.config.Metrics.RunFinished(string(lost.Finished.Status), lost.Finished.Duration)
		} else {
			s.config.Metrics.RunStatus(string(lost.Finished.Status))
		}
	}
	return s.publishParked(ctx)
}

// publishParked publishes every parked message whose turn has come.
func (o *Orchestrator) publishParked(ctx context.Context) error {
	for {
		messages, err := o.config.Steps.TakeParked(ctx, o.config.Queue)
		if err != nil || len(messages) == 0 {
			return err
		}
		for i, m := range messages {
			if err := o.publishOneParked(ctx, m); err != nil {
				return errors.Join(err, o.keepParked(ctx, messages[i:], m.ID))
			}
		}
	}
}

// keepParked gives messages back that were not published; the broker may have that with
// the id sent. If the database does not answer either, it does not wait for each of them:
// the end of a step waits meanwhile, and other workers may take them after their lease.
func (o *Orchestrator) keepParked(ctx context.Context, messages []store.ParkedMessage, sent int64) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dropTimeout)
	defer cancel()
	for _, m := range messages {
		if failed := o.config.Steps.KeepParked(ctx, m.ID, m.ID == sent); err == nil {
			err = failed
		}
	}
	return err
}

// publishOneParked publishes one message and deletes its row. A crash in between
// leaves both, which is harmless: the step ignores the duplicate.
func (o *Orchestrator) publishOneParked(ctx context.Context, m store.ParkedMessage) error {
	stall.FromContext(ctx).Progress("")
	faultpoint.Hit(faultpoint.ParkedTaken, m.RunID, string(m.Step))
	publish, cancel := context.WithTimeout(ctx, publishTimeout)
	defer cancel()
	if err := o.broker.Publish(publish, publishingOf(m)); err != nil {
		return err
	}
	faultpoint.Hit(faultpoint.ParkedPublished, m.RunID, string(m.Step))
	o.log.Info("parked message returned to the queue", "run_id", m.RunID, "step", string(m.Step), "task_id", m.TaskID,
		"why", string(m.Why), "waited", max(0, time.Since(m.Since)).Round(time.Millisecond))
	return o.config.Steps.DropParked(context.WithoutCancel(ctx), m.ID)
}

// publishReady publishes at the end of a step the parked messages that have waited
// for it. If it fails, the next sweep publishes them.
func (o *Orchestrator) publishReady(ctx context.Context, log *slog.Logger) {
	if o.broker == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), o.config.FinishTimeout)
	defer cancel()
	if err := o.publishParked(ctx); err != nil {
		log.Warn("parked messages cannot be published yet", "error", err)
	}
}

// runOf returns the id of the run that a message belongs to, "" for none.
func runOf(m *protocol.Message) string {
	if m.Task != TaskExecutePlanStep {
		return ""
	}
	run, _ := store.ParseRunID(argument(m, 0, "run_id")) // no message that Execute refuses belongs to a run
	return run
}

// stepOf names the step that a message is for. Its run is "" for none.
func stepOf(d protocol.Delivery) store.StepMessage {
	m, err := protocol.Decode(d, nil)
	if err != nil {
		return store.StepMessage{}
	}
	return store.StepMessage{RunID: runOf(m), Step: store.Step(argument(m, 1, "step_name")), TaskID: m.ID}
}

// argument returns an argument of execute_plan_step, "" if it is no text.
func argument(m *protocol.Message, position int, name string) string {
	encoded := m.Kwargs.Get(name)
	if len(m.Args) > position {
		encoded = m.Args[position]
	}
	var text string
	if json.Unmarshal(encoded, &text) != nil {
		return ""
	}
	return text
}

// rollbackMessage makes the message that the worker of a failed step would have
// published (docs/moonmind.md#the-chain): protocol 2, with a new task id and no
// message that follows it.
func (o *Orchestrator) rollbackMessage(run store.Run, rootTaskID, parentTaskID string) (string, protocol.Delivery, error) {
	args := make([]json.RawMessage, 2)
	for i, text := range []string{run.ID, string(store.StepRollback)} {
		var err error
		if args[i], err = protocol.EncodeJSON(text); err != nil {
			return "", protocol.Delivery{}, err
		}
	}
	message, _, err := protocol.NewSignature(TaskExecutePlanStep, args, nil).Apply(protocol.ApplyOptions{
		RootID: rootTaskID, ParentID: parentTaskID, Origin: o.config.Node, Now: o.config.Now(),
	})
	if err != nil {
		return "", protocol.Delivery{}, err
	}
	message.Headers["ignore_result"] = false
	message.Properties.Priority = nil
	return message.TaskID, protocol.Delivery{Headers: message.Headers, Properties: message.Properties, Body: message.Body}, nil
}

var _ Broker = (*worker.Worker)(nil)

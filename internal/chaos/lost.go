package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// lostGrace is the workers' grace in a trial that loses a message.
const lostGrace = 2 * time.Second

// lostEnds are where the worker is killed that ends a lost run, in turn.
var lostEnds = []stage{
	{Point: faultpoint.LostFailed, Do: kill},
	{Point: faultpoint.LostBefore, Do: kill},
	{Point: faultpoint.ParkedTaken, Step: "rollback", Do: kill},
	{Point: faultpoint.LostFailed, Do: kill},
	{Point: faultpoint.ParkedPublished, Step: "rollback", Do: kill},
	{Point: faultpoint.StepBegun, Step: "rollback", Do: kill},
}

// lose makes the trial one whose run is lost: a worker is killed, the broker
// forgets the message meanwhile, and the worker that ends the run for that
// reason is killed too, mostly just after it has. There is no standby, which
// would take the message before it can be lost; whoever goes on is a process
// of its own all the same.
func (t *Trial) lose(random *rand.Rand, turn int) {
	t.Standby, t.Shape.FailAt = false, ""
	lost := stage{Do: kill, Lose: true}
	switch random.IntN(4) {
	case 0: // the step had ended, the next one's message is lost
		lost.Point, lost.Step = faultpoint.SettleAfter, []string{"analyze", "patch", "build", "restart"}[random.IntN(4)]
		t.LostStep = next(lost.Step)
		t.Case = "the message of " + t.LostStep + " lost"
	case 1: // the step was in progress
		points := []faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded, faultpoint.StepWorked, faultpoint.FinishWritten}
		lost.Point, lost.Step = points[random.IntN(len(points))], []string{"patch", "build", "restart"}[random.IntN(3)]
		t.LostStep = lost.Step
		t.Case = "the message of " + t.LostStep + " lost while it ran"
	case 2: // the run had failed, the rollback's message is lost
		t.Shape.FailAt = []string{"patch", "build", "restart", "verify"}[random.IntN(4)]
		lost.Point, lost.Step = faultpoint.SettleAfter, t.Shape.FailAt
		t.Case = "the message of rollback lost"
	default: // the same when the rollback had begun
		t.Shape.FailAt = []string{"patch", "build", "restart", "verify"}[random.IntN(4)]
		lost.Point, lost.Step = faultpoint.StepBegun, "rollback"
		t.Case = "the message of rollback lost while it ran"
	}
	t.Stages = []stage{lost, lostEnds[turn%len(lostEnds)]}
}

// forget lets the broker lose what is in the queue, as a purge does. All
// workers are dead: when their consumers are gone, what they had is back. That
// is one message, or two when an acknowledgement died with its worker.
func (l *lane) forget(ctx context.Context) error {
	err := until(ctx, "the message to be back in the queue", func() (bool, error) {
		state, err := l.channel.QueueDeclarePassive(l.queue, true, false, false, false, nil)
		return state.Consumers == 0 && state.Messages > 0, err
	})
	if err != nil {
		return err
	}
	n, err := l.channel.QueuePurge(l.queue, false)
	if err == nil && n == 0 {
		err = errors.New("the queue was empty when it was purged")
	}
	return err
}

// judgeLost demands that a run which was lost says so.
func (l *lane) judgeLost(ctx context.Context, o *outcome) error {
	if !o.lost || o.trial.LostStep == "" {
		return nil
	}
	messages, err := l.rows(ctx, `
		SELECT COALESCE(message, '') FROM spec_workflow_task_states
		WHERE orchestrator_run_id = $1 AND plan_step::text = $2 AND starts_with(message, 'run was lost: step ' || $2::text || ' ')`, o.run.ID, o.trial.LostStep)
	if err == nil && len(messages) != 1 {
		o.complain(wrong, "step %s does not say that the run was lost", o.trial.LostStep)
	}
	return err
}

package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// lostGrace is the workers' LostGrace in a trial that loses a message.
const lostGrace = 2 * time.Second

// lostEnds are the points, in turn, at which the worker is killed that ends a lost
// run.
var lostEnds = []stage{
	{Point: faultpoint.LostFailed, Do: kill},
	{Point: faultpoint.LostBefore, Do: kill},
	{Point: faultpoint.ParkedTaken, Step: "rollback", Do: kill},
	{Point: faultpoint.LostFailed, Do: kill},
	{Point: faultpoint.ParkedPublished, Step: "rollback", Do: kill},
	{Point: faultpoint.StepBegun, Step: "rollback", Do: kill},
}

// loseMessage makes the trial one whose run is lost. A worker is killed, the message
// is purged, and the worker that ends the lost run is killed too, mostly just after
// that. There is no standby worker, because it would take the message before the
// purge.
func (t *Trial) loseMessage(random *rand.Rand, turn int) {
	t.Standby, t.Shape.FailAt = false, ""
	lost := stage{Do: kill, PurgeMessage: true}
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

// purge purges the queue. All workers are dead: when the broker has removed their
// consumers, it has requeued their messages. That is one, or two if an
// acknowledgement was lost with its worker.
func (l *lane) purge(ctx context.Context) error {
	err := until(ctx, "the message to be requeued", func() (bool, error) {
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

// judgeLost checks that the state of a lost run says so.
func (l *lane) judgeLost(ctx context.Context, o *outcome) error {
	if !o.lost || o.trial.LostStep == "" {
		return nil
	}
	messages, err := l.rows(ctx, `
		SELECT COALESCE(message, '') FROM spec_workflow_task_states
		WHERE orchestrator_run_id = $1 AND plan_step::text = $2 AND starts_with(message, 'run was lost: step ' || $2::text || ' ')`, o.run.ID, o.trial.LostStep)
	if err == nil && len(messages) != 1 {
		o.report(wrong, "the message of step %s does not say that the run was lost", o.trial.LostStep)
	}
	return err
}

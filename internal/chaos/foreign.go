package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// foreignKeeps is how long a foreign consumer keeps a message unacknowledged:
// longer than LostGrace and the time in which a worker begins to sweep.
const foreignKeeps = lostGrace*2 + time.Second

// toForeign makes the trial one in which a worker is killed and a foreign consumer
// takes the message.
func (t *Trial) toForeign(random *rand.Rand) {
	points := []faultpoint.Point{faultpoint.StepBegun, faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded, faultpoint.StepWorked}
	p := place{point: points[random.IntN(len(points))], step: []string{"patch", "build", "restart"}[random.IntN(3)]}
	t.shapeFor(p, random)
	t.Standby = false
	t.Stages = []stage{p.stage(kill)}
	t.Stages[0].ToForeign = true
}

// deliverToForeign lets a foreign consumer take the message of a dead worker, keep
// it while the next worker sweeps, and requeue it unchanged, as a Python worker
// does when it is stopped.
func (l *lane) deliverToForeign(ctx context.Context, t Trial) error {
	channel, err := l.conn.Channel()
	if err != nil {
		return err
	}
	defer channel.Close()
	if err := channel.Qos(1, 0, false); err != nil {
		return err
	}
	deliveries, err := channel.ConsumeWithContext(ctx, l.queue, "foreign", false, false, false, false, nil)
	if err != nil {
		return err
	}
	select {
	case d, ok := <-deliveries:
		if !ok {
			return errors.New("the foreign consumer's channel was closed")
		}
		if err := l.restartDead(t); err != nil {
			return err
		}
		select {
		case <-time.After(foreignKeeps):
			return d.Nack(false, true)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case <-time.After(waitTimeout):
		return errors.New("the foreign consumer did not get the message of the dead worker")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

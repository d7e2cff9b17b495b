package chaos

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// holdsFor is how long a foreign consumer has a message in hand: longer than
// the grace after which a run is lost, and the time that a worker needs to
// begin.
const holdsFor = lostGrace*2 + time.Second

// lend makes the trial one in which a worker dies, and a consumer that is no
// worker of this program takes the message.
func (t *Trial) lend(random *rand.Rand) {
	points := []faultpoint.Point{faultpoint.StepBegun, faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded, faultpoint.StepWorked}
	p := place{point: points[random.IntN(len(points))], step: []string{"patch", "build", "restart"}[random.IntN(3)]}
	t.fit(p, random)
	t.Standby = false
	t.Stages = []stage{p.stage(kill)}
	t.Stages[0].Lend = true
}

// lendMessage lets a foreign consumer take the message that a dead worker had,
// hold it while the next worker looks for it, and give it back as it was: what
// Python's worker does that is stopped.
func (l *lane) lendMessage(ctx context.Context, t Trial) error {
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
		if err := l.staffAgain(t); err != nil {
			return err
		}
		select {
		case <-time.After(holdsFor):
			return d.Nack(false, true)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case <-time.After(patience):
		return errors.New("the message of a dead worker did not come to the foreign consumer")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

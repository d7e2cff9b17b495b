package worker

import (
	"context"
	"maps"
	"reflect"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// A quorum queue drops a message, or dead-letters it, once it has come back
// more often than the queue's delivery limit, which is 20 from RabbitMQ 4.0 on
// unless it is set. What counts are lost channels and connections, and before
// 4.3 also the acknowledgement timeout and basic.nack: a message that waits
// for a database would be gone after twenty attempts, and one whose task runs
// for hours after twenty timeouts. Neither has anything wrong with it. So a
// message that has been counted is replaced: it is sent again as a new one, of
// which nothing is counted, and when the broker has confirmed that, the old
// one is acknowledged. A crash in between leaves both.
//
// A message that kills its worker is not replaced, and the limit holds for it.

const (
	// headerCount is how a quorum queue tells what it has counted; it is absent
	// at first. RabbitMQ 4.3 also tells how often it was delivered.
	headerCount    = "x-delivery-count"
	headerAcquired = "x-acquired-count"
	// headerCopy marks a message that replaces another: when its task ends
	// meanwhile, it must not run again, though the broker has delivered it to
	// nobody yet.
	headerCopy = "x-mm-orchestrator-copy"
)

// replaceTimeout bounds the sending of a copy; without one the message goes
// back as it is.
const replaceTimeout = 30 * time.Second

// defaultLimit is RabbitMQ's from 4.0 on, where none is set.
const defaultLimit = 20

// count is how many returns of this message its queue has counted.
func (d *delivery) count() int { return integer(d.wire.Headers[headerCount]) }

func integer(value any) int {
	switch n := reflect.ValueOf(value); {
	case n.CanInt():
		return int(n.Int())
	case n.CanUint():
		return int(n.Uint())
	}
	return 0
}

// repeats says that somebody may have seen the message before.
func (d *delivery) repeats() bool {
	_, copied := d.wire.Headers[headerCopy]
	return d.redelivered || copied
}

// requeue gives a message back to its queue.
func (d *delivery) requeue() error {
	if d.count() > 0 && d.replace() {
		return d.acker.Ack(d.tag, false)
	}
	return d.acker.Nack(d.tag, false, true)
}

// renew replaces the message of a task that runs, so that there is always one
// for another worker, should this one die. The copy is delivered and joins the
// task; as one that comes to another worker after the task's end runs again,
// this waits until half of the limit is used up. A limit that only a policy of
// the broker knows may be lower: then the task goes on without its message.
func (d *delivery) renew() {
	limit := defaultLimit
	if own, set := d.sub.queue.Arguments["x-delivery-limit"]; set {
		limit = integer(own)
	}
	if limit > 0 && d.count() >= max(1, limit/2) && d.replace() {
		d.settle(verdictAck)
	}
}

// replace puts a copy of a message into its queue, and into no other, and says
// whether it is there.
func (d *delivery) replace() bool {
	w := d.sub.worker
	d.copied.Store(true)
	ctx, cancel := context.WithTimeout(w.life.settle, replaceTimeout)
	defer cancel()
	err := d.sendCopy(ctx)
	if err != nil && !d.session.isLost() {
		w.cfg.Logger.Warn("message cannot be sent again and goes back as it is: its queue drops it at its delivery limit",
			"queue", d.sub.queue.Name, "task_id", clip(d.wire.Properties.CorrelationID), "count", d.wire.Headers[headerCount], "error", err)
	}
	return err == nil
}

func (d *delivery) sendCopy(ctx context.Context) error {
	headers := maps.Clone(d.wire.Headers)
	delete(headers, headerCount)
	delete(headers, headerAcquired)
	headers[headerCopy] = true
	m := protocol.Publishing{
		TaskID: d.wire.Properties.CorrelationID, RoutingKey: d.sub.queue.Name,
		Headers: headers, Properties: d.wire.Properties, Body: d.wire.Body,
	}
	out, err := amqpPublishing(m)
	if err != nil {
		return err
	}
	return d.session.publishAlone(ctx, m, out)
}

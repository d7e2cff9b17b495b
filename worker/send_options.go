package worker

import (
	"fmt"
	"strconv"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// SendTo is the queue to which this worker sends the messages of the task: those that
// follow another task, and those that a handler sends with its context and a client. It
// is Celery's task attribute queue. A queue or exchange of the signature takes precedence,
// and so does that of [Prepare]; it takes precedence over Config.TaskRoutes. A retry goes
// where its message came from. Defaults to the routes.
func SendTo(queue string) TaskOption {
	if queue == "" {
		panic("worker: SendTo needs the name of a queue")
	}
	return func(r *registration) { r.sendTo = queue }
}

// ExpireAfter is how long after they were sent the messages that this worker sends for
// the task may begin to run: Celery's task attribute expires. Later, a worker stores
// REVOKED, or the broker drops the message. An expiry of the signature takes precedence,
// and a retry keeps that of its message. Defaults to none.
func ExpireAfter(d time.Duration) TaskOption {
	if d <= 0 {
		panic(fmt.Sprintf("worker: ExpireAfter(%v): want a positive duration", d))
	}
	return func(r *registration) { r.expireAfter = d }
}

// expire gives a message the expiry of its task, if it has none.
func (r registration) expire(m *protocol.Publishing, now time.Time) {
	if r.expireAfter > 0 && m.Headers["expires"] == nil {
		m.Headers["expires"] = protocol.FormatTime(now.Add(r.expireAfter))
		m.Properties.Expiration = strconv.FormatInt(r.expireAfter.Milliseconds(), 10)
	}
}

// SendOptions returns what the worker of the running task has for the messages of a task:
// [SendTo] and [ExpireAfter], or the zero values. A client calls it for what it sends with
// a handler's context, as that of package client does.
func (t *Task) SendOptions(task string) (queue string, expireAfter time.Duration) {
	if t.sendOptions == nil {
		return "", 0
	}
	r := t.sendOptions(task)
	return r.sendTo, r.expireAfter
}

package worker

import (
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
)

// transport returns Transport, or else the broker that Broker names. It connects to
// nothing. The error contains no password.
//
// Only this file knows an implementation. The scheme of an address chooses it: those
// that are read today, amqp, pyamqp and amqps, are all RabbitMQ's.
func (c Config) transport() (broker.Broker, error) {
	if c.Transport != nil {
		return c.Transport, nil
	}
	config := amqp.Config{Addresses: c.Broker, TLS: c.TLS, Heartbeat: c.Heartbeat, Name: c.Node, Delays: slices.ContainsFunc(c.TaskQueues, isQuorum), Logger: c.Logger}
	return amqp.New(config), config.Validate()
}

// isQuorum reports whether Celery sees that a queue is a quorum queue
// (celery/utils/quorum_queues.py).
func isQuorum(q Queue) bool { return q.Type == "quorum" || q.Arguments["x-queue-type"] == "quorum" }

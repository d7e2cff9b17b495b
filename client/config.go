package client

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Config configures a [Client]. Queues, routes and the default queue must be those of
// the workers, as in Python, where producers and workers share one configuration.
type Config struct {
	// Broker is Celery's broker_url, as [worker.Config] reads it. Required, unless
	// Transport is set.
	Broker string
	// TLS is the configuration for amqps:// brokers, as in [worker.Config].
	TLS *tls.Config

	// Transport is used in place of Broker, as in [worker.Config].
	Transport broker.Broker

	// DefaultQueue is the queue of tasks for which neither an option nor a route
	// gives a queue. Defaults to "celery", as in Python.
	DefaultQueue string
	// TaskQueues declare queues, as in [worker.Config]. A queue that is not listed is
	// declared as Celery declares a missing one.
	TaskQueues []worker.Queue
	// TaskRoutes choose the queue by the task's name, as in [worker.Config].
	TaskRoutes []worker.Route
	// DefaultExchange and DefaultRoutingKey are for TaskQueues without them, as in
	// [worker.Config].
	DefaultExchange, DefaultRoutingKey string
	// RefuseUnknownQueues makes it an error to send to a queue that is not in
	// TaskQueues.
	RefuseUnknownQueues bool

	// Results is where results are read. Nil means that the program reads none.
	Results results.Backend

	// Origin names this process in messages. Defaults to gen<pid>@<host>.
	Origin string
	// Heartbeat is the interval of the signs of life, as in [worker.Config].
	Heartbeat time.Duration
	// Logger is told about declarations that differ from a queue's. Nil discards it.
	Logger *slog.Logger
	// Now returns the current time. Defaults to time.Now.
	Now func() time.Time
}

// FromWorker returns the configuration of a client beside a worker: with its broker,
// its queues, routes and declarations, and its result backend.
func FromWorker(w worker.Config) Config {
	w = w.WithDefaults()
	return Config{
		Broker: w.Broker, TLS: w.TLS, Transport: w.Transport,
		DefaultQueue: w.DefaultQueue, TaskQueues: w.TaskQueues, TaskRoutes: w.TaskRoutes,
		DefaultExchange: w.DefaultExchange, DefaultRoutingKey: w.DefaultRoutingKey, RefuseUnknownQueues: w.RefuseUnknownQueues,
		Results: w.Results, Heartbeat: w.Heartbeat, Logger: w.Logger, Now: w.Now,
	}
}

// worker returns the configuration of the worker that publishes for the client. It
// never runs.
func (c Config) worker() worker.Config {
	consumed := c.DefaultQueue
	if c.RefuseUnknownQueues && len(c.TaskQueues) > 0 {
		consumed = c.TaskQueues[0].Name
	}
	return worker.Config{
		Broker: c.Broker, TLS: c.TLS, Transport: c.Transport, Queues: []string{consumed},
		DefaultQueue: c.DefaultQueue, TaskQueues: c.TaskQueues, TaskRoutes: c.TaskRoutes,
		DefaultExchange: c.DefaultExchange, DefaultRoutingKey: c.DefaultRoutingKey, RefuseUnknownQueues: c.RefuseUnknownQueues,
		Heartbeat: c.Heartbeat, Logger: c.Logger, Now: c.Now,
	}
}

// ErrNoResults: Config.Results is nil, so that no result can be read.
var ErrNoResults = errors.New("client: the configuration has no result backend: set Results, for instance to postgres.Open(ctx, url)")

// ErrClosed: the client was closed.
var ErrClosed = errors.New("client: closed")

func invalid(format string, args ...any) error { return fmt.Errorf("client: "+format, args...) }

package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// Client sends tasks over one connection, which it makes at the first Send and again
// after it was lost. Many goroutines may use it at once.
type Client struct {
	config  Config
	results results.Backend
	replyTo string // identifies this client in messages, as a Python thread does

	// worker has the routes and makes connections; it never runs.
	worker *worker.Worker
	// connecting is a semaphore: it guards sender and closed.
	connecting chan struct{}
	sender     connection
	closed     bool
}

// connection is what the client needs of one. worker.Sender has it.
type connection interface {
	Send(ctx context.Context, m protocol.Publishing, own protocol.Destination) error
	Broadcast(ctx context.Context, m protocol.Publishing) error
	Lost() <-chan struct{}
	Close()
}

// New returns a client. It connects to nothing. The error names every invalid field.
func New(config Config) (*Client, error) {
	if config.DefaultQueue == "" {
		config.DefaultQueue = "celery"
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Origin == "" {
		host, err := os.Hostname()
		if err != nil {
			host = "localhost"
		}
		config.Origin = fmt.Sprintf("gen%d@%s", os.Getpid(), host)
	}
	w, err := worker.New(config.worker())
	if err != nil {
		return nil, err
	}
	return &Client{config: config, results: config.Results, replyTo: protocol.NewID(), worker: w, connecting: make(chan struct{}, 1)}, nil
}

// Close closes the connection. It leaves the result backend open. Calls that run end
// with an error.
func (c *Client) Close() {
	c.connecting <- struct{}{}
	defer func() { <-c.connecting }()
	c.closed = true
	if c.sender != nil {
		c.sender.Close()
		c.sender = nil
	}
}

// connection returns the connection, and makes one if there is none.
func (c *Client) connection(ctx context.Context) (connection, error) {
	select {
	case c.connecting <- struct{}{}:
		defer func() { <-c.connecting }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if c.closed {
		return nil, ErrClosed
	}
	if c.sender != nil {
		select {
		case <-c.sender.Lost():
			c.sender.Close()
			c.sender = nil
		default:
			return c.sender, nil
		}
	}
	sender, err := c.worker.Sender(ctx)
	if err != nil {
		return nil, err
	}
	c.sender = sender
	return sender, nil
}

// retryPauses are those of Celery's task_publish_retry_policy.
var retryPauses = []time.Duration{0, 200 * time.Millisecond, 400 * time.Millisecond}

// withConnection calls do, and again on a new connection if the connection was lost.
func (c *Client) withConnection(ctx context.Context, do func(connection) error) error {
	for try := 0; ; try++ {
		connection, err := c.connection(ctx)
		if err == nil {
			err = do(connection)
		}
		if !errors.Is(err, worker.ErrUnreachable) || try == len(retryPauses) {
			return err
		}
		select {
		case <-time.After(retryPauses[try]):
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), err)
		}
	}
}

// Send publishes the messages of a signature, and returns once the broker has
// confirmed them. The options are for this call: they take precedence over those of
// the signature, and Link and LinkError add to them. In a handler of package worker,
// give it the handler's context.
//
// When an error ends Send in the middle of a group, some of its tasks were sent.
func (c *Client) Send(ctx context.Context, s Signature, options ...Option) (*Result, error) {
	p, err := c.plan(ctx, s, options)
	if err != nil {
		return nil, err
	}
	for _, m := range p.messages {
		err := c.withConnection(ctx, func(to connection) error { return to.Send(ctx, m.publishing, m.destination) })
		if err != nil {
			return nil, err
		}
	}
	if task := worker.TaskFromContext(ctx); task != nil {
		task.AddChild(p.started.entry())
	}
	return p.result, nil
}

// Messages returns the messages that Send would publish, in order, and publishes
// nothing. It is for tests, and for programs that publish later, for instance from an
// outbox table in their database by [worker.Worker.Publish]. That declares no queue.
func (c *Client) Messages(ctx context.Context, s Signature, options ...Option) ([]protocol.Publishing, *Result, error) {
	p, err := c.plan(ctx, s, options)
	if err != nil {
		return nil, nil, err
	}
	messages := make([]protocol.Publishing, len(p.messages))
	for i, m := range p.messages {
		if messages[i], err = c.worker.Routed(m.publishing, m.destination); err != nil {
			return nil, nil, err
		}
	}
	return messages, p.result, nil
}

// Result returns the result of a task that was sent before, by its id: Python's
// AsyncResult(id).
func (c *Client) Result(id string) *Result { return &Result{ID: id, client: c} }

// Revoke tells all Python workers to skip the tasks when they receive them, and to
// drop those that wait for their time (docs/celery.md#revokes). A task that runs
// continues. Workers of package worker do not listen for remote control yet: a program
// calls [worker.Worker.Revoke] of its own worker.
//
// The error is [worker.ErrUnroutable] when no worker listens.
func (c *Client) Revoke(ctx context.Context, ids ...string) error {
	command := struct {
		Method      string         `json:"method"`
		Arguments   map[string]any `json:"arguments"`
		Destination any            `json:"destination"`
		Pattern     any            `json:"pattern"`
		Matcher     any            `json:"matcher"`
	}{Method: "revoke", Arguments: map[string]any{"task_id": ids, "terminate": false, "signal": "SIGTERM"}}
	body := encode(command)
	m := protocol.Publishing{
		TaskID: "revoke", Task: "celery.pidbox",
		Exchange: "celery.pidbox",
		Headers:  map[string]any{"clock": int32(0), "expires": int32(0)},
		Properties: protocol.Properties{
			ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: 2, Priority: new(uint8),
		},
		Body: body,
	}
	return c.withConnection(ctx, func(to connection) error { return to.Broadcast(ctx, m) })
}

package worker

import (
	"context"
	"errors"
)

var (
	// errNoDelivery says that every delivery of the task is lost with its session.
	errNoDelivery = errors.New("the connection that delivered the task is lost")
	// errBrokerBlocked says that the broker would not read a query.
	errBrokerBlocked = errors.New("the broker has blocked this connection (it lacks memory or disk space) and would not answer")
)

// StillUnacked asks the broker whether the task's message is still delivered to
// this worker and unacknowledged. Nil means that this was true at some moment
// during the call, and that until then the broker had delivered the message to
// no other consumer. It returns an error when the connection that delivered the
// message is lost, when the broker has blocked the connection, and when ctx ends
// before the broker answers.
//
// It is for handlers that must not wait for the heartbeats to notice a lost
// connection.
func (t *Task) StillUnacked(ctx context.Context) error {
	if t.stillUnacked == nil {
		return errNoDelivery
	}
	return t.stillUnacked(ctx)
}

// stillUnacked sends a query on the channel that delivered the attempt's message.
// An answer proves that the channel is open, and so that the broker counts the
// delivery as unacknowledged.
func (w *Worker) stillUnacked(ctx context.Context, a *attempt) error {
	s := a.session()
	if s == nil {
		return errNoDelivery
	}
	if s.isBlocked() {
		return errBrokerBlocked
	}
	// RabbitMQ answers channel.flow without doing anything.
	err := s.callConsuming(ctx, "channel.flow", func() error { return s.consumeChannel.Flow(true) })
	switch {
	case err == nil && !s.isLost():
		return nil
	case err != nil && ctx.Err() != nil:
		return err
	}
	return errNoDelivery
}

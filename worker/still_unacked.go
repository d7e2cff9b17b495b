package worker

import (
	"context"
	"errors"
)

var (
	// errNotHeld says that no delivery of a task is left that could be settled.
	errNotHeld = errors.New("the connection that delivered the task is lost")
	// errCannotAsk says that the broker would not read the question.
	errCannotAsk = errors.New("the broker reads nothing from this connection for a while, as it lacks memory or disk space")
)

// StillUnacked asks the broker for a sign that the task's message is still in this
// worker's hands. Nil means that it was so at some moment during the call:
// until then the broker had given the message to nobody else. The error says
// that the connection that delivered it is lost, or that the broker cannot be
// asked, or is that of ctx if it does not answer.
//
// A worker whose broker is silent hears of a lost connection only after some
// heartbeats; this is for who has to know sooner.
func (t *Task) StillUnacked(ctx context.Context) error {
	if t.held == nil {
		return errNotHeld
	}
	return t.held(ctx)
}

// stillUnacked asks on the channel on which an execution was delivered: when it
// answers, the broker counts its deliveries as unacknowledged.
func (w *Worker) stillUnacked(ctx context.Context, e *execution) error {
	s := w.running.sessionOf(e)
	if s == nil {
		return errNotHeld
	}
	if s.blocked.Load() {
		// Asked all the same, it would lose the connection for not answering.
		return errCannotAsk
	}
	answer := make(chan error, 1)
	go func() {
		// RabbitMQ answers this one without doing anything.
		answer <- s.call("channel.flow", func() error { return s.consuming.Flow(true) })
	}()
	select {
	case err := <-answer:
		if err != nil || s.isLost() {
			return errNotHeld
		}
		return nil
	case <-s.lost:
		return errNotHeld
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// sessionOf is the connection that holds an execution's message for this worker
// alone, nil for none.
func (a *attachments) sessionOf(e *execution) *session {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, d := range e.deliveries {
		if !d.session.isLost() && !d.copied.Load() {
			return d.session
		}
	}
	return nil
}

// Package timeout ends what takes too long, for callers that do so thousands of times a
// second and are almost never late. It owns no policy: how long is the caller's decision.
//
// context.WithTimeout and time.NewTimer set a timer of the runtime each. If that is the
// next one of its processor, as in a process that has little else to wait for, the runtime
// wakes a thread for it. With two timers for each result that a worker stores this was a
// fifth of its processor time. The timeouts of a [Group] share one timer, which is set
// again only when it has fired, or for a timeout that ends earlier than it fires.
package timeout

import (
	"context"
	"sync"
	"time"
)

// Group is a set of timeouts with one timer. Its zero value is ready for use, by many
// goroutines at once. Nothing has to be closed: once the last timeout has ended or was
// stopped, its timer fires at most once.
type Group struct {
	mu sync.Mutex
	// first is the list of what waits, in no order: it is short.
	first *waiting
	timer *time.Timer
	// firesAt is when timer fires, zero if it does not.
	firesAt time.Time
}

// waiting is a timeout that has not ended. The mutex of its group guards it.
type waiting struct {
	at             time.Time
	end            func()
	previous, next *waiting
	listed         bool
}

// Context is context.WithTimeout, except that a context which is derived from the returned
// one has the error context.Canceled when the time is over, with the cause
// context.DeadlineExceeded.
func (g *Group) Context(parent context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	inner, cancel := context.WithCancelCause(parent)
	c := &limited{Context: inner, waiting: waiting{at: time.Now().Add(limit), end: func() { cancel(context.DeadlineExceeded) }}}
	switch earlier, ok := parent.Deadline(); {
	case ok && earlier.Before(c.waiting.at):
		c.waiting.at = earlier // and the parent ends it
	case limit <= 0:
		c.waiting.end()
	default:
		g.add(&c.waiting)
	}
	return c, func() {
		g.remove(&c.waiting)
		cancel(nil)
	}
}

// limited is a context with a deadline.
type limited struct {
	context.Context
	waiting waiting
}

func (c *limited) Deadline() (time.Time, bool) { return c.waiting.at, true }

func (c *limited) Err() error {
	err := c.Context.Err()
	if err == context.Canceled && context.Cause(c.Context) == context.DeadlineExceeded {
		return context.DeadlineExceeded
	}
	return err
}

// After returns a channel that is closed after a time, unless stop is called before. stop
// must be called; it does nothing the second time.
func (g *Group) After(limit time.Duration) (over <-chan struct{}, stop func()) {
	closed := make(chan struct{})
	w := &waiting{at: time.Now().Add(limit), end: func() { close(closed) }}
	g.add(w)
	return closed, func() { g.remove(w) }
}

func (g *Group) add(w *waiting) {
	g.mu.Lock()
	defer g.mu.Unlock()
	w.listed, w.next = true, g.first
	if w.next != nil {
		w.next.previous = w
	}
	g.first = w
	if g.firesAt.IsZero() || w.at.Before(g.firesAt) {
		g.set(w.at)
	}
}

// set lets the timer fire at a time. The caller has locked g.mu.
func (g *Group) set(at time.Time) {
	g.firesAt = at
	if g.timer == nil {
		g.timer = time.AfterFunc(time.Until(at), g.fire)
		return
	}
	g.timer.Reset(time.Until(at))
}

func (g *Group) remove(w *waiting) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.unlist(w)
}

// unlist removes a timeout from the list. The caller has locked g.mu.
func (g *Group) unlist(w *waiting) {
	if !w.listed {
		return
	}
	w.listed = false
	if w.previous == nil {
		g.first = w.next
	} else {
		w.previous.next = w.next
	}
	if w.next != nil {
		w.next.previous = w.previous
	}
	w.previous, w.next = nil, nil
}

// fire ends the timeouts whose time is over, and sets the timer for the next one.
func (g *Group) fire() {
	for _, w := range g.over() {
		w.end()
	}
}

func (g *Group) over() (over []*waiting) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	var next time.Time
	for w := g.first; w != nil; {
		following := w.next
		if w.at.After(now) {
			if next.IsZero() || w.at.Before(next) {
				next = w.at
			}
		} else {
			g.unlist(w)
			over = append(over, w)
		}
		w = following
	}
	g.firesAt = time.Time{}
	if !next.IsZero() {
		g.set(next)
	}
	return over
}

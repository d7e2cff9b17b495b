package worker

import (
	"context"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// connection is a session or a publisher.
type connection interface{ Lost() <-chan struct{} }

func isLost(c connection) bool {
	select {
	case <-c.Lost():
		return true
	default:
		return false
	}
}

// link holds the current connection of a kind, and lets goroutines wait for the next
// one. The zero value is ready for use.
type link[C connection] struct {
	mu      sync.Mutex
	present bool
	current C             // valid if present
	changed chan struct{} // closed at the next change
	// usable measures the time during which there was a connection.
	usable stopwatch
}

func (l *link[C]) set(c C) { l.change(c, true) }

func (l *link[C]) unset() {
	var none C
	l.change(none, false)
}

func (l *link[C]) change(c C, present bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.current, l.present = c, present
	l.usable.run(present)
	if l.changed != nil {
		close(l.changed)
	}
	l.changed = make(chan struct{})
}

// get waits for a connection that is not lost. It returns the cause of ctx when
// that ends first.
func (l *link[C]) get(ctx context.Context) (C, error) {
	for {
		l.mu.Lock()
		if l.changed == nil {
			l.changed = make(chan struct{})
		}
		c, present, changed := l.current, l.present, l.changed
		l.mu.Unlock()
		if present && !isLost(c) {
			return c, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			var none C
			return none, context.Cause(ctx)
		}
	}
}

// now returns the connection if there is one that is not lost. It does not wait.
func (l *link[C]) now() (C, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.current, l.present && !isLost(l.current)
}

// sessionLink holds the current session, and knows whether the worker consumes.
type sessionLink struct {
	link[*session]
	// All below is guarded by mu.
	hasConsumers bool      // every queue has its consumer on the session
	since        time.Time // when hasConsumers changed last
	err          error     // why there are no consumers: the last failure
}

// set sets the session, or none.
func (l *sessionLink) set(s *session, hasConsumers bool, err error, now time.Time) {
	l.mu.Lock()
	if l.hasConsumers != hasConsumers || l.since.IsZero() {
		l.since = now
	}
	l.hasConsumers, l.err = hasConsumers, err
	l.mu.Unlock()
	l.change(s, s != nil)
}

// connected sets a session that has no consumers yet. It keeps the last error,
// so that Ready reports the reason during an attempt too, and not only between
// two attempts.
func (l *sessionLink) connected(s *session, now time.Time) {
	l.mu.Lock()
	err := l.err
	l.mu.Unlock()
	l.set(s, false, err, now)
}

// publishingLink holds the current connection that publishes.
type publishingLink struct {
	link[broker.Publisher]
	blocked time.Duration // on the connections before; guarded by mu
}

// unset removes the connection.
func (l *publishingLink) unset() {
	l.mu.Lock()
	if l.present {
		l.blocked += l.current.Blocked()
		l.present = false
	}
	l.mu.Unlock()
	l.link.unset()
}

// accepting is for how long, in total, there was a connection on which the broker has
// accepted messages.
func (l *publishingLink) accepting() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	total := l.usable.elapsed() - l.blocked
	if l.present {
		total -= l.current.Blocked()
	}
	return total
}

// stopwatch measures how long it has run in total. The zero value stands still.
type stopwatch struct {
	mu    sync.Mutex
	total time.Duration
	since time.Time // zero while it stands still
}

func (s *stopwatch) run(running bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case running && s.since.IsZero():
		s.since = time.Now()
	case !running && !s.since.IsZero():
		s.total += time.Since(s.since)
		s.since = time.Time{}
	}
}

func (s *stopwatch) elapsed() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.since.IsZero() {
		return s.total
	}
	return s.total + time.Since(s.since)
}

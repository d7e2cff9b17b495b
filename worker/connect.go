package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// session is a connection that consumes, with its deliveries.
type session struct {
	broker.Consumer
	subscriptions []*subscription
	gone          bool // its deliveries have ended; guarded by registry.mu
}

// subscription is a consumed queue on a session.
type subscription struct {
	session *session
	queue   Queue
	worker  *Worker

	// delayed is how many of its deliveries are delayed; guarded by registry.mu.
	// unadjusted is set when it has changed and adjust has not been called.
	delayed    int
	unadjusted atomic.Bool

	// mu is locked while the broker is told about delayed ones. at is nil until the
	// broker has answered.
	mu sync.Mutex
	at broker.Subscription
}

// adjust tells the broker how many messages are delayed, so that these do not keep
// others from being delivered. Each move to or from delayed is followed by a call.
func (sub *subscription) adjust() {
	if !sub.unadjusted.Swap(false) {
		return
	}
	sub.mu.Lock()
	defer sub.mu.Unlock()
	if sub.at != nil {
		sub.at.Delay(sub.worker.lifecycle.record, min(sub.worker.registry.delayedOn(sub), sub.worker.cfg.MaxETA))
	}
}

// subscribe begins to receive. It locks mu: messages arrive before the broker's answer,
// and one that is delayed has to wait for it.
func (sub *subscription) subscribe(ctx context.Context) (err error) {
	sub.mu.Lock()
	defer sub.mu.Unlock()
	sub.at, err = sub.session.Subscribe(ctx, sub.queue, sub.worker.cfg.Prefetch, func(d broker.Delivery) { sub.worker.received(sub, d) })
	if err != nil {
		sub.at = nil
	}
	return err
}

// close ends the deliveries of a session and closes its connection.
func (w *Worker) close(s *session) {
	w.registry.lose(s)
	s.Close()
}

// start makes the first connection and consumes. It retries until StartTimeout,
// and only if no broker answers.
func (w *Worker) start(ctx context.Context) (*session, error) {
	deadline := time.Now().Add(w.cfg.StartTimeout)
	for failures := 1; ; failures++ {
		s, err := w.connectAndConsume(ctx)
		if err == nil {
			close(w.started)
			return s, nil
		}
		pause := redialPause(failures)
		if !errors.Is(err, ErrUnreachable) || time.Now().Add(pause).After(deadline) {
			return nil, err
		}
		if failures == 1 {
			w.cfg.Logger.Warn("broker does not answer yet", "error", err, "at_most", w.cfg.StartTimeout)
		}
		if !sleep(ctx, pause) {
			return nil, err
		}
	}
}

// connectAndConsume connects, declares the queues and receives from each. All queues are
// declared before the first message arrives: a declaration that fails ends the
// session, and with it every delivery.
func (w *Worker) connectAndConsume(ctx context.Context) (*session, error) {
	queues, err := w.queues()
	if err != nil {
		return nil, err
	}
	consumer, err := w.broker.OpenConsumer(ctx, queues)
	if err != nil {
		w.link.set(nil, false, err, w.cfg.Now())
		return nil, err
	}
	s := &session{Consumer: consumer}
	// Set the session before the first delivery arrives: its outcome may have to
	// be published before all queues have their consumers.
	w.link.connected(s, w.cfg.Now())
	for _, queue := range queues {
		sub := &subscription{session: s, queue: queue, worker: w}
		if err := sub.subscribe(ctx); err != nil {
			w.link.set(nil, false, err, w.cfg.Now())
			w.close(s)
			return nil, err
		}
		s.subscriptions = append(s.subscriptions, sub)
	}
	w.link.set(s, true, nil, w.cfg.Now())
	w.faults.consuming()
	faultpoint.Hit(faultpoint.ConnectionRestored)
	w.metrics.connected.Set(1)
	// The program itself logs its start, so that only a reconnection is worth a
	// line.
	level := slog.LevelDebug
	if count := w.sessions.Add(1); count > 1 && w.faults.changed("consuming", nil) {
		level = slog.LevelInfo
	}
	w.cfg.Logger.Log(context.Background(), level, "consuming", "broker", s.Place(), "queues", w.cfg.Queues, "slots", w.cfg.Slots, "node", w.cfg.Node)
	return s, nil
}

// queues returns the declarations of the consumed queues.
func (w *Worker) queues() ([]Queue, error) {
	var queues []Queue
	for _, name := range w.cfg.Queues {
		queue, err := w.routes.queue(name)
		if err != nil {
			return nil, err
		}
		queues = append(queues, queue)
	}
	return queues, nil
}

// keepConnected replaces each lost session by a new one, without limit, until the
// lifecycle's record phase ends. When the worker is stopping, new sessions receive
// nothing.
func (w *Worker) keepConnected(s *session) {
	closeReceivingEnded := sync.OnceFunc(func() { close(w.receivingEnded) })
	defer closeReceivingEnded()
	for {
		select {
		case <-s.Lost():
			w.lostSession(s)
		case <-w.lifecycle.receive.Done():
			for _, sub := range s.subscriptions {
				sub.at.Stop(w.lifecycle.record)
			}
			w.metrics.connected.Set(0)
			if !isLost(s) {
				closeReceivingEnded()
				w.link.set(s, false, errStopping, w.cfg.Now())
				select {
				case <-s.Lost():
				case <-w.lifecycle.record.Done():
				}
			}
			w.link.set(nil, false, errStopping, w.cfg.Now())
			w.close(s)
			closeReceivingEnded()
		}
		var ok bool
		if s, ok = w.reconnect(closeReceivingEnded); !ok {
			return
		}
	}
}

func (w *Worker) lostSession(s *session) {
	w.registry.lose(s)
	faultpoint.Hit(faultpoint.ConnectionLost)
	w.metrics.connected.Set(0)
	w.metrics.reconnects.Inc()
	err := fmt.Errorf("%w: connection to %s lost: %w", ErrUnreachable, s.Place(), s.Err())
	w.link.set(nil, false, err, w.cfg.Now())
	if w.faults.changed("lost", s.Err()) {
		w.cfg.Logger.Warn("connection to the broker lost: running tasks go on", "broker", s.Place(), "error", s.Err())
	}
	w.close(s)
}

// reconnect tries until it succeeds. It returns false when the record phase has
// ended. Sessions that die at once count as failures: the next one follows after a
// pause.
func (w *Worker) reconnect(closeReceivingEnded func()) (*session, bool) {
	for {
		if w.lifecycle.record.Err() != nil {
			return nil, false
		}
		if w.lifecycle.receive.Err() != nil {
			closeReceivingEnded() // later attempts do not consume
		}
		if pause := w.faults.pause(); pause > 0 {
			// The end of the receive phase shortens the current pause.
			until := w.lifecycle.receive
			if until.Err() != nil {
				until = w.lifecycle.record
			}
			sleep(until, pause)
		}
		s, err := w.reconnectOnce()
		if err == nil {
			return s, true
		}
		w.link.set(nil, false, err, w.cfg.Now())
		if w.faults.changed("connect", err) && w.lifecycle.record.Err() == nil {
			w.cfg.Logger.Warn("cannot reconnect to the broker yet: retrying", "error", err)
		}
	}
}

func (w *Worker) reconnectOnce() (*session, error) {
	if w.lifecycle.receive.Err() == nil {
		return w.connectAndConsume(w.lifecycle.receive)
	}
	consumer, err := w.broker.OpenConsumer(w.lifecycle.record, nil)
	if err != nil {
		return nil, err
	}
	s := &session{Consumer: consumer}
	w.link.set(s, false, errStopping, w.cfg.Now())
	return s, nil
}

// keepPublishing keeps a connection for publishing, from Run's start until the
// lifecycle's record phase ends.
func (w *Worker) keepPublishing() {
	var faults connectionFaults
	for w.lifecycle.record.Err() == nil {
		if !sleep(w.lifecycle.record, faults.pause()) {
			return
		}
		p, err := w.broker.OpenPublisher(w.lifecycle.record)
		if err != nil {
			if faults.changed("connect", err) && w.lifecycle.record.Err() == nil {
				w.cfg.Logger.Warn("cannot connect to the broker for publishing yet: retrying", "error", err)
			}
			continue
		}
		w.publishing.set(p)
		faults.consuming()
		select {
		case <-p.Lost():
			if faults.changed("lost", p.Err()) {
				w.cfg.Logger.Warn("connection for publishing lost", "broker", p.Place(), "error", p.Err())
			}
		case <-w.lifecycle.record.Done():
		}
		w.publishing.unset()
		p.Close()
	}
}

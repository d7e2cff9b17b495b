package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// life is the set of contexts that a run of the worker goes through. They end
// in this order.
type life struct {
	// base has the values of Run's context, and does not end.
	base context.Context
	// receive ends when the worker shall take no more tasks.
	receive context.Context
	// work ends when running tasks shall return; its cause is ErrShutdown.
	work context.Context
	// abandon ends when nobody waits for them any longer.
	abandon context.Context
	// settle ends when what has ended must have been recorded.
	settle context.Context

	endReceive, endAbandon, endSettle context.CancelFunc
	endWork                           context.CancelCauseFunc

	deliveries sync.WaitGroup // goroutines that handle one delivery each
}

func (l *life) begin(parent context.Context) {
	// Values are inherited, the end of parent is not.
	l.base = context.WithoutCancel(parent)
	l.receive, l.endReceive = context.WithCancel(l.base)
	l.work, l.endWork = context.WithCancelCause(l.base)
	l.abandon, l.endAbandon = context.WithCancel(l.base)
	l.settle, l.endSettle = context.WithCancel(l.base)
}

func (l *life) end() {
	l.endReceive()
	l.endWork(ErrShutdown)
	l.endAbandon()
	l.endSettle()
}

// Run connects, declares, consumes and works until ctx ends or StopNow is
// called, and then shuts down:
//
//  1. The consumers are cancelled; messages that have not begun, those that
//     wait for an ETA included, go back to their queues at once.
//  2. Running tasks finish, are recorded and acknowledged, for at most
//     ShutdownTimeout or until StopNow.
//  3. The rest have their context cancelled with ErrShutdown and get
//     StopTimeout to return; their messages go back.
//  4. Config.BeforeStopped is called, and the connection is closed.
//
// The error is nil after a shutdown. Before the worker has consumed once it
// says why it cannot: compare with ErrUnreachable, ErrCredentials, ErrVhost,
// ErrMismatch and ErrPermission. Later losses of the broker are mended.
func (w *Worker) Run(ctx context.Context) error {
	if err := w.freeze(); err != nil {
		return err
	}
	w.life.begin(ctx)
	defer w.life.end()

	// The first connection may be given up by ctx; later ones outlive it,
	// because finished work still has to be recorded.
	starting, cancel := context.WithCancel(ctx)
	defer cancel()
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		select {
		case <-w.stopNow:
			cancel()
		case <-starting.Done():
		}
	}()
	first, subscriptions, err := w.start(starting)
	if err != nil {
		cancel()
		<-stopped
		// One queue may have been consumed before another failed.
		w.life.end()
		w.life.deliveries.Wait()
		if ctx.Err() != nil || w.stopping() {
			return nil
		}
		return err
	}

	var keeper sync.WaitGroup
	keeper.Go(func() { w.keepConnected(first, subscriptions) })
	select {
	case <-ctx.Done():
	case <-w.stopNow:
	}
	w.drain()
	w.life.endSettle()
	keeper.Wait()
	cancel()
	<-stopped
	return nil
}

func (w *Worker) freeze() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.frozen {
		return errors.New("worker: Run was called twice; make a new worker")
	}
	if len(w.registry) == 0 {
		return errors.New("worker: no task is registered")
	}
	w.frozen = true
	return nil
}

func (w *Worker) stopping() bool {
	select {
	case <-w.stopNow:
		return true
	default:
		return false
	}
}

// drain ends the work in the order that Run promises.
func (w *Worker) drain() {
	w.cfg.Logger.Info("worker stops: no new tasks, running ones finish", "tasks", w.running.count(), "at_most", w.cfg.ShutdownTimeout)
	limit := time.Now().Add(max(w.cfg.ShutdownTimeout, 0) + w.cfg.StopTimeout)
	w.life.endReceive()
	<-w.quiet // no goroutine receives any more

	idle := make(chan struct{})
	go func() {
		w.life.deliveries.Wait()
		close(idle)
	}()
	if !waitFor(idle, max(w.cfg.ShutdownTimeout, 0), w.stopNow) {
		if n := w.running.count(); n > 0 {
			w.cfg.Logger.Warn("worker stops now: running tasks are cancelled", "tasks", n, "at_most", w.cfg.StopTimeout)
		}
		limit = time.Now().Add(w.cfg.StopTimeout)
		w.life.endWork(ErrShutdown)
		// The last tenth is for recording what has ended just in time.
		if !waitFor(idle, w.cfg.StopTimeout*9/10, nil) {
			w.life.endAbandon()
			if !waitFor(idle, w.cfg.StopTimeout/10, nil) {
				w.life.endSettle()
				<-idle
			}
		}
	}
	if n := w.abandoned.Load(); n > 0 {
		w.cfg.Logger.Error("handlers ignore the end of their context and are left behind", "handlers", n)
	}
	w.cfg.Logger.Info("worker has stopped", w.beforeStopped(limit)...)
}

const (
	// lastActMost and lastActLeast bound BeforeStopped, and lastActUrgent does
	// after StopNow.
	lastActMost   = 10 * time.Second
	lastActLeast  = 500 * time.Millisecond
	lastActUrgent = time.Second
)

// beforeStopped calls Config.BeforeStopped, which shall be done by limit.
func (w *Worker) beforeStopped(limit time.Time) []any {
	if w.cfg.BeforeStopped == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(w.life.base, min(max(time.Until(limit), lastActLeast), lastActMost))
	var hurry sync.WaitGroup
	defer hurry.Wait()
	defer cancel()
	if !w.stopping() {
		// A second signal means that somebody is in a hurry. One that came
		// before has set the limit.
		hurry.Go(func() {
			select {
			case <-w.stopNow:
				if sleep(ctx, lastActUrgent) {
					cancel()
				}
			case <-ctx.Done():
			}
		})
	}
	return w.cfg.BeforeStopped(ctx)
}

func waitFor(done <-chan struct{}, limit time.Duration, sooner <-chan struct{}) bool {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
	case <-sooner:
	}
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// start makes the first connection and consumes. Only a broker that does not
// answer is tried again, until StartTimeout.
func (w *Worker) start(ctx context.Context) (*session, []*subscription, error) {
	deadline := time.Now().Add(w.cfg.StartTimeout)
	for failures := 1; ; failures++ {
		s, subscriptions, err := w.connectAndConsume(ctx)
		if err == nil {
			close(w.started)
			return s, subscriptions, nil
		}
		pause := redialPause(failures)
		if !errors.Is(err, ErrUnreachable) || time.Now().Add(pause).After(deadline) {
			return nil, nil, err
		}
		if failures == 1 {
			w.cfg.Logger.Warn("broker does not answer yet", "error", err, "at_most", w.cfg.StartTimeout)
		}
		if !sleep(ctx, pause) {
			return nil, nil, err
		}
	}
}

func (w *Worker) connectAndConsume(ctx context.Context) (*session, []*subscription, error) {
	s, err := w.connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	// Known before the first delivery arrives: settling it may be quicker
	// than the consumers of all queues.
	w.link.connected(s, w.cfg.Now())
	subscriptions, err := w.consume(s)
	if err != nil {
		w.link.set(nil, false, err, w.cfg.Now())
		s.close()
		return nil, nil, err
	}
	w.link.set(s, true, nil, w.cfg.Now())
	faultpoint.Hit(faultpoint.Consuming)
	w.metrics.connected.Set(1)
	// The program says what it starts; only a return is news.
	level := slog.LevelDebug
	if count := w.sessions.Add(1); count > 1 {
		level = slog.LevelInfo
	}
	w.cfg.Logger.Log(context.Background(), level, "consuming", "broker", s.broker, "queues", w.cfg.Queues, "slots", w.cfg.Slots, "node", w.cfg.Node)
	return s, subscriptions, nil
}

// keepConnected replaces each lost session by a new one, without limit, until
// all work is settled. Once the worker stops, new sessions only publish.
func (w *Worker) keepConnected(s *session, subscriptions []*subscription) {
	closeQuiet := sync.OnceFunc(func() { close(w.quiet) })
	defer closeQuiet()
	for {
		select {
		case <-s.lost:
			w.lostSession(s)
		case <-w.life.receive.Done():
			for _, sub := range subscriptions {
				sub.stop()
			}
			w.metrics.connected.Set(0)
			if !s.isLost() {
				s.consumers.Wait()
				closeQuiet()
				w.link.set(s, false, errStopping, w.cfg.Now())
				select {
				case <-s.lost:
				case <-w.life.settle.Done():
				}
			}
			w.link.set(nil, false, errStopping, w.cfg.Now())
			s.close()
			closeQuiet()
		}
		var ok bool
		if s, subscriptions, ok = w.reconnect(closeQuiet); !ok {
			return
		}
	}
}

func (w *Worker) lostSession(s *session) {
	faultpoint.Hit(faultpoint.ConnectionLost)
	w.metrics.connected.Set(0)
	w.metrics.reconnects.Inc()
	err := fmt.Errorf("%w: connection to %s lost: %w", ErrUnreachable, s.broker, s.lostErr)
	w.link.set(nil, false, err, w.cfg.Now())
	w.cfg.Logger.Warn("connection to the broker lost: running tasks go on", "broker", s.broker, "error", s.lostErr)
	s.close()
}

// reconnect tries until it succeeds; false means that all is settled.
func (w *Worker) reconnect(closeQuiet func()) (*session, []*subscription, bool) {
	last := ""
	for failures := 1; ; failures++ {
		if w.life.settle.Err() != nil {
			return nil, nil, false
		}
		if w.life.receive.Err() != nil {
			closeQuiet() // no attempt from here on consumes
		}
		s, subscriptions, err := w.reconnectOnce()
		if err == nil {
			return s, subscriptions, true
		}
		w.link.set(nil, false, err, w.cfg.Now())
		if text := err.Error(); text != last && w.life.settle.Err() == nil {
			w.cfg.Logger.Warn("broker cannot be used again yet", "error", err)
			last = text
		}
		// The end of receive cuts the pause short, once.
		until := w.life.receive
		if until.Err() != nil {
			until = w.life.settle
		}
		sleep(until, redialPause(failures))
	}
}

func (w *Worker) reconnectOnce() (*session, []*subscription, error) {
	if w.life.receive.Err() == nil {
		return w.connectAndConsume(w.life.receive)
	}
	s, err := w.connect(w.life.settle)
	if err != nil {
		return nil, nil, err
	}
	w.link.set(s, false, errStopping, w.cfg.Now())
	return s, nil, nil
}

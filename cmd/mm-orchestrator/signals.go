package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// stopOnSignals returns a context that ends with the first SIGTERM or SIGINT (take
// no new work), and a channel that the second one closes (cancel running steps).
// release stops listening for signals, and returns when that has ended.
func stopOnSignals(parent context.Context, log *slog.Logger) (ctx context.Context, stopNow <-chan struct{}, release func()) {
	ctx, cancel := context.WithCancel(parent)
	second := make(chan struct{})
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	released, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for n := 0; ; n++ {
			select {
			case received := <-signals:
				switch n {
				case 0:
					log.Info("stopping: running steps may finish; a second signal cancels them", "signal", received.String())
					cancel()
				case 1:
					log.Warn("stopping now: running steps are cancelled and their messages return to the queue", "signal", received.String())
					close(second)
				}
			case <-released:
				return
			}
		}
	}()
	return ctx, second, func() {
		signal.Stop(signals)
		close(released)
		<-done
		cancel()
	}
}

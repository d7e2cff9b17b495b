package worker_test

import (
	"context"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// usage is what a process holds while it is idle.
type usage struct{ bytes, goroutines, descriptors int }

// settled returns the usage once the goroutines and descriptors of the last messages
// have ended. most is nil at first.
func settled(t *testing.T, w *worker.Worker, most *usage) (u usage) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		eventually(t, "every message is acknowledged", func() bool { return len(w.Unacked()) == 0 })
		u = usage{bytesInUse(), runtime.NumGoroutine(), descriptors(t)}
		if most == nil || u.goroutines <= most.goroutines && u.descriptors <= most.descriptors || time.Now().After(deadline) {
			return u
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip("this system does not list the descriptors of a process:", err)
	}
	return len(open)
}

// A worker holds as much after many messages as after a few: MM_TEST_MESSAGES says how
// many, 30,000 unless it is set. It is not parallel, so that no other test
// allocates meanwhile.
func TestManyMessagesLeaveNothingBehind(t *testing.T) {
	messages := 30_000
	if text := os.Getenv("MM_TEST_MESSAGES"); text != "" {
		var err error
		if messages, err = strconv.Atoi(text); err != nil || messages < 10 {
			t.Fatalf("MM_TEST_MESSAGES is %q, want a number from 10 on", text)
		}
	}
	// What a worker remembers on purpose is full by then: see rememberedOutcomes.
	const warm = 10_000
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Logger, cfg.Slots, cfg.Prefetch = nil, 8, 32
	w := newWorker(t, cfg)
	// It bounds the messages that are in the queue or with the worker.
	window := make(chan struct{}, 1000)
	var pause sync.RWMutex
	w.Register("shop.nothing", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		pause.RLock()
		defer pause.RUnlock()
		<-window
		return nil, nil
	}), worker.IgnoreResult())
	workertest.Start(t, w)
	send := func(n int) {
		for range n {
			window <- struct{}{}
			r.send(nothing())
		}
		for range cap(window) { // all have run
			window <- struct{}{}
		}
		for range cap(window) {
			<-window
		}
	}
	send(warm)
	// A worker keeps as many goroutines as slots were busy at the same time.
	pause.Lock()
	for range cfg.Prefetch {
		window <- struct{}{}
		r.send(nothing())
	}
	eventually(t, "the worker has as many messages as it may", func() bool { return len(w.Unacked()) == cfg.Prefetch })
	pause.Unlock()
	before := settled(t, w, nil)
	t.Logf("after %d messages: %+v", warm, before)
	began := time.Now()
	var now usage
	const parts = 10
	for part := range parts {
		send(messages / parts)
		now = settled(t, w, &before)
		t.Logf("after %d more, %.0f a second: %+v", messages/parts*(part+1), float64(messages/parts*(part+1))/time.Since(began).Seconds(), now)
	}
	// The runtime's own structures and pools vary by less.
	if most := before.bytes + 2<<20; now.bytes > most {
		t.Errorf("%d bytes are in use after %d messages, %d before", now.bytes, messages, before.bytes)
	}
	if now.goroutines > before.goroutines || now.descriptors > before.descriptors {
		t.Errorf("%d goroutines and %d descriptors after %d messages, %d and %d before",
			now.goroutines, now.descriptors, messages, before.goroutines, before.descriptors)
	}
	if n := w.Reconnects(); n != 0 {
		t.Errorf("the connection was lost %d times", n)
	}
}

// nothing is a message that Python would send for a task without arguments.
func nothing() protocol.Publishing {
	return workertest.Message("orders", "shop.nothing", nil, nil, workertest.Option("ignore_result", true))
}

// Messages that wait for a slot have no goroutine each. It is not parallel, since it counts
// the goroutines of the process.
func TestMessagesThatWaitForASlotHaveNoGoroutine(t *testing.T) {
	r := newTestEnv(t)
	cfg := r.config()
	cfg.Slots, cfg.Prefetch = 2, 300
	w := newWorker(t, cfg)
	release := make(chan struct{})
	w.Register("shop.nothing", worker.HandlerFunc(func(context.Context, *worker.Task) (any, error) {
		<-release
		return nil, nil
	}), worker.IgnoreResult())
	workertest.Start(t, w)
	// The connection that publishes has goroutines too: with this, it is open.
	if err := w.Publish(t.Context(), nothing()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first task runs", func() bool { return len(w.Unacked()) == 1 })
	before := runtime.NumGoroutine()
	for range cfg.Prefetch - 1 {
		r.send(nothing())
	}
	eventually(t, "all messages wait", func() bool { return len(w.Unacked()) == cfg.Prefetch })
	eventually(t, "few goroutines are left", func() bool { return runtime.NumGoroutine() <= before+2*cfg.Slots })
	close(release)
	eventually(t, "every message is acknowledged", func() bool { return len(w.Unacked()) == 0 })
}

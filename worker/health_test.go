package worker

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// openConsumer is a connection that is not lost.
type openConsumer struct{ broker.Consumer }

func (openConsumer) Lost() <-chan struct{} { return nil }

// During an attempt to consume again, Ready reports the reason of the last failure
// and for how long the worker has not consumed.
func TestReadyKeepsTheReasonDuringAnAttempt(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 27, 3, 0, 0, 0, time.UTC)
	w := &Worker{started: make(chan struct{}), cfg: Config{Now: func() time.Time { return now }}}
	close(w.started)
	s := &session{Consumer: openConsumer{}}
	w.link.set(s, true, nil, now)
	if err := w.Ready(); err != nil {
		t.Fatalf("with consumers: %v", err)
	}
	w.link.set(nil, false, errors.New("the queue was deleted"), now)
	for range 3 {
		now = now.Add(20 * time.Second)
		w.link.set(nil, false, errors.New("access refused"), now)
		w.link.connected(s, now)
	}
	err := w.Ready()
	if err == nil || !strings.Contains(err.Error(), "access refused") || !strings.Contains(err.Error(), "1m0s") {
		t.Errorf("during the fourth attempt: %v, want the reason of the third and 1m0s", err)
	}
	w.link.set(s, true, nil, now)
	if err := w.Ready(); err != nil {
		t.Errorf("consuming again: %v", err)
	}
}

package worker

import (
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// steadyAfter is how long a session consumes before it counts as steady. A shorter
// one counts as a failed attempt: its loss is followed by a pause, and the next
// equal one is not logged.
const steadyAfter = 5 * time.Second

// connectionFaults counts the failures in a row to have a steady connection, and
// knows which of them were logged.
type connectionFaults struct {
	mu       sync.Mutex // guards all below
	failures int
	began    time.Time         // when the last session began to consume; zero afterwards
	logged   map[string]string // the kind of the last failure, by what failed
}

// consuming records that a session consumes.
func (f *connectionFaults) consuming() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.began = time.Now()
}

// endSession forgets the failures before a session that was steady. The caller has
// locked f.mu.
func (f *connectionFaults) endSession() {
	if !f.began.IsZero() && time.Since(f.began) >= steadyAfter {
		f.failures, f.logged = 0, nil
	}
	f.began = time.Time{}
}

// pause returns how long to wait before the next attempt to connect. The first
// attempt after a steady session follows at once.
func (f *connectionFaults) pause() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.endSession()
	f.failures++
	if f.failures == 1 {
		return 0
	}
	return redialPause(f.failures - 1)
}

// changed reports whether a failure is of another kind than the last one of what
// failed, in a row of failures.
func (f *connectionFaults) changed(what string, err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if what == "lost" {
		f.endSession()
	}
	kind := broker.Kind(err)
	if last, ok := f.logged[what]; ok && last == kind {
		return false
	}
	if f.logged == nil {
		f.logged = map[string]string{}
	}
	f.logged[what] = kind
	return true
}

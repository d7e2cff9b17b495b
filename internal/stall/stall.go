// Package stall detects work that has stopped making progress. A deadlock, or
// a call that never returns, leaves a process that answers its health probes
// and does no work.
//
// Each piece of work is an [Activity] of a [Detector]. It reports its progress,
// and it says when it waits for something that may take any time, such as a
// command or a free slot. An activity that does neither for too long is stuck.
package stall

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Detector knows what a process is working on. The zero value is ready for use.
// All methods of a Detector and of its activities may be called from any
// goroutine.
type Detector struct {
	mu         sync.Mutex
	activities map[*Activity]struct{}
}

// Activity is one piece of work. The methods of a nil *Activity do nothing.
type Activity struct {
	detector   *Detector
	kind, name string // shown with a space in between
	// All below is guarded by detector.mu.
	doing    string
	progress time.Time
	waits    int
}

// Start adds an activity. Name and doing are shown to the operator, as in
// "step build of run 6f1c…" and "opening its artifacts". The caller must call
// End.
func (d *Detector) Start(name, doing string) *Activity { return d.StartOf("", name, doing) }

// StartOf is Start for what begins often: the operator sees kind and name, as in "message"
// and "6f1c…", and they need not be joined before.
func (d *Detector) StartOf(kind, name, doing string) *Activity {
	a := &Activity{detector: d, kind: kind, name: name, doing: doing, progress: time.Now()}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.activities == nil {
		d.activities = map[*Activity]struct{}{}
	}
	d.activities[a] = struct{}{}
	return a
}

type contextKey struct{}

// Context returns a copy of ctx that carries the activity to the functions that
// do its work.
func (a *Activity) Context(ctx context.Context) context.Context {
	return context.WithValue(ctx, contextKey{}, a)
}

// FromContext returns the activity that ctx carries, or nil.
func FromContext(ctx context.Context) *Activity {
	a, _ := ctx.Value(contextKey{}).(*Activity)
	return a
}

// End removes the activity from its detector.
func (a *Activity) End() {
	if a == nil {
		return
	}
	a.detector.mu.Lock()
	defer a.detector.mu.Unlock()
	delete(a.detector.activities, a)
}

// Progress reports progress. If doing is not "", it says what the activity does
// from now on.
func (a *Activity) Progress(doing string) {
	if a == nil {
		return
	}
	a.detector.mu.Lock()
	defer a.detector.mu.Unlock()
	a.progress, a.doing = time.Now(), cmp.Or(doing, a.doing)
}

// Wait says that the activity waits for something that may take any time. It
// cannot be stuck until the returned function is called.
func (a *Activity) Wait() (over func()) {
	if a == nil {
		return func() {}
	}
	a.BeginWait()
	return sync.OnceFunc(a.EndWait)
}

// WaitAtMost is Wait for something that ends by itself within the limit. If it does not, the
// activity no longer counts as waiting.
func (a *Activity) WaitAtMost(limit time.Duration) (over func()) {
	end := a.Wait()
	timer := time.AfterFunc(limit, end)
	return func() {
		timer.Stop()
		end()
	}
}

// BeginWait is Wait for what happens often: the caller calls EndWait once.
func (a *Activity) BeginWait() {
	if a == nil {
		return
	}
	a.detector.mu.Lock()
	defer a.detector.mu.Unlock()
	a.waits++
}

// EndWait ends what BeginWait has begun.
func (a *Activity) EndWait() {
	if a == nil {
		return
	}
	a.detector.mu.Lock()
	defer a.detector.mu.Unlock()
	a.waits--
	a.progress = time.Now()
}

// shown is how many stuck activities an error names.
const shown = 3

// Stuck returns an error that names the activities without progress for at
// least that long, the longest first, or nil if there are none.
func (d *Detector) Stuck(after time.Duration) error {
	d.mu.Lock()
	var stuck []Activity
	for a := range d.activities {
		if a.waits == 0 && time.Since(a.progress) >= after {
			stuck = append(stuck, *a)
		}
	}
	d.mu.Unlock()
	if len(stuck) == 0 {
		return nil
	}
	slices.SortFunc(stuck, func(a, b Activity) int { return a.progress.Compare(b.progress) })
	var texts []string
	for _, a := range stuck[:min(len(stuck), shown)] {
		texts = append(texts, fmt.Sprintf("%s has made no progress for %s, while %s", strings.TrimSpace(a.kind+" "+a.name), time.Since(a.progress).Round(time.Second), a.doing))
	}
	if more := len(stuck) - shown; more > 0 {
		texts = append(texts, fmt.Sprintf("nor have %d more", more))
	}
	return fmt.Errorf("%s. Send the process SIGQUIT to print its stacks, and restart it", strings.Join(texts, "; "))
}

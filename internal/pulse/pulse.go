// Package pulse finds what has stopped moving: a deadlock, or a call that
// never returns, leaves a process that answers every question about itself and
// does no work.
//
// What works is a [Part] of a [Board]. It says when it moves, and when it waits
// for something outside that may take any time: a command, a free slot. A part
// that does neither for too long is stuck. It holds no domain: package worker
// uses it too.
package pulse

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Board is what a process is doing. The zero value is empty. All methods of a
// Board and its Parts may be called by any goroutine.
type Board struct {
	mu    sync.Mutex
	parts map[*Part]struct{}
}

// Part is one thing that has to move.
type Part struct {
	board *Board
	name  string
	// All below is guarded by board.mu.
	doing string
	moved time.Time
	waits int
}

// Enter adds a part that moves now. The name and what it is doing are for the
// operator, as in "step build of run 6f1c…" and "opening its artifacts". Leave
// must follow.
func (b *Board) Enter(name, doing string) *Part {
	p := &Part{board: b, name: name, doing: doing, moved: time.Now()}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.parts == nil {
		b.parts = map[*Part]struct{}{}
	}
	b.parts[p] = struct{}{}
	return p
}

type partKey struct{}

// Context carries the part to functions that do its work.
func (p *Part) Context(ctx context.Context) context.Context {
	return context.WithValue(ctx, partKey{}, p)
}

// Of is the part that ctx carries, or nil, on which nothing has an effect.
func Of(ctx context.Context) *Part {
	p, _ := ctx.Value(partKey{}).(*Part)
	return p
}

// Leave takes the part off the board.
func (p *Part) Leave() {
	if p == nil {
		return
	}
	p.board.mu.Lock()
	defer p.board.mu.Unlock()
	delete(p.board.parts, p)
}

// Move says that the part goes on. With doing not "", that is what it does
// from now on.
func (p *Part) Move(doing string) {
	if p == nil {
		return
	}
	p.board.mu.Lock()
	defer p.board.mu.Unlock()
	p.moved, p.doing = time.Now(), cmp.Or(doing, p.doing)
}

// Wait says that the part waits for something outside, until the returned
// function is called.
func (p *Part) Wait() (over func()) {
	if p == nil {
		return func() {}
	}
	p.board.mu.Lock()
	defer p.board.mu.Unlock()
	p.waits++
	return sync.OnceFunc(func() {
		p.board.mu.Lock()
		defer p.board.mu.Unlock()
		p.waits--
		p.moved = time.Now()
	})
}

// shown is how many stuck parts an error names.
const shown = 3

// Stuck names the parts that have not moved for so long, those for the longest
// time first, or is nil.
func (b *Board) Stuck(after time.Duration) error {
	b.mu.Lock()
	var stuck []Part
	for p := range b.parts {
		if p.waits == 0 && time.Since(p.moved) >= after {
			stuck = append(stuck, *p)
		}
	}
	b.mu.Unlock()
	if len(stuck) == 0 {
		return nil
	}
	slices.SortFunc(stuck, func(a, b Part) int { return a.moved.Compare(b.moved) })
	var texts []string
	for _, p := range stuck[:min(len(stuck), shown)] {
		texts = append(texts, fmt.Sprintf("%s has not moved for %s, while %s", p.name, time.Since(p.moved).Round(time.Second), p.doing))
	}
	if more := len(stuck) - shown; more > 0 {
		texts = append(texts, fmt.Sprintf("so have %d more", more))
	}
	return fmt.Errorf("%s. Send the process SIGQUIT for its stacks, and restart it", strings.Join(texts, "; "))
}

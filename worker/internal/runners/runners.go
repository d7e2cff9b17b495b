// Package runners runs work in goroutines that are used again: a new goroutine would
// have to let its stack grow again for each message, which takes as long as it takes to
// write a small one. It knows nothing of the work, and bounds only how many goroutines
// wait for more, never how many run.
package runners

import "sync/atomic"

// A Pool has goroutines that have done their work and wait for more.
type Pool[T any] struct {
	do      func(T) (again bool)
	next    chan T // to those that wait
	stopped <-chan struct{}
	waiting atomic.Int32
	most    int32
}

// New returns a pool that calls do for each piece of work, and in which at most so many
// goroutines wait, until stopped is closed. A goroutine for which do returns false ends.
func New[T any](most int, stopped <-chan struct{}, do func(T) (again bool)) *Pool[T] {
	return &Pool[T]{do: do, next: make(chan T), stopped: stopped, most: int32(most)}
}

// Run does some work in a goroutine that waits, or in a new one, and returns at once.
func (p *Pool[T]) Run(work T) {
	select {
	case p.next <- work:
	default:
		go func() {
			for more := true; more && p.do(work); {
				work, more = p.wait()
			}
		}()
	}
}

// wait returns the next work, or false if the goroutine is to end.
func (p *Pool[T]) wait() (work T, more bool) {
	defer p.waiting.Add(-1)
	if p.waiting.Add(1) > p.most {
		return work, false
	}
	select {
	case work = <-p.next:
		return work, true
	case <-p.stopped:
		return work, false
	}
}

package amqp

import (
	"math"
	"runtime"
	"slices"
	"sync"
)

// acks writes the acknowledgements of a channel: those that are due at the same time
// together, by one frame for all of them where possible (basic.ack with multiple), and
// by one write to the socket otherwise.
//
// A frame for several acknowledges every unsettled delivery up to its tag. So it needs to
// be known which deliveries are unsettled. The goroutines of several consumers take
// deliveries from the library, and not in the order of their tags: while one is missing,
// there are no frames for several.
type acks struct {
	// write acknowledges up to tag if multiple is set, else tag alone. Between hold and
	// release, nothing is written to the socket: release writes all of it.
	write   func(tag uint64, multiple bool) error
	hold    func()
	release func() error

	mu sync.Mutex // guards all below
	// first and last are the ends of the list of unsettled deliveries, in the order of
	// their tags. A delivery that is rejected or requeued leaves it when that is
	// written, so that no frame for several acknowledges it.
	first, last *receipt
	// seen is how many deliveries of the channel there were so far, and highest the
	// greatest tag among them. The broker's tags are 1, 2, 3 and so on: one is missing if
	// the two are not equal.
	seen, highest uint64
	due           []uint64 // the tags to be acknowledged
	writing       bool     // a goroutine writes those that are due, until none is
}

// add records a delivery. It is unsettled.
func (a *acks) add(r *receipt) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.seen++
	a.highest = max(a.highest, r.tag)
	before := a.last
	for before != nil && before.tag > r.tag {
		before = before.previous
	}
	r.unsettled, r.previous = true, before
	if before == nil {
		r.next, a.first = a.first, r
	} else {
		r.next, before.next = before.next, r
	}
	if r.next == nil {
		a.last = r
	} else {
		r.next.previous = r
	}
}

// settled removes a delivery from those that are unsettled.
func (a *acks) settled(r *receipt) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.remove(r)
}

// remove is settled for a caller that has locked a.mu.
func (a *acks) remove(r *receipt) {
	if !r.unsettled {
		return
	}
	r.unsettled = false
	if r.previous == nil {
		a.first = r.next
	} else {
		r.previous.next = r.next
	}
	if r.next == nil {
		a.last = r.previous
	} else {
		r.next.previous = r.previous
	}
	r.previous, r.next = nil, nil
}

// ack acknowledges a delivery. When all calls have returned, all acknowledgements are
// written: a call returns earlier only if another one writes for it.
func (a *acks) ack(r *receipt) error {
	a.mu.Lock()
	a.remove(r)
	a.due = append(a.due, r.tag)
	if a.writing {
		a.mu.Unlock()
		return nil
	}
	a.writing = true
	others := a.first != nil
	a.mu.Unlock()
	if others {
		// What can run now may be due, too, by the time that this goroutine continues.
		// Nothing is waited for.
		runtime.Gosched()
	}
	for {
		tags, upTo, more := a.take()
		if !more {
			return nil
		}
		if err := a.writeAll(tags, upTo); err != nil {
			a.mu.Lock()
			defer a.mu.Unlock()
			a.writing, a.due = false, nil
			return err
		}
	}
}

// take returns the tags that are due, in order. All deliveries with tags below upTo are
// settled or among them. It ends the writing if there are none.
func (a *acks) take() (tags []uint64, upTo uint64, more bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.due) == 0 {
		a.writing = false
		return nil, 0, false
	}
	tags, a.due = a.due, nil
	slices.Sort(tags)
	switch {
	case a.seen != a.highest: // one is missing
	case a.first == nil:
		upTo = math.MaxUint64
	default:
		upTo = a.first.tag
	}
	return tags, upTo, true
}

func (a *acks) writeAll(tags []uint64, upTo uint64) error {
	together, _ := slices.BinarySearch(tags, upTo)
	if together < 2 {
		together = 0
	}
	if frames := len(tags) - max(together-1, 0); frames == 1 {
		return a.write(tags[len(tags)-1], together > 0)
	}
	a.hold()
	var err error
	if together > 0 {
		err = a.write(tags[together-1], true)
	}
	for _, tag := range tags[together:] {
		if err == nil {
			err = a.write(tag, false)
		}
	}
	if releaseErr := a.release(); err == nil {
		err = releaseErr
	}
	return err
}

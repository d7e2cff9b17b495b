package worker

import (
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// attempt is one run of a task in this process, from the moment it has a slot until
// all its deliveries are settled. When a connection is lost meanwhile, the tag of
// the first delivery is invalid, and a later delivery of the same message, which
// has joined, is acknowledged in its place.
type attempt struct {
	identity
	registry     *registry
	first        *delivery         // the one that started it
	message      *protocol.Message // written at the start, before the handler
	registration registration      // likewise
	outcome      outcome           // written when the handler has ended
	task         *Task             // what the handler receives; written at the start
	began        time.Time         // when the handler was called
	ended        atomic.Bool       // the handler has returned, or the attempt goes on without it
	updating     sync.Mutex        // locked while the handler stores a state

	// Guarded by registry.mu.
	deliveries   []*delivery
	counted      bool // its start is recorded; written before the handler
	inHandler    bool // its goroutine runs the handler: see handing_over.go
	acknowledged bool // early: it goes on without deliveries
	paused       bool // it waits without a slot before it requeues its message
	hasSlot      bool // from the grant until the slot is free for another attempt
}

// begin returns the message, which it decodes if it was kept as bytes. It is an error
// when the connection is lost already: the broker delivers the message again,
// perhaps to another worker.
func (a *attempt) begin() (*protocol.Message, error) {
	m := a.message
	if m == nil {
		var err error
		if m, err = a.first.decode(); err != nil {
			return nil, err
		}
	}
	a.registry.mu.Lock()
	defer a.registry.mu.Unlock()
	for _, d := range a.deliveries {
		if d.state != stateGone {
			a.message = m
			return m, nil
		}
	}
	return nil, errors.New("its connection is lost")
}

// endUpdates waits for a state that the handler is storing, in another goroutine or
// although it was given up: it must not replace the outcome. It is called when the handler
// has ended, and no other state is stored from then on. A backend that does not return
// is not waited for.
func (a *attempt) endUpdates() {
	if a.updating.TryLock() {
		a.updating.Unlock()
		return
	}
	stored := make(chan struct{})
	go func() {
		defer close(stored)
		a.updating.Lock()
		defer a.updating.Unlock()
	}()
	waitFor(stored, storeTimeout, nil)
}

// releaseSlot frees the slot for another attempt. Further calls do nothing.
func (a *attempt) releaseSlot() {
	a.registry.mu.Lock()
	defer a.registry.mu.Unlock()
	a.freeSlot()
}

// freeSlot is releaseSlot for a caller that has locked registry.mu.
func (a *attempt) freeSlot() {
	if !a.hasSlot {
		return
	}
	a.hasSlot = false
	a.registry.free++
	a.registry.metrics.running.Dec()
	a.registry.grant()
}

// giveUp lets the attempt go on without its handler. The handler keeps the slot
// until it returns.
func (a *attempt) giveUp(returned <-chan outcome) {
	r := a.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	r.giveUp(a)
	go func() {
		<-returned
		r.handlerReturned()
	}()
}

// giveUp leaves the slot of an attempt to its handler. The caller has locked r.mu.
func (r *registry) giveUp(a *attempt) {
	a.hasSlot = false
	r.givenUp++
	r.metrics.givenUp.Inc()
}

// handlerReturned frees the slot of a handler that was given up.
func (r *registry) handlerReturned() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.metrics.givenUp.Dec()
	r.givenUp--
	r.free++
	r.metrics.running.Dec()
	r.grant()
}

// pause frees the slot and delays the deliveries, and those that join from now on.
func (a *attempt) pause() {
	for _, d := range a.delay() {
		d.sub.adjust()
	}
}

func (a *attempt) delay() (delayed []*delivery) {
	a.registry.mu.Lock()
	defer a.registry.mu.Unlock()
	a.paused = true
	for _, d := range a.deliveries {
		if d.state == stateRunning {
			d.move(stateDelayed, stateRunning)
			delayed = append(delayed, d)
		}
	}
	a.freeSlot()
	return delayed
}

// hasRunning reports whether a delivery other than d uses the part of its consumer's
// limit that belongs to the slot. The caller has locked registry.mu.
func (a *attempt) hasRunning(d *delivery) bool {
	return slices.ContainsFunc(a.deliveries, func(other *delivery) bool {
		return other != d && other.state == stateRunning && !other.copied
	})
}

// end settles all deliveries and ends the attempt. After Ignore only the first
// delivery is acknowledged. The handler may have stored its message, and a delivery
// that has joined may be the copy that was published from there, the only one left:
// it is requeued and runs.
func (a *attempt) end(s settlement) {
	tellAll(a.choose(s))
}

// tellAll tells the broker how the deliveries of an attempt are settled.
//
// Consumers that they no longer need are cancelled before: the broker could deliver a
// requeued message to one of them, and a quorum queue counts a return when a consumer
// is cancelled meanwhile.
func tellAll(settling []*delivery) {
	for _, d := range settling {
		d.sub.adjust()
	}
	for _, d := range settling {
		d.tell()
	}
}

func (a *attempt) choose(s settlement) []*delivery {
	r := a.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.running, a.identity)
	if a.acknowledged {
		s = settlementAck // it must not run again, whatever its outcome is
	}
	toldAt := unknown
	if slices.ContainsFunc(a.deliveries, func(d *delivery) bool { return d.state == stateRunning || d.state == stateDelayed }) {
		toldAt = r.losses
	}
	r.ended.add(a.identity, s, toldAt)
	for _, d := range a.deliveries {
		switch {
		case d.state != stateRunning && d.state != stateDelayed:
		case s == settlementIgnored && d != a.first:
			d.choose(settlementRequeue)
		default:
			d.choose(s)
		}
	}
	return a.deliveries
}

// receipt returns that of an unsettled delivery of which there is no copy in the queue,
// or nil.
func (a *attempt) receipt() broker.Receipt {
	a.registry.mu.Lock()
	defer a.registry.mu.Unlock()
	for _, d := range a.deliveries {
		if (d.state == stateRunning || d.state == stateDelayed) && !d.copied {
			return d.receipt
		}
	}
	return nil
}

package worker

import (
	"container/list"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// delivery is one message that the broker has handed to this worker. It is in one
// state at a time, and only the methods in this file change the state:
//
//	state     what is true                                  who moves it, and where
//	--------  --------------------------------------------  -----------------------------------------
//	received  its goroutine reads it; it has its place in   read: running, delayed or settling if its
//	          its queue's line                              task is known; refuse: refused; delay:
//	                                                        delayed; wait: waiting
//	refused   no task runs for it (it is malformed,         settle: settling; delay: delayed, for a
//	          revoked, expired or not registered); the      pause before it is requeued
//	          worker records that
//	delayed   it waits, without a slot, for its ETA or for  its goroutine at that time: waiting,
//	          the end of a pause, and another message may   limited or settling
//	          be delivered in its place
//	limited   it waits, without a slot, in the line of its  turn: waiting, when it is the first and
//	          task's rate limit, and another message may    its task may start again
//	          be delivered in its place
//	waiting   it waits in its queue's line for a slot,      grant: running, or settling if its task
//	          mostly without a goroutine (see park); of a   has ended meanwhile
//	          task with a rate limit, one waits
//	running   it belongs to an attempt, which has a slot    pause: delayed; end: settling;
//	          or records its outcome                        acknowledge: settling, while the attempt
//	                                                        goes on without it
//	settling  its settlement is chosen, and the broker is   told: settled
//	          being told
//	settled   the broker has been told                      nobody
//	gone      its connection is lost, and the broker        nobody
//	          delivers the message again
//
// What else happens to it:
//
//	state              lost connection    shutdown               the same message again   time limit
//	-----------------  -----------------  ---------------------  -----------------------  ----------------
//	received, refused  gone               goes on, then requeue  independent              none
//	delayed, limited,  gone; the message  requeue                independent, until one   none
//	waiting            counts as not to                          of them runs
//	                   blame (see renew)
//	running            gone; the attempt  end, or requeue after  joins the attempt        ends the attempt
//	                   goes on            StopTimeout                                     as a failure
//	settling           gone               goes on                settled alike if the     none
//	                                                             task has an outcome
//
// A delivery of an attempt that pauses, or that has another running delivery, is
// delayed too. It leaves with its attempt.
type delivery struct {
	// Written once, at receipt.
	registry *registry
	sub      *subscription
	wire     protocol.Delivery // the message as the broker delivered it
	receipt  broker.Receipt    // settles it
	// returns is how often its queue counts it as returned, and returnLimit after how
	// many the queue drops it, or 0: see requeue.go.
	returns, returnLimit int
	activity             *stall.Activity // reports its progress to Stuck; nil until a goroutine serves it
	// passOn is that of broker.Delivery, or nil. It is called before the delivery is
	// settled, unless returnsSoon is set: then its goroutine receives the next one at once.
	passOn      func()
	returnsSoon atomic.Bool
	// left says that another goroutine goes on with the attempt of the delivery: see
	// handing_over.go. Written and read by the goroutine that has served it until then.
	left bool
	// changed tells the delivery's goroutine that another one has moved it, unless the
	// delivery is parked.
	changed chan struct{}

	// Guarded by registry.mu.
	state      state
	place      *list.Element     // in its queue's line; nil outside of it
	id         identity          // zero until it is read
	message    *protocol.Message // nil until it is read, and while it is kept as bytes
	attempt    *attempt          // from running on
	limit      *rateLimit        // of its task; nil without one
	limited    *list.Element     // in the limit's line; nil outside of it
	match      match             // how its task was known
	settlement settlement        // from settling on
	telling    bool              // a goroutine tells the broker
	parked     bool              // it has no goroutine while it waits: see park
	copied     bool              // a copy of the message may be in its queue
}

// state is the state of a delivery. See the table at [delivery].
type state int

const (
	stateNew state = iota // not handed to the registry yet
	stateReceived
	stateRefused
	stateDelayed
	stateLimited
	stateWaiting
	stateRunning
	stateSettling
	stateSettled
	stateGone
)

func (s state) String() string {
	return [...]string{"new", "received", "refused", "delayed", "limited", "waiting", "running", "settling", "settled", "gone"}[s]
}

// open reports whether the broker still counts the delivery as unacknowledged.
func (s state) open() bool { return s > stateNew && s < stateSettled }

// apart reports whether another message may be delivered in the place of this one.
func (s state) apart() bool { return s == stateDelayed || s == stateLimited }

// waits reports whether no task has begun for the delivery, though its message is read.
func (s state) waits() bool { return s.apart() || s == stateWaiting }

// settlement is how the worker settles a delivery with the broker.
type settlement int

const (
	settlementAck settlement = iota
	settlementReject
	settlementRequeue
	// settlementIgnored acknowledges a task whose handler returned Ignore. The
	// worker does not remember it: the handler may have stored the message and
	// publish it again later, and that message must run.
	settlementIgnored
)

// move changes the state and everything that follows from it: the queue's line
// and the numbers that the registry keeps. The caller has locked registry.mu. A
// move that the table does not have is a fault of this package.
func (d *delivery) move(to state, from ...state) {
	allowed := false
	for _, f := range from {
		allowed = allowed || d.state == f
	}
	if !allowed {
		panic(fmt.Sprintf("delivery cannot become %v: it is %v", to, d.state))
	}
	r := d.registry
	inLine := func(s state) bool { return s == stateReceived || s == stateWaiting }
	switch {
	case inLine(d.state) && !inLine(to):
		r.leaveLine(d)
	case !inLine(d.state) && inLine(to):
		r.joinLine(d)
	}
	if d.state.apart() != to.apart() {
		change := 1
		if d.state.apart() {
			change = -1
		}
		d.sub.delayed += change
		d.sub.unadjusted.Store(true)
		r.metrics.delayed.Add(float64(change))
	}
	if l := d.limit; l != nil {
		if d.limited != nil && to != stateLimited {
			l.line.Remove(d.limited)
			d.limited = nil
			defer l.wakeNext()
		}
		switch {
		case to == stateLimited:
			d.limited = l.line.PushBack(d)
		case to == stateWaiting:
			l.ahead = d
		case l.ahead == d:
			l.ahead = nil
			defer l.wakeNext()
		}
	}
	d.state = to
	if !to.open() {
		delete(r.open, d)
		d.message = nil
	}
}

// wake tells the delivery's goroutine to look at the state again, or gives a parked
// delivery a goroutine. The caller has locked registry.mu.
func (d *delivery) wake() {
	if d.parked {
		d.parked = false
		d.registry.resume(d)
		return
	}
	select {
	case d.changed <- struct{}{}:
	default:
	}
}

// receive adds the delivery to the registry, at the end of its queue's line. After a
// shutdown has begun it is settling instead, and if its connection is lost it is
// gone.
func (d *delivery) receive() state {
	r := d.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case d.sub.session.gone:
		d.move(stateGone, stateNew)
	case r.closed:
		r.open[d] = struct{}{}
		d.settlement = settlementRequeue
		d.move(stateSettling, stateNew)
	default:
		r.open[d] = struct{}{}
		d.move(stateReceived, stateNew)
		r.handlers.Add(1)
	}
	return d.state
}

// read records what the message says. If its task runs in this process, the
// delivery joins the attempt. If the task has ended, the delivery is settling
// alike: see registry.join.
func (d *delivery) read(m *protocol.Message, id identity) match {
	r := d.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	if d.state != stateReceived {
		return matchNone // gone
	}
	d.message, d.id, d.limit = m, id, r.limitOf(m)
	return r.join(d, stateReceived)
}

// refuse takes a delivery out of its line for which no task will run.
func (d *delivery) refuse() {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	if d.state == stateReceived {
		d.move(stateRefused, stateReceived)
		d.registry.grant()
	}
}

// delay begins a wait without a slot. Only the bytes of the message are kept.
// After a shutdown has begun, the delivery is settling instead.
func (d *delivery) delay() {
	r := d.registry
	defer d.sub.adjust()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case d.state != stateReceived && d.state != stateRefused:
	case r.closed:
		d.choose(settlementRequeue)
	default:
		d.message = nil
		d.move(stateDelayed, stateReceived, stateRefused)
		r.grant()
	}
}

// wait asks for a slot. The delivery keeps the place in line that it has had since
// its receipt; after a delay it goes to the end. If the rate limit of its task lets it
// wait, only the bytes of the message are kept.
func (d *delivery) wait() {
	r := d.registry
	defer d.sub.adjust()
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case d.state != stateReceived && d.state != stateDelayed:
	case r.closed:
		d.choose(settlementRequeue)
	case d.limit != nil && !d.limit.admits(r.now()):
		d.message = nil
		d.move(stateLimited, stateReceived, stateDelayed)
		r.grant()
	default:
		d.move(stateWaiting, stateReceived, stateDelayed)
		r.grant()
	}
}

// turn returns the delivery's state. A limited delivery whose turn has come is waiting
// from now on. If it is the next but too early, turn also returns how long it waits.
func (d *delivery) turn() (s state, pause time.Duration) {
	r := d.registry
	defer d.sub.adjust()
	r.mu.Lock()
	defer r.mu.Unlock()
	if d.state == stateLimited {
		next, pause := d.limit.turn(d, r.now())
		switch {
		case next && pause > 0:
			return d.state, pause
		case next:
			d.move(stateWaiting, stateLimited)
			r.grant()
		}
	}
	return d.state, 0
}

// park reports whether the goroutine of the delivery need not wait, because another one
// goes on when the delivery is moved: many wait for a slot, and the collector would scan
// the stack of each, and shrink it so that it has to grow again. A goroutine that also
// receives waits itself, so that the delivery is settled before it receives the next one.
func (d *delivery) park() bool {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	d.parked = d.state == stateWaiting && d.limit == nil && d.passOn == nil
	return d.parked
}

// choose decides how the delivery is settled. The caller has locked registry.mu and
// tells the broker, or wakes the goroutine that does.
func (d *delivery) choose(s settlement) {
	d.move(stateSettling, stateReceived, stateRefused, stateDelayed, stateLimited, stateWaiting, stateRunning)
	d.settlement = s
	d.registry.grant()
}

// settle settles the delivery with the broker, unless that was decided already or
// the connection is lost.
func (d *delivery) settle(s settlement) {
	if d.decide(s) {
		d.sub.adjust() // see tellAll
		d.tell()
	}
}

// decide moves the delivery to settling, unless it is there or further already.
func (d *delivery) decide(s settlement) bool {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	if !d.state.open() || d.state == stateSettling {
		return false
	}
	d.choose(s)
	d.wake()
	return true
}

// tell tells the broker how a delivery is settled that is settling. Several
// goroutines may call it; the first does it.
func (d *delivery) tell() {
	faultpoint.Hit(faultpoint.SettleBefore, d.wire.Properties.CorrelationID)
	s, mine := d.beginTelling()
	if !mine {
		return
	}
	if !d.returnsSoon.Load() {
		d.receiveOthers()
	}
	switch s {
	case settlementAck, settlementIgnored:
		d.receipt.Ack()
	case settlementReject:
		d.receipt.Reject()
	case settlementRequeue:
		d.requeue()
	}
	d.told()
	faultpoint.Hit(faultpoint.SettleAfter, d.wire.Properties.CorrelationID)
}

// receiveOthers lets another goroutine receive, if this one would.
func (d *delivery) receiveOthers() {
	if d.passOn != nil {
		d.passOn()
	}
}

func (d *delivery) beginTelling() (s settlement, mine bool) {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	mine = d.state == stateSettling && !d.telling
	d.telling = d.telling || mine
	return d.settlement, mine
}

// told ends the delivery.
func (d *delivery) told() {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	if d.state == stateSettling {
		d.move(stateSettled, stateSettling)
	}
}

// lose ends all deliveries of a lost connection. Attempts continue without them.
func (r *registry) lose(s *session) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s.gone = true
	r.losses++
	for d := range r.open {
		if d.sub.session != s {
			continue
		}
		if d.attempt == nil && d.state.waits() {
			r.returned.add(d.id)
		}
		d.move(stateGone, d.state)
		d.wake()
	}
	r.grant()
}

// now returns the delivery's state.
func (d *delivery) now() state {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	return d.state
}

// granted returns the attempt that the delivery has started or joined after its wait
// for a slot, and how its task was known. Both are empty when it has left.
func (d *delivery) granted() (*attempt, match) {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	switch {
	case d.attempt != nil && d.attempt.first == d:
		return d.attempt, matchNone
	case d.attempt != nil:
		return d.attempt, matchRunning
	}
	return nil, d.match
}

// markCopied records that a copy of the message may be in its queue.
func (d *delivery) markCopied() {
	d.registry.mu.Lock()
	defer d.registry.mu.Unlock()
	d.copied = true
}

// acceptContent is Celery's accept_content. It is JSON only: the other formats
// can run code or need Python.
var acceptContent = []string{"application/json"}

// decode reads the message. It is an error when the message is malformed.
func (d *delivery) decode() (*protocol.Message, error) { return protocol.Decode(d.wire, acceptContent) }

// decodeHeader reads the message without its body.
func (d *delivery) decodeHeader() (*protocol.Message, error) {
	return protocol.DecodeHeader(d.wire, acceptContent)
}

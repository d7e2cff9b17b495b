package worker

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// fakeReceipt records what the broker is told about a delivery.
type fakeReceipt struct {
	broker.Receipt
	t        testing.TB
	tag      int
	told     string
	delivery *delivery
}

func (r *fakeReceipt) tell(what string) {
	if r.told != "" {
		r.t.Fatalf("delivery %d was %s before it was %s", r.tag, r.told, what)
	}
	r.told = what
	r.delivery.tell() // as another goroutine may at the same time
}
func (r *fakeReceipt) Ack()     { r.tell("acknowledged") }
func (r *fakeReceipt) Reject()  { r.tell("rejected") }
func (r *fakeReceipt) Requeue() { r.tell("requeued") }

func receiptOf(d *delivery) *fakeReceipt { return d.receipt.(*fakeReceipt) }

// registryTest is a registry whose deliveries come from the test.
type registryTest struct {
	t       testing.TB
	worker  *Worker
	session *session
	subs    map[string]*subscription
	tag     int
	now     time.Time
}

func newRegistryTest(t testing.TB, slots int) *registryTest {
	metrics, err := newMetrics(nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &registryTest{t: t, now: time.Unix(0, 0)}
	r.worker = &Worker{registry: newRegistry(slots, metrics, func() time.Time { return r.now }), metrics: metrics, cfg: Config{MaxETA: 1000}}
	r.connect()
	return r
}

// connect replaces the session. The old one is not lost.
func (r *registryTest) connect() {
	r.session = &session{}
	r.subs = map[string]*subscription{}
}

// deliver hands a message to the registry.
func (r *registryTest) deliver(queue string, redelivered bool) *delivery {
	sub := r.subs[queue]
	if sub == nil {
		sub = &subscription{session: r.session, queue: Queue{Name: queue}, worker: r.worker}
		r.subs[queue] = sub
	}
	r.tag++
	receipt := &fakeReceipt{t: r.t, tag: r.tag}
	d := &delivery{registry: r.worker.registry, sub: sub, wire: protocol.Delivery{Redelivered: redelivered}, receipt: receipt, changed: make(chan struct{}, 1)}
	receipt.delivery = d
	d.receive()
	return d
}

func (r *registryTest) expect(d *delivery, want state) {
	r.t.Helper()
	if got := d.now(); got != want {
		r.t.Fatalf("delivery %d is %v, want %v", receiptOf(d).tag, got, want)
	}
}

func identityOf(id string) identity { return identify(&protocol.Message{ID: id}, nil) }

// A queue's messages start in the order in which the broker has delivered them, also
// when a later one is read first; one that was delayed goes to the end.
func TestMessagesStartInTheBrokersOrder(t *testing.T) {
	t.Parallel()
	r := newRegistryTest(t, 1)
	var all []*delivery
	for range 4 {
		all = append(all, r.deliver("q", false))
	}
	for i, d := range slices.Backward(all) {
		d.read(nil, identityOf(fmt.Sprint(i)))
		if i == 1 {
			d.delay()
		} else {
			d.wait()
		}
	}
	all[1].wait()
	for _, i := range []int{0, 2, 3, 1} {
		r.expect(all[i], stateRunning)
		all[i].attempt.end(settlementAck)
		all[i].attempt.releaseSlot()
	}
}

// A queue with many messages does not keep the message of another queue waiting for
// more than one of them.
func TestSlotsGoToTheQueuesInTurn(t *testing.T) {
	t.Parallel()
	r := newRegistryTest(t, 1)
	start := func(queue, id string) *delivery {
		d := r.deliver(queue, false)
		d.read(nil, identityOf(id))
		d.wait()
		return d
	}
	var full []*delivery
	for i := range 10 {
		full = append(full, start("full", fmt.Sprint(i)))
	}
	other := start("other", "x")
	r.expect(full[0], stateRunning)
	full[0].attempt.releaseSlot()
	r.expect(other, stateRunning)
	r.expect(full[1], stateWaiting)
}

func TestRecentOutcomesAreBounded(t *testing.T) {
	t.Parallel()
	r := newRegistryTest(t, 1)
	r.worker.registry.ended = newEndedTasks(2)
	for _, id := range []string{"a", "b", "c"} {
		d := r.deliver("q", true)
		if known := d.read(nil, identityOf(id)); known != matchNone {
			t.Fatalf("%s is already known", id)
		}
		d.wait()
		d.attempt.end(settlementAck)
		d.attempt.releaseSlot()
	}
	r.worker.registry.lose(r.session)
	r.connect()
	if known := r.deliver("q", true).read(nil, identityOf("a")); known != matchNone {
		t.Error("the oldest is still known")
	}
	if d := r.deliver("q", true); d.read(nil, identityOf("c")) != matchEnded || d.settlement != settlementAck {
		t.Errorf("the newest is %v", d.now())
	}
	if known := r.deliver("q", false).read(nil, identityOf("c")); known != matchNone {
		t.Error("a message that was sent again counts as a redelivery")
	}
	if known := r.deliver("q", true).read(nil, identityOf("c")); known != matchNone {
		t.Error("a message that was sent again counts as the one before when it is delivered again")
	}
	// What was asked for last is kept longest.
	ended := newEndedTasks(2)
	a, b, c := identityOf("a"), identityOf("b"), identityOf("c")
	ended.add(a, settlementAck, unknown)
	ended.add(b, settlementAck, unknown)
	ended.find(a)
	ended.add(c, settlementReject, unknown)
	if _, known := ended.find(b); known {
		t.Error("b is known, which nobody has asked for")
	}
	if task, known := ended.find(a); !known || task.settlement != settlementAck {
		t.Errorf("a is known %v, %v", known, task)
	}
	set := newRecentSet[string](2)
	for _, id := range []string{"a", "b", "c", "c"} {
		set.add(id)
	}
	if set.has("a") || !set.has("b") || !set.has("c") || len(set.index) != 2 {
		t.Errorf("set is %v", set.index)
	}
}

// While the connection lives on which a task's message was settled, that message cannot come
// again: an equal one is another, which another worker has requeued. Copies of it may come.
func TestOutcomesAreForMessagesThatCanComeAgain(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		lost bool // the connection, after the end
		copy bool
		want match
	}{
		{"another message", false, false, matchNone},
		{"a copy", false, true, matchEnded},
		{"its settlement may be lost", true, false, matchEnded},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRegistryTest(t, 1)
			d := r.deliver("q", false)
			d.read(nil, identityOf("a"))
			d.wait()
			d.attempt.end(settlementAck)
			d.attempt.releaseSlot()
			if c.lost {
				r.worker.registry.lose(r.session)
				r.connect()
			}
			again := r.deliver("q", true)
			if c.copy {
				again.wire.Headers = map[string]any{headerCopy: true}
			}
			if known := again.read(nil, identityOf("a")); known != c.want {
				t.Errorf("it is known %v, want %v", known, c.want)
			}
		})
	}
}

// expected is what a simple model, which keeps no numbers and no lines, expects of
// a delivery.
type expected struct {
	*delivery
	state   state
	told    string // what the broker is told, from settling on
	queue   string
	name    string // of the task
	task    identity
	isRead  bool // read has been called
	refused bool // no task runs for it
	copied  bool
	place   int // in line: the smallest of its queue is the first
	attempt *expectedAttempt
	limit   *expectedLimit // nil without one
}

func (e *expected) message() *protocol.Message { return &protocol.Message{Task: e.name} }

func (e *expected) settles(told string) { e.state, e.told = stateSettling, told }

// told is what the broker is told for a settlement.
var told = map[settlement]string{
	settlementAck: "acknowledged", settlementReject: "rejected", settlementRequeue: "requeued", settlementIgnored: "acknowledged",
}

type expectedAttempt struct {
	actual                        *attempt
	first                         *expected
	paused, hasSlot, acknowledged bool
}

// expectedLimit is the rate limit of a task: one waiting delivery is ahead of the line.
type expectedLimit struct {
	every time.Duration
	next  time.Time
	line  []*expected
}

// ahead reports whether a delivery of the task waits for a slot.
func (l *expectedLimit) ahead(m *model) bool {
	return slices.ContainsFunc(m.all, func(e *expected) bool { return e.limit == l && e.state == stateWaiting })
}

// may reports whether a delivery may wait for a slot.
func (l *expectedLimit) may(m *model, e *expected) bool {
	first := len(l.line) == 0 || l.line[0] == e
	return first && !l.ahead(m) && !m.now().Before(l.next)
}

// expectedEnd is what the broker was told, and after how many losses of connections.
type expectedEnd struct {
	told   string
	toldAt int // -1: no delivery was left to be told about
}

type model struct {
	all              []*expected
	limits           map[string]*expectedLimit // by task
	running          map[identity]*expectedAttempt
	ended            map[identity]expectedEnd
	losses           int // of connections
	returned         map[identity]bool
	queues           []string
	turn             string // the queue that got the last slot
	slots            int
	handlers         []chan outcome // those that were given up, each with its slot
	place            int
	draining, closed bool
	now              func() time.Time
}

func (m *model) free() int {
	n := m.slots - len(m.handlers)
	for _, a := range m.running {
		if a.hasSlot {
			n--
		}
	}
	return n
}

// head is the first delivery in a queue's line.
func (m *model) head(queue string) *expected {
	var head *expected
	for _, e := range m.all {
		if e.queue == queue && (e.state == stateReceived || e.state == stateWaiting) && (head == nil || e.place < head.place) {
			head = e
		}
	}
	return head
}

func (m *model) join(e *expected) bool {
	if a := m.running[e.task]; a != nil {
		if a.acknowledged {
			e.settles("acknowledged")
			return true
		}
		state := stateRunning
		for _, other := range m.all {
			if a.paused || other.attempt == a && other.state == stateRunning && !other.copied {
				state = stateDelayed
			}
		}
		e.attempt, e.state = a, state
		return true
	}
	if end, ended := m.ended[e.task]; ended && e.wire.Redelivered && end.toldAt != m.losses {
		e.settles(end.told)
		return true
	}
	delete(m.ended, e.task)
	return false
}

func (m *model) grant() {
	for m.free() > 0 && !m.draining {
		var next *expected
		at := slices.Index(m.queues, m.turn) + 1
		for i := range m.queues {
			if head := m.head(m.queues[(at+i)%len(m.queues)]); head != nil && head.state == stateWaiting {
				next = head
				break
			}
		}
		if next == nil {
			return
		}
		m.turn = next.queue
		if !m.join(next) {
			next.attempt, next.state = &expectedAttempt{first: next, hasSlot: true, actual: next.delivery.attempt}, stateRunning
			m.running[next.task] = next.attempt
			if next.limit != nil {
				next.limit.next = m.now().Add(next.limit.every)
			}
		}
	}
}

// wait lets a delivery wait for the rate limit of its task, or for a slot.
func (m *model) wait(e *expected) {
	switch {
	case m.closed:
		e.settles("requeued")
	case e.limit != nil && !e.limit.may(m, e):
		e.state = stateLimited
		e.limit.line = append(e.limit.line, e)
	default:
		e.state = stateWaiting
	}
	m.grant()
}

// turns lets each limited delivery look whether its turn has come, as its goroutine does
// when it is woken or its time has come.
func (m *model) turns() {
	for _, l := range m.limits {
		l.line = slices.DeleteFunc(l.line, func(e *expected) bool { return e.state != stateLimited })
	}
	for moved := true; moved; {
		moved = false
		for _, e := range m.all {
			if e.state != stateLimited {
				continue
			}
			e.delivery.turn()
			if e.limit.may(m, e) {
				m.place++
				e.state, e.place = stateWaiting, m.place
				e.limit.line = e.limit.line[1:]
				moved = true
				m.grant()
			}
		}
	}
}

// lose ends the deliveries of a session.
func (m *model) lose(s *session) {
	m.losses++
	for _, e := range m.all {
		if e.sub.session != s || !e.state.open() {
			continue
		}
		if e.attempt == nil && e.state.waits() {
			m.returned[e.delivery.id] = true
		}
		e.state = stateGone
	}
	m.grant()
}

// settle ends the deliveries of an attempt that have not left.
func (m *model) settle(a *expectedAttempt, s settlement) {
	for _, e := range m.all {
		if e.attempt != a || e.state != stateRunning && e.state != stateDelayed {
			continue
		}
		e.settles(told[s])
		if s == settlementIgnored && e != a.first {
			e.settles("requeued")
		}
		e.state = stateSettled
	}
}

// check compares the registry and its deliveries with the model.
func (m *model) check(t *testing.T, r *registry, step string) {
	t.Helper()
	open, delayed := 0, map[*subscription]int{}
	for _, e := range m.all {
		tag := receiptOf(e.delivery).tag
		if got := e.delivery.now(); got != e.state {
			t.Fatalf("after %s: delivery %d is %v, the model expects %v", step, tag, got, e.state)
		}
		if e.state.open() {
			open++
		}
		if e.state == stateDelayed || e.state == stateLimited {
			delayed[e.sub]++
		}
		joined := e.attempt != nil && e.attempt.first != e
		if (e.state.apart() && e.attempt == nil || !e.state.open() || joined) && e.delivery.message != nil {
			t.Fatalf("after %s: delivery %d, which is %v, keeps its message", step, tag, e.state)
		}
		if e.isRead && r.wasReturned(e.delivery) != m.returned[e.task] {
			t.Fatalf("after %s: delivery %d has waited before a lost connection: %v, the model expects %v", step, tag, !m.returned[e.task], m.returned[e.task])
		}
	}
	all := 0
	for _, e := range m.all {
		if n := r.delayedOn(e.sub); n != delayed[e.sub] {
			t.Fatalf("after %s: %d delayed, the model expects %d", step, n, delayed[e.sub])
		}
	}
	for _, n := range delayed {
		all += n
	}
	if len(r.open) != open || r.free != m.free() || r.attempts() != len(m.running) || r.handlersGivenUp() != len(m.handlers) {
		t.Fatalf("after %s: %d open, %d slots free, %d attempts, %d handlers given up; the model expects %d, %d, %d, %d",
			step, len(r.open), r.free, r.attempts(), r.handlersGivenUp(), open, m.free(), len(m.running), len(m.handlers))
	}
	if d, n := gaugeOf(r.metrics.delayed), gaugeOf(r.metrics.running); d != all || n != m.slots-m.free() {
		t.Fatalf("after %s: the metrics say %d delayed and %d running, the model expects %d and %d", step, d, n, all, m.slots-m.free())
	}
	for _, a := range m.running {
		// The question whether the message is still unacknowledged is asked about one
		// that waits for it, and of which there is no copy.
		usable, present := false, false
		for _, e := range m.all {
			usable = usable || e.attempt == a && (e.state == stateRunning || e.state == stateDelayed) && !e.copied
			present = present || e.attempt == a && e.state != stateGone
		}
		if got := a.actual.receipt(); (got != nil) != usable {
			t.Fatalf("after %s: a task has a message to ask about: %v, the model expects %v", step, got != nil, usable)
		}
		if a.actual.message == nil {
			continue // begin would decode it
		}
		if _, err := a.actual.begin(); (err == nil) != present && !a.acknowledged {
			t.Fatalf("after %s: a task may begin: %v, the model expects %v", step, err, present)
		}
	}
}

func gaugeOf(c prometheus.Gauge) int {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		return -1
	}
	return int(m.GetGauge().GetValue())
}

// registryWalk drives a registry and its model with the same random events.
type registryWalk struct {
	*registryTest
	t      *testing.T
	random *rand.Rand
	r      *registry
	m      *model
	live   []*session
	lost   []*session
	moved  *expected // the delivery that the event is about
}

// pick returns a delivery in one of the states for which the condition holds.
func (w *registryWalk) pick(holds func(*expected) bool, states ...state) *expected {
	var found []*expected
	for _, e := range w.m.all {
		if slices.Contains(states, e.state) && (holds == nil || holds(e)) {
			found = append(found, e)
		}
	}
	if len(found) == 0 {
		return nil
	}
	return found[w.random.IntN(len(found))]
}

// attempt returns one that runs.
func (w *registryWalk) attempt(holds func(*expectedAttempt) bool) *expectedAttempt {
	e := w.pick(func(e *expected) bool {
		return e.attempt != nil && w.m.running[e.task] == e.attempt && (holds == nil || holds(e.attempt))
	}, stateRunning, stateDelayed, stateSettled, stateGone)
	if e == nil {
		return nil
	}
	return e.attempt
}

func alone(e *expected) bool { return e.attempt == nil }

// event makes one event and returns what it was.
func (w *registryWalk) event() string {
	m, random := w.m, w.random
	switch random.IntN(22) {
	case 0, 1, 2, 3:
		queue := fmt.Sprintf("q%d", random.IntN(2))
		late := len(w.lost) > 0 && random.IntN(8) == 0
		current, subs := w.session, w.subs
		if late {
			w.session, w.subs = w.lost[0], map[string]*subscription{}
		}
		d := w.deliver(queue, random.IntN(2) == 0)
		w.session, w.subs = current, subs
		name := fmt.Sprint(random.IntN(6))
		e := &expected{delivery: d, state: stateReceived, queue: queue, name: name, task: identityOf(fmt.Sprint(name, " ", random.IntN(2)))}
		m.place++
		e.place, e.limit = m.place, m.limits[e.message().Task]
		m.all = append(m.all, e)
		switch {
		case late:
			e.state = stateGone
			return "a delivery of a lost connection"
		case m.closed:
			e.settles("requeued")
		default:
			if !slices.Contains(m.queues, queue) {
				m.queues = append(m.queues, queue)
			}
		}
		return "a delivery"
	case 4, 5, 6, 7:
		if e := w.pick(func(e *expected) bool { return !e.isRead }, stateReceived); e != nil {
			w.moved, e.isRead = e, true
			found := e.read(e.message(), e.task)
			if m.join(e) != (found != matchNone) {
				w.t.Fatalf("read found %v", found)
			}
			m.grant()
			return "reading"
		}
	case 8, 9, 10:
		if e := w.pick(func(e *expected) bool { return e.isRead }, stateReceived); e != nil {
			w.moved = e
			e.wait()
			m.wait(e)
			return "the wait for a slot"
		}
	case 11:
		if e := w.pick(func(e *expected) bool { return e.isRead || e.refused }, stateReceived, stateRefused); e != nil {
			w.moved = e
			e.delivery.delay()
			if e.state = stateDelayed; m.closed {
				e.settles("requeued")
			}
			m.grant()
			return "a delay"
		}
	case 12:
		if e := w.pick(func(e *expected) bool { return alone(e) && !e.refused }, stateDelayed); e != nil {
			w.moved = e
			e.wait()
			m.place++
			e.place = m.place
			m.wait(e)
			return "the end of a delay"
		}
	case 13:
		if e := w.pick(nil, stateReceived); e != nil {
			w.moved, e.refused = e, true
			e.refuse()
			e.state = stateRefused
			m.grant()
			return "a refusal"
		}
	case 14:
		if e := w.pick(func(e *expected) bool { return alone(e) && e.refused }, stateRefused, stateDelayed, stateGone); e != nil {
			w.moved = e
			s := settlement(random.IntN(3))
			e.settle(s)
			if e.state != stateGone {
				e.settles(told[s])
				e.state = stateSettled
			}
			m.grant()
			return "a settlement without a task"
		}
	case 15:
		if a := w.attempt(func(a *expectedAttempt) bool { return a.hasSlot && !a.acknowledged }); a != nil {
			a.actual.pause()
			a.paused, a.hasSlot = true, false
			for _, other := range m.all {
				if other.attempt == a && other.state == stateRunning {
					other.state = stateDelayed
				}
			}
			m.grant()
			return "a pause"
		}
	case 16:
		if a := w.attempt(nil); a != nil {
			w.end(a, settlement(random.IntN(4)))
			return "the end of a task"
		}
	case 17:
		w.now = w.now.Add(time.Duration(random.IntN(4)) * time.Second)
		return "the passing of time"
	case 18:
		if a := w.attempt(func(a *expectedAttempt) bool { return a.hasSlot && !a.paused }); a != nil {
			a.actual.acknowledge()
			a.acknowledged = true
			m.settle(a, settlementAck)
			m.grant()
			return "an early acknowledgement"
		}
	case 19:
		if random.IntN(3) > 0 {
			break
		}
		if len(w.live) < 2 {
			w.connect()
			w.live = append(w.live, w.session)
			return "a new connection"
		}
		s := w.live[0]
		w.live, w.lost = w.live[1:], append(w.lost, s)
		w.r.lose(s)
		m.lose(s)
		return "a lost connection"
	case 20:
		if e := w.pick(nil, stateRunning, stateDelayed, stateWaiting); e != nil {
			e.markCopied()
			e.copied = true
			return "a copy"
		}
	case 21:
		if n := len(m.handlers); n > 0 && random.IntN(2) == 0 {
			w.handlerReturns()
			return "the return of a handler"
		}
		if a := w.attempt(func(a *expectedAttempt) bool { return a.hasSlot }); a != nil {
			handler := make(chan outcome)
			a.actual.giveUp(handler)
			a.hasSlot = false
			m.handlers = append(m.handlers, handler)
			return "a handler that is given up"
		}
	}
	return "nothing"
}

// handlerReturns lets a handler return that was given up.
func (w *registryWalk) handlerReturns() {
	handler := w.m.handlers[0]
	w.m.handlers = w.m.handlers[1:]
	handler <- outcome{}
	for w.r.handlersGivenUp() > len(w.m.handlers) { // its goroutine frees the slot
		runtime.Gosched()
	}
	w.m.grant()
}

func (w *registryWalk) end(a *expectedAttempt, s settlement) {
	m, toldAt := w.m, -1
	for _, e := range m.all {
		if e.attempt == a && (e.state == stateRunning || e.state == stateDelayed) {
			toldAt = m.losses
		}
	}
	a.actual.end(s)
	a.actual.releaseSlot()
	delete(m.running, a.first.task)
	if a.acknowledged {
		s = settlementAck
	}
	if delete(m.ended, a.first.task); s == settlementAck || s == settlementReject {
		m.ended[a.first.task] = expectedEnd{told[s], toldAt}
	}
	m.settle(a, s)
	m.grant()
}

// step makes an event, and compares registry and model.
func (w *registryWalk) step(event func() string) {
	w.t.Helper()
	before := map[*expected]state{}
	for _, e := range w.m.all {
		select {
		case <-e.changed:
		default:
		}
		if alone(e) {
			before[e] = e.state
		}
	}
	w.moved = nil
	step := event()
	w.m.check(w.t, w.r, step)
	for e, was := range before {
		if was.waits() && e.state != was && e != w.moved && len(e.changed) == 0 {
			w.t.Fatalf("after %s: the goroutine of delivery %d was not told that it is %v", step, receiptOf(e.delivery).tag, e.state)
		}
	}
	// A delivery whose settlement is chosen is settled by its own goroutine.
	for _, e := range w.m.all {
		if e.state == stateSettling {
			e.tell()
			e.state = stateSettled
		}
	}
	w.m.turns()
	w.m.check(w.t, w.r, step)
	for _, e := range w.m.all {
		if got := receiptOf(e.delivery).told; e.state == stateSettled && got != e.told || e.state != stateSettled && got != "" {
			w.t.Fatalf("after %s: delivery %d is %v, the broker was told %q; the model expects %q", step, receiptOf(e.delivery).tag, e.state, got, e.told)
		}
	}
}

// Random events move deliveries, attempts and slots as a simple model says, also during
// a shutdown. In the end nothing is left.
func TestRegistryMovesAsItsModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { walkRegistry(t, seed) })
	}
}

func walkRegistry(t *testing.T, seed uint64) {
	random := rand.New(rand.NewPCG(seed, 10))
	slots := 1 + random.IntN(3)
	rt := newRegistryTest(t, slots)
	w := &registryWalk{registryTest: rt, t: t, random: random, r: rt.worker.registry, live: []*session{rt.session}}
	// Two tasks have rate limits: those whose ids begin with 0 and 1.
	limits := map[string]*expectedLimit{"0": {every: 3 * time.Second}, "1": {every: 5 * time.Second}}
	for task, l := range limits {
		w.r.limit(task, l.every)
	}
	w.m = &model{running: map[identity]*expectedAttempt{}, ended: map[identity]expectedEnd{}, returned: map[identity]bool{}, limits: limits,
		slots: slots, now: func() time.Time { return rt.now }}
	walk := func(events int) {
		for range events {
			w.step(w.event)
		}
	}
	walk(150)
	w.step(func() string {
		w.r.drain()
		w.m.draining = true
		return "the end of receiving"
	})
	walk(20)
	w.step(func() string {
		w.r.close()
		w.m.closed = true
		for _, e := range w.m.all {
			if alone(e) && e.state.waits() {
				e.settles("requeued")
			}
		}
		return "the shutdown"
	})
	walk(20)
	for len(w.m.handlers) > 0 {
		w.step(func() string { w.handlerReturns(); return "the return of a handler" })
	}
	for _, e := range w.m.all {
		if e.state == stateReceived && !e.isRead {
			w.step(func() string {
				w.moved, e.isRead = e, true
				e.read(e.message(), e.task)
				w.m.join(e)
				return "reading"
			})
		}
		if e.state == stateReceived || e.state == stateRefused {
			w.step(func() string {
				w.moved = e
				e.settle(settlementRequeue)
				e.settles("requeued")
				e.state = stateSettled
				return "a settlement without a task"
			})
		}
	}
	for len(w.m.running) > 0 {
		w.step(func() string { w.end(w.attempt(nil), settlementAck); return "the end of a task" })
	}
	if len(w.r.open) != 0 || w.r.free != slots {
		t.Fatalf("%d deliveries are open and %d of %d slots are free", len(w.r.open), w.r.free, slots)
	}
}

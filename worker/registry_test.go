package worker

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// fakeReceipt records what the broker is told about a delivery.
type fakeReceipt struct {
	broker.Receipt
	t    testing.TB
	tag  int
	told string
}

func (r *fakeReceipt) tell(what string) {
	if r.told != "" {
		r.t.Errorf("delivery %d was %s before it was %s", r.tag, r.told, what)
	}
	r.told = what
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

// connect replaces the session.
func (r *registryTest) connect() {
	if r.session != nil {
		r.worker.registry.lose(r.session)
	}
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
	d := &delivery{registry: r.worker.registry, sub: sub, wire: protocol.Delivery{Redelivered: redelivered}, receipt: &fakeReceipt{t: r.t, tag: r.tag}, changed: make(chan struct{}, 1)}
	d.receive()
	return d
}

func (r *registryTest) expect(d *delivery, want state) {
	r.t.Helper()
	if got := d.now(); got != want {
		r.t.Fatalf("delivery %d is %v, want %v", receiptOf(d).tag, got, want)
	}
}

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
		d.read(nil, identity{id: fmt.Sprint(i)})
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
		d.read(nil, identity{id: id})
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
		if known := d.read(nil, identity{id: id}); known != matchNone {
			t.Fatalf("%s is already known", id)
		}
		d.wait()
		d.attempt.end(settlementAck)
		d.attempt.releaseSlot()
	}
	if known := r.deliver("q", true).read(nil, identity{id: "a"}); known != matchNone {
		t.Error("the oldest is still known")
	}
	if d := r.deliver("q", true); d.read(nil, identity{id: "c"}) != matchEnded || d.settlement != settlementAck {
		t.Errorf("the newest is %v", d.now())
	}
	if known := r.deliver("q", false).read(nil, identity{id: "c"}); known != matchNone {
		t.Error("a message that was sent again counts as a redelivery")
	}
	set := newRecentSet[string](2)
	for _, id := range []string{"a", "b", "c", "c"} {
		set.add(id)
	}
	if set.has("a") || !set.has("b") || !set.has("c") || len(set.index) != 2 {
		t.Errorf("set is %v", set.index)
	}
}

// expected is what a simple model, which keeps no numbers and no lines, expects of
// a delivery.
type expected struct {
	*delivery
	state   state
	queue   string
	task    identity
	place   int // in line: the smallest of its queue is the first
	attempt *expectedAttempt
	session *session
	limit   *expectedLimit // nil without one
}

// message is that of the delivery's task, which is the first digit of the id.
func (e *expected) message() *protocol.Message { return &protocol.Message{Task: e.task.id[:1]} }

type expectedAttempt struct {
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

type model struct {
	all     []*expected
	limits  map[string]*expectedLimit // by task
	running map[identity]*expectedAttempt
	ended   map[identity]bool
	queues  []string
	turn    string // the queue that got the last slot
	slots   int
	place   int
	closed  bool
	now     func() time.Time
}

func (m *model) free() int {
	n := m.slots
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
			e.state = stateSettling
			return true
		}
		state := stateRunning
		for _, other := range m.all {
			if a.paused || other.attempt == a && other.state == stateRunning {
				state = stateDelayed
			}
		}
		e.attempt, e.state = a, state
		return true
	}
	if m.ended[e.task] && e.wire.Redelivered {
		e.state = stateSettling
		return true
	}
	return false
}

func (m *model) grant() {
	for m.free() > 0 && !m.closed {
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
			next.attempt, next.state = &expectedAttempt{first: next, hasSlot: true}, stateRunning
			m.running[next.task] = next.attempt
			if next.limit != nil {
				next.limit.next = m.now().Add(next.limit.every)
			}
		}
	}
}

// wait lets a delivery wait for the rate limit of its task, or for a slot.
func (m *model) wait(e *expected) {
	if e.limit != nil && !e.limit.may(m, e) {
		e.state = stateLimited
		e.limit.line = append(e.limit.line, e)
	} else {
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

func (m *model) check(t *testing.T, r *registry, step string) {
	t.Helper()
	open, delayed := 0, map[*subscription]int{}
	for _, e := range m.all {
		if got := e.delivery.now(); got != e.state {
			t.Fatalf("after %s: delivery %d is %v, the model expects %v", step, receiptOf(e.delivery).tag, got, e.state)
		}
		if e.state.open() {
			open++
		}
		if e.state == stateDelayed || e.state == stateLimited {
			delayed[e.sub]++
		}
	}
	for _, e := range m.all {
		if n := r.delayedOn(e.sub); n != delayed[e.sub] {
			t.Fatalf("after %s: %d delayed, the model expects %d", step, n, delayed[e.sub])
		}
	}
	if len(r.open) != open || r.free != m.free() || r.attempts() != len(m.running) {
		t.Fatalf("after %s: %d open, %d slots free, %d attempts; the model expects %d, %d, %d",
			step, len(r.open), r.free, r.attempts(), open, m.free(), len(m.running))
	}
}

// Random events move deliveries, attempts and slots as a simple model says. In the
// end nothing is left, and the broker was told once about each delivery whose
// connection was not lost.
func TestRegistryMovesAsItsModel(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		random := rand.New(rand.NewPCG(seed, 10))
		slots := 1 + random.IntN(3)
		rt := newRegistryTest(t, slots)
		r := rt.worker.registry
		m := &model{running: map[identity]*expectedAttempt{}, ended: map[identity]bool{}, slots: slots, now: func() time.Time { return rt.now }}
		// Two tasks have rate limits: those whose ids begin with 0 and 1.
		m.limits = map[string]*expectedLimit{"0": {every: 3 * time.Second}, "1": {every: 5 * time.Second}}
		for task, l := range m.limits {
			r.limit(task, l.every)
		}
		pick := func(states ...state) *expected {
			var found []*expected
			for _, e := range m.all {
				if slices.Contains(states, e.state) {
					found = append(found, e)
				}
			}
			if len(found) == 0 {
				return nil
			}
			return found[random.IntN(len(found))]
		}
		endAttempt := func(e *expected, s settlement) {
			a := e.attempt
			actual := a.first.delivery.attempt
			actual.end(s)
			actual.releaseSlot()
			delete(m.running, a.first.task)
			m.ended[a.first.task] = s == settlementAck || a.acknowledged
			for _, e := range m.all {
				if e.attempt == a && (e.state == stateRunning || e.state == stateDelayed) {
					e.state = stateSettled
				}
			}
			m.grant()
		}
		for range 120 {
			var step string
			switch random.IntN(14) {
			case 0, 1, 2:
				step = "a delivery"
				queue := fmt.Sprintf("q%d", random.IntN(2))
				d := rt.deliver(queue, random.IntN(2) == 0)
				if !slices.Contains(m.queues, queue) {
					m.queues = append(m.queues, queue)
				}
				m.place++
				m.all = append(m.all, &expected{delivery: d, state: stateReceived, queue: queue, place: m.place, session: rt.session,
					task: identity{id: fmt.Sprint(random.IntN(6), " ", random.IntN(2))}})
				e := m.all[len(m.all)-1]
				e.limit = m.limits[e.message().Task]
			case 3, 4, 5:
				if e := pick(stateReceived); e != nil {
					step = "reading and waiting"
					found := e.read(e.message(), e.task)
					if m.join(e) != (found != matchNone) {
						t.Fatalf("seed %d: read found %v", seed, found)
					}
					m.grant()
					if found == matchEnded {
						e.tell()
						e.state = stateSettled
					} else if found == matchNone {
						e.wait()
						m.wait(e)
					}
				}
			case 6:
				if e := pick(stateReceived); e != nil {
					step = "a delay"
					found := e.read(e.message(), e.task)
					m.join(e)
					m.grant()
					if found == matchEnded {
						e.tell()
						e.state = stateSettled
					} else if found == matchNone {
						e.delivery.delay()
						e.state = stateDelayed
						m.grant()
					}
				}
			case 7:
				if e := pick(stateDelayed); e != nil && e.attempt == nil {
					step = "the end of a delay"
					e.wait()
					m.place++
					e.place = m.place
					m.wait(e)
				}
			case 8:
				if e := pick(stateReceived); e != nil {
					step = "a refusal"
					e.refuse()
					e.state = stateRefused
					m.grant()
					e.settle(settlementReject)
					e.state = stateSettled
				}
			case 9:
				if e := pick(stateRunning); e != nil && !e.attempt.paused {
					step = "a pause"
					e.attempt.first.delivery.attempt.pause()
					e.attempt.paused, e.attempt.hasSlot = true, false
					for _, other := range m.all {
						if other.attempt == e.attempt && other.state == stateRunning {
							other.state = stateDelayed
						}
					}
					m.grant()
				}
			case 10:
				if e := pick(stateRunning, stateGone, stateSettled); e != nil && e.attempt != nil && m.running[e.task] == e.attempt {
					step = "the end of a task"
					endAttempt(e, []settlement{settlementAck, settlementRequeue}[random.IntN(2)])
				}
			case 11:
				step = "the passing of time"
				rt.now = rt.now.Add(time.Duration(random.IntN(4)) * time.Second)
			case 12:
				if e := pick(stateRunning); e != nil && !e.attempt.paused && e.attempt.hasSlot {
					step = "an early acknowledgement"
					e.attempt.first.delivery.attempt.acknowledge()
					e.attempt.acknowledged = true
					for _, other := range m.all {
						if other.attempt == e.attempt && (other.state == stateRunning || other.state == stateDelayed) {
							other.state = stateSettled
						}
					}
					m.grant()
				}
			case 13:
				if random.IntN(4) == 0 {
					step = "a lost connection"
					old := rt.session
					rt.connect()
					for _, e := range m.all {
						if e.session == old && e.state.open() {
							e.state = stateGone
						}
					}
					m.grant()
				}
			}
			// A delivery whose task has ended while it waited is settled by its own
			// goroutine.
			for _, e := range m.all {
				if e.state == stateSettling {
					e.tell()
					e.state = stateSettled
				}
			}
			m.turns()
			m.check(t, r, fmt.Sprintf("%s (seed %d)", step, seed))
		}
		r.close()
		m.closed = true
		for _, e := range m.all {
			switch {
			case e.attempt == nil && (e.state.waits()):
				e.tell()
				e.state = stateSettled
			case e.state == stateReceived:
				e.read(e.message(), e.task)
				if m.join(e); e.state == stateReceived {
					e.wait()
				}
				if e.attempt == nil {
					e.tell()
					e.state = stateSettled
				}
			}
		}
		for _, a := range m.running {
			endAttempt(a.first, settlementAck)
		}
		m.check(t, r, fmt.Sprintf("the shutdown (seed %d)", seed))
		if len(r.open) != 0 || r.free != slots {
			t.Fatalf("seed %d: %d deliveries are open and %d of %d slots are free", seed, len(r.open), r.free, slots)
		}
		for _, e := range m.all {
			if told := receiptOf(e.delivery).told; (told == "") != (e.state == stateGone) {
				t.Fatalf("seed %d: delivery %d is %v and was %q", seed, receiptOf(e.delivery).tag, e.state, told)
			}
		}
	}
}

package worker

import (
	"container/list"
	"crypto/sha256"
	"slices"
	"sync"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// rememberedOutcomes is how many ended tasks a worker remembers, about 200
// bytes each.
const rememberedOutcomes = 4096

// identity is equal for two deliveries of the same message. A retry has the
// same task id but a higher count of retries.
type identity struct {
	id      string
	retries int
	body    [sha256.Size]byte
}

func identify(m *protocol.Message, body []byte) identity {
	return identity{id: m.ID, retries: m.Retries, body: sha256.Sum256(body)}
}

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

// execution is a task that runs, or whose outcome is being recorded, in this
// process. All its deliveries are settled at its end: when a connection was
// lost meanwhile, the tag of the first delivery is invalid and a later
// delivery has to be acknowledged.
type execution struct {
	identity
	deliveries []*delivery // guarded by executions.mu
	first      *delivery   // the one that started it
}

// settlementOf returns how to settle delivery d when the execution ends with v.
// After Ignore only the first delivery is acknowledged. The handler may have
// stored its message, and an attached delivery may be the copy that was
// published from there, the only one left: it is requeued and runs.
func (e *execution) settlementOf(d *delivery, v settlement) settlement {
	if v == settlementIgnored && d != e.first {
		return settlementRequeue
	}
	return v
}

// executions holds the tasks that run in this process and the settlements of
// those that ended last.
type executions struct {
	mu      sync.Mutex
	running map[identity]*execution
	recent  map[identity]*list.Element
	order   *list.List // of ended, oldest first
	limit   int        // of ended tasks to remember
}

type ended struct {
	identity
	settlement settlement
}

func newExecutions(limit int) executions {
	return executions{
		running: map[identity]*execution{},
		recent:  map[identity]*list.Element{},
		order:   list.New(),
		limit:   limit,
	}
}

// match says which known task a delivery belongs to.
type match int

const (
	// matchNone: its task neither runs here nor is remembered.
	matchNone match = iota
	// matchRunning: its task runs here. The delivery was attached to it and is
	// settled with it.
	matchRunning
	// matchEnded: its task has ended here, and its settlement is remembered.
	matchEnded
)

// attach attaches a delivery to its task if that runs here. A remembered
// outcome is used only for a message that the broker marks as redelivered, or
// for a copy that a worker published in place of one: a producer that sends the
// same task again after its end wants it to run.
func (a *executions) attach(d *delivery, id identity) (match, settlement) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.attachLocked(d, id)
}

func (a *executions) attachLocked(d *delivery, id identity) (match, settlement) {
	if e, ok := a.running[id]; ok {
		// Deliveries of lost connections and those that a copy has replaced need
		// no settlement any more. Dropping them bounds the list.
		e.deliveries = slices.DeleteFunc(e.deliveries, func(d *delivery) bool { return d.session.isLost() || d.settled.Load() })
		e.deliveries = append(e.deliveries, d)
		return matchRunning, 0
	}
	if element, ok := a.recent[id]; ok && d.repeats() {
		a.order.MoveToBack(element)
		return matchEnded, element.Value.(ended).settlement
	}
	return matchNone, 0
}

// begin adds an execution for the delivery's task, unless the task runs here
// already or has ended here.
func (a *executions) begin(d *delivery, id identity) (*execution, match, settlement) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if known, v := a.attachLocked(d, id); known != matchNone {
		return nil, known, v
	}
	e := &execution{identity: id, deliveries: []*delivery{d}, first: d}
	a.running[id] = e
	return e, matchNone, 0
}

// end removes the execution and returns its deliveries. It remembers the
// settlement of a task that was acknowledged or rejected with an outcome. Any
// other settlement also makes it forget an earlier one of an equal message: this
// one comes again, marked as redelivered, and must run.
func (a *executions) end(e *execution, v settlement) []*delivery {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.running, e.identity)
	if old, ok := a.recent[e.identity]; ok {
		a.order.Remove(old)
		delete(a.recent, e.identity)
	}
	if v == settlementAck || v == settlementReject {
		a.recent[e.identity] = a.order.PushBack(ended{e.identity, v})
		if a.order.Len() > a.limit {
			oldest := a.order.Remove(a.order.Front()).(ended)
			delete(a.recent, oldest.identity)
		}
	}
	return e.deliveries
}

// count returns the number of executions.
func (a *executions) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.running)
}

// rememberedRevocations is Celery's REVOKES_MAX.
const rememberedRevocations = 50000

// idSet is a set of the ids that were added last, up to its size.
type idSet struct {
	mu    sync.Mutex
	index map[string]bool
	ring  []string
	next  int
}

func newIDSet(size int) *idSet {
	return &idSet{index: map[string]bool{}, ring: make([]string, 0, size)}
}

func (s *idSet) add(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.index[id] {
		return
	}
	if len(s.ring) < cap(s.ring) {
		s.ring = append(s.ring, id)
	} else {
		delete(s.index, s.ring[s.next])
		s.ring[s.next] = id
		s.next = (s.next + 1) % len(s.ring)
	}
	s.index[id] = true
}

func (s *idSet) has(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.index[id]
}

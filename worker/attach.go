package worker

import (
	"container/list"
	"crypto/sha256"
	"slices"
	"sync"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// recentOutcomes is how many ended tasks are remembered, some 200 bytes each.
const recentOutcomes = 4096

// identity tells whether two deliveries are the same message: a retry has the
// same id, but counts on.
type identity struct {
	id      string
	retries int
	body    [sha256.Size]byte
}

func identify(m *protocol.Message, body []byte) identity {
	return identity{id: m.ID, retries: m.Retries, body: sha256.Sum256(body)}
}

// verdict is what the broker is told about a delivery at its end.
type verdict int

const (
	verdictAck verdict = iota
	verdictReject
	verdictRequeue
	// verdictDrop acknowledges a task without outcome. It is not remembered:
	// its handler may have kept the message to send it again, and that one
	// must not be taken for one that has ended.
	verdictDrop
)

// execution is a task that runs, or is being settled, in this process. All
// deliveries of it are settled together at its end: when the connection was
// lost meanwhile, the first delivery's tag is dead and a later one counts.
type execution struct {
	identity
	deliveries []*delivery // guarded by attachments.mu
	// began is the delivery with which it began.
	began *delivery
}

// verdictOn is what becomes of one of its deliveries when v ends it. Without
// an outcome nothing is known of the others: a handler may have kept the
// message and somebody may have sent it again, so that this is the only copy.
// They go back and are looked at anew.
func (e *execution) verdictOn(d *delivery, v verdict) verdict {
	if v == verdictDrop && d != e.began {
		return verdictRequeue
	}
	return v
}

// attachments knows what runs here and what has just ended.
type attachments struct {
	mu      sync.Mutex
	running map[identity]*execution
	recent  map[identity]*list.Element
	order   *list.List // of ended, oldest first
	most    int
}

type ended struct {
	identity
	verdict verdict
}

func newAttachments(most int) attachments {
	return attachments{
		running: map[identity]*execution{},
		recent:  map[identity]*list.Element{},
		order:   list.New(),
		most:    most,
	}
}

// arrival is what becomes of a delivery.
type arrival int

const (
	// arrivalNew: nothing is known of it.
	arrivalNew arrival = iota
	// arrivalAttached: its task runs here, and it will be settled with it.
	arrivalAttached
	// arrivalEnded: its task has ended here, and the verdict is known.
	arrivalEnded
)

// arrive looks a delivery up, and attaches it if its task runs here. Only a
// message that the broker calls redelivered, or that we have sent in place of
// such a one, is answered from memory: somebody who sends the same task again
// after its end wants it to run.
func (a *attachments) arrive(d *delivery, id identity) (arrival, verdict) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.look(d, id)
}

func (a *attachments) look(d *delivery, id identity) (arrival, verdict) {
	if e, ok := a.running[id]; ok {
		// Those of lost connections are dead, and some have been replaced by a
		// copy: they are not collected.
		e.deliveries = slices.DeleteFunc(e.deliveries, func(d *delivery) bool { return d.session.isLost() || d.settled.Load() })
		e.deliveries = append(e.deliveries, d)
		return arrivalAttached, 0
	}
	if element, ok := a.recent[id]; ok && d.repeats() {
		a.order.MoveToBack(element)
		return arrivalEnded, element.Value.(ended).verdict
	}
	return arrivalNew, 0
}

// begin makes the delivery's task one that runs here, unless it does already
// or has ended.
func (a *attachments) begin(d *delivery, id identity) (*execution, arrival, verdict) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if arrival, v := a.look(d, id); arrival != arrivalNew {
		return nil, arrival, v
	}
	e := &execution{identity: id, deliveries: []*delivery{d}, began: d}
	a.running[id] = e
	return e, arrivalNew, 0
}

// end takes the execution out and returns all its deliveries. The verdict is
// remembered unless the message goes back to its queue or had no outcome.
func (a *attachments) end(e *execution, v verdict) []*delivery {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.running, e.identity)
	if old, ok := a.recent[e.identity]; ok && v != verdictRequeue {
		a.order.Remove(old)
		delete(a.recent, e.identity)
	}
	if v == verdictAck || v == verdictReject {
		a.recent[e.identity] = a.order.PushBack(ended{e.identity, v})
		if a.order.Len() > a.most {
			oldest := a.order.Remove(a.order.Front()).(ended)
			delete(a.recent, oldest.identity)
		}
	}
	return e.deliveries
}

// count is how many tasks run here, those included that are being settled.
func (a *attachments) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.running)
}

// rememberedRevocations is Celery's REVOKES_MAX.
const rememberedRevocations = 50000

// idSet is a set of the last ids that were added.
type idSet struct {
	mu    sync.Mutex
	index map[string]bool
	ring  []string
	next  int
}

func newIDSet(most int) *idSet {
	return &idSet{index: map[string]bool{}, ring: make([]string, 0, most)}
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

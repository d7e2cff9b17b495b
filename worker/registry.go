package worker

import (
	"container/list"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// registry owns every delivery and every attempt of a worker, and the slots. Whatever
// else asks what is unacknowledged, delayed or running, what has just ended, or
// what is revoked, asks it. One mutex guards all of it, and is never locked during
// a call of the broker, the result backend or a handler.
//
// Slots: a free slot goes to the queues in turn, so that a full queue does not keep
// another waiting, and within a queue to the message that the broker delivered
// first. A message that is still being read keeps its place.
type registry struct {
	metrics *workerMetrics
	now     func() time.Time
	// limits are the rate limits of tasks, by name. Written before Run.
	limits map[string]*rateLimit
	// resume gives a parked delivery a goroutine, and does not wait for it. Written before
	// Run.
	resume func(*delivery)
	// handlers counts the deliveries that have a goroutine or are parked. None is added
	// once the registry is closed.
	handlers sync.WaitGroup

	mu       sync.Mutex // guards all below
	open     map[*delivery]struct{}
	running  map[identity]*attempt
	ended    endedTasks
	losses   int                   // how many connections were lost
	returned *recentSet[identity]  // messages that waited when their connection was lost
	revoked  *recentSet[string]    // ids of tasks
	free     int                   // slots
	givenUp  int                   // handlers that the worker no longer waits for; each keeps its slot
	lines    map[string]*list.List // of *delivery, by queue
	queues   []string              // in the order in which they got a line
	last     int                   // the index in queues of the one that got the last slot
	draining bool                  // no task starts any more
	ending   bool                  // no handler is waited for any more
	closed   bool                  // nothing is received any more
}

const (
	// rememberedOutcomes is how many ended tasks a worker remembers, about 120
	// bytes each.
	rememberedOutcomes = 4096
	// rememberedReturns is how many messages a worker remembers that waited when
	// their connection was lost.
	rememberedReturns = 4096
	// rememberedRevocations is Celery's REVOKES_MAX.
	rememberedRevocations = 50000
)

func newRegistry(slots int, metrics *workerMetrics, now func() time.Time) *registry {
	return &registry{
		metrics:  metrics,
		now:      now,
		limits:   map[string]*rateLimit{},
		open:     map[*delivery]struct{}{},
		running:  map[identity]*attempt{},
		ended:    newEndedTasks(rememberedOutcomes),
		returned: newRecentSet[identity](rememberedReturns),
		revoked:  newRecentSet[string](rememberedRevocations),
		free:     slots,
		lines:    map[string]*list.List{},
		last:     -1,
	}
}

// identity is equal for two deliveries of the same message. A retry has the same task id but
// a higher count of retries. A task that replaces this one has the same id and no retries,
// and the same body if the task calls itself again: only its nesting is higher. An identity
// is a hash and has no pointers: the collector need not look at the thousands of them that
// the registry remembers.
type identity [sha256.Size]byte

func identify(m *protocol.Message, body []byte) identity {
	sum := sha256.Sum256(body)
	all := append(make([]byte, 0, 128), sum[:]...) // enough for most, on the stack
	all = binary.BigEndian.AppendUint64(all, uint64(m.Retries))
	all = binary.BigEndian.AppendUint64(all, uint64(m.ReplacedTaskNesting))
	return sha256.Sum256(append(all, m.ID...))
}

// match says which known task a delivery belongs to.
type match int

const (
	// matchNone: its task neither runs here nor is remembered.
	matchNone match = iota
	// matchRunning: its task runs here. The delivery has joined the attempt and is
	// settled with it.
	matchRunning
	// matchEnded: its task has ended here. The delivery is settling alike, and the
	// caller tells the broker.
	matchEnded
)

// join lets a delivery join the attempt of its task if that runs here, and decides
// how it is settled if the task has ended. A remembered outcome is used only for a
// message that the broker marks as redelivered, or for a copy that a worker
// published in place of one: a producer that sends the same task again after its
// end wants it to run. That outcome is forgotten then: if the new message is lost
// with its connection while it waits, it comes back marked as redelivered. It may also
// have waited in another worker, which has requeued it at its shutdown. So the outcome
// is used only if the message of the task can come again, because a connection was lost
// before the broker has surely got its settlement. The caller has locked r.mu.
func (r *registry) join(d *delivery, from state) match {
	if a, ok := r.running[d.id]; ok {
		if a.acknowledged {
			d.match = matchEnded
			d.choose(settlementAck)
			return matchEnded
		}
		// Deliveries that are settled or gone need nothing any more. Dropping them
		// bounds the list.
		a.deliveries = slices.DeleteFunc(a.deliveries, func(d *delivery) bool { return !d.state.open() })
		a.deliveries = append(a.deliveries, d)
		d.attempt, d.message, d.match = a, nil, matchRunning
		if a.paused || a.hasRunning(d) {
			d.move(stateDelayed, from)
		} else {
			d.move(stateRunning, from)
		}
		r.grant()
		return matchRunning
	}
	if !d.repeats() {
		r.ended.forget(d.id)
		return matchNone
	}
	task, ok := r.ended.find(d.id)
	switch {
	case !ok:
		return matchNone
	case task.toldAt == r.losses && !d.isCopy():
		r.ended.forget(d.id) // as above: if it waits, it may come again
		return matchNone
	}
	d.match = matchEnded
	d.choose(task.settlement)
	return matchEnded
}

// grant gives free slots to deliveries in line. The caller has locked r.mu. Every
// move that can make one of them the next calls it.
func (r *registry) grant() {
	for r.free > 0 && !r.draining {
		d := r.next()
		if d == nil {
			return
		}
		if r.join(d, stateWaiting) == matchNone {
			if d.limit != nil {
				d.limit.next = r.now().Add(d.limit.every)
			}
			d.move(stateRunning, stateWaiting)
			a := &attempt{identity: d.id, registry: r, first: d, deliveries: []*delivery{d}, message: d.message, hasSlot: true}
			d.attempt = a
			r.running[d.id] = a
			r.free--
			r.metrics.running.Inc()
		}
		d.wake()
	}
}

// next returns the delivery whose turn it is, or nil.
func (r *registry) next() *delivery {
	for i := range r.queues {
		at := (r.last + 1 + i) % len(r.queues)
		first := r.lines[r.queues[at]].Front()
		if first == nil {
			continue
		}
		if d := first.Value.(*delivery); d.state == stateWaiting {
			r.last = at
			return d
		}
	}
	return nil
}

// limit sets the rate limit of a task.
func (r *registry) limit(task string, every time.Duration) {
	if every > 0 {
		r.limits[task] = &rateLimit{every: every, line: list.New()}
	}
}

// limitOf returns the rate limit of a message's task, or nil.
func (r *registry) limitOf(m *protocol.Message) *rateLimit {
	if m == nil {
		return nil
	}
	return r.limits[m.Task]
}

func (r *registry) joinLine(d *delivery) {
	name := d.sub.queue.Name
	line := r.lines[name]
	if line == nil {
		line = list.New()
		r.lines[name] = line
		r.queues = append(r.queues, name)
	}
	d.place = line.PushBack(d)
}

func (r *registry) leaveLine(d *delivery) {
	r.lines[d.sub.queue.Name].Remove(d.place)
	d.place = nil
}

// drain ends the granting of slots.
func (r *registry) drain() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining = true
}

// close requeues what waits and lets nothing in any more. Attempts continue, and
// handlers becomes zero at their end.
func (r *registry) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.draining, r.closed = true, true
	for d := range r.open {
		if d.attempt == nil && d.state.waits() {
			d.choose(settlementRequeue)
			d.wake()
		}
	}
}

// delayedOn returns how many deliveries of a subscription are delayed.
func (r *registry) delayedOn(sub *subscription) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return sub.delayed
}

// attempts returns how many tasks run or record their outcome.
func (r *registry) attempts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.running)
}

// handlersGivenUp returns how many handlers the worker no longer waits for.
func (r *registry) handlersGivenUp() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.givenUp
}

// wasReturned reports whether the message waited in this process, without having
// begun, when a connection was lost.
func (r *registry) wasReturned(d *delivery) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.returned.has(d.id)
}

func (r *registry) revoke(taskID string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.revoked.add(taskID)
}

func (r *registry) isRevoked(taskID string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.revoked.has(taskID)
}

// unacked returns the messages of all deliveries that have been read and are not
// settled, and the deliveries of those that are kept as bytes.
func (r *registry) unacked() (messages []*protocol.Message, kept []*delivery) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, a := range r.running {
		if a.message != nil && !a.acknowledged {
			messages = append(messages, a.message)
		}
	}
	for d := range r.open {
		switch {
		case d.attempt != nil && (d.attempt.message != nil || d.attempt.first != d):
		case d.message != nil:
			messages = append(messages, d.message)
		case d.id != identity{}:
			kept = append(kept, d)
		}
	}
	return messages, kept
}

// Unacked lists the messages that this worker has received and not yet settled:
// those that wait for a slot or are delayed, those whose tasks run, and those
// whose outcome is being recorded. [Worker.QueueDepth] does not count them. The
// order is arbitrary. Delayed messages are decoded for each call. It is for a page that
// shows what a worker does, as Celery's inspect does with active, reserved and
// scheduled, and for a program that looks for records of its own without a message.
func (w *Worker) Unacked() []*protocol.Message {
	list, kept := w.registry.unacked()
	for _, d := range kept {
		if m, err := d.decode(); err == nil {
			list = append(list, m)
		}
	}
	return list
}

// endedTasks remembers how the tasks were settled that ended last, or that were asked for
// last.
type endedTasks struct {
	settlements map[identity]endedTask
	// ring has the identities in the order of their turns. An older place of an identity
	// that got a later turn means nothing any more.
	ring []identity
	turn int // the number of turns so far
}

type endedTask struct {
	settlement settlement
	turn       int
	// toldAt is registry.losses when the broker was told the settlement. It is unknown for
	// a message that was delivered on a lost connection, and not again since.
	toldAt int
}

// unknown is the toldAt of a message that the broker may deliver again in any case.
const unknown = -1

func newEndedTasks(limit int) endedTasks {
	return endedTasks{settlements: map[identity]endedTask{}, ring: make([]identity, limit)}
}

func (e *endedTasks) find(id identity) (endedTask, bool) {
	task, ok := e.settlements[id]
	if ok {
		e.remember(id, task)
	}
	return task, ok
}

// add remembers the settlement of a task that was acknowledged or rejected with an
// outcome. Any other settlement makes it forget an earlier one of an equal
// message: this one comes again, marked as redelivered, and must run.
func (e *endedTasks) add(id identity, s settlement, toldAt int) {
	if s != settlementAck && s != settlementReject {
		e.forget(id)
		return
	}
	e.remember(id, endedTask{settlement: s, toldAt: toldAt})
}

func (e *endedTasks) forget(id identity) { delete(e.settlements, id) }

// remember gives a task a turn, for which it forgets the one with the oldest.
func (e *endedTasks) remember(id identity, task endedTask) {
	place := &e.ring[e.turn%len(e.ring)]
	if oldest, ok := e.settlements[*place]; ok && oldest.turn == e.turn-len(e.ring) {
		delete(e.settlements, *place)
	}
	task.turn = e.turn
	*place, e.settlements[id] = id, task
	e.turn++
}

// recentSet is a set of the elements that were added last, up to its size.
type recentSet[T comparable] struct {
	index map[T]bool
	ring  []T
	next  int
	size  int
}

func newRecentSet[T comparable](size int) *recentSet[T] {
	return &recentSet[T]{index: map[T]bool{}, size: size}
}

func (s *recentSet[T]) add(element T) {
	if s.index[element] {
		return
	}
	if len(s.ring) < s.size {
		s.ring = append(s.ring, element)
	} else {
		delete(s.index, s.ring[s.next])
		s.ring[s.next] = element
		s.next = (s.next + 1) % s.size
	}
	s.index[element] = true
}

func (s *recentSet[T]) has(element T) bool { return s.index[element] }

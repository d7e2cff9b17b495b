package worker

import (
	"sync"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// messageSet holds the messages of deliveries that are not settled yet.
type messageSet struct {
	mu       sync.Mutex
	messages map[*protocol.Message]struct{}
}

// add puts a message in; the returned function takes it out.
func (s *messageSet) add(m *protocol.Message) (remove func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.messages[m] = struct{}{}
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.messages, m)
	}
}

// Unacked lists the messages that this worker has taken from the broker and
// not yet settled: those that wait for a slot or an ETA, those that run, and
// those whose outcome is being recorded. The broker counts them in no queue.
// The order is arbitrary.
func (w *Worker) Unacked() []*protocol.Message {
	w.inHand.mu.Lock()
	defer w.inHand.mu.Unlock()
	list := make([]*protocol.Message, 0, len(w.inHand.messages))
	for m := range w.inHand.messages {
		list = append(list, m)
	}
	return list
}

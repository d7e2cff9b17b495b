package worker

import (
	"sync"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// messageSet is a set of the messages whose deliveries are not settled yet.
type messageSet struct {
	mu       sync.Mutex
	messages map[*protocol.Message]struct{}
}

// add adds a message until remove is called.
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

// Unacked lists the messages that this worker has received and not yet settled:
// those that wait for a slot or are delayed, those whose tasks run, and those
// whose outcome is being recorded. [Worker.QueueDepth] does not count them. The
// order is arbitrary.
func (w *Worker) Unacked() []*protocol.Message {
	w.unacked.mu.Lock()
	defer w.unacked.mu.Unlock()
	list := make([]*protocol.Message, 0, len(w.unacked.messages))
	for m := range w.unacked.messages {
		list = append(list, m)
	}
	return list
}

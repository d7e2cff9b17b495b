package worker

import (
	"encoding/json"
	"fmt"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Replace is returned as the error of a handler to run another task, or a chain, in the
// place of this one: Celery's Task.replace (docs/celery.md#replacing-a-task). The
// signature is one of package client or of package protocol, or its JSON text.
//
//	return nil, worker.Replace(client.Chain(client.Task("shop.reserve", sku), client.Task("shop.charge")))
//
// What holds then:
//
//   - The replacement, or the last task of a chain, has the id of the replaced task:
//     whoever waits for that gets its result. An id of its own is not used.
//   - Group, callbacks, error callbacks and the later steps of the chain move over.
//   - The worker stores nothing for the replaced task itself and acknowledges it.
//   - A group, or a chain with one, is a chord in Celery. This worker cannot start it: the
//     task fails with NotImplementedError. So it does with an empty chain, or with a task
//     that no queue takes.
func Replace(signature json.Marshaler) error { return replacement{signature} }

type replacement struct{ signature json.Marshaler }

func (r replacement) Error() string { return "replaced by another task" }

// replaceOutcome reads the signature, which the program's code writes.
func replaceOutcome(r replacement) outcome {
	if r.signature == nil {
		return failureOutcome(fmt.Errorf("a task cannot be replaced by nil"))
	}
	text, err := r.signature.MarshalJSON()
	if err != nil {
		return failureOutcome(err)
	}
	signature, err := protocol.ParseSignature(text)
	if err != nil {
		return failureOutcome(fmt.Errorf("a task cannot be replaced: %w", err))
	}
	return outcome{kind: outcomeReplaced, replacement: signature}
}

// recordReplaced publishes the message of a replacement.
func (w *Worker) recordReplaced(m *protocol.Message, s protocol.Signature) (impossible, err error) {
	plan, err := protocol.ReplaceTask(m, s, w.sender())
	if err != nil {
		return err, nil
	}
	messages, err := w.routeFollowUps(plan.FollowUps)
	if err != nil {
		return err, nil
	}
	if err := w.publishAll(m, messages); err != nil {
		return nobodyTakes(err)
	}
	return nil, nil
}

// AddChild records that the handler has sent a task. The result row then lists it as a
// child, before what follows the task, as Celery does. The client of package client
// calls it for what is sent with a handler's context; another client may do the same.
// child is an entry of Celery's list of children: [[id, parent], null] of a task,
// [[id, parent], [members]] of a group.
func (t *Task) AddChild(child json.RawMessage) {
	t.childrenMutex.Lock()
	defer t.childrenMutex.Unlock()
	t.sent = append(t.sent, child)
}

// children returns the entries of all that the task's handler has sent.
func (t *Task) children() []json.RawMessage {
	t.childrenMutex.Lock()
	defer t.childrenMutex.Unlock()
	return slices.Clone(t.sent)
}

// withChildren puts the children that a handler has sent before those of the plan.
func withChildren(sent []json.RawMessage, planned json.RawMessage) json.RawMessage {
	if len(sent) == 0 {
		return planned
	}
	var later []json.RawMessage
	if planned != nil && protocol.DecodeJSON(planned, &later) != nil {
		return planned
	}
	text, err := protocol.EncodeJSON(append(slices.Clone(sent), later...))
	if err != nil {
		return planned // an entry of AddChild is not JSON
	}
	return text
}

// ownChild is the entry of the task itself: a retry is one of its own children.
func ownChild(m *protocol.Message) json.RawMessage {
	text, _ := protocol.EncodeJSON([]any{[]any{m.ID, nil}, nil})
	return text
}

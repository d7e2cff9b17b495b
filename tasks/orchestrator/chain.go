package orchestrator

import (
	"encoding/json"
	"errors"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// ChainMessage makes the message that starts a run, as MoonMind's API does
// (docs/moonmind.md#the-chain): the steps of the plan in its order, and the rollback as
// the error callback of each. Steps that have succeeded before are in it too: the
// worker answers them with their outcome. node is the origin in the message, newID
// makes task ids; nil means random ones.
func ChainMessage(run store.Run, queue, node string, now time.Time, newID func() string) (taskID string, message protocol.Delivery, err error) {
	entries, err := store.ParsePlan(run.Steps)
	if err != nil {
		return "", protocol.Delivery{}, err
	}
	var steps []store.Step
	hasRollback := false
	for _, entry := range entries {
		switch step := store.Step(store.StepName(entry)); {
		case step == store.StepRollback:
			hasRollback = true
		case step.Known():
			steps = append(steps, step)
		}
	}
	if len(steps) == 0 {
		return "", protocol.Delivery{}, errors.New("the plan has no step")
	}
	if newID == nil {
		newID = protocol.NewID
	}
	type object = map[string]any
	signature := func(step store.Step, options object) object {
		return object{"task": TaskExecutePlanStep, "args": []string{run.ID, string(step)}, "kwargs": object{}, "options": options, "subtask_type": nil, "immutable": true}
	}
	options := func() object {
		o := object{"task_id": newID()}
		if hasRollback {
			o["link_error"] = []object{signature(store.StepRollback, object{"queue": queue})}
		}
		return o
	}
	first := options()
	chain := []object{}
	for _, step := range slices.Backward(steps[1:]) {
		chain = append(chain, signature(step, options()))
	}
	first["chain"], first["queue"] = chain, queue
	text, err := json.Marshal(signature(steps[0], first))
	if err != nil {
		return "", protocol.Delivery{}, err
	}
	parsed, err := protocol.ParseSignature(text)
	if err != nil {
		return "", protocol.Delivery{}, err
	}
	published, _, err := parsed.Apply(protocol.ApplyOptions{Origin: node, Now: now})
	if err != nil {
		return "", protocol.Delivery{}, err
	}
	published.Headers["ignore_result"] = false
	published.Headers["argsrepr"] = "('" + run.ID + "', '" + string(steps[0]) + "')" // a tuple, as a producer has it
	published.Properties.Priority = nil
	return published.TaskID, protocol.Delivery{Headers: published.Headers, Properties: published.Properties, Body: published.Body}, nil
}

// Workspace returns the name of a run's workspace, as [store.BeginRequest] has it. root
// is the configured workspace.
func Workspace(queue, root string, run store.Run) string { return workspaceOf(queue, root, run) }

package protocol

import (
	"fmt"
	"slices"
)

// ReplaceTask returns the message that runs a signature in the place of m's task, as
// Celery's Task.replace does (docs/celery.md#replacing-a-task):
//
//   - The replacement, or the last task of a replacing chain, has m's id, group and
//     reply address, so that whoever waits for m gets its result.
//   - It has m's callbacks. m's error callbacks are for every task of the replacement.
//   - The later steps of m's chain follow it, with their ids.
//   - The header replaced_task_nesting of all of them is one more than that of m.
//
// The call has no side effects and may be repeated for the same message; with a nil
// [Sender.NewID] it then returns the same ids. Those of a retry of m, and of a task that
// replaces m, are others. The error is a [*CanvasError]: the signature is an empty chain,
// or it is or contains a chord, or a group, which Celery makes a chord.
func ReplaceTask(m *Message, s Signature, sender Sender) (Plan, error) {
	// A task may replace itself by an equal signature again and again, and what comes before
	// it each time is another task.
	outcome := fmt.Sprintf("replaced %d.%d", m.Retries, m.ReplacedTaskNesting)
	p := planner{m: m, sender: sender, outcome: outcome, sources: [][]Signature{{s}}}
	steps, err := p.flatten(s)
	if err != nil {
		return Plan{}, err
	}
	last := len(steps) - 1
	nesting, err := EncodeJSON(m.ReplacedTaskNesting + 1)
	if err != nil {
		return Plan{}, err
	}
	for i, step := range steps {
		if step.Task == "celery.group" {
			return Plan{}, p.unsupported(step, "a group that replaces a task is a chord; "+chordAdvice)
		}
		if step.Option("chord") != nil {
			return Plan{}, p.unsupported(step, "it is part of a chord; "+chordAdvice)
		}
		set := []Member{{"replaced_task_nesting", nesting}}
		add := func(name string, more []Signature) error {
			if len(more) == 0 {
				return nil
			}
			merged, err := mergeLists(step.Option(name), signaturesJSON(more))
			if err != nil {
				return p.unsupported(step, name+": "+detailOf(err))
			}
			set = append(set, Member{name, merged})
			return nil
		}
		if err := add("link_error", m.Embed.Errbacks); err != nil {
			return Plan{}, err
		}
		switch {
		case i == last:
			if err := add("link", m.Embed.Callbacks); err != nil {
				return Plan{}, err
			}
			set = append(set, Member{"task_id", quoteJSON(m.ID)})
			// Celery loses it, and the caller of an rpc backend waits for ever.
			if m.Properties.ReplyTo != "" {
				set = append(set, Member{"reply_to", quoteJSON(m.Properties.ReplyTo)})
			}
			if m.Group != "" {
				set = append(set, Member{"group_id", quoteJSON(m.Group)})
			}
			if m.GroupIndex != nil {
				index, err := EncodeJSON(*m.GroupIndex)
				if err != nil {
					return Plan{}, err
				}
				set = append(set, Member{"group_index", index})
			}
		case step.TaskID() == "":
			set = append(set, Member{"task_id", quoteJSON(p.newID())})
		}
		if i < last && step.Option("reply_to") == nil {
			set = append(set, Member{"reply_to", quoteJSON(sender.ReplyTo)})
		}
		if steps[i], err = step.WithOptions(set...); err != nil {
			return Plan{}, p.unsupported(step, detailOf(err))
		}
	}
	var rest []Signature
	if s.Task == "celery.chain" || len(m.Embed.Chain) > 0 {
		rest = []Signature{} // a chain, of which this may be the last step
	}
	for _, step := range m.Embed.Chain {
		step, err := step.WithOptions(Member{"replaced_task_nesting", nesting})
		if err != nil {
			return Plan{}, p.unsupported(step, detailOf(err))
		}
		rest = append(rest, step)
	}
	for _, step := range slices.Backward(steps[1:]) {
		rest = append(rest, step)
	}
	// The arguments are given as those of a call, which argsrepr shows as a tuple.
	first, err := p.lead(s, steps[0])
	if err != nil {
		return Plan{}, err
	}
	p.args = first.Args
	if _, err := p.apply(NewSignature(first.Task, nil, first.Kwargs, first.Options...), ApplyOptions{Chain: rest}); err != nil {
		return Plan{}, err
	}
	return Plan{FollowUps: p.followUps}, nil
}

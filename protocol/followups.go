package protocol

import (
	"crypto/sha1"
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Sender is the worker that publishes follow-ups.
type Sender struct {
	// ReplyTo is the worker's own reply address, for signatures without one.
	ReplyTo string
	// Origin is "gen<pid>@<host>".
	Origin string
	// NewID makes ids for tasks and groups that come without one. Nil makes
	// UUIDs of version 5 from the id of the task, its outcome, and the
	// signatures that follow: the same each time, so that whoever publishes
	// again after a crash publishes the same. Celery draws them.
	NewID func() string
	// Now is the moment from which countdown and expires count; zero is now.
	Now time.Time
	// InheritPriority gives follow-ups of a success the priority of their
	// predecessor (Celery's task_inherit_parent_priority).
	InheritPriority bool
}

// FollowUp is a message to send and what its signature says of the way.
// The worker's routes fill Exchange and RoutingKey of the Publishing.
type FollowUp struct {
	Publishing  Publishing
	Destination Destination
}

// Plan is what follows the outcome of a task, in the order of publishing.
type Plan struct {
	FollowUps []FollowUp
	// Children is for Result.Children; nil when nothing follows.
	Children json.RawMessage
}

// AfterSuccess lists callbacks and the next chain step of a task that
// returned value; nil is None (docs/celery.md#after-success). It changes
// nothing and may be called again. The error is a *CanvasError.
func AfterSuccess(m *Message, value json.RawMessage, s Sender) (Plan, error) {
	if value == nil {
		value = json.RawMessage("null")
	}
	p := planner{m: m, sender: s, args: []json.RawMessage{value}, seed: seedOf(m.ID, "success", m.Embed.Callbacks, m.Embed.Chain)}
	if s.InheritPriority {
		p.priority = m.Properties.Priority
	}
	if err := p.callbacks(m.Embed.Callbacks); err != nil {
		return Plan{}, err
	}
	if n := len(m.Embed.Chain); n > 0 {
		// The rest must not be nil, or the last step would not know that it
		// was one of a chain.
		rest := append([]Signature{}, m.Embed.Chain[:n-1]...)
		child, err := p.step(m.Embed.Chain[n-1], rest)
		if err != nil {
			return Plan{}, err
		}
		p.children = append(p.children, child)
	}
	return p.plan(), nil
}

// AfterFailure lists the error callbacks of a task, as one ad-hoc group
// (docs/celery.md#error-callbacks): each is sent as a task, with the failed
// task's id as first argument unless it is immutable. A Python errback of the
// new style, which wants (request, exc, traceback), gets the id alone and
// fails. The error is a *CanvasError.
func AfterFailure(m *Message, s Sender) (Plan, error) {
	p := planner{m: m, sender: s, args: []json.RawMessage{quoteJSON(m.ID)}, seed: seedOf(m.ID, "failure", m.Embed.Errbacks)}
	if len(m.Embed.Errbacks) > 0 {
		if _, err := p.group(m.Embed.Errbacks, "", nil); err != nil {
			return Plan{}, err
		}
	}
	return p.plan(), nil
}

// A planner collects the follow-ups of one task.
type planner struct {
	m        *Message
	sender   Sender
	args     []json.RawMessage
	priority *uint8

	followUps []FollowUp
	children  []json.RawMessage
	// nesting counts the chains and groups that enclose the one at hand.
	nesting int
	// seed is from what ids are made, and made counts them.
	seed []byte
	made int
}

// seedOf is a digest of what makes one outcome of one task.
func seedOf(taskID, outcome string, follow ...[]Signature) []byte {
	h := sha1.New() // as version 5 of UUID wants it; nobody gains by a collision
	fmt.Fprintf(h, "%q %s", taskID, outcome)
	for _, sigs := range follow {
		for _, s := range sigs {
			fmt.Fprintf(h, " %q", s.raw)
		}
	}
	return h.Sum(nil)
}

// newID makes the next id.
func (p *planner) newID() string {
	if p.sender.NewID != nil {
		return p.sender.NewID()
	}
	p.made++
	return derivedUUID(fmt.Appendf(nil, "%x %d", p.seed, p.made))
}

func (p *planner) plan() Plan {
	plan := Plan{FollowUps: p.followUps}
	if len(p.children) > 0 {
		plan.Children = joinArray(p.children)
	}
	return plan
}

// callbacks applies one alone as it is; of several, the groups one by one and
// then all others together as an ad-hoc group.
func (p *planner) callbacks(sigs []Signature) error {
	if len(sigs) == 1 {
		child, err := p.step(sigs[0], nil)
		if err == nil {
			p.children = append(p.children, child)
		}
		return err
	}
	var plain []Signature
	for _, s := range sigs {
		if s.Task != "celery.group" {
			plain = append(plain, s)
			continue
		}
		child, err := p.step(s, nil)
		if err != nil {
			return err
		}
		p.children = append(p.children, child)
	}
	if len(plain) == 0 {
		return nil
	}
	child, err := p.group(plain, "", nil)
	if err == nil {
		p.children = append(p.children, child)
	}
	return err
}

// step applies one signature; rest is the chain behind it. It returns its
// entry in the list of children.
func (p *planner) step(s Signature, rest []Signature) (json.RawMessage, error) {
	steps, err := p.flatten(s)
	if err != nil {
		return nil, err
	}
	if len(steps) > 1 {
		behind := slices.Clone(steps[1:])
		slices.Reverse(behind)
		rest = append(append([]Signature{}, rest...), behind...)
	}
	if steps[0].Task != "celery.group" {
		return p.apply(steps[0], ApplyOptions{Chain: rest})
	}
	if len(rest) > 0 {
		return nil, p.unsupported(steps[0], "a group with a task behind it is a chord; "+chordAdvice)
	}
	tasks, err := p.tasksOf(steps[0])
	if err != nil {
		return nil, err
	}
	return p.group(tasks, steps[0].TaskID(), rest)
}

// group applies signatures as one group; no id makes a new one. Members of a
// group that ends a chain get an empty rest of it, like any last step.
func (p *planner) group(sigs []Signature, id string, rest []Signature) (json.RawMessage, error) {
	if id == "" {
		id = p.newID()
	}
	var results []json.RawMessage
	if err := p.members(sigs, id, rest, &results); err != nil {
		return nil, err
	}
	return groupChild(id, results), nil
}

// members applies the members of a group. Groups inside of it dissolve, and
// their members are counted on their own, as Celery does.
func (p *planner) members(sigs []Signature, id string, rest []Signature, results *[]json.RawMessage) error {
	if len(sigs) == 0 {
		return nil
	}
	if p.nesting++; p.nesting > maxNesting {
		return p.unsupported(sigs[0], "nested too deeply")
	}
	defer func() { p.nesting-- }()
	for i, s := range sigs {
		if s.Task == "celery.group" {
			tasks, err := p.tasksOf(s)
			if err == nil {
				err = p.members(tasks, id, rest, results)
			}
			if err != nil {
				return err
			}
			continue
		}
		steps, err := p.flatten(s)
		if err != nil {
			return err
		}
		options := ApplyOptions{Group: id, GroupIndex: &i, Chain: rest}
		if len(steps) > 1 {
			// Of a chain the last step is the member.
			last, err := p.joinGroup(steps[len(steps)-1], id, i)
			if err != nil {
				return err
			}
			behind := append([]Signature{last}, steps[1:len(steps)-1]...)
			slices.Reverse(behind[1:])
			options = ApplyOptions{Chain: behind}
		}
		child, err := p.apply(steps[0], options)
		if err != nil {
			return err
		}
		*results = append(*results, child)
	}
	return nil
}

// joinGroup writes a group into a signature's options.
func (p *planner) joinGroup(s Signature, id string, index int) (Signature, error) {
	if s.Option("group_id") != nil {
		return s, nil
	}
	text, _ := EncodeJSON(index)
	joined, err := s.WithOptions(Member{"group_id", quoteJSON(id)}, Member{"group_index", text})
	if err != nil {
		return s, p.unsupported(s, detailOf(err))
	}
	return joined, nil
}

// apply makes the message of one task.
func (p *planner) apply(s Signature, o ApplyOptions) (json.RawMessage, error) {
	if s.Option("chord") != nil {
		return nil, p.unsupported(s, "it is part of a chord; "+chordAdvice)
	}
	if s.Task == "celery.group" || s.Task == "celery.chain" || s.Task == "celery.chord" {
		return nil, p.unsupported(s, "it stands where only a task can")
	}
	o.Args, o.ParentID, o.RootID = p.args, p.m.ID, first(p.m.RootID, p.m.ID)
	o.ReplyTo, o.Origin, o.Now, o.NewID = p.sender.ReplyTo, p.sender.Origin, p.sender.Now, p.newID
	o.Priority = p.priority
	publishing, destination, err := s.Apply(o)
	if err != nil {
		return nil, p.unsupported(s, detailOf(err))
	}
	p.followUps = append(p.followUps, FollowUp{Publishing: publishing, Destination: destination})
	return taskChild(publishing.TaskID), nil
}

// taskChild is a task in the list of children: [[id, parent], children].
func taskChild(id string) json.RawMessage {
	null := json.RawMessage("null")
	return joinArray([]json.RawMessage{joinArray([]json.RawMessage{quoteJSON(id), null}), null})
}

// groupChild is a group there: [[id, parent], results].
func groupChild(id string, results []json.RawMessage) json.RawMessage {
	null := json.RawMessage("null")
	return joinArray([]json.RawMessage{joinArray([]json.RawMessage{quoteJSON(id), null}), joinArray(results)})
}

// mergeLists joins two options that are arrays of signatures or one alone.
// What is in both is taken once.
func mergeLists(a, b json.RawMessage) (json.RawMessage, error) {
	var all []json.RawMessage
	for _, text := range []json.RawMessage{a, b} {
		if text == nil {
			continue
		}
		sigs, err := parseSignatures(text)
		if err != nil {
			return nil, err
		}
		for _, s := range sigs {
			if !slices.ContainsFunc(all, func(t json.RawMessage) bool { return string(t) == string(s.raw) }) {
				all = append(all, s.raw)
			}
		}
	}
	return joinArray(all), nil
}

// LaterStep is a chain step that will never run because an earlier one has
// failed. Its row is FAILURE with the failed task's exception and traceback,
// worker and queue NULL and retries 0 (docs/celery.md#after-failure).
type LaterStep struct {
	TaskID string
	Task   string
	Args   json.RawMessage
	Kwargs json.RawMessage
}

// LaterSteps lists the steps behind m in the order in which Celery stores
// them: the last one first, and what stands inside of a step after everything
// else: the body of a chord, on which clients wait, and, other than Celery on a
// database, the members of a group or chain. Steps without a preset id are
// left out.
func LaterSteps(m *Message) []LaterStep {
	var steps []LaterStep
	level := m.Embed.Chain
	for range maxNesting {
		var inside []Signature
		for _, s := range level {
			if id := s.TaskID(); id != "" {
				steps = append(steps, LaterStep{TaskID: id, Task: s.Task, Args: s.rawArgs, Kwargs: s.rawKwargs})
			}
			inside = append(inside, insideOf(s)...)
		}
		level = inside
	}
	return steps
}

// insideOf gives the signatures in a complex one that hold results of their
// own. What cannot be read holds none.
func insideOf(s Signature) []Signature {
	name := map[string]string{"celery.chord": "body", "celery.group": "tasks", "celery.chain": "tasks"}[s.Task]
	text := s.Kwargs.Get(name)
	if name == "" || text == nil {
		return nil
	}
	sigs, err := parseSignatures(text)
	if err != nil {
		return nil
	}
	return sigs
}

package protocol

import (
	"cmp"
	"crypto/sha1"
	"encoding/json"
	"fmt"
	"slices"
	"time"
)

// Sender describes the worker that publishes follow-ups.
type Sender struct {
	// ReplyTo is the worker's own reply address, used for signatures without
	// one.
	ReplyTo string
	// Origin is "gen<pid>@<host>", the value of the header origin.
	Origin string
	// NewID makes ids for tasks and groups that have none. Defaults to UUIDs
	// of version 5, derived from the id of the task, its outcome and the
	// signatures that follow it. A worker that publishes again after a crash
	// therefore uses the same ids. (Celery uses random ids.)
	NewID func() string
	// Now is the time from which countdown and expires count. Defaults to the
	// current time.
	Now time.Time
	// InheritPriority copies the task's priority to the follow-ups of a
	// success, as Celery's setting task_inherit_parent_priority does.
	InheritPriority bool
	// Prepare is [ApplyOptions.Prepare] for every follow-up. It must give the same
	// each time. AfterSuccess is also called with a nil value, before the task has
	// returned one.
	Prepare func(s Signature, args []json.RawMessage) (Prepared, error)
}

// FollowUp is a message to publish, and the destination that its signature
// asks for. The worker's routes fill in Exchange and RoutingKey.
type FollowUp struct {
	Publishing  Publishing
	Destination Destination
	// Queue is the queue that Sender.Prepare has chosen, for a signature that asks
	// for no destination. Empty means that the worker's routes decide.
	Queue string
}

// Plan lists the messages to publish after a task, in the order of publishing.
type Plan struct {
	FollowUps []FollowUp
	// Callbacks is how many of FollowUps, the first ones, are callbacks of a success. The
	// others begin the next step of the chain.
	Callbacks int
	// Children is the value for [Result.Children]; nil without follow-ups.
	Children json.RawMessage
}

// AfterSuccess returns the callbacks and the next chain step of a task that
// returned value (docs/celery.md#after-success). A nil value is None. The call
// has no side effects and may be repeated; with a nil [Sender.NewID] it then
// returns the same ids. The error is a [*CanvasError].
func AfterSuccess(m *Message, value json.RawMessage, s Sender) (Plan, error) {
	if len(m.Embed.Callbacks) == 0 && len(m.Embed.Chain) == 0 {
		return Plan{}, nil
	}
	if value == nil {
		value = json.RawMessage("null")
	}
	p := planner{m: m, sender: s, args: []json.RawMessage{value}, outcome: outcomeSuccess, sources: [][]Signature{m.Embed.Callbacks, m.Embed.Chain}}
	if s.InheritPriority {
		p.priority = m.Properties.Priority
	}
	if err := p.callbacks(m.Embed.Callbacks); err != nil {
		return Plan{}, err
	}
	callbacks := len(p.followUps)
	if n := len(m.Embed.Chain); n > 0 {
		// The rest must not be nil: an empty array on the wire marks the last
		// step of a chain, null a task without a chain.
		rest := append([]Signature{}, m.Embed.Chain[:n-1]...)
		child, err := p.step(m.Embed.Chain[n-1], rest)
		if err != nil {
			return Plan{}, err
		}
		p.children = append(p.children, child)
	}
	plan := p.plan()
	plan.Callbacks = callbacks
	return plan, nil
}

// AfterFailure returns the error callbacks of a task, as one ad-hoc group
// (docs/celery.md#error-callbacks). Each is sent as a task, with the failed
// task's id as first argument unless the signature is immutable. A Python
// errback of the new style, which takes (request, exc, traceback), receives
// the id alone and fails. The error is a [*CanvasError].
func AfterFailure(m *Message, s Sender) (Plan, error) {
	if len(m.Embed.Errbacks) == 0 {
		return Plan{}, nil
	}
	p := planner{m: m, sender: s, args: []json.RawMessage{quoteJSON(m.ID)}, outcome: "failure", sources: [][]Signature{m.Embed.Errbacks}}
	if _, err := p.adHocGroup(m.Embed.Errbacks); err != nil {
		return Plan{}, err
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
	// nesting counts the chains and groups around the current one.
	nesting int
	// outcome and sources, the signatures that are applied, are what new ids are
	// derived from, besides the task's id. seed is made of them for the first new id:
	// producers give ids to nearly all signatures. made counts the new ids.
	outcome string
	sources [][]Signature
	seed    []byte
	made    int
}

// outcomeSuccess is the outcome of a task that has returned.
const outcomeSuccess = "success"

// seedOf returns a digest of a task's id, its outcome and its follow-ups.
func seedOf(taskID, outcome string, followUps [][]Signature) []byte {
	h := sha1.New() // what UUID version 5 uses; the ids need no protection against deliberate collisions
	fmt.Fprintf(h, "%q %s", taskID, outcome)
	for _, sigs := range followUps {
		for _, s := range sigs {
			fmt.Fprintf(h, " %q", s.raw)
		}
	}
	return h.Sum(nil)
}

// newID returns the next id.
func (p *planner) newID() string {
	if p.sender.NewID != nil {
		return p.sender.NewID()
	}
	if p.seed == nil {
		p.seed = seedOf(p.m.ID, p.outcome, p.sources)
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

// callbacks applies a single callback directly. Of several, it applies each
// group by itself, and then all others together as one ad-hoc group, as Celery
// does.
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
	child, err := p.adHocGroup(plain)
	if err == nil {
		p.children = append(p.children, child)
	}
	return err
}

// step applies one signature; rest is the chain after it. It returns the
// signature's entry in the list of children.
func (p *planner) step(s Signature, rest []Signature) (json.RawMessage, error) {
	steps, err := p.flatten(s)
	if err != nil {
		return nil, err
	}
	if len(steps) > 1 {
		later := slices.Clone(steps[1:])
		slices.Reverse(later)
		rest = append(append([]Signature{}, rest...), later...)
	}
	first, err := p.lead(s, steps[0])
	if err != nil {
		return nil, err
	}
	if s.Task == "celery.chain" && rest == nil {
		rest = []Signature{} // it is the last step of a chain
	}
	if first.Task != "celery.group" {
		return p.apply(first, ApplyOptions{Chain: rest})
	}
	if len(rest) > 0 {
		return nil, p.unsupported(first, "a group followed by a task is a chord; "+chordAdvice)
	}
	return p.group(first, rest)
}

// lead returns the first step of s with the options that a celery.chain has for it.
func (p *planner) lead(s, first Signature) (Signature, error) {
	if s.Task != "celery.chain" {
		return first, nil
	}
	options, err := p.optionsForTasks(s)
	if err != nil {
		return first, err
	}
	return p.handOver(options, first)
}

// group applies a celery.group, with a new id if it has none. Its options are for each
// of its tasks. In a group that ends a chain the members get an empty rest, like any last
// step.
func (p *planner) group(s Signature, rest []Signature) (json.RawMessage, error) {
	tasks, err := p.tasksOf(s)
	if err != nil {
		return nil, err
	}
	options, err := p.optionsForTasks(s)
	if err != nil {
		return nil, err
	}
	return p.applyGroup(groupCall{id: s.TaskID(), rest: rest, options: options}, tasks)
}

// adHocGroup applies signatures as one group that is made for them.
func (p *planner) adHocGroup(sigs []Signature) (json.RawMessage, error) {
	return p.applyGroup(groupCall{}, sigs)
}

// groupCall is what the members of one group have in common, and their results.
type groupCall struct {
	id      string
	rest    []Signature
	options Object
	results []json.RawMessage
}

func (p *planner) applyGroup(g groupCall, sigs []Signature) (json.RawMessage, error) {
	if g.id == "" {
		g.id = p.newID()
	}
	if err := p.members(sigs, &g); err != nil {
		return nil, err
	}
	return groupChild(g.id, g.results), nil
}

// members applies the members of a group. The members of a nested group become members
// of this group and are numbered from 0 again, as in Celery, which drops the nested
// group's options.
func (p *planner) members(sigs []Signature, g *groupCall) error {
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
				err = p.members(tasks, g)
			}
			if err != nil {
				return err
			}
			continue
		}
		s, err := p.handOver(g.options, s)
		if err != nil {
			return err
		}
		steps, err := p.flatten(s)
		if err != nil {
			return err
		}
		options := ApplyOptions{Group: g.id, GroupIndex: &i, Chain: g.rest}
		if len(steps) > 1 {
			// The last step of a chain is the member of the group.
			last, err := p.joinGroup(steps[len(steps)-1], g.id, i)
			if err != nil {
				return err
			}
			later := append([]Signature{last}, steps[1:len(steps)-1]...)
			slices.Reverse(later[1:])
			options = ApplyOptions{Chain: later}
		}
		first, err := p.lead(s, steps[0])
		if err != nil {
			return err
		}
		child, err := p.apply(first, options)
		if err != nil {
			return err
		}
		if len(steps) > 1 {
			child = chainResult(steps, child)
		}
		g.results = append(g.results, child)
	}
	return nil
}

// joinGroup sets the group in a signature's options, unless it has one.
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
		return nil, p.unsupported(s, "only a task can be used here")
	}
	o.Args, o.ParentID, o.RootID = p.args, p.m.ID, cmp.Or(p.m.RootID, p.m.ID)
	o.ReplyTo, o.Origin, o.Now, o.NewID = p.sender.ReplyTo, p.sender.Origin, p.sender.Now, p.newID
	o.Priority = p.priority
	queue := ""
	if prepare := p.sender.Prepare; prepare != nil {
		o.Prepare = func(s Signature, args []json.RawMessage) (Prepared, error) {
			prepared, err := prepare(s, args)
			queue = prepared.Queue
			return prepared, err
		}
	}
	publishing, destination, err := s.Apply(o)
	if err != nil {
		return nil, p.unsupported(s, detailOf(err))
	}
	p.followUps = append(p.followUps, FollowUp{Publishing: publishing, Destination: destination, Queue: queue})
	return taskChild(publishing.TaskID), nil
}

// taskChild returns a task's entry in the list of children:
// [[id, parent], children].
func taskChild(id string) json.RawMessage {
	null := json.RawMessage("null")
	return joinArray([]json.RawMessage{joinArray([]json.RawMessage{quoteJSON(id), null}), null})
}

// chainResult returns the entry of a chain among the results of a group: that of its
// last step, whose parents are the steps before it. first is the entry of its first step,
// which stands for a chain that ends with a group: the ids of that group's tasks may not
// exist yet.
func chainResult(steps []Signature, first json.RawMessage) json.RawMessage {
	if steps[len(steps)-1].Task == "celery.group" {
		return first
	}
	if len(steps) > maxParents {
		steps = steps[len(steps)-maxParents:]
	}
	null := json.RawMessage("null")
	entry := null
	for _, step := range steps {
		entry = joinArray([]json.RawMessage{joinArray([]json.RawMessage{quoteJSON(step.TaskID()), entry}), null})
	}
	return entry
}

// maxParents bounds how deeply chainResult nests: readers refuse JSON of some hundred
// levels, and with it the whole row.
const maxParents = 100

// groupChild returns a group's entry in the list of children:
// [[id, parent], results].
func groupChild(id string, results []json.RawMessage) json.RawMessage {
	null := json.RawMessage("null")
	return joinArray([]json.RawMessage{joinArray([]json.RawMessage{quoteJSON(id), null}), joinArray(results)})
}

// mergeLists concatenates two options, each an array of signatures or a single
// one, without duplicates.
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

// LaterStep is a chain step that will never run because an earlier step has
// failed. Its result row is FAILURE with the failed task's exception and
// traceback, worker and queue NULL and retries 0
// (docs/celery.md#after-failure).
type LaterStep struct {
	// TaskID is the step's preset id, Task its name.
	TaskID string
	Task   string
	// Args and Kwargs are the signature's own arguments as JSON text.
	Args   json.RawMessage
	Kwargs json.RawMessage
	// ReplyTo, Group and ParentID are those of the signature's options, or "". RootID is
	// likewise, or else the failed task's.
	ReplyTo, RootID, ParentID, Group string
}

// LaterSteps lists the steps after m in the order in which Celery stores their
// results: the last step first. Then come the body of the chord that m is part of, and
// signatures nested in a step: the body of a chord, whose result clients wait for, and the
// members of a group or chain, which Celery's database backend leaves out. Steps
// without a preset id are omitted, since no client can wait for them.
func LaterSteps(m *Message) []LaterStep {
	var steps []LaterStep
	level := m.Embed.Chain
	if m.Embed.Chord != nil {
		level = append(slices.Clone(level), *m.Embed.Chord)
	}
	for range maxNesting {
		var inside []Signature
		for _, s := range level {
			if id := s.TaskID(); id != "" {
				option := func(name string) string { return textOf(s.Option(name)) }
				steps = append(steps, LaterStep{
					TaskID: id, Task: s.Task, Args: s.rawArgs, Kwargs: s.rawKwargs,
					ReplyTo: option("reply_to"), ParentID: option("parent_id"), Group: option("group_id"),
					RootID: cmp.Or(option("root_id"), m.RootID, m.ID),
				})
			}
			inside = append(inside, nestedIn(s)...)
		}
		level = inside
	}
	return steps
}

// nestedIn returns the signatures nested in a chord, group or chain that have
// results of their own, and the body of the chord that s is part of; none if they cannot
// be parsed.
func nestedIn(s Signature) []Signature {
	var nested []Signature
	name := map[string]string{"celery.chord": "body", "celery.group": "tasks", "celery.chain": "tasks"}[s.Task]
	for _, text := range []json.RawMessage{s.Kwargs.Get(name), s.Option("chord")} {
		if text == nil {
			continue
		}
		if sigs, err := parseSignatures(text); err == nil {
			nested = append(nested, sigs...)
		}
	}
	return nested
}

package client

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// plan is what a Send publishes, and the result that it returns.
type plan struct {
	messages []message
	result   *Result
	started  *Result // of what is sent itself: the first task of a chain
}

type message struct {
	publishing  protocol.Publishing
	destination protocol.Destination
}

// planner makes the messages of one Send.
type planner struct {
	client *Client
	// parent and root are those of the task whose handler sends, or "".
	parent, root string
	sendOptions  func(task string) (queue string, expireAfter time.Duration)
	messages     []message
	started      *Result
}

// member is the place of a task in a group.
type member struct {
	group string
	index int
}

func (c *Client) plan(ctx context.Context, s Signature, call []Option) (plan, error) {
	given := options{}.with(call)
	s.fail(given.err)
	if err := s.problem(); err != nil {
		return plan{}, invalid("%w", err)
	}
	if err := checkGroups(s); err != nil {
		return plan{}, err
	}
	p := planner{client: c}
	if task := worker.TaskFromContext(ctx); task != nil {
		p.parent, p.root, p.sendOptions = task.ID, task.RootID, task.SendOptions
		if p.root == "" {
			p.root = task.ID
		}
	}
	if s.kind != kindTask && len(given.stamps) > 0 {
		for _, stamp := range given.stamps {
			s.options.stamps = set(s.options.stamps, stamp.Key, stamp.Value)
		}
		given.stamps = nil
	}
	result, err := p.send(s.inherit(), given, nil)
	return plan{p.messages, result, p.started}, err
}

// send adds the messages that start a signature. of is its place in a group, or nil.
func (p *planner) send(s Signature, call options, of *member) (*Result, error) {
	switch s.kind {
	case kindChain:
		return p.sendChain(s, call, of)
	case kindGroup:
		return p.sendGroup(s, call)
	}
	result := p.freeze(&s, call.textOf("task_id"), of)
	p.start(result)
	return result, p.publish(s, call.without("task_id"), nil)
}

// checkGroups refuses a group that another task follows.
func checkGroups(s Signature) error {
	parts := s.parts
	if s.kind == kindChain {
		parts = flatten(s.parts, kindChain)
	}
	for i, part := range parts {
		if s.kind == kindChain && part.kind == kindGroup && i < len(parts)-1 {
			return invalid("a group that another task follows is a chord, which this package cannot send: task %d of a chain of %d is a group", i+1, len(parts))
		}
		if err := checkGroups(part); err != nil {
			return err
		}
	}
	return nil
}

// start records what is sent first: members of a group do not count.
func (p *planner) start(r *Result) {
	if p.started == nil {
		p.started = r
	}
}

// freeze gives a task its id and the address of its result, as Python's freeze does,
// and returns its result. id is used unless the task has one.
func (p *planner) freeze(s *Signature, id string, of *member) *Result {
	if own := s.options.textOf("task_id"); own != "" && id == "" {
		id = own
	}
	if id == "" {
		id = protocol.NewID()
	}
	set := func(name string, value any) { s.options.put(option{name: name, value: encode(value)}) }
	s.options = s.options.with(nil)
	set("task_id", id)
	if s.options.value("reply_to") == nil {
		set("reply_to", p.client.replyTo)
	}
	if of != nil {
		if of.group != "" && s.options.value("group_id") == nil {
			set("group_id", of.group)
		}
		set("group_index", of.index)
	}
	return &Result{ID: id, client: p.client}
}

// sendChain sends the first task of a chain. All others stand in its message.
func (p *planner) sendChain(s Signature, call options, of *member) (*Result, error) {
	call = call.over(s.options)
	steps := flatten(s.parts, kindChain)
	last := len(steps) - 1
	callbacks, errbacks := call.list("link"), call.list("link_error")
	id := call.textOf("task_id")
	call = call.without("link").without("link_error").without("task_id")

	var previous *Result
	for i := range steps {
		place, preset := (*member)(nil), ""
		if i == last {
			place, preset = of, id
		}
		var result *Result
		if steps[i].kind == kindGroup {
			if len(callbacks) > 0 {
				return nil, invalid("a group cannot have callbacks: link them to its tasks")
			}
			if last == 0 {
				if preset != "" {
					call.put(option{name: "task_id", value: encode(preset)})
				}
				return p.sendGroup(steps[i], call.add("link_error", errbacks))
			}
			result = p.freezeGroup(&steps[i], preset, nil, errbacks)
		} else {
			result = p.freeze(&steps[i], preset, place)
			steps[i].options = steps[i].options.add("link_error", errbacks)
			if i == last {
				steps[i].options = steps[i].options.add("link", callbacks)
			}
		}
		result.Parent = previous
		previous = result
	}
	rest := []protocol.Signature{}
	for _, step := range slices.Backward(steps[1:]) {
		parsed, err := protocol.ParseSignature(step.text())
		if err != nil {
			return nil, err
		}
		rest = append(rest, parsed)
	}
	p.start(&Result{ID: steps[0].options.textOf("task_id")})
	return previous, p.publish(steps[0], call, rest)
}

// flatten returns the parts with those of nested chains or groups in their place.
func flatten(parts []Signature, of kind) []Signature {
	var flat []Signature
	for _, part := range parts {
		switch {
		case part.kind == of, part.kind == kindGroup && len(part.parts) == 1:
			// Celery unrolls a group of one task, too.
			flat = append(flat, flatten(part.parts, of)...)
		default:
			flat = append(flat, part)
		}
	}
	return flat
}

// freezeGroup gives the tasks of a group at a chain's end their ids. of is the place of
// that chain in a group, or nil.
func (p *planner) freezeGroup(s *Signature, id string, of *member, errbacks []Signature) *Result {
	if id == "" {
		id = protocol.NewID()
	}
	s.options = s.options.with(nil)
	s.options.put(option{name: "task_id", value: encode(id)})
	if of != nil {
		s.options.put(option{name: "group_index", value: encode(of.index)})
	}
	null := json.RawMessage("null")
	s.options.put(option{name: "root_id", value: null})
	s.options.put(option{name: "parent_id", value: null})
	result := &Result{ID: id, client: p.client, group: true}
	s.parts = flatten(s.parts, kindGroup)
	for i := range s.parts {
		part := p.freezePart(&s.parts[i], "", &member{index: i}, errbacks)
		result.Members = append(result.Members, part)
	}
	return result
}

// freezePart freezes a member of a group, which may be a chain, or a step of such a chain.
func (p *planner) freezePart(s *Signature, id string, of *member, errbacks []Signature) *Result {
	switch s.kind {
	case kindTask:
		result := p.freeze(s, id, of)
		s.options = s.options.add("link_error", errbacks)
		return result
	case kindGroup:
		return p.freezeGroup(s, id, of, errbacks)
	}
	s.parts = flatten(s.parts, kindChain)
	var previous *Result
	for i := range s.parts {
		place, preset := (*member)(nil), ""
		if i == len(s.parts)-1 {
			place, preset = of, s.options.textOf("task_id")
		}
		result := p.freezePart(&s.parts[i], preset, place, nil)
		result.Parent = previous
		previous = result
	}
	// Workers give both to its tasks.
	s.options = s.options.with(nil)
	s.options.put(option{name: "task_id", value: encode(previous.ID)})
	s.options = s.options.add("link_error", errbacks)
	return previous
}

// sendGroup sends every task of a group.
func (p *planner) sendGroup(s Signature, call options) (*Result, error) {
	call = call.over(s.options)
	if len(call.list("link")) > 0 {
		return nil, invalid("a group cannot have callbacks: link them to its tasks")
	}
	errbacks, id := call.list("link_error"), call.textOf("task_id")
	call = call.without("link_error").without("task_id")
	if id == "" {
		id = protocol.NewID()
	}
	result := &Result{ID: id, client: p.client, group: true}
	p.start(result)
	return result, p.sendMembers(s.parts, call, errbacks, result)
}

// sendMembers sends the tasks of a group. Those of a group within it are its own, but
// are counted apart, as Celery does.
func (p *planner) sendMembers(parts []Signature, call options, errbacks []Signature, group *Result) error {
	for i, part := range parts {
		own := call
		switch part.kind {
		case kindGroup:
			if err := p.sendMembers(part.parts, call, errbacks, group); err != nil {
				return err
			}
			continue
		case kindTask:
			part.options = part.options.add("link_error", errbacks)
		default:
			own = own.add("link_error", errbacks)
		}
		sent, err := p.send(part, own, &member{group.ID, i})
		if err != nil {
			return err
		}
		group.Members = append(group.Members, sent)
	}
	return nil
}

// withSendOptions adds what the worker of the running handler has for a task.
func (p *planner) withSendOptions(task string, o options) options {
	if p.sendOptions == nil {
		return o
	}
	o.entries = slices.Clone(o.entries)
	queue, expireAfter := p.sendOptions(task)
	if queue != "" && o.value("queue") == nil && o.value("exchange") == nil && o.value("routing_key") == nil {
		Queue(queue)(&o)
	}
	if expireAfter > 0 && o.value("expires") == nil {
		Expires(expireAfter)(&o)
	}
	return o
}

// publish adds the message of a task. rest are the later tasks of its chain, the next
// one last.
func (p *planner) publish(s Signature, call options, rest []protocol.Signature) error {
	merged := p.withSendOptions(s.task, call.over(s.options))
	// The arguments are given as those of a call, which argsrepr shows as a tuple.
	signature := protocol.NewSignature(s.task, nil, s.kwargs, merged.members()...)
	publishing, destination, err := signature.Apply(protocol.ApplyOptions{
		Args: s.args, Chain: rest, ParentID: p.parent, RootID: p.root,
		ReplyTo: p.client.replyTo, Origin: p.client.config.Origin, Now: p.client.config.Now(),
	})
	if err != nil {
		return invalid("%w", err)
	}
	p.messages = append(p.messages, message{publishing, destination})
	return nil
}

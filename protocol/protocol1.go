package protocol

import "encoding/json"

// decodeBodyObject decodes the body of a message that lacks the header task.
// The body must be an object with the key task
// (docs/celery.md#telling-the-protocols-apart).
func decodeBodyObject(d Delivery, accept []string) (Object, error) {
	body, err := decodeBody(d, accept)
	if err != nil {
		return nil, err
	}
	if kindOfBody(body) != kindObject {
		return nil, &MalformedError{Reason: ReasonUnknown, Detail: "no task header, and the body is not an object"}
	}
	o, err := members(body)
	if err != nil {
		return nil, &MalformedError{Reason: ReasonBody, Detail: err.Error()}
	}
	if !o.has("task") {
		return nil, &MalformedError{Reason: ReasonUnknown, Detail: "no task header, and no task in the body"}
	}
	return o, nil
}

func (o Object) has(key string) bool {
	for _, m := range o {
		if m.Key == key {
			return true
		}
	}
	return false
}

// protocol1Fields returns the body's fields. The group is in the field taskset,
// which overrides the field group.
func protocol1Fields(o Object) fields {
	return func(name string) any {
		if name == "group" && o.has("taskset") {
			name = "taskset"
		}
		text := o.Get(name)
		if text == nil {
			return nil
		}
		return plainValue(text)
	}
}

// decodeProtocol1 reads a message whose fields are all in the body. Protocol 1
// writes a chain as nested callbacks: the option link of each signature holds
// the next one.
//
// A time without a zone is read as UTC, even if the field utc is false. Such a
// time is in the producer's local time, but the message does not name the zone.
func decodeProtocol1(d Delivery, accept []string) (*Message, error) {
	o, err := decodeBodyObject(d, accept)
	if err != nil {
		return nil, err
	}
	m := newMessage(1, d)
	m.readFields(protocol1Fields(o))
	if err := checkTask(m); err != nil {
		return nil, err
	}
	if err := m.readProtocol1Body(o); err != nil {
		return nil, err
	}
	if err := m.finish(protocol1Fields(o)); err != nil {
		return nil, err
	}
	m.ArgsRepr, m.KwargsRepr = argsRepr(m.Args, true), kwargsRepr(m.Kwargs)
	return m, nil
}

// decodeHybrid reads a message with protocol 2's headers and protocol 1's
// body. A header overrides the body's field, even if the header is null.
func decodeHybrid(m *Message, body json.RawMessage) (*Message, error) {
	o, err := members(body)
	if err != nil || !o.has("args") {
		return nil, m.fail(ReasonShape, "it is an object without args")
	}
	inBody := protocol1Fields(o)
	f := func(name string) any {
		if v, ok := m.Headers[name]; ok {
			return v
		}
		if name == "group" {
			// Celery ignores taskset in this form and reads only group.
			if text := o.Get(name); text != nil {
				return plainValue(text)
			}
			return nil
		}
		return inBody(name)
	}
	m.readFields(f)
	if err := m.readProtocol1Body(o); err != nil {
		return nil, err
	}
	return m, m.finish(f)
}

func (m *Message) readProtocol1Body(o Object) error {
	m.RawArgs, m.RawKwargs = json.RawMessage("[]"), json.RawMessage("{}")
	for _, member := range o {
		switch member.Key {
		case "args":
			m.RawArgs = member.Value
		case "kwargs":
			m.RawKwargs = member.Value
		}
	}
	var followers Object
	for _, member := range o {
		if member.Key != "chain" {
			followers = append(followers, member)
		}
	}
	return m.readFollowers(followers)
}

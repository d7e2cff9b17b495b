package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"
)

// contentTypeJSON is the only content type that can be decoded.
const contentTypeJSON = "application/json"

// serializers are kombu's names for content types.
var serializers = map[string]string{
	contentTypeJSON:                   "json",
	"application/x-python-serialize":  "pickle",
	"application/x-yaml":              "yaml",
	"application/x-msgpack":           "msgpack",
	"application/vnd.msgpack; v=0.00": "msgpack",
}

// DecodeHeader reads only the headers of a message: task, id, parent, root,
// group, retries and so on. A worker uses it to look up the task's handler
// before it decodes the body, as Celery does
// (docs/celery.md#telling-the-protocols-apart).
//
// A protocol 1 message has no headers, so its body is decoded, subject to
// accept as in [Decode]. Message.ID is "" when the id is missing. Args, Kwargs,
// Embed, ETA and Expires stay empty. The error is a [*MalformedError].
func DecodeHeader(d Delivery, accept []string) (*Message, error) {
	if _, ok := d.Headers["task"]; !ok {
		fields, err := decodeBodyObject(d, accept)
		if err != nil {
			return nil, err
		}
		m := newMessage(1, d)
		m.readFields(protocol1Fields(fields))
		return m, checkTask(m)
	}
	m := newMessage(2, d)
	m.readFields(headerFields(d.Headers))
	return m, checkTask(m)
}

// Decode reads a message of protocol 2, of protocol 1, or of the hybrid of both
// (docs/celery.md#telling-the-protocols-apart).
//
//   - All headers but task and id are optional. A header of an unexpected type
//     counts as missing, except that a bad eta or expires is an error.
//   - accept lists the content types to accept, compared exactly; nil means
//     application/json alone. Other types in the list have no effect on what
//     can be decoded: that is always JSON only.
//   - The message shares memory with d, and the caller must not change d.
//
// The error is a [*MalformedError].
func Decode(d Delivery, accept []string) (*Message, error) {
	if _, ok := d.Headers["task"]; !ok {
		return decodeProtocol1(d, accept)
	}
	m := newMessage(2, d)
	m.readFields(headerFields(d.Headers))
	if err := checkTask(m); err != nil {
		return nil, err
	}
	body, err := decodeBody(d, accept)
	if err != nil {
		return nil, m.malformed(err)
	}
	if kindOfBody(body) == kindObject {
		return decodeHybrid(m, body)
	}
	if err := m.readBody(body); err != nil {
		return nil, err
	}
	return m, m.finish(headerFields(d.Headers))
}

func newMessage(version int, d Delivery) *Message {
	headers := d.Headers
	if headers == nil {
		headers = map[string]any{}
	}
	return &Message{
		Version:     version,
		Headers:     headers,
		Properties:  d.Properties,
		Exchange:    d.Exchange,
		RoutingKey:  d.RoutingKey,
		Redelivered: d.Redelivered,
	}
}

func checkTask(m *Message) error {
	if m.Task == "" {
		return &MalformedError{Reason: ReasonUnknown, TaskID: m.ID, Detail: "the task's name is not text"}
	}
	return nil
}

// malformed adds the message's task and id to an error.
func (m *Message) malformed(err error) error {
	var e *MalformedError
	if errors.As(err, &e) {
		e.Task, e.TaskID = m.Task, m.ID
	}
	return err
}

func (m *Message) fail(reason Reason, detail string) error {
	return &MalformedError{Reason: reason, TaskID: m.ID, Task: m.Task, Detail: detail}
}

// readBody splits a body into args, kwargs and embed.
func (m *Message) readBody(body json.RawMessage) error {
	if kindOfBody(body) != kindArray {
		return m.fail(ReasonShape, "it is "+truncate(string(body), 60))
	}
	parts, err := elements(body)
	if err != nil || len(parts) != 3 {
		return m.fail(ReasonShape, fmt.Sprintf("it has %d elements", len(parts)))
	}
	if err := m.readEmbed(parts[2]); err != nil {
		return err
	}
	m.RawArgs, m.RawKwargs = parts[0], parts[1]
	return nil
}

func (m *Message) readEmbed(text json.RawMessage) error {
	if isNull(text) {
		return nil
	}
	embed, err := members(text)
	if err != nil {
		return m.fail(ReasonShape, "embed is not an object")
	}
	return m.readFollowers(embed)
}

// readFollowers reads the four members of embed. In protocol 1 they are fields
// of the body.
func (m *Message) readFollowers(o Object) error {
	for _, list := range []struct {
		name string
		into *[]Signature
	}{{"callbacks", &m.Embed.Callbacks}, {"errbacks", &m.Embed.Errbacks}, {"chain", &m.Embed.Chain}} {
		text := o.Get(list.name)
		if text == nil {
			continue
		}
		sigs, err := parseSignatures(text)
		if err != nil {
			return m.fail(ReasonShape, list.name+": "+detailOf(err))
		}
		*list.into = sigs
	}
	if text := o.Get("chord"); text != nil {
		chord, err := ParseSignature(text)
		if err != nil {
			return m.fail(ReasonShape, "chord: "+detailOf(err))
		}
		m.Embed.Chord = &chord
	}
	return nil
}

// finish checks the rest in the order in which a Python worker does: the id,
// the times, and last the arguments, which matter only when the task runs.
func (m *Message) finish(f fields) error {
	if m.ID == "" {
		return m.fail(ReasonNoID, "")
	}
	var err error
	if m.ETA, err = timeField(f("eta")); err != nil {
		return m.fail(ReasonETA, err.Error())
	}
	if m.Expires, err = timeField(f("expires")); err != nil {
		return m.fail(ReasonExpires, err.Error())
	}
	if kindOf(m.RawKwargs) != kindObject {
		return m.fail(ReasonKwargs, "it is "+truncate(string(m.RawKwargs), 60))
	}
	if kindOf(m.RawArgs) != kindArray {
		return m.fail(ReasonArgs, "it is "+truncate(string(m.RawArgs), 60))
	}
	if m.Args, err = elements(m.RawArgs); err != nil {
		return m.fail(ReasonBody, err.Error())
	}
	if m.Kwargs, err = members(m.RawKwargs); err != nil {
		return m.fail(ReasonBody, err.Error())
	}
	return nil
}

func timeField(v any) (*time.Time, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case time.Time:
		return &v, nil
	case string:
		if v == "" {
			return nil, nil
		}
		t, err := ParseTime(v)
		return &t, err
	}
	return nil, &TimeError{Text: truncate(fmt.Sprint(v), 60), Why: "it is not text"}
}

// kindOfBody is kindOf for a body, which may be empty.
func kindOfBody(body json.RawMessage) kind {
	if len(body) == 0 {
		return kindNull
	}
	return kindOf(body)
}

// decodeBody returns the body as checked JSON. An empty body is returned as it
// is, as in kombu.
func decodeBody(d Delivery, accept []string) (json.RawMessage, error) {
	if err := checkContentType(d.Properties.ContentType, accept); err != nil {
		return nil, err
	}
	body, err := decompress(d, MaxBodySize)
	if err != nil {
		return nil, &MalformedError{Reason: ReasonCompression, Detail: err.Error()}
	}
	if len(body) == 0 {
		return nil, nil
	}
	// Python decodes the bytes of the message, before it decompresses them. A
	// compressed body is UTF-8.
	encoding := d.Properties.ContentEncoding
	if isCompressed(d) {
		encoding = "utf-8"
	}
	body, ok := bodyText(body, encoding)
	if !ok {
		detail := "it is not UTF-8"
		if name := encodingName(encoding); name != "" && name != "utf_8" && name != "utf8" {
			detail = "it is neither " + quote(encoding) + " nor UTF-8"
		}
		return nil, &MalformedError{Reason: ReasonBody, Detail: detail}
	}
	if err := checkJSON(body); err != nil {
		return nil, &MalformedError{Reason: ReasonBody, Detail: err.Error()}
	}
	return bytes.Trim(body, " \t\r\n"), nil
}

// checkContentType refuses the types that kombu refuses. It also refuses those
// that kombu always accepts and that end a Python worker's process
// (docs/celery.md#bad-messages).
func checkContentType(contentType string, accept []string) error {
	if contentType == "" {
		return &MalformedError{Reason: ReasonNoContentType}
	}
	accepted := contentType == contentTypeJSON
	if accept != nil {
		accepted = accepted && (slices.Contains(accept, contentTypeJSON) || slices.Contains(accept, "json"))
	}
	if accepted {
		return nil
	}
	name := truncate(contentType, 120)
	if alias, ok := serializers[contentType]; ok {
		name = alias + " (" + contentType + ")"
	}
	return &MalformedError{Reason: ReasonContentType,
		Detail: "Refusing to deserialize untrusted content of type " + name}
}

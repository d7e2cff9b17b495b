package protocol

import (
	"cmp"
	"encoding/json"
	"maps"
	"strings"
	"time"
)

// RetryOptions are the options of [RetryMessage].
type RetryOptions struct {
	// ETA is the earliest time of the retry; zero means at once.
	ETA time.Time
	// Now is the time from which the property expiration counts. Defaults to
	// the current time.
	Now time.Time
	// Args and Kwargs, unless nil, replace those of the message.
	Args   []json.RawMessage
	Kwargs Object
	// Queue, if set, sends the retry to this queue through the default
	// exchange, instead of to the message's own exchange and routing key.
	Queue string
	// KeepParent keeps a missing parent_id missing, as Celery's
	// retry_on_worker_lost does. Otherwise a retry without a parent gets the
	// task's own id as its parent_id.
	KeepParent bool
}

// RetryMessage returns the message that runs m's task again, with the same id
// and retries + 1 (docs/celery.md#retries). Exchange and RoutingKey are those
// of m, unless [RetryOptions.Queue] is set. Custom headers are kept; the
// headers that the broker adds for deliveries and dead-lettering are not. The
// error is a [*MalformedError]: the new arguments are not JSON.
func RetryMessage(m *Message, o RetryOptions) (Publishing, error) {
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	args, rawArgs := m.Args, m.RawArgs
	if o.Args != nil {
		args, rawArgs = o.Args, joinArray(o.Args)
	}
	kwargs, rawKwargs := m.Kwargs, m.RawKwargs
	if o.Kwargs != nil {
		kwargs, rawKwargs = o.Kwargs, joinObject(o.Kwargs)
	}
	var chord json.RawMessage
	if m.Embed.Chord != nil {
		chord = m.Embed.Chord.raw
	}
	p := Publishing{
		TaskID:     m.ID,
		Task:       m.Task,
		Exchange:   m.Exchange,
		RoutingKey: m.RoutingKey,
		Headers:    retryHeaders(m, o),
		Properties: Properties{
			ContentType:     contentTypeJSON,
			ContentEncoding: "utf-8",
			DeliveryMode:    2,
			Priority:        m.Properties.Priority,
			CorrelationID:   m.ID,
			ReplyTo:         m.Properties.ReplyTo,
		},
		Body: messageBody(rawArgs, rawKwargs, embedJSON(
			signaturesJSON(m.Embed.Callbacks), signaturesJSON(m.Embed.Errbacks), signaturesJSON(m.Embed.Chain), chord)),
	}
	if err := checkJSON(p.Body); err != nil {
		return Publishing{}, &MalformedError{Reason: ReasonBody, Task: m.Task, TaskID: m.ID, Detail: "new arguments: " + err.Error()}
	}
	p.Headers["argsrepr"], p.Headers["kwargsrepr"] = argsRepr(args, true), kwargsRepr(kwargs)
	if m.Expires != nil {
		p.Properties.Expiration = expiration(*m.Expires, o.Now)
	}
	if o.Queue != "" {
		p.Exchange, p.RoutingKey = "", o.Queue
	}
	return p, nil
}

func retryHeaders(m *Message, o RetryOptions) map[string]any {
	h := maps.Clone(m.Headers)
	if h == nil {
		h = map[string]any{}
	}
	maps.DeleteFunc(h, func(name string, _ any) bool {
		return name == "x-death" || name == "x-delivery-count" || name == "x-acquired-count" || name == "compression" ||
			strings.HasPrefix(name, "x-first-death-") || strings.HasPrefix(name, "x-last-death-")
	})
	parent := m.ParentID
	if parent == "" && !o.KeepParent {
		parent = m.ID
	}
	for name, value := range map[string]any{
		"lang":                  "py",
		"task":                  m.Task,
		"id":                    m.ID,
		"shadow":                orNil(m.Shadow),
		"eta":                   nil,
		"expires":               nil,
		"group":                 orNil(m.Group),
		"group_index":           nil,
		"retries":               int32(m.Retries) + 1,
		"timelimit":             []any{limitHeader(m.TimeLimit.Hard), limitHeader(m.TimeLimit.Soft)},
		"root_id":               cmp.Or(m.RootID, m.ID),
		"parent_id":             orNil(parent),
		"origin":                m.Origin,
		"ignore_result":         nil,
		"replaced_task_nesting": int32(m.ReplacedTaskNesting),
		"stamped_headers":       nil,
		"stamps":                map[string]any{},
	} {
		h[name] = value
	}
	if !o.ETA.IsZero() {
		h["eta"] = FormatTime(o.ETA)
	}
	if m.Expires != nil {
		h["expires"] = FormatTime(*m.Expires)
		if text, ok := m.Headers["expires"].(string); ok {
			h["expires"] = text
		}
	}
	if m.GroupIndex != nil {
		h["group_index"] = int32(*m.GroupIndex)
	}
	if m.IgnoreResult != nil {
		h["ignore_result"] = *m.IgnoreResult
	}
	if m.StampedHeaders != nil {
		names := make([]any, len(m.StampedHeaders))
		for i, name := range m.StampedHeaders {
			names[i] = name
		}
		h["stamped_headers"] = names
	}
	if m.Stamps != nil {
		h["stamps"] = m.Stamps
	}
	return h
}

// limitHeader returns a time limit in seconds, or nil for none.
func limitHeader(d time.Duration) any {
	switch {
	case d == 0:
		return nil
	case d%time.Second == 0 && d/time.Second == time.Duration(int32(d/time.Second)):
		return int32(d / time.Second)
	}
	return d.Seconds()
}

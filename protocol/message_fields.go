package protocol

import (
	"encoding/json"
	"math"
	"time"
)

// fields returns the value of a message's field, or nil. The name is that of
// protocol 2's header. Protocol 1 keeps the same fields in the body.
type fields func(name string) any

func headerFields(headers map[string]any) fields {
	return func(name string) any { return headers[name] }
}

// readFields reads all fields but the arguments, the embed, eta and expires. A
// field of an unexpected type counts as missing.
func (m *Message) readFields(f fields) {
	m.Task = textField(f("task"))
	m.ID = textField(f("id"))
	m.RootID = textField(f("root_id"))
	m.ParentID = textField(f("parent_id"))
	m.Group = textField(f("group"))
	if n, ok := intField(f("group_index")); ok && n == int(int32(n)) {
		m.GroupIndex = &n
	}
	m.Shadow = textField(f("shadow"))
	if n, ok := intField(f("retries")); ok && n > 0 {
		m.Retries = min(n, math.MaxInt32-1)
	}
	if pair, ok := f("timelimit").([]any); ok && len(pair) == 2 {
		m.TimeLimit = TimeLimit{Hard: secondsField(pair[0]), Soft: secondsField(pair[1])}
	}
	m.ArgsRepr = textField(f("argsrepr"))
	m.KwargsRepr = textField(f("kwargsrepr"))
	m.Origin = textField(f("origin"))
	if b, ok := f("ignore_result").(bool); ok {
		m.IgnoreResult = &b
	}
	if n, ok := intField(f("replaced_task_nesting")); ok && n > 0 {
		m.ReplacedTaskNesting = min(n, math.MaxInt32-1)
	}
	if names, ok := f("stamped_headers").([]any); ok {
		m.StampedHeaders = []string{}
		for _, name := range names {
			if text := textField(name); text != "" {
				m.StampedHeaders = append(m.StampedHeaders, text)
			}
		}
	}
	if stamps, ok := f("stamps").(map[string]any); ok {
		m.Stamps = stamps
	}
}

// textField accepts a string, or the []byte that some AMQP clients return for
// one.
func textField(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case []byte:
		return string(v)
	}
	return ""
}

// intField accepts any kind of integer, and a float without a fraction.
func intField(v any) (int, bool) {
	switch v := v.(type) {
	case int:
		return v, true
	case int8:
		return int(v), true
	case int16:
		return int(v), true
	case int32:
		return int(v), true
	case int64:
		return int(v), true
	case uint8:
		return int(v), true
	case uint16:
		return int(v), true
	case uint32:
		return int(v), true
	case uint64:
		return int(v), v <= math.MaxInt
	case uint:
		return int(v), v <= math.MaxInt
	case float32:
		return intField(float64(v))
	case float64:
		return int(v), v == math.Trunc(v) && math.Abs(v) < 1<<53
	}
	return 0, false
}

// numberField accepts any kind of number but NaN.
func numberField(v any) (float64, bool) {
	switch v := v.(type) {
	case float64:
		return v, !math.IsNaN(v)
	case float32:
		return float64(v), !math.IsNaN(float64(v))
	}
	n, ok := intField(v)
	return float64(n), ok
}

// secondsField converts a positive number of seconds; anything else means no
// limit.
func secondsField(v any) time.Duration {
	seconds, ok := numberField(v)
	if !ok || seconds <= 0 || seconds > math.MaxInt64/float64(time.Second) {
		return 0
	}
	return time.Duration(seconds * float64(time.Second))
}

// plainValue converts JSON to the types that headers hold: nil, bool, string,
// int32, int64, float64, []any and map[string]any. An integer becomes an int32
// where it fits, since py-amqp before 5.4 misreads the other integer types. A
// larger one becomes an int64, or text if it is negative or too large for that
// (docs/celery.md#header-types).
func plainValue(text json.RawMessage) any {
	s := scanner{text: text}
	return plainNext(&s)
}

func plainNext(s *scanner) any {
	k, err := s.peek()
	if err != nil {
		return nil
	}
	switch k {
	case kindArray:
		list := []any{}
		_ = s.array(func() error { list = append(list, plainNext(s)); return nil })
		return list
	case kindObject:
		table := map[string]any{}
		_ = s.object(func(key string) error { table[printable(key)] = plainNext(s); return nil })
		return table
	}
	scalar, err := s.scalar(k)
	if err != nil {
		return nil
	}
	switch k {
	case kindBool:
		return scalar[0] == 't'
	case kindString:
		return printable(unquoteJSON(scalar))
	case kindNumber:
		return plainNumber(scalar)
	}
	return nil
}

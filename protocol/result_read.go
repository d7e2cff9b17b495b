package protocol

import (
	"encoding/json"
	"fmt"
)

// SetColumn sets Value or Exception from the bytes of a result column, pickle or
// JSON, as r.State asks for: RETRY, FAILURE and REVOKED have an exception. It sets
// Unreadable when the bytes cannot be decoded (see [ReadResult]).
func (r *Result) SetColumn(column []byte) {
	value, err := ReadResult(column)
	switch {
	case err != nil:
		r.Unreadable = fmt.Errorf("the result of task %s cannot be read: %w", r.TaskID, err)
	case r.State == StateRetry || r.State == StateFailure || r.State == StateRevoked:
		if r.Exception, err = ParseException(value); err != nil {
			r.Unreadable = fmt.Errorf("the exception of task %s cannot be read: %w", r.TaskID, err)
		}
	case !isNull(value):
		r.Value = append(json.RawMessage(nil), value...)
	}
}

// ParseException parses an exception as Celery stores it: an object with the keys
// exc_type, exc_message and exc_module (docs/celery.md#states-and-exceptions).
// exc_message may be a list of arguments or one argument. Null gives nil.
func ParseException(text json.RawMessage) (*Exception, error) {
	if isNull(text) {
		return nil, nil
	}
	o, err := members(text)
	if err != nil {
		return nil, err
	}
	e := &Exception{Type: textOf(o.Get("exc_type")), Module: textOf(o.Get("exc_module")), Args: []json.RawMessage{}}
	if e.Type == "" {
		return nil, fmt.Errorf("it has no exc_type")
	}
	message := o.Get("exc_message")
	switch {
	case message == nil:
	case kindOf(message) == kindArray:
		if e.Args, err = elements(message); err != nil {
			return nil, err
		}
	default:
		e.Args = append(e.Args, message)
	}
	return e, nil
}

package protocol

import (
	"encoding/json"
	"fmt"
)

// Encoding is the format of the result column
// (docs/celery.md#result-encoding).
type Encoding string

// The encodings. Every version of Celery reads a pickle; only 5.7 reads JSON.
const (
	EncodingPickle Encoding = "pickle"
	EncodingJSON   Encoding = "json"
)

// EncodeResult returns the bytes of the result column: the value, or the
// exception as a dictionary of exc_type, exc_message and exc_module. For None
// it returns nil (SQL's NULL), which every version of Celery reads as None. The
// error is a [*SyntaxError]: Value or an argument of Exception is not JSON.
func EncodeResult(r Result, encoding Encoding) ([]byte, error) {
	if r.Exception == nil {
		if len(r.Value) == 0 || isNull(r.Value) {
			return nil, nil
		}
		if encoding == EncodingPickle {
			return PickleJSON(r.Value)
		}
		return r.Value, checkJSON(r.Value)
	}
	text := r.Exception.JSON()
	if encoding != EncodingPickle {
		return text, checkJSON(text)
	}
	return pickleException(*r.Exception)
}

// JSON returns the exception as Celery stores it: an object with the keys
// exc_type, exc_message and exc_module.
func (e Exception) JSON() json.RawMessage {
	return joinObject(Object{
		{"exc_type", quoteJSON(e.Type)},
		{"exc_message", joinArray(e.Args)},
		{"exc_module", e.module()},
	})
}

func (e Exception) module() json.RawMessage {
	if e.Module == "" {
		return json.RawMessage("null")
	}
	return quoteJSON(e.Module)
}

// pickleException writes the three keys, with the arguments as a tuple, as
// Python does.
func pickleException(e Exception) ([]byte, error) {
	w := pickleWriter{out: []byte{opProto, 2, opEmptyDict, opMark}}
	w.str("exc_type")
	w.str(e.Type)
	w.str("exc_message")
	w.out = append(w.out, opMark)
	for i, a := range e.Args {
		if err := checkJSON(a); err != nil {
			return nil, fmt.Errorf("argument %d of exception %s: %w", i, e.Type, err)
		}
		if err := w.inner(a); err != nil {
			return nil, fmt.Errorf("argument %d of exception %s: %w", i, e.Type, err)
		}
	}
	w.out = append(w.out, opTuple)
	w.str("exc_module")
	if err := w.inner(e.module()); err != nil {
		return nil, err
	}
	return append(w.out, opSetItems, opStop), nil
}

// ReadResult decodes the bytes of a result column, pickle or JSON, to JSON in
// Python's dialect. NULL and None give null.
//
// Reading a pickle never runs code. Values of datetime, date, time, Decimal, UUID and
// bytes become type wrappers; any other Python class is a [*PickleError], and so is a
// pickle that is too large or nested too deeply. For a text the error is a
// [*SyntaxError].
func ReadResult(column []byte) (json.RawMessage, error) {
	switch {
	case column == nil:
		return json.RawMessage("null"), nil
	case len(column) > 0 && column[0] == opProto:
		return unpickle(column, MaxBodySize)
	}
	if err := checkJSON(column); err != nil {
		return nil, err
	}
	return json.RawMessage(column), nil
}

// StampsJSON returns the value of [Result.Stamps] for a message, or nil if it
// has no stamps.
func StampsJSON(m *Message) json.RawMessage {
	if len(m.StampedHeaders) == 0 {
		return nil
	}
	text, err := EncodeJSON(struct {
		StampedHeaders []string       `json:"stamped_headers"`
		Stamps         map[string]any `json:"stamps"`
	}{m.StampedHeaders, m.Stamps})
	if err != nil {
		// All types that headers hold can be encoded as JSON.
		return nil
	}
	return text
}

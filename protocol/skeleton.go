package protocol

import (
	"encoding/json"
	"errors"
	"time"
)

var errSoon = errors.New("soon")

func quoteJSON(s string) json.RawMessage                                { b, _ := json.Marshal(s); return b }
func exceptionRepr(e Exception) string                                  { return e.Type }
func exceptionText(e Exception) string                                  { return "" }
func tracebackText(e Exception, frames []Frame) string                  { return "" }
func decodeHeader(d Delivery, accept []string) (*Message, error)        { return nil, errSoon }
func decode(d Delivery, accept []string) (*Message, error)              { return nil, errSoon }
func checkCanvas(m *Message) error                                      { return nil }
func planSuccess(m *Message, v json.RawMessage, s Sender) (Plan, error) { return Plan{}, errSoon }
func planFailure(m *Message, s Sender) (Plan, error)                    { return Plan{}, errSoon }
func laterSteps(m *Message) []LaterStep                                 { return nil }
func retryMessage(m *Message, o RetryOptions) (Publishing, error)       { return Publishing{}, errSoon }
func (s Signature) apply(o ApplyOptions) (Publishing, Destination, error) {
	return Publishing{}, Destination{}, errSoon
}
func encodeJSON(v any) (json.RawMessage, error)              { return nil, errSoon }
func decodeJSON(text json.RawMessage, v any) error           { return errSoon }
func checkJSON(text []byte) error                            { return errSoon }
func encodeResult(r Result, e Encoding) ([]byte, error)      { return nil, errSoon }
func readResult(b []byte) (json.RawMessage, error)           { return nil, errSoon }
func pickleJSON(text json.RawMessage) ([]byte, error)        { return nil, errSoon }
func stampsJSON(m *Message) json.RawMessage                  { return nil }
func parseTime(s string) (time.Time, error)                  { return time.Time{}, errSoon }
func formatTime(t time.Time) string                          { return "" }
func parseSignature(text json.RawMessage) (Signature, error) { return Signature{}, errSoon }
func newSignature(task string, args []json.RawMessage, kwargs Object, options []Member) Signature {
	return Signature{}
}
func textOf(text json.RawMessage) string                            { return "" }
func (s Signature) withOptions(options []Member) (Signature, error) { return s, errSoon }
func (o Object) get(key string) json.RawMessage                     { return nil }

// EncodeError says what has no form in JSON. It is permanent.
type EncodeError struct {
	// Path leads to the value, as in "$.items[3]".
	Path string
	// Type is the Go type of the value.
	Type string
	// Why is one clause.
	Why string
}

// Error says what cannot be encoded and why.
func (e *EncodeError) Error() string { return e.Path }

// Exception is what Celery would store for it.
func (e *EncodeError) Exception() Exception {
	return NewException("kombu.exceptions", "EncodeError", e.Error())
}

// PickleError says why a pickle was not read. It is permanent.
type PickleError struct{ Why string }

// Error says what was found.
func (e *PickleError) Error() string { return e.Why }

// Decimal, UUID and Date are Python's types that have no like in Go. Decimal
// is the digits as written.
type Decimal string

// UUID is the 16 bytes of a UUID.
type UUID [16]byte

// Date is a day without time.
type Date struct{ Year, Month, Day int }

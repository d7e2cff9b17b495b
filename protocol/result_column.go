package protocol

import "encoding/json"

// Encoding is how the result column is written (contract 6.1).
type Encoding string

// The encodings. Every Celery reads a pickle; only 5.7 reads JSON.
const (
	EncodingPickle Encoding = "pickle"
	EncodingJSON   Encoding = "json"
)

// EncodeResult makes the bytes of the result column: the value, or the
// exception as a dictionary of exc_type, exc_message and exc_module. It
// returns nil, SQL's NULL, for None.
func EncodeResult(r Result, encoding Encoding) ([]byte, error) { return encodeResult(r, encoding) }

// ReadResult decodes the bytes of a result column, pickle or JSON, to JSON.
// NULL and None give null. A pickle is read without running anything: what
// needs a Python class is a *PickleError.
func ReadResult(column []byte) (json.RawMessage, error) { return readResult(column) }

// PickleJSON writes JSON text as a pickle of protocol 2.
func PickleJSON(text json.RawMessage) ([]byte, error) { return pickleJSON(text) }

// StampsJSON is Result.Stamps for a message: nil when it has no stamps.
func StampsJSON(m *Message) json.RawMessage { return stampsJSON(m) }

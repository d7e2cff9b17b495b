package protocol

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// Kombu's type wrappers are objects {"__type__": name, "__value__": value}
// with exactly these two keys (docs/celery.md#pythons-json). Go's time.Time and
// []byte are written in wrappers; the types below stand for Python's types that
// have no counterpart in Go.

// Decimal is a Python decimal.Decimal, as the text that Python prints for it.
type Decimal string

// TimeOfDay is a Python datetime.time, as the text that its isoformat returns,
// such as 07:08:09.123456 or 07:08:09+02:00.
type TimeOfDay string

// Naive is the location of a time.Time that stands for a Python datetime without
// a time zone. Such a time is written without a zone. Its clock counts as UTC
// wherever Go compares or converts it.
var Naive = time.FixedZone("naive", 0)

// UUID is a Python uuid.UUID.
type UUID [16]byte

// String returns the usual form with dashes, 8-4-4-4-12 hexadecimal digits.
func (u UUID) String() string {
	h := hex.EncodeToString(u[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// Date is a Python datetime.date.
type Date struct{ Year, Month, Day int }

// String returns the date in ISO 8601, such as 2024-05-06.
func (d Date) String() string { return fmt.Sprintf("%04d-%02d-%02d", d.Year, d.Month, d.Day) }

// wrap returns the text of a type wrapper.
func wrap(name string, value json.RawMessage) json.RawMessage {
	return joinObject(Object{{"__type__", quoteJSON(name)}, {"__value__", value}})
}

func wrapTime(t time.Time) json.RawMessage {
	text := t.Format("2006-01-02T15:04:05")
	if micros := t.Nanosecond() / 1000; micros != 0 {
		text += fmt.Sprintf(".%06d", micros)
	}
	if t.Location() != Naive {
		layout := "-07:00"
		if _, offset := t.Zone(); offset%60 != 0 { // local mean time
			layout = "-07:00:00"
		}
		text += t.Format(layout)
	}
	return wrap("datetime", quoteJSON(text))
}

func wrapBytes(b []byte) json.RawMessage {
	if utf8.Valid(b) {
		return wrap("bytes", quoteJSON(string(b)))
	}
	return wrap("base64", quoteJSON(base64.StdEncoding.EncodeToString(b)))
}

func wrapUUID(u UUID) json.RawMessage {
	return wrap("uuid", joinObject(Object{{"hex", quoteJSON(hex.EncodeToString(u[:]))}}))
}

// wrapper splits a type wrapper, if o is one.
func wrapper(o Object) (name string, value json.RawMessage, ok bool) {
	if len(o) != 2 {
		return "", nil, false
	}
	for _, m := range o {
		switch m.Key {
		case "__type__":
			name = textOf(m.Value)
		case "__value__":
			value = m.Value
		default:
			return "", nil, false
		}
	}
	return name, value, name != "" && value != nil
}

// wrapper moves past the next object if that is a type wrapper, and otherwise
// does not move. It reads no deeper than a wrapper may be nested: otherwise it
// would read nested objects once for every level.
func (s *scanner) wrapper() (name string, value json.RawMessage, ok bool) {
	look := *s
	if !look.mayBeWrapper() {
		return "", nil, false
	}
	look.depth = maxDepth - 2
	text, err := look.raw()
	if err != nil {
		return "", nil, false
	}
	o, err := members(text)
	if err != nil {
		return "", nil, false
	}
	if name, value, ok = wrapper(o); ok {
		s.pos = look.pos
	}
	return name, value, ok
}

// mayBeWrapper looks at the beginning of an object alone: nearly no object is a
// wrapper. A key may be written with escapes.
func (s *scanner) mayBeWrapper() bool {
	s.space()
	look := *s
	look.pos++ // the brace
	look.space()
	rest := look.text[min(look.pos, len(look.text)):]
	return bytes.HasPrefix(rest, []byte(`"__`)) || bytes.HasPrefix(rest, []byte(`"\`)) || bytes.HasPrefix(rest, []byte(`"_\`))
}

var errWrapper = errors.New("not a value of that type")

// parseUUID reads the value of a UUID's wrapper, or its text. kombu gives the members of
// an object to uuid.UUID. Besides hex it writes version in release 5.3.0, which is None
// for a UUID without one.
func parseUUID(value json.RawMessage) (u UUID, err error) {
	text, version := textOf(value), ""
	if kindOf(value) == kindObject {
		o, err := members(value)
		if err != nil {
			return u, errWrapper
		}
		for _, m := range o {
			switch m.Key {
			case "hex":
				text = textOf(m.Value)
			case "version":
				version = string(m.Value)
			default:
				return u, errWrapper
			}
		}
	}
	b, err := hex.DecodeString(strings.ReplaceAll(text, "-", ""))
	if err != nil || len(b) != len(u) {
		return u, errWrapper
	}
	switch version {
	case "", "null":
		return UUID(b), nil
	case "1", "2", "3", "4", "5": // all that uuid.UUID takes up to Python 3.13
		return UUID(b).withVersion(version[0] - '0'), nil
	}
	return u, errWrapper
}

// unwrap returns the Go value of a type wrapper: a time.Time, Date, TimeOfDay,
// Decimal, UUID or []byte.
func unwrap(name string, value json.RawMessage) (any, error) {
	if name == "uuid" {
		return parseUUID(value)
	}
	if kindOf(value) != kindString {
		return nil, errWrapper
	}
	text := textOf(value)
	switch name {
	case "datetime":
		return parseIsoformat(text)
	case "date":
		t, err := ParseTime(text)
		return Date{t.Year(), int(t.Month()), t.Day()}, err
	case "decimal":
		return Decimal(text), nil
	case "time":
		return TimeOfDay(text), nil
	case "bytes":
		return []byte(text), nil
	case "base64":
		return base64.StdEncoding.DecodeString(text)
	}
	return nil, errWrapper
}

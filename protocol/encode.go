package protocol

import "encoding/json"

// EncodeJSON writes v as Python's json.dumps would, in kombu's dialect
// (contract 2.2): ", " and ": " as separators, \u escapes for everything
// outside ASCII, floats as Python prints them, NaN and Infinity, structs by
// their encoding/json tags in the order of their fields, maps by sorted key,
// []byte, time.Time, [Decimal], [UUID] and [Date] in type wrappers, *big.Int
// in full. A json.RawMessage is checked and passes unchanged; nil is null.
//
// The error is an *EncodeError: v, or something in it, has no form in JSON.
func EncodeJSON(v any) (json.RawMessage, error) { return encodeJSON(v) }

// DecodeJSON is the way back: it reads text in the same dialect into the
// value that v points to. Type wrappers become time.Time, []byte, string-like
// types; into an any they become time.Time, []byte, [Decimal], [UUID], [Date].
// Numbers in an any become int64, *big.Int or float64.
func DecodeJSON(text json.RawMessage, v any) error { return decodeJSON(text, v) }

// CheckJSON says whether text is one value of Python's JSON dialect.
func CheckJSON(text []byte) error { return checkJSON(text) }

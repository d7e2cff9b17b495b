package protocol

import (
	"bytes"
	"strconv"
)

// appendFloat writes a float as Python's repr does, and NaN and the
// infinities as json.dumps does.
func appendFloat(out []byte, f float64) []byte {
	switch {
	case f != f:
		return append(out, "NaN"...)
	case f > 1.7976931348623157e308:
		return append(out, "Infinity"...)
	case f < -1.7976931348623157e308:
		return append(out, "-Infinity"...)
	}
	start := len(out)
	out = strconv.AppendFloat(out, f, 'e', -1, 64)
	exponent, _ := strconv.Atoi(string(out[bytes.LastIndexByte(out, 'e')+1:]))
	if exponent < -4 || exponent >= 16 {
		return out
	}
	out = strconv.AppendFloat(out[:start], f, 'f', -1, 64)
	if bytes.IndexByte(out[start:], '.') < 0 {
		out = append(out, ".0"...)
	}
	return out
}

// plainNumber returns a float64, or for an integer: an int32 if it fits, else a
// non-negative int64 if it fits, else text.
func plainNumber(text []byte) any {
	if !isInteger(text) {
		return parseFloat(text)
	}
	n, err := strconv.ParseInt(string(text), 10, 64)
	switch {
	case err != nil:
		return string(text)
	case n == int64(int32(n)):
		return int32(n)
	case n < 0:
		return string(text)
	}
	return n
}

// isInteger reports whether the text of a number is an integer, not a float.
func isInteger(number []byte) bool { return !bytes.ContainsAny(number, ".eENI") }

// parseFloat parses a number as Python's float does. Overflow gives an
// infinity in both languages, and both accept NaN and the infinities.
func parseFloat(number []byte) float64 {
	f, _ := strconv.ParseFloat(string(number), 64)
	return f
}

package protocol

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// reprMax is Celery's limit on argsrepr and kwargsrepr, in characters.
const reprMax = 1024

// reprLevels is the depth at which Celery's saferepr writes "..." instead.
const reprLevels = 3

// argsRepr returns Celery's value of the header argsrepr: text for logs, cut
// after about 1024 characters. Celery shows a tuple, or a list where it sends a
// signature's own arguments unchanged.
func argsRepr(args []json.RawMessage, tuple bool) string {
	r := reprWriter{left: reprMax}
	switch {
	case !tuple && len(args) > 0:
		r.container("[", "]", func() { r.items(args) })
	case len(args) == 1:
		r.container("(", ",)", func() { r.items(args) })
	default:
		r.container("(", ")", func() { r.items(args) })
	}
	return r.out.String()
}

// kwargsRepr returns Celery's value of the header kwargsrepr.
func kwargsRepr(kwargs Object) string {
	r := reprWriter{left: reprMax}
	r.container("{", "}", func() { r.pairs(kwargs) })
	return r.out.String()
}

// A reprWriter is Celery's saferepr: Python's repr with a limit on length and
// depth. All brackets are closed.
type reprWriter struct {
	out   strings.Builder
	left  int
	level int
	// cut is set once the limit is exceeded. After that, only closing
	// brackets are written.
	cut bool
}

// full reports whether the limit is reached, and then writes the "...".
func (r *reprWriter) full() bool {
	if !r.cut && r.left <= 0 {
		r.cut = true
		r.out.WriteString(", ...")
	}
	return r.cut
}

func (r *reprWriter) write(text string) {
	r.out.WriteString(text)
	r.left -= utf8.RuneCountInString(text)
}

func (r *reprWriter) text(text string) {
	if !r.full() {
		r.write(text)
	}
}

func (r *reprWriter) container(start, end string, content func()) {
	if r.full() {
		return
	}
	if r.level >= reprLevels {
		r.write(start + "..." + end)
		return
	}
	r.write(start)
	r.level++
	content()
	r.level--
	r.write(end)
}

func (r *reprWriter) items(items []json.RawMessage) {
	for i, item := range items {
		if i > 0 {
			r.text(", ")
		}
		if r.cut {
			return
		}
		r.value(item)
	}
}

func (r *reprWriter) pairs(o Object) {
	for i, m := range o {
		if i > 0 {
			r.text(", ")
		}
		if r.full() {
			return
		}
		r.write(r.quoted(m.Key))
		r.text(": ")
		r.value(m.Value)
	}
}

// quoted is saferepr's quoting, which escapes only the quote.
func (r *reprWriter) quoted(text string) string {
	return "'" + strings.ReplaceAll(truncate(printable(text), r.left), "'", `\'`) + "'"
}

func (r *reprWriter) value(text json.RawMessage) {
	if r.full() {
		return
	}
	switch k := kindOf(text); k {
	case kindArray:
		items, _ := elements(text)
		r.container("[", "]", func() { r.items(items) })
	case kindObject:
		o, _ := members(text)
		if special, ok := wrapperRepr(o); ok {
			r.write(special)
			return
		}
		r.container("{", "}", func() { r.pairs(o) })
	case kindString:
		r.write(r.quoted(textOf(text)))
	default:
		r.write(truncate(scalarRepr(k, text), r.left))
	}
}

// truncate is Celery's truncate: it cuts at a space if there is one.
func truncate(text string, most int) string {
	if most <= 0 || utf8.RuneCountInString(text) < most {
		return text
	}
	cut := 0
	for range most {
		_, n := utf8.DecodeRuneInString(text[cut:])
		cut += n
	}
	text = text[:cut]
	if space := strings.LastIndexByte(text, ' '); space >= 0 {
		text = text[:space]
	}
	return text + "..."
}

// printable writes lone surrogates as escapes: a header must be UTF-8.
func printable(text string) string {
	if utf8.ValidString(text) {
		return text
	}
	var out strings.Builder
	for len(text) > 0 {
		r, n := nextRune(text)
		if 0xD800 <= r && r < 0xE000 {
			fmt.Fprintf(&out, `\u%04x`, r)
		} else {
			out.WriteRune(r)
		}
		text = text[n:]
	}
	return out.String()
}

// scalarRepr is Python's repr of null, a bool, or a number.
func scalarRepr(k kind, text json.RawMessage) string {
	switch k {
	case kindNull:
		return "None"
	case kindBool:
		if textIs(text, "true") {
			return "True"
		}
		return "False"
	}
	number := strings.TrimSpace(string(text))
	if isInteger([]byte(number)) {
		if number == "-0" {
			return "0"
		}
		return number
	}
	switch out := string(appendFloat(nil, parseFloat([]byte(number)))); out {
	case "NaN":
		return "nan"
	case "Infinity":
		return "inf"
	case "-Infinity":
		return "-inf"
	default:
		return out
	}
}

func textIs(text json.RawMessage, want string) bool { return strings.TrimSpace(string(text)) == want }

// wrapperRepr is Python's repr of the object that a type wrapper stands for.
func wrapperRepr(o Object) (string, bool) {
	name, value, ok := wrapper(o)
	if !ok {
		return "", false
	}
	switch name {
	case "decimal":
		return "Decimal(" + PythonRepr(textOf(value)) + ")", true
	case "uuid":
		if id, err := parseUUID(value); err == nil {
			return "UUID('" + id.String() + "')", true
		}
	case "bytes":
		return "b'" + printable(textOf(value)) + "'", true
	case "datetime", "date", "time":
		return timeRepr(name, textOf(value))
	}
	return "", false
}

// pyRepr is Python's repr of a JSON value.
func pyRepr(text json.RawMessage) string {
	switch k := kindOf(text); k {
	case kindArray:
		items, _ := elements(text)
		parts := make([]string, len(items))
		for i, item := range items {
			parts[i] = pyRepr(item)
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case kindObject:
		o, _ := members(text)
		if name, value, ok := wrapper(o); ok && (name == "bytes" || name == "base64") {
			if content, err := unwrap(name, value); err == nil {
				return bytesRepr(content.([]byte))
			}
		}
		if special, ok := wrapperRepr(o); ok {
			return special
		}
		parts := make([]string, len(o))
		for i, m := range o {
			parts[i] = PythonRepr(m.Key) + ": " + pyRepr(m.Value)
		}
		return "{" + strings.Join(parts, ", ") + "}"
	case kindString:
		return PythonRepr(textOf(text))
	default:
		return scalarRepr(k, text)
	}
}

// bytesRepr is Python's repr of bytes: b'\xff\n'.
func bytesRepr(content []byte) string {
	quote := byte('\'')
	if bytes.IndexByte(content, '\'') >= 0 && bytes.IndexByte(content, '"') < 0 {
		quote = '"'
	}
	out := []byte{'b', quote}
	for _, c := range content {
		switch {
		case c == quote || c == '\\':
			out = append(out, '\\', c)
		case c == '\n':
			out = append(out, `\n`...)
		case c == '\r':
			out = append(out, `\r`...)
		case c == '\t':
			out = append(out, `\t`...)
		case c < 0x20 || c >= 0x7F:
			out = fmt.Appendf(out, `\x%02x`, c)
		default:
			out = append(out, c)
		}
	}
	return string(append(out, quote))
}

// PythonRepr is Python's repr of a str, as in the texts of its exceptions.
func PythonRepr(text string) string {
	quote := byte('\'')
	if strings.Contains(text, "'") && !strings.Contains(text, `"`) {
		quote = '"'
	}
	out := []byte{quote}
	for len(text) > 0 {
		r, n := nextRune(text)
		switch {
		case r == rune(quote) || r == '\\':
			out = append(out, '\\', byte(r))
		case r == '\n':
			out = append(out, `\n`...)
		case r == '\r':
			out = append(out, `\r`...)
		case r == '\t':
			out = append(out, `\t`...)
		case r < 0x80 && !strconv.IsPrint(r), r >= 0x80 && r <= 0xFF && !unicode.IsPrint(r):
			out = fmt.Appendf(out, `\x%02x`, r)
		case unicode.IsPrint(r):
			out = utf8.AppendRune(out, r)
		case r <= 0xFFFF:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = fmt.Appendf(out, `\U%08x`, r)
		}
		text = text[n:]
	}
	return string(append(out, quote))
}

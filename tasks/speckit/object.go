package speckit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// object is a JSON object that keeps the order of its keys, as Python's dict. The
// context of the chain is one: keys that this program does not know are passed on.
type object struct {
	keys   []string
	values map[string]json.RawMessage
}

// maxContext bounds the context of a chain, in bytes.
const maxContext = 1 << 20

// parseObject parses a JSON object. Of a repeated key the last value counts, as in
// Python.
func parseObject(text json.RawMessage) (*object, error) {
	if len(text) > maxContext {
		return nil, fmt.Errorf("the object has %d bytes, more than %d", len(text), maxContext)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	if token, err := decoder.Token(); err != nil || token != json.Delim('{') {
		return nil, fmt.Errorf("%s is not an object", head(string(text)))
	}
	o := newObject()
	for decoder.More() {
		token, err := decoder.Token()
		if err != nil {
			return nil, err
		}
		key, _ := token.(string)
		var value json.RawMessage
		if err := decoder.Decode(&value); err != nil {
			return nil, err
		}
		o.setRaw(key, value)
	}
	return o, nil
}

func newObject() *object { return &object{values: map[string]json.RawMessage{}} }

// head shortens a text for an error.
func head(text string) string {
	if len(text) <= 80 {
		return text
	}
	return strings.ToValidUTF8(text[:80], "") + "…"
}

func (o *object) setRaw(key string, value json.RawMessage) {
	if _, has := o.values[key]; !has {
		o.keys = append(o.keys, key)
	}
	o.values[key] = value
}

// set sets a key to a text, a number, a boolean, nil, a list of texts or an object.
func (o *object) set(key string, value any) { o.setRaw(key, rawOf(value)) }

// setDefault sets a key that is absent.
func (o *object) setDefault(key string, value any) {
	if _, has := o.values[key]; !has {
		o.set(key, value)
	}
}

func rawOf(value any) json.RawMessage {
	if o, is := value.(*object); is {
		return o.compact()
	}
	text, err := json.Marshal(value)
	if err != nil {
		panic(err) // only the types that set names
	}
	return text
}

// text returns a text that is neither null nor empty, or "".
func (o *object) text(key string) string {
	var text string
	if json.Unmarshal(o.values[key], &text) != nil {
		return ""
	}
	return text
}

// truthy says whether a value is true for Python's `if`.
func (o *object) truthy(key string) bool {
	switch string(bytes.TrimSpace(o.values[key])) {
	case "", "null", "false", "0", `""`, "[]", "{}", "0.0", "-0":
		return false
	}
	return true
}

// inner returns the object at key, or nil.
func (o *object) inner(key string) *object {
	inner, err := parseObject(o.values[key])
	if err != nil {
		return nil
	}
	return inner
}

// raw returns a value, or null.
func (o *object) raw(key string) json.RawMessage {
	if value, has := o.values[key]; has {
		return value
	}
	return json.RawMessage("null")
}

// compact writes the object without white space.
func (o *object) compact() json.RawMessage {
	var out bytes.Buffer
	out.WriteByte('{')
	for i, key := range o.keys {
		if i > 0 {
			out.WriteByte(',')
		}
		name, _ := json.Marshal(key) // a string always encodes
		out.Write(name)
		out.WriteByte(':')
		out.Write(o.values[key])
	}
	out.WriteByte('}')
	return out.Bytes()
}

// python writes the object as Python's json.dumps(o) does, or with indent 2 as
// json.dumps(o, indent=2): ", " and ": " between items, and only ASCII.
func (o *object) python(indent bool) (string, error) {
	var out strings.Builder
	if err := writePython(&out, o.compact(), indent, "\n"); err != nil {
		return "", err
	}
	return out.String(), nil
}

func writePython(out *strings.Builder, text json.RawMessage, indent bool, line string) error {
	text = bytes.TrimSpace(text)
	between, start, end := ", ", "", ""
	if indent {
		between, start, end = ","+line+"  ", line+"  ", line
	}
	switch text[0] {
	case '{':
		o, err := parseObject(text)
		if err != nil {
			return err
		}
		if len(o.keys) == 0 {
			out.WriteString("{}")
			return nil
		}
		out.WriteString("{" + start)
		for i, key := range o.keys {
			if i > 0 {
				out.WriteString(between)
			}
			quoted, err := protocol.EncodeJSON(key)
			if err != nil {
				return err
			}
			out.Write(quoted)
			out.WriteString(": ")
			if err := writePython(out, o.values[key], indent, line+"  "); err != nil {
				return err
			}
		}
		out.WriteString(end + "}")
	case '[':
		var items []json.RawMessage
		if err := json.Unmarshal(text, &items); err != nil {
			return err
		}
		if len(items) == 0 {
			out.WriteString("[]")
			return nil
		}
		out.WriteString("[" + start)
		for i, item := range items {
			if i > 0 {
				out.WriteString(between)
			}
			if err := writePython(out, item, indent, line+"  "); err != nil {
				return err
			}
		}
		out.WriteString(end + "]")
	case '"':
		var s string
		if err := json.Unmarshal(text, &s); err != nil {
			return err
		}
		quoted, err := protocol.EncodeJSON(s)
		if err != nil {
			return err
		}
		out.Write(quoted)
	default:
		out.Write(text)
	}
	return nil
}

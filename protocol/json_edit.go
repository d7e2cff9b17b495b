package protocol

import (
	"bytes"
	"encoding/json"
)

// joinArray writes an array with Python's separators.
func joinArray(items []json.RawMessage) json.RawMessage {
	out := []byte{'['}
	for i, item := range items {
		if i > 0 {
			out = append(out, ", "...)
		}
		out = append(out, item...)
	}
	return append(out, ']')
}

// joinObject writes an object with Python's separators.
func joinObject(o Object) json.RawMessage {
	out := []byte{'{'}
	for i, m := range o {
		if i > 0 {
			out = append(out, ", "...)
		}
		out = appendQuoted(out, m.Key)
		out = append(out, ": "...)
		out = append(out, m.Value...)
	}
	return append(out, '}')
}

// setMembers sets members in the text of an object and leaves all other bytes
// unchanged. New members are appended.
func setMembers(text json.RawMessage, set []Member) (json.RawMessage, error) {
	for _, m := range set {
		s := scanner{text: text}
		if k, err := s.peek(); err != nil || k != kindObject {
			return nil, s.fail("an object is expected")
		}
		start, end, count := -1, 0, 0
		err := s.object(func(key string) error {
			count++
			s.space()
			from := s.pos
			err := s.skip()
			if key == m.Key {
				start, end = from, s.pos
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		var out []byte
		if start >= 0 {
			out = append(append(append(out, text[:start]...), m.Value...), text[end:]...)
		} else {
			brace := bytes.LastIndexByte(text, '}')
			out = append(out, text[:brace]...)
			if count > 0 {
				out = append(out, ", "...)
			}
			out = append(append(appendQuoted(out, m.Key), ": "...), m.Value...)
			out = append(out, text[brace:]...)
		}
		text = out
	}
	return text, nil
}

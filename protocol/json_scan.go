package protocol

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"unicode/utf8"
)

// maxDepth is how deeply arrays and objects may be nested, in JSON and in
// pickles: about as deeply as Python's recursion limit allows.
const maxDepth = 960

// SyntaxError says that a text is not Python's dialect of JSON.
type SyntaxError struct {
	// Offset is the position of the error, in bytes.
	Offset int
	// Why is the reason, one clause.
	Why string
}

// Error names the position and the reason.
func (e *SyntaxError) Error() string {
	return fmt.Sprintf("not JSON at byte %d: %s", e.Offset, e.Why)
}

type kind byte

const (
	kindNull kind = iota
	kindBool
	kindNumber
	kindString
	kindArray
	kindObject
)

// A scanner reads Python's dialect of JSON (docs/celery.md#pythons-json) in one
// pass: the standard, plus NaN, Infinity and -Infinity. The text must be valid
// UTF-8.
type scanner struct {
	text  []byte
	pos   int
	depth int
}

func (s *scanner) fail(why string) error { return &SyntaxError{Offset: s.pos, Why: why} }

func (s *scanner) space() {
	for s.pos < len(s.text) {
		switch s.text[s.pos] {
		case ' ', '\t', '\n', '\r':
			s.pos++
		default:
			return
		}
	}
}

// peek moves to the next value and returns its kind, judged by the first byte.
func (s *scanner) peek() (kind, error) {
	s.space()
	if s.pos >= len(s.text) {
		return 0, s.fail("the text ends where a value is expected")
	}
	switch c := s.text[s.pos]; {
	case c == 'n':
		return kindNull, nil
	case c == 't', c == 'f':
		return kindBool, nil
	case c == '"':
		return kindString, nil
	case c == '[':
		return kindArray, nil
	case c == '{':
		return kindObject, nil
	case c == '-', c == 'N', c == 'I', '0' <= c && c <= '9':
		return kindNumber, nil
	}
	return 0, s.fail("no value begins with this character")
}

// skip moves past one value.
func (s *scanner) skip() error {
	k, err := s.peek()
	if err != nil {
		return err
	}
	switch k {
	case kindArray:
		return s.array(s.skip)
	case kindObject:
		return s.quotedKeys(func([]byte) error { return s.skip() })
	}
	_, err = s.scalar(k)
	return err
}

// raw moves past one value and returns its text.
func (s *scanner) raw() (json.RawMessage, error) {
	s.space()
	start := s.pos
	err := s.skip()
	return json.RawMessage(s.text[start:s.pos:s.pos]), err
}

// scalar moves past a value that is neither an array nor an object, and returns
// its text.
func (s *scanner) scalar(k kind) ([]byte, error) {
	start := s.pos
	switch k {
	case kindNull:
		return s.word("null")
	case kindBool:
		if s.text[s.pos] == 't' {
			return s.word("true")
		}
		return s.word("false")
	case kindString:
		if err := s.skipString(); err != nil {
			return nil, err
		}
		return s.text[start:s.pos], nil
	}
	return s.number()
}

func (s *scanner) word(w string) ([]byte, error) {
	if !bytes.HasPrefix(s.text[s.pos:], []byte(w)) {
		return nil, s.fail("unknown word")
	}
	s.pos += len(w)
	return s.text[s.pos-len(w) : s.pos], nil
}

func (s *scanner) number() ([]byte, error) {
	start := s.pos
	switch s.text[s.pos] {
	case 'N':
		return s.word("NaN")
	case 'I':
		return s.word("Infinity")
	case '-':
		s.pos++
		if s.pos < len(s.text) && s.text[s.pos] == 'I' {
			s.pos--
			return s.word("-Infinity")
		}
	}
	if s.pos < len(s.text) && s.text[s.pos] == '0' {
		s.pos++
	} else if s.digits() == 0 {
		return nil, s.fail("a number needs digits")
	}
	if s.pos+1 < len(s.text) && s.text[s.pos] == '.' && isDigit(s.text[s.pos+1]) {
		s.pos++
		s.digits()
	}
	if s.pos < len(s.text) && (s.text[s.pos] == 'e' || s.text[s.pos] == 'E') {
		at := s.pos
		s.pos++
		if s.pos < len(s.text) && (s.text[s.pos] == '+' || s.text[s.pos] == '-') {
			s.pos++
		}
		if s.digits() == 0 {
			s.pos = at
		}
	}
	if s.pos-start > maxDigits {
		return nil, s.fail("a number with too many digits")
	}
	return s.text[start:s.pos], nil
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

func (s *scanner) digits() int {
	start := s.pos
	for s.pos < len(s.text) && isDigit(s.text[s.pos]) {
		s.pos++
	}
	return s.pos - start
}

// maxDigits is the limit on the length of a number, since the time of a
// conversion grows faster than the length. Python since 3.11 has a lower limit:
// 4300 digits.
const maxDigits = 1 << 16

func (s *scanner) skipString() error {
	s.pos++
	for s.pos < len(s.text) {
		switch c := s.text[s.pos]; {
		case c == '"':
			s.pos++
			return nil
		case c < 0x20:
			return s.fail("control character in a string")
		case c == '\\':
			s.pos++
			if s.pos >= len(s.text) {
				return s.fail("the text ends in a string")
			}
			switch s.text[s.pos] {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
			case 'u':
				if _, ok := hex4(s.text[s.pos+1:]); !ok {
					return s.fail(`\u needs four hexadecimal digits`)
				}
				s.pos += 4
			default:
				return s.fail("unknown escape in a string")
			}
			s.pos++
		default:
			s.pos++
		}
	}
	return s.fail("the text ends in a string")
}

func hex4(b []byte) (rune, bool) {
	if len(b) < 4 {
		return 0, false
	}
	var r rune
	for _, c := range b[:4] {
		switch {
		case isDigit(c):
			r = r<<4 | rune(c-'0')
		case 'a' <= c && c <= 'f':
			r = r<<4 | rune(c-'a'+10)
		case 'A' <= c && c <= 'F':
			r = r<<4 | rune(c-'A'+10)
		default:
			return 0, false
		}
	}
	return r, true
}

// array moves past an array and calls each at every element; each must move
// past that element.
func (s *scanner) array(each func() error) error {
	return s.container(']', each)
}

// object moves past an object and calls each for every key; each must move
// past the value.
func (s *scanner) object(each func(key string) error) error {
	return s.quotedKeys(func(key []byte) error { return each(unquoteJSON(key)) })
}

// quotedKeys is object with the texts of the keys.
func (s *scanner) quotedKeys(each func(key []byte) error) error {
	return s.container('}', func() error {
		s.space()
		if s.pos >= len(s.text) || s.text[s.pos] != '"' {
			return s.fail("a key in double quotes is expected")
		}
		start := s.pos
		if err := s.skipString(); err != nil {
			return err
		}
		key := s.text[start:s.pos]
		s.space()
		if s.pos >= len(s.text) || s.text[s.pos] != ':' {
			return s.fail("a colon is expected")
		}
		s.pos++
		return each(key)
	})
}

func (s *scanner) container(end byte, each func() error) error {
	if s.depth++; s.depth > maxDepth {
		return s.fail("nested too deeply")
	}
	s.pos++
	s.space()
	if s.pos < len(s.text) && s.text[s.pos] == end {
		s.pos++
		s.depth--
		return nil
	}
	for {
		if err := each(); err != nil {
			return err
		}
		s.space()
		if s.pos >= len(s.text) {
			return s.fail("the text ends in an array or object")
		}
		switch s.text[s.pos] {
		case ',':
			s.pos++
		case end:
			s.pos++
			s.depth--
			return nil
		default:
			return s.fail("a comma is expected")
		}
	}
}

// end checks that only white space follows.
func (s *scanner) end() error {
	s.space()
	if s.pos < len(s.text) {
		return s.fail("more text after the value")
	}
	return nil
}

func checkJSON(text []byte) error {
	if !utf8.Valid(text) {
		return &SyntaxError{Why: "the text is not UTF-8"}
	}
	s := scanner{text: text}
	if err := s.skip(); err != nil {
		return err
	}
	return s.end()
}

// kindOf returns the kind of a checked text.
func kindOf(text json.RawMessage) kind {
	s := scanner{text: text}
	k, err := s.peek()
	if err != nil {
		return kindNull
	}
	return k
}

func isNull(text json.RawMessage) bool { return kindOf(text) == kindNull }

// elements splits an array. The result is never nil.
func elements(text json.RawMessage) ([]json.RawMessage, error) {
	s := scanner{text: text}
	items := make([]json.RawMessage, 0, max(elementCount(text), room(text)))
	if k, err := s.peek(); err != nil || k != kindArray {
		return nil, s.fail("an array is expected")
	}
	err := s.array(func() error {
		item, err := s.raw()
		items = append(items, item)
		return err
	})
	return items, err
}

// elementCount counts the elements of a large array, since growing a slice to
// their number costs several times its size. It returns 0 for other texts.
func elementCount(text json.RawMessage) int {
	const large = 64 << 10
	if len(text) < large || kindOf(text) != kindArray {
		return 0
	}
	n := 0
	s := scanner{text: text}
	if s.array(func() error { n++; return s.skip() }) != nil {
		return 0
	}
	return n
}

// room is for how many elements or members a slice has room at first: one that grows from
// one element to three takes twice as much.
func room(text json.RawMessage) int {
	if len(text) <= len("[]") {
		return 0
	}
	return 4
}

// smallObject is how many members of an object are compared one by one: a map of their keys
// would take longer to build.
const smallObject = 8

// members splits an object. For a repeated key the last value is kept, at the
// place of the first, as in Python. The result is never nil.
func members(text json.RawMessage) (Object, error) {
	s := scanner{text: text}
	o := make(Object, 0, room(text))
	if k, err := s.peek(); err != nil || k != kindObject {
		return nil, s.fail("an object is expected")
	}
	var seen map[string]int // of a large object
	err := s.object(func(key string) error {
		value, err := s.raw()
		at, repeated := seen[key]
		if seen == nil {
			at = slices.IndexFunc(o, func(m Member) bool { return m.Key == key })
			repeated = at >= 0
		}
		if repeated {
			o[at].Value = value
			return err
		}
		o = append(o, Member{Key: key, Value: value})
		if seen != nil {
			seen[key] = len(o) - 1
		} else if len(o) == smallObject {
			seen = make(map[string]int, 2*smallObject)
			for i, m := range o {
				seen[m.Key] = i
			}
		}
		return err
	})
	return o, err
}

package protocol

import (
	"encoding"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// EncodeError says that [EncodeJSON] cannot encode a value. The error is
// permanent: a retry fails in the same way.
type EncodeError struct {
	// Path is the path to the value, such as "items[3].price"; "" is the
	// outermost value.
	Path string
	// Type is the Go type of the value.
	Type string
	// Why is the reason, one clause.
	Why string
}

// Error names the path, the Go type and the reason.
func (e *EncodeError) Error() string {
	where := "value"
	if e.Path != "" {
		where = "value at " + e.Path
	}
	return fmt.Sprintf("%s of type %s cannot be encoded as JSON: %s", where, e.Type, e.Why)
}

// Exception returns the exception that Celery stores in this case.
func (e *EncodeError) Exception() Exception {
	return NewException("kombu.exceptions", "EncodeError", e.Error())
}

// EncodeJSON encodes v as Python's json.dumps does, in kombu's dialect
// (docs/celery.md#pythons-json):
//
//   - Separators are ", " and ": "; characters outside of ASCII become \u
//     escapes.
//   - Floats are written as Python prints them, NaN and Infinity included; a
//     *big.Int is written in full.
//   - Structs follow their encoding/json tags, in the order of their fields;
//     maps are sorted by key.
//   - []byte, time.Time, [Decimal], [UUID], [Date] and [TimeOfDay] are written
//     in type wrappers. A time.Time in the location [Naive] has no zone. A value
//     that Python's type does not have is an error.
//   - A json.RawMessage is checked and written unchanged. Nil is null.
//
// The error is an [*EncodeError].
func EncodeJSON(v any) (json.RawMessage, error) {
	e := encoder{}
	if err := e.value(reflect.ValueOf(v)); err != nil {
		return nil, err
	}
	return e.out, nil
}

// What Python's Decimal and time.fromisoformat read, in all versions that Celery
// supports. Other text in a wrapper would make Python refuse the whole message.
var (
	pythonDecimal = regexp.MustCompile(`(?i)^[+-]?(([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|inf(inity)?|s?nan[0-9]*)$`)
	pythonTime    = regexp.MustCompile(`^([01][0-9]|2[0-3])(:[0-5][0-9](:[0-5][0-9](\.([0-9]{3}|[0-9]{6}))?)?)?([+-]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{6})?)?)?$`)
)

type encoder struct {
	out  []byte
	path []string
}

func (e *encoder) fail(v reflect.Value, why string) error {
	return &EncodeError{Path: strings.TrimPrefix(strings.Join(e.path, ""), "."), Type: v.Type().String(), Why: why}
}

func (e *encoder) value(v reflect.Value) error {
	if !v.IsValid() {
		e.out = append(e.out, "null"...)
		return nil
	}
	if len(e.path) > maxDepth {
		return e.fail(v, "nested too deeply, or it contains itself")
	}
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Map, reflect.Slice:
		if v.IsNil() {
			e.out = append(e.out, "null"...)
			return nil
		}
	}
	if done, err := e.special(v); done {
		return err
	}
	switch v.Kind() {
	case reflect.Bool:
		e.out = strconv.AppendBool(e.out, v.Bool())
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		e.out = strconv.AppendInt(e.out, v.Int(), 10)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64, reflect.Uintptr:
		e.out = strconv.AppendUint(e.out, v.Uint(), 10)
	case reflect.Float32:
		f := v.Float()
		if f != math.Trunc(f) {
			// The shortest text that gives the same float32, not its float64: 0.1.
			f, _ = strconv.ParseFloat(strconv.FormatFloat(f, 'g', -1, 32), 64)
		}
		e.out = appendFloat(e.out, f)
	case reflect.Float64:
		e.out = appendFloat(e.out, v.Float())
	case reflect.String:
		e.out = appendQuoted(e.out, v.String())
	case reflect.Pointer, reflect.Interface:
		return e.at("", v.Elem())
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			e.out = append(e.out, wrapBytes(v.Bytes())...)
			return nil
		}
		return e.list(v)
	case reflect.Array:
		return e.list(v)
	case reflect.Map:
		return e.mapping(v)
	case reflect.Struct:
		return e.structure(v)
	default:
		return e.fail(v, "JSON has no such kind")
	}
	return nil
}

// at encodes a part of a value, and extends the path for errors.
func (e *encoder) at(step string, v reflect.Value) error {
	e.path = append(e.path, step)
	err := e.value(v)
	e.path = e.path[:len(e.path)-1]
	return err
}

// special encodes the types that have an encoding of their own.
func (e *encoder) special(v reflect.Value) (done bool, err error) {
	if !v.CanInterface() {
		return false, nil
	}
	switch x := v.Interface().(type) {
	case json.RawMessage:
		if err := checkJSON(x); err != nil {
			return true, e.fail(v, err.Error())
		}
		e.out = append(e.out, x...)
	case json.Number:
		if err := checkJSON([]byte(x)); err != nil || kindOf(json.RawMessage(x)) != kindNumber {
			return true, e.fail(v, "not a number")
		}
		e.out = append(e.out, x...)
	case time.Time:
		if y := x.Year(); y < 1 || y > 9999 {
			return true, e.fail(v, "Python's datetime has only the years 1 to 9999")
		}
		e.out = append(e.out, wrapTime(x)...)
	case Decimal:
		if !pythonDecimal.MatchString(string(x)) {
			return true, e.fail(v, quote(truncate(string(x), 60))+" is no number of Python's decimal")
		}
		e.out = append(e.out, wrap("decimal", quoteJSON(string(x)))...)
	case UUID:
		e.out = append(e.out, wrapUUID(x)...)
	case TimeOfDay:
		if !pythonTime.MatchString(string(x)) {
			return true, e.fail(v, quote(truncate(string(x), 60))+" is not as Python's datetime.time prints a time")
		}
		e.out = append(e.out, wrap("time", quoteJSON(string(x)))...)
	case Date:
		if x.Year < 1 || x.Year > 9999 || !isDay(x.Year, x.Month, x.Day) {
			return true, e.fail(v, x.String()+" is no day of Python's calendar")
		}
		e.out = append(e.out, wrap("date", quoteJSON(x.String()))...)
	case Object:
		return true, e.object(v, x)
	case big.Int:
		e.out = x.Append(e.out, 10)
	case *big.Int:
		e.out = x.Append(e.out, 10)
	case *time.Time: // its MarshalJSON would make it text
		return e.special(v.Elem())
	case json.Marshaler:
		text, err := x.MarshalJSON()
		if err != nil {
			return true, e.fail(v, err.Error())
		}
		return true, e.restyle(v, text)
	case encoding.TextMarshaler:
		text, err := x.MarshalText()
		if err != nil {
			return true, e.fail(v, err.Error())
		}
		e.out = appendQuoted(e.out, string(text))
	default:
		if v.CanAddr() && v.Kind() != reflect.Pointer {
			switch v.Addr().Interface().(type) {
			case json.Marshaler, encoding.TextMarshaler:
				return e.special(v.Addr())
			}
		}
		return false, nil
	}
	return true, nil
}

func (e *encoder) object(v reflect.Value, o Object) error {
	e.out = append(e.out, '{')
	for i, m := range o {
		if err := checkJSON(m.Value); err != nil {
			return e.fail(v, err.Error())
		}
		e.key(i, m.Key)
		e.out = append(e.out, m.Value...)
	}
	e.out = append(e.out, '}')
	return nil
}

func (e *encoder) key(index int, key string) {
	if index > 0 {
		e.out = append(e.out, ", "...)
	}
	e.out = append(appendQuoted(e.out, key), ": "...)
}

// restyle writes the output of a json.Marshaler with Python's separators and
// escapes.
func (e *encoder) restyle(v reflect.Value, text []byte) error {
	if err := checkJSON(text); err != nil {
		return e.fail(v, err.Error())
	}
	s := scanner{text: text}
	e.out, _ = appendRestyled(e.out, &s)
	return nil
}

func appendRestyled(out []byte, s *scanner) ([]byte, error) {
	k, err := s.peek()
	if err != nil {
		return out, err
	}
	first := true
	comma := func() {
		if !first {
			out = append(out, ", "...)
		}
		first = false
	}
	switch k {
	case kindArray:
		out = append(out, '[')
		err = s.array(func() (err error) {
			comma()
			out, err = appendRestyled(out, s)
			return err
		})
		return append(out, ']'), err
	case kindObject:
		out = append(out, '{')
		err = s.object(func(key string) (err error) {
			comma()
			out = append(appendQuoted(out, key), ": "...)
			out, err = appendRestyled(out, s)
			return err
		})
		return append(out, '}'), err
	}
	text, err := s.scalar(k)
	if k == kindString && err == nil {
		return appendQuoted(out, unquoteJSON(text)), nil
	}
	return append(out, text...), err
}

func (e *encoder) list(v reflect.Value) error {
	e.out = append(e.out, '[')
	for i := range v.Len() {
		if i > 0 {
			e.out = append(e.out, ", "...)
		}
		if err := e.at("["+strconv.Itoa(i)+"]", v.Index(i)); err != nil {
			return err
		}
	}
	e.out = append(e.out, ']')
	return nil
}

func (e *encoder) mapping(v reflect.Value) error {
	type entry struct {
		key   string
		value reflect.Value
	}
	var entries []entry
	for it := v.MapRange(); it.Next(); {
		key, err := e.mapKey(it.Key())
		if err != nil {
			return err
		}
		entries = append(entries, entry{key, it.Value()})
	}
	slices.SortFunc(entries, func(a, b entry) int { return strings.Compare(a.key, b.key) })
	e.out = append(e.out, '{')
	for i, entry := range entries {
		e.key(i, entry.key)
		if err := e.at("."+entry.key, entry.value); err != nil {
			return err
		}
	}
	e.out = append(e.out, '}')
	return nil
}

func (e *encoder) mapKey(v reflect.Value) (string, error) {
	if v.Kind() == reflect.String {
		return v.String(), nil
	}
	if m, ok := v.Interface().(encoding.TextMarshaler); ok {
		text, err := m.MarshalText()
		if err != nil {
			return "", e.fail(v, err.Error())
		}
		return string(text), nil
	}
	switch {
	case v.CanInt():
		return strconv.FormatInt(v.Int(), 10), nil
	case v.CanUint():
		return strconv.FormatUint(v.Uint(), 10), nil
	}
	return "", e.fail(v, "a key must be text or an integer")
}

func (e *encoder) structure(v reflect.Value) error {
	e.out = append(e.out, '{')
	n := 0
	for _, f := range fieldsOf(v.Type()) {
		field, err := v.FieldByIndexErr(f.index)
		if err != nil || f.omit(field) {
			continue
		}
		e.key(n, f.name)
		n++
		if !f.quoted {
			if err := e.at("."+f.name, field); err != nil {
				return err
			}
			continue
		}
		start := len(e.out)
		if err := e.at("."+f.name, field); err != nil {
			return err
		}
		text := string(e.out[start:])
		e.out = appendQuoted(e.out[:start], text)
	}
	e.out = append(e.out, '}')
	return nil
}

package protocol

import (
	"encoding"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// ValueError says that [DecodeJSON] could not store a JSON value in a Go value.
type ValueError struct {
	// Path is the path to the value, such as "items[3].price"; "" is the
	// outermost value.
	Path string
	// Type is the Go type of the target.
	Type string
	// Why is the reason, one clause.
	Why string
}

// Error names the path, the Go type and the reason.
func (e *ValueError) Error() string {
	where := "value"
	if e.Path != "" {
		where = "value at " + e.Path
	}
	return fmt.Sprintf("%s does not fit %s: %s", where, e.Type, e.Why)
}

// DecodeJSON is the inverse of [EncodeJSON]: it decodes text in Python's
// dialect of JSON into the value that v points to. The rules are those of
// encoding/json, with these differences:
//
//   - Floats accept NaN, Infinity and -Infinity.
//   - A type wrapper is decoded into a time.Time, []byte, [Decimal], [UUID],
//     [Date] or [TimeOfDay]. An any receives a value of one of these types. A
//     datetime without a zone is a time.Time in the location [Naive], so that
//     [EncodeJSON] writes all of these as they came. A string accepts a
//     datetime.time, too.
//   - Null is an error where the target is a number: it is Python's None, and 0
//     would be another value. A pointer to a number receives nil.
//   - A number in an any becomes an int64, or a *big.Int if it is too large
//     for that, or a float64.
//   - An integer accepts a float without a fraction.
//
// The error is a [*SyntaxError] or a [*ValueError].
func DecodeJSON(text json.RawMessage, v any) error {
	if err := checkJSON(text); err != nil {
		return err
	}
	target := reflect.ValueOf(v)
	if target.Kind() != reflect.Pointer || target.IsNil() {
		return &ValueError{Type: fmt.Sprintf("%T", v), Why: "a pointer is needed"}
	}
	d := valueDecoder{scanner: scanner{text: text}}
	return d.value(target.Elem())
}

type valueDecoder struct {
	scanner
	path []string
}

func (d *valueDecoder) mismatch(v reflect.Value, why string) error {
	return &ValueError{Path: strings.TrimPrefix(strings.Join(d.path, ""), "."), Type: v.Type().String(), Why: why}
}

func (d *valueDecoder) at(step string, v reflect.Value) error {
	d.path = append(d.path, step)
	err := d.value(v)
	d.path = d.path[:len(d.path)-1]
	return err
}

var (
	rawType    = reflect.TypeFor[json.RawMessage]()
	bytesType  = reflect.TypeFor[[]byte]()
	bigIntType = reflect.TypeFor[big.Int]()
	numberType = reflect.TypeFor[json.Number]()
)

// value decodes the next value. The caller has checked the syntax.
func (d *valueDecoder) value(v reflect.Value) error {
	k, err := d.peek()
	if err != nil {
		return err
	}
	if v.Type() == rawType {
		text, err := d.raw()
		v.SetBytes([]byte(text))
		return err
	}
	if k == kindNull {
		if v.CanInt() || v.CanUint() || v.CanFloat() || v.Type() == bigIntType || v.Type() == numberType {
			return d.mismatch(v, "it is null (Python's None); a pointer would accept that")
		}
		v.SetZero()
		return d.skip()
	}
	if v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		return d.value(v.Elem())
	}
	switch v.Type() {
	case bigIntType:
		return d.bigInt(k, v)
	case numberType:
		text, err := d.raw()
		if k != kindNumber {
			return d.mismatch(v, "not a number")
		}
		v.SetString(string(text))
		return err
	}
	if k == kindObject {
		if done, err := d.wrapped(v); done {
			return err
		}
	}
	if done, err := d.unmarshaler(k, v); done {
		return err
	}
	if v.Kind() == reflect.Interface && v.NumMethod() == 0 {
		x, err := d.any(k)
		if err == nil && x != nil {
			v.Set(reflect.ValueOf(x))
		}
		return err
	}
	switch k {
	case kindArray:
		return d.list(v)
	case kindObject:
		return d.mapping(v)
	}
	text, err := d.scalar(k)
	if err != nil {
		return err
	}
	return d.plain(k, text, v)
}

func (d *valueDecoder) plain(k kind, text []byte, v reflect.Value) error {
	switch {
	case k == kindBool && v.Kind() == reflect.Bool:
		v.SetBool(text[0] == 't')
	case k == kindString && v.Kind() == reflect.String:
		v.SetString(unquoteJSON(text))
	case k == kindString && v.Type() == bytesType:
		v.SetBytes([]byte(unquoteJSON(text)))
	case k == kindNumber && v.CanFloat():
		f := parseFloat(text)
		if v.OverflowFloat(f) && !math.IsInf(f, 0) {
			return d.mismatch(v, "out of range")
		}
		v.SetFloat(f)
	case k == kindNumber && (v.CanInt() || v.CanUint()):
		return d.integer(text, v)
	default:
		return d.mismatch(v, "it is "+truncate(string(text), 60))
	}
	return nil
}

// integer sets an integer. It accepts a float without a fraction too: a Python
// caller may send 2.0 where it means 2.
func (d *valueDecoder) integer(text []byte, v reflect.Value) error {
	if !isInteger(text) {
		f := parseFloat(text)
		if f != math.Trunc(f) || math.Abs(f) > 1<<53 {
			return d.mismatch(v, "it is "+truncate(string(text), 60))
		}
		text = strconv.AppendInt(nil, int64(f), 10)
	}
	if v.CanInt() {
		n, err := strconv.ParseInt(string(text), 10, 64)
		if err != nil || v.OverflowInt(n) {
			return d.mismatch(v, "out of range")
		}
		v.SetInt(n)
		return nil
	}
	n, err := strconv.ParseUint(string(text), 10, 64)
	if err != nil || v.OverflowUint(n) {
		return d.mismatch(v, "out of range")
	}
	v.SetUint(n)
	return nil
}

func (d *valueDecoder) bigInt(k kind, v reflect.Value) error {
	text, err := d.raw()
	if err != nil {
		return err
	}
	n, ok := new(big.Int).SetString(string(text), 10)
	if k != kindNumber || !ok {
		return d.mismatch(v, "it is "+truncate(string(text), 60))
	}
	v.Set(reflect.ValueOf(n).Elem())
	return nil
}

// wrapped decodes a type wrapper if the target has the type for one.
func (d *valueDecoder) wrapped(v reflect.Value) (done bool, err error) {
	isAny := v.Kind() == reflect.Interface && v.NumMethod() == 0
	switch v.Interface().(type) {
	case time.Time, Date, TimeOfDay, Decimal, UUID, []byte, string:
	default:
		if !isAny {
			return false, nil
		}
	}
	look := d.scanner
	name, inner, ok := look.wrapper()
	if !ok {
		return false, nil
	}
	x, err := unwrap(name, inner)
	if err != nil {
		if isAny {
			return false, nil
		}
		return true, d.mismatch(v, "not a value of Python's type "+truncate(name, 60))
	}
	d.scanner = look
	if text, ok := x.(TimeOfDay); ok && v.Type() == reflect.TypeFor[string]() {
		v.SetString(string(text))
		return true, nil
	}
	if got := reflect.ValueOf(x); got.Type().AssignableTo(v.Type()) {
		v.Set(got)
		return true, nil
	}
	return true, d.mismatch(v, "it is Python's type "+truncate(name, 60))
}

// unmarshaler calls the UnmarshalJSON or UnmarshalText of a target that has
// one.
func (d *valueDecoder) unmarshaler(k kind, v reflect.Value) (done bool, err error) {
	if !v.CanAddr() || !v.Addr().CanInterface() {
		return false, nil
	}
	switch x := v.Addr().Interface().(type) {
	case *time.Time:
		// Plain text is accepted too: kombu before 5.3 wrote no type wrappers.
		text, err := d.raw()
		if err != nil {
			return true, err
		}
		if *x, err = ParseTime(textOf(text)); err != nil {
			return true, d.mismatch(v, "not a time")
		}
		return true, nil
	case json.Unmarshaler:
		text, err := d.raw()
		if err == nil {
			err = x.UnmarshalJSON(text)
		}
		if err != nil {
			return true, d.mismatch(v, err.Error())
		}
		return true, nil
	case encoding.TextUnmarshaler:
		if k != kindString {
			return false, nil
		}
		text, err := d.raw()
		if err == nil {
			err = x.UnmarshalText([]byte(textOf(text)))
		}
		if err != nil {
			return true, d.mismatch(v, err.Error())
		}
		return true, nil
	}
	return false, nil
}

// any decodes into a target of type any.
func (d *valueDecoder) any(k kind) (any, error) {
	switch k {
	case kindArray:
		list := []any{}
		err := d.array(func() error {
			var x any
			err := d.value(reflect.ValueOf(&x).Elem())
			list = append(list, x)
			return err
		})
		return list, err
	case kindObject:
		m := map[string]any{}
		err := d.object(func(key string) error {
			var x any
			err := d.value(reflect.ValueOf(&x).Elem())
			m[key] = x
			return err
		})
		return m, err
	}
	text, err := d.scalar(k)
	if err != nil {
		return nil, err
	}
	switch k {
	case kindBool:
		return text[0] == 't', nil
	case kindString:
		return unquoteJSON(text), nil
	}
	if !isInteger(text) {
		return parseFloat(text), nil
	}
	if n, err := strconv.ParseInt(string(text), 10, 64); err == nil {
		return n, nil
	}
	n, _ := new(big.Int).SetString(string(text), 10)
	return n, nil
}

func (d *valueDecoder) list(v reflect.Value) error {
	n := 0
	switch v.Kind() {
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 0, 0))
		return d.array(func() error {
			item := reflect.New(v.Type().Elem()).Elem()
			err := d.at("["+strconv.Itoa(n)+"]", item)
			v.Set(reflect.Append(v, item))
			n++
			return err
		})
	case reflect.Array:
		v.SetZero()
		return d.array(func() error {
			if n >= v.Len() {
				return d.mismatch(v, "it has more elements")
			}
			err := d.at("["+strconv.Itoa(n)+"]", v.Index(n))
			n++
			return err
		})
	}
	return d.mismatch(v, "it is an array")
}

func (d *valueDecoder) mapping(v reflect.Value) error {
	switch {
	case v.Kind() == reflect.Struct:
		fields := fieldsOf(v.Type())
		return d.object(func(key string) error {
			f, ok := fieldNamed(fields, key)
			if !ok {
				return d.skip()
			}
			target, err := fieldAt(v, f.index)
			if err != nil {
				return d.mismatch(v, "an embedded pointer to a type that is not exported")
			}
			if f.quoted {
				return d.quoted(key, target)
			}
			return d.at("."+key, target)
		})
	case v.Kind() == reflect.Map && v.Type().Key().Kind() == reflect.String:
		v.Set(reflect.MakeMap(v.Type()))
		return d.object(func(key string) error {
			item := reflect.New(v.Type().Elem()).Elem()
			err := d.at("."+key, item)
			v.SetMapIndex(reflect.ValueOf(key).Convert(v.Type().Key()), item)
			return err
		})
	}
	return d.mismatch(v, "it is an object")
}

// quoted decodes a field with the option ",string".
func (d *valueDecoder) quoted(key string, v reflect.Value) error {
	text, err := d.raw()
	if err != nil || isNull(text) {
		return err
	}
	inner := valueDecoder{scanner: scanner{text: []byte(textOf(text))}, path: d.path}
	if checkJSON(inner.text) != nil {
		return d.mismatch(v, "not a value in quotes")
	}
	return inner.at("."+key, v)
}

func fieldNamed(fields []field, key string) (field, bool) {
	for _, f := range fields {
		if f.name == key {
			return f, true
		}
	}
	for _, f := range fields {
		if strings.EqualFold(f.name, key) {
			return f, true
		}
	}
	return field{}, false
}

// fieldAt is FieldByIndex that allocates embedded structs whose pointer is nil.
func fieldAt(v reflect.Value, index []int) (reflect.Value, error) {
	for i, at := range index {
		if i > 0 && v.Kind() == reflect.Pointer {
			if v.IsNil() {
				if !v.CanSet() {
					return v, errWrapper
				}
				v.Set(reflect.New(v.Type().Elem()))
			}
			v = v.Elem()
		}
		v = v.Field(at)
	}
	return v, nil
}

// CheckJSON checks that text is exactly one value of Python's dialect of JSON.
// The error is a [*SyntaxError].
func CheckJSON(text []byte) error { return checkJSON(text) }

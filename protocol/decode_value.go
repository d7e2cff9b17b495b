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
	"unicode/utf8"
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
//   - Null, Python's None, fits what can be nil (a pointer, an any, a slice, a
//     map) and types with UnmarshalJSON. For all others it is an error.
//   - A number in an any becomes an int64, or a *big.Int if it is too large
//     for that, or a float64.
//   - An integer accepts a float without a fraction. A float accepts an integer
//     that it can hold exactly. A float32 rounds floats.
//   - An array must have the length of the Go array.
//   - The text of a wrapped decimal, uuid, date, time or datetime is accepted by
//     types with UnmarshalText.
//   - A map may have integers as keys.
//
// What does not fit its target is an error, and never becomes another value
// (docs/library.md#types), except that members of an object for which a struct
// has no field are left out. The error is a [*SyntaxError] or a [*ValueError].
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
	timeType   = reflect.TypeFor[time.Time]()
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
		return d.null(v)
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

// null decodes None.
func (d *valueDecoder) null(v reflect.Value) error {
	switch v.Kind() {
	case reflect.Pointer, reflect.Interface, reflect.Slice, reflect.Map:
		v.SetZero()
		return d.skip()
	}
	if _, ok := addressOf(v).(json.Unmarshaler); ok && v.Type() != timeType && v.Type() != bigIntType {
		_, err := d.unmarshaler(kindNull, v)
		return err
	}
	return d.mismatch(v, "it is null (Python's None); a pointer would accept that")
}

// addressOf returns the address of v if its methods may be called.
func addressOf(v reflect.Value) any {
	if !v.CanAddr() || !v.Addr().CanInterface() {
		return nil
	}
	return v.Addr().Interface()
}

func (d *valueDecoder) plain(k kind, text []byte, v reflect.Value) error {
	switch {
	case k == kindBool && v.Kind() == reflect.Bool:
		v.SetBool(text[0] == 't')
	case k == kindString && v.Kind() == reflect.String && v.Type() != reflect.TypeFor[Decimal]() && v.Type() != reflect.TypeFor[TimeOfDay]():
		v.SetString(unquoteJSON(text))
	case k == kindString && isBytes(v):
		content := []byte(unquoteJSON(text))
		if !utf8.Valid(content) {
			return d.mismatch(v, "it is text with a lone surrogate")
		}
		v.SetBytes(content)
	case k == kindNumber && v.CanFloat():
		return d.float(text, v)
	case k == kindNumber && (v.CanInt() || v.CanUint()):
		return d.integer(text, v)
	default:
		return d.mismatch(v, "it is "+truncate(string(text), 60))
	}
	return nil
}

// float sets a float. Python's integers have any size: one that the float would
// round, such as a large id, is an error.
func (d *valueDecoder) float(text []byte, v reflect.Value) error {
	f := parseFloat(text)
	if !isInteger(text) {
		if v.OverflowFloat(f) && !math.IsInf(f, 0) {
			return d.mismatch(v, "out of range")
		}
		v.SetFloat(f)
		return nil
	}
	n, _ := new(big.Int).SetString(string(text), 10)
	exact := new(big.Float).SetInt(n)
	if v.Kind() == reflect.Float32 {
		f32, accuracy := exact.Float32()
		if accuracy != big.Exact {
			return d.mismatch(v, "it is the integer "+truncate(string(text), 60)+", which would be rounded")
		}
		v.SetFloat(float64(f32))
		return nil
	}
	f, accuracy := exact.Float64()
	if accuracy != big.Exact {
		return d.mismatch(v, "it is the integer "+truncate(string(text), 60)+", which would be rounded")
	}
	v.SetFloat(f)
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

// wrapped decodes a type wrapper. It returns done = false for an object that is
// none, and leaves a wrapper to the UnmarshalJSON of a target that has one.
func (d *valueDecoder) wrapped(v reflect.Value) (done bool, err error) {
	isAny := v.Kind() == reflect.Interface && v.NumMethod() == 0
	look := d.scanner
	name, inner, ok := look.wrapper()
	if !ok {
		return false, nil
	}
	x, err := unwrap(name, inner)
	if err != nil {
		switch v.Interface().(type) {
		case time.Time, Date, TimeOfDay, Decimal, UUID, []byte, string:
			return true, d.mismatch(v, "not a value of Python's type "+truncate(name, 60))
		}
		return false, nil
	}
	got := reflect.ValueOf(x)
	_, isTime := x.(TimeOfDay)
	_, isData := x.([]byte)
	switch {
	case isAny || got.Type() == v.Type():
		v.Set(got)
	case isData && isBytes(v):
		v.SetBytes(x.([]byte))
	case isTime && v.Type() == reflect.TypeFor[string]():
		v.SetString(string(x.(TimeOfDay)))
	default:
		target := addressOf(v)
		if _, ok := target.(json.Unmarshaler); ok && v.Type() != timeType {
			return false, nil
		}
		reader, ok := target.(encoding.TextUnmarshaler)
		if !ok || isData || v.Type() == timeType {
			return true, d.mismatch(v, "it is Python's type "+name)
		}
		if err := reader.UnmarshalText([]byte(textOfWrapped(x, inner))); err != nil {
			return true, d.mismatch(v, err.Error())
		}
	}
	d.scanner = look
	return true, nil
}

func isBytes(v reflect.Value) bool {
	return v.Kind() == reflect.Slice && v.Type().Elem().Kind() == reflect.Uint8 && v.Type() != rawType
}

// textOfWrapped is the text that a type of another package is likely to read.
func textOfWrapped(x any, inner json.RawMessage) string {
	if u, ok := x.(UUID); ok {
		return u.String()
	}
	return textOf(inner)
}

// unmarshaler calls the UnmarshalJSON or UnmarshalText of a target that has
// one.
func (d *valueDecoder) unmarshaler(k kind, v reflect.Value) (done bool, err error) {
	switch x := addressOf(v).(type) {
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
		text, err := d.raw()
		if err == nil && k != kindString {
			return true, d.mismatch(v, "it is no text: "+truncate(string(text), 60))
		}
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
		if isBytes(v) {
			return d.mismatch(v, "it is an array, not Python's bytes")
		}
		v.Set(reflect.MakeSlice(v.Type(), 0, 0))
		return d.array(func() error {
			item := reflect.New(v.Type().Elem()).Elem()
			err := d.at("["+strconv.Itoa(n)+"]", item)
			v.Set(reflect.Append(v, item))
			n++
			return err
		})
	case reflect.Array:
		err := d.array(func() error {
			if n >= v.Len() {
				return d.mismatch(v, "it has more elements")
			}
			err := d.at("["+strconv.Itoa(n)+"]", v.Index(n))
			n++
			return err
		})
		if err == nil && n < v.Len() {
			err = d.mismatch(v, "it has only "+strconv.Itoa(n)+" elements")
		}
		return err
	}
	return d.mismatch(v, "it is an array")
}

func (d *valueDecoder) mapping(v reflect.Value) error {
	switch {
	case v.Kind() == reflect.Struct && v.Type() != reflect.TypeFor[Date]():
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
	case v.Kind() == reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		return d.object(func(text string) error {
			key := reflect.New(v.Type().Key()).Elem()
			if !setKey(key, text) {
				return d.mismatch(v, "it has the key "+quote(truncate(text, 60)))
			}
			item := reflect.New(v.Type().Elem()).Elem()
			err := d.at("."+text, item)
			v.SetMapIndex(key, item)
			return err
		})
	}
	return d.mismatch(v, "it is an object")
}

// setKey sets the key of a map. Python writes an integer key as its digits.
func setKey(key reflect.Value, text string) bool {
	if reader, ok := addressOf(key).(encoding.TextUnmarshaler); ok {
		return reader.UnmarshalText([]byte(text)) == nil
	}
	switch {
	case key.Kind() == reflect.String:
		key.SetString(text)
		return true
	case key.CanInt():
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil || key.OverflowInt(n) {
			return false
		}
		key.SetInt(n)
		return true
	case key.CanUint():
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil || key.OverflowUint(n) {
			return false
		}
		key.SetUint(n)
		return true
	}
	return false
}

// quoted decodes a field with the option ",string".
func (d *valueDecoder) quoted(key string, v reflect.Value) error {
	text, err := d.raw()
	if err != nil {
		return err
	}
	if isNull(text) {
		text = json.RawMessage(`"null"`)
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

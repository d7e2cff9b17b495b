package protocol_test

import (
	"encoding/json"
	"errors"
	"math"
	"math/big"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

type base struct {
	ID     int `json:"id"`
	Hidden string
}

type order struct {
	base
	Name     string          `json:"name"`
	Price    float64         `json:"price"`
	Tags     []string        `json:"tags"`
	Note     *string         `json:"note"`
	Empty    string          `json:"empty,omitempty"`
	Zero     time.Time       `json:"zero,omitzero"`
	Count    int64           `json:"count,string"`
	Raw      json.RawMessage `json:"raw"`
	When     time.Time       `json:"when"`
	Data     []byte          `json:"data"`
	Big      *big.Int        `json:"big"`
	Skipped  int             `json:"-"`
	Any      any             `json:"any"`
	Amounts  map[string]int  `json:"amounts"`
	Pair     [2]bool         `json:"pair"`
	Duration shout           `json:"shout"`
	private  int
}

// shout is a type with MarshalJSON and UnmarshalJSON.
type shout string

func (s shout) MarshalText() ([]byte, error) { return []byte(strings.ToUpper(string(s))), nil }

func (s *shout) UnmarshalText(text []byte) error {
	*s = shout(strings.ToLower(string(text)))
	return nil
}

func TestEncodeAndDecodeStruct(t *testing.T) {
	t.Parallel()
	n, _ := new(big.Int).SetString("123456789012345678901234567890", 10)
	in := order{
		base: base{ID: 7, Hidden: "h"}, Name: "für", Price: 5, Tags: []string{}, Count: 3, Raw: json.RawMessage(`{"a":NaN}`),
		When: time.Date(2024, 5, 6, 7, 8, 9, 123456000, time.UTC), Data: []byte{0xFF, 0}, Big: n, Skipped: 1,
		Any: map[string]any{"z": 1, "a": []any{nil, math.Inf(1)}}, Amounts: map[string]int{"b": 2, "a": 1}, Pair: [2]bool{true, false}, Duration: "loud", private: 1,
	}
	got, err := protocol.EncodeJSON(&in)
	want := `{"id": 7, "Hidden": "h", "name": "f\u00fcr", "price": 5.0, "tags": [], "note": null, "count": "3", "raw": {"a":NaN},` +
		` "when": {"__type__": "datetime", "__value__": "2024-05-06T07:08:09.123456+00:00"}, "data": {"__type__": "base64", "__value__": "/wA="},` +
		` "big": 123456789012345678901234567890, "any": {"a": [null, Infinity], "z": 1}, "amounts": {"a": 1, "b": 2}, "pair": [true, false], "shout": "LOUD"}`
	if err != nil || string(got) != want {
		t.Errorf("%v:\ngot  %s\nwant %s", err, got, want)
	}
	var out order
	if err := protocol.DecodeJSON(got, &out); err != nil {
		t.Fatal(err)
	}
	in.Skipped, in.private = 0, 0
	in.Any = map[string]any{"z": int64(1), "a": []any{nil, math.Inf(1)}}
	if !out.When.Equal(in.When) {
		t.Errorf("time %v", out.When)
	}
	out.When = in.When
	if !reflect.DeepEqual(out, in) {
		t.Errorf("\ngot  %+v\nwant %+v", out, in)
	}
}

// Fields with the same name follow the rules of encoding/json.
func TestEncodeEmbedded(t *testing.T) {
	t.Parallel()
	type deep struct{ A, B int }
	type left struct {
		deep
		X int `json:"x"`
		Y int
	}
	type right struct{ X, Y int }
	v := struct {
		left
		*right
		A int `json:"A"`
	}{left: left{deep: deep{1, 2}, X: 3, Y: 4}, A: 5}
	ours, err := protocol.EncodeJSON(v)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.ReplaceAll(string(ours), " ", ""); got != string(theirs) {
		t.Errorf("got %s, encoding/json has %s", got, theirs)
	}
}

func TestEncodeJSONRefuses(t *testing.T) {
	t.Parallel()
	type loop struct{ Next *loop }
	endless := &loop{}
	endless.Next = endless
	for name, c := range map[string]struct {
		value any
		path  string
	}{
		"a channel":            {map[string]any{"a": []any{1, make(chan int)}}, "a[1]"},
		"a function":           {struct{ F func() }{func() {}}, "F"},
		"a complex number":     {complex(1, 2), ""},
		"raw text":             {[]json.RawMessage{json.RawMessage("{")}, "[0]"},
		"a number as text":     {json.Number("1x"), ""},
		"a key that is float":  {map[float64]int{1: 1}, ""},
		"a decimal in words":   {[]any{protocol.Decimal("ten")}, "[0]"},
		"an empty decimal":     {protocol.Decimal(""), ""},
		"the time 25:00":       {protocol.TimeOfDay("25:00"), ""},
		"the 30th of February": {protocol.Date{Year: 2024, Month: 2, Day: 30}, ""},
		"the year 10000":       {time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC), ""},
		"itself":               {endless, "*"},
	} {
		_, err := protocol.EncodeJSON(c.value)
		var e *protocol.EncodeError
		if !errors.As(err, &e) || e.Path != c.path && c.path != "*" {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if x := e.Exception(); x.Module != "kombu.exceptions" || x.Type != "EncodeError" {
			t.Errorf("%s: %+v", name, x)
		}
	}
}

func TestDecodeJSONInto(t *testing.T) {
	t.Parallel()
	when := time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC)
	for text, want := range map[string]any{
		`5`: 5, `5.0`: 5, `-7`: int8(-7), `NaN`: nil, `1e3`: uint(1000), `"x"`: "x", `true`: true,
		`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09"}`: time.Date(2024, 5, 6, 7, 8, 9, 0, protocol.Naive), `"2024-05-06T07:08:09+00:00"`: when,
		`{"__type__": "bytes", "__value__": "hi"}`: []byte("hi"), `"hi"`: []byte("hi"),
		`{"__type__": "decimal", "__value__": "1.50"}`:    protocol.Decimal("1.50"),
		`{"__type__": "date", "__value__": "2024-05-06"}`: protocol.Date{Year: 2024, Month: 5, Day: 6},
		`{"__type__": "time", "__value__": "07:08:09"}`:   "07:08:09",
		`[1, 2]`: []int{1, 2}, `{"a": 1}`: map[string]int{"a": 1}, `1.5`: json.Number("1.5"), `[]`: []string{},
	} {
		if want == nil {
			var f float64
			if err := protocol.DecodeJSON(json.RawMessage(text), &f); err != nil || !math.IsNaN(f) {
				t.Errorf("%s: %v %v", text, f, err)
			}
			continue
		}
		got := reflect.New(reflect.TypeOf(want))
		if err := protocol.DecodeJSON(json.RawMessage(text), got.Interface()); err != nil || !reflect.DeepEqual(got.Elem().Interface(), want) {
			t.Errorf("%s: got %#v, %v, want %#v", text, got.Elem().Interface(), err, want)
		}
	}
	for text, target := range map[string]any{
		`"x"`: new(int), `1.5`: new(int), `300`: new(int8), `-1`: new(uint), `1e400`: new(int), `[1, 2, 3]`: new([2]int), `{}`: new([]int), `[]`: new(map[string]int),
		`null`: new(int), ` null`: new(uint8), `null `: new(float64), ` null `: new(big.Int), `  null`: new(json.Number),
		`null   `: new(string), `   null`: new(bool), ` null  `: new(time.Time), `  null `: new(order), `   null `: new([2]int), `    null`: new(protocol.UUID),
		`9007199254740993`: new(float64), `16777217`: new(float32), `[1]`: new([2]int), `{"x": 1}`: new(map[int]int), `{"1": 1}`: new(map[bool]int),
		`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09"}`: new(map[string]any), `{"__type__": "date", "__value__": "2024-05-06"}`: new(struct{ A int }),
		`[null]`: new([]int), `{"a": null}`: new(map[string]float64),
		`true`: new(string), `{"__type__": "decimal", "__value__": "1"}`: new(time.Time), `"soon"`: new(time.Time), `99999999999999999999`: new(int64),
		`{"price": "x"}`: new(order), `{"when": 5}`: new(order),
	} {
		var e *protocol.ValueError
		if err := protocol.DecodeJSON(json.RawMessage(text), target); !errors.As(err, &e) {
			t.Errorf("%s into %T: %v", text, target, err)
		}
	}
	var syntax *protocol.SyntaxError
	if err := protocol.DecodeJSON(json.RawMessage(`[1`), new(any)); !errors.As(err, &syntax) {
		t.Errorf("half an array: %v", err)
	}
}

// kombu 5.3.0 writes the version of a UUID beside its digits. As Python's uuid.UUID, it
// sets the bits of version and variant.
func TestUUIDWithItsVersion(t *testing.T) {
	t.Parallel()
	wrapper := func(members string) json.RawMessage {
		return json.RawMessage(`{"__type__": "uuid", "__value__": {` + members + `}}`)
	}
	for members, want := range map[string]string{
		`"hex": "6d0f3e512b8a4c779d1e58a4c360f219", "version": 4`:    "6d0f3e51-2b8a-4c77-9d1e-58a4c360f219",
		`"version": 1, "hex": "ffffffffffffffffffffffffffffffff"`:    "ffffffff-ffff-1fff-bfff-ffffffffffff",
		`"hex": "00000000000000000000000000000000", "version": 5`:    "00000000-0000-5000-8000-000000000000",
		`"hex": "00000000000000000000000000000005", "version": null`: "00000000-0000-0000-0000-000000000005",
	} {
		var typed protocol.UUID
		var value any
		if err := errors.Join(protocol.DecodeJSON(wrapper(members), &typed), protocol.DecodeJSON(wrapper(members), &value)); err != nil {
			t.Errorf("%s: %v", members, err)
		}
		if typed.String() != want || value != typed {
			t.Errorf("%s: %v and %v, want %s", members, typed, value, want)
		}
	}
	for _, members := range []string{
		``, `"version": 4`, `"hex": "6d0f3e512b8a4c779d1e58a4c360f219", "version": 0`, `"hex": "6d0f3e512b8a4c779d1e58a4c360f219", "version": 6`,
		`"hex": "6d0f3e512b8a4c779d1e58a4c360f219", "version": "4"`, `"hex": "6d0f3e512b8a4c779d1e58a4c360f219", "other": 4`,
	} {
		if err := protocol.DecodeJSON(wrapper(members), new(protocol.UUID)); err == nil {
			t.Errorf("%s is a UUID", members)
		}
	}
}

// pythonValues are the values that arguments have in Python, one of each kind and
// what is at the limits.
const pythonValues = `[
	None, True, False, 0, 1, -1, 127, 128, 255, 256, -129, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63, -2**63, -2**63 - 1, 2**64, 10**30, -10**400,
	0.0, -0.0, 1.0, 2.5, 1e15, 2.0**60, 1e300, 5e-324, 0.1, float('nan'), float('inf'), float('-inf'),
	'', 'text', 'caf\u00e9', '\U0001f600', '\ud800', '1', 'true', '2024-05-06', '2024-05-06T07:08:09+00:00', '12345678-1234-5678-1234-567812345678', '\0',
	b'', b'bytes', b'\xff\x00', bytearray(b'x'),
	[], [1], [1, 2], [1, 2, 3], [None], ['a', 'b'], [[1], [2]], (), (1, 2), ('a', 1), {1, 2}, frozenset(),
	{}, {'a': 1}, {'A': 1}, {'a': None}, {'a': {'a': 1}}, {1: 2}, {'x': 1, 'y': 2}, {'-1': 5}, {'__type__': 'x'}, {None: 1}, {True: 1}, {'a': [{'a': datetime(2024, 5, 6)}]},
	datetime(2024, 5, 6, 7, 8, 9), datetime(2024, 5, 6, 7, 8, 9, 123456, timezone.utc), datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59, 999999),
	datetime(2024, 5, 6, tzinfo=timezone(timedelta(hours=-5, minutes=-30))), datetime(1900, 1, 1, tzinfo=timezone(timedelta(seconds=1172))),
	datetime(2024, 5, 6, tzinfo=timezone(timedelta(seconds=1, microseconds=5))), timedelta(seconds=5),
	date(2024, 5, 6), date(1, 1, 1), time(7, 8, 9), time(7, 8, 9, 5, timezone.utc), Decimal('1.50'), Decimal('NaN'), Decimal('1E+400'), UUID(int=5),
	[datetime(2024, 5, 6), date(2024, 5, 6), {'d': Decimal('1')}, b'x'], complex(1, 2), range(3), object(),
]`

type blob []byte
type label string
type count int16
type single struct {
	A *int `json:"a"`
}
type maybe struct{ text string }

func (m *maybe) UnmarshalJSON(text []byte) error { m.text = string(text); return nil }
func (m maybe) MarshalJSON() ([]byte, error)     { return []byte(m.text), nil }

// A value of Python that a Go type accepts comes back as the same value, and every
// other value is an error: nothing is changed unsaid. The exceptions are those of
// the table in docs/library.md.
func TestPythonsValuesFitOrAreRefused(t *testing.T) {
	t.Parallel()
	types := []reflect.Type{
		reflect.TypeFor[bool](), reflect.TypeFor[int](), reflect.TypeFor[int8](), reflect.TypeFor[int16](), reflect.TypeFor[int32](), reflect.TypeFor[int64](),
		reflect.TypeFor[uint](), reflect.TypeFor[uint8](), reflect.TypeFor[uint16](), reflect.TypeFor[uint32](), reflect.TypeFor[uint64](), reflect.TypeFor[uintptr](),
		reflect.TypeFor[float32](), reflect.TypeFor[float64](), reflect.TypeFor[count](), reflect.TypeFor[string](), reflect.TypeFor[label](), reflect.TypeFor[[]byte](), reflect.TypeFor[blob](),
		reflect.TypeFor[any](), reflect.TypeFor[json.RawMessage](), reflect.TypeFor[json.Number](), reflect.TypeFor[big.Int](), reflect.TypeFor[*big.Int](),
		reflect.TypeFor[*int](), reflect.TypeFor[*string](), reflect.TypeFor[*bool](), reflect.TypeFor[**int](), reflect.TypeFor[*time.Time](),
		reflect.TypeFor[[]int](), reflect.TypeFor[[]any](), reflect.TypeFor[[]string](), reflect.TypeFor[[2]int](), reflect.TypeFor[[0]int](), reflect.TypeFor[[]*int](), reflect.TypeFor[[][]int](),
		reflect.TypeFor[map[string]any](), reflect.TypeFor[map[string]int](), reflect.TypeFor[map[int]int](), reflect.TypeFor[map[uint8]int](), reflect.TypeFor[map[label]*int](), reflect.TypeFor[map[string]map[string]int](),
		reflect.TypeFor[single](), reflect.TypeFor[*single](), reflect.TypeFor[struct{}](), reflect.TypeFor[maybe](), reflect.TypeFor[*maybe](),
		reflect.TypeFor[time.Time](), reflect.TypeFor[time.Duration](), reflect.TypeFor[protocol.Date](), reflect.TypeFor[protocol.TimeOfDay](), reflect.TypeFor[protocol.Decimal](), reflect.TypeFor[protocol.UUID](),
		reflect.TypeFor[big.Rat](), reflect.TypeFor[*big.Float](), reflect.TypeFor[netip.Addr](), reflect.TypeFor[chan int](), reflect.TypeFor[func()](), reflect.TypeFor[complex128](), reflect.TypeFor[error](),
	}
	texts := answer[[]*string](t, askPython(t, "5.7.0", []question{{"texts", pythonValues}})[0])
	type pair struct {
		into        reflect.Type
		text, again string
	}
	var pairs []pair
	var questions []question
	accepted := map[reflect.Type]int{}
	for _, text := range texts {
		if text == nil {
			continue // kombu cannot send it
		}
		for _, into := range types {
			v := reflect.New(into)
			err := protocol.DecodeJSON(json.RawMessage(*text), v.Interface())
			var refused *protocol.ValueError
			if errors.As(err, &refused) {
				if refused.Type == "" || refused.Why == "" {
					t.Errorf("%s into %v: %v", *text, into, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s into %v: %v", *text, into, err)
				continue
			}
			accepted[into]++
			again, err := protocol.EncodeJSON(v.Elem().Interface())
			if err != nil {
				t.Errorf("%s into %v is %#v: %v", *text, into, v.Elem(), err)
				continue
			}
			pairs = append(pairs, pair{into, *text, string(again)})
			questions = append(questions, question{"same", []string{*text, string(again)}})
		}
	}
	for i, same := range askPython(t, "5.7.0", questions) {
		p := pairs[i]
		if string(same) == "true" || changesAsDocumented(p.into, p.text) {
			continue
		}
		t.Errorf("%s into %v comes back as %s", p.text, p.into, p.again)
	}
	for _, into := range types {
		if kind := into.Kind(); (accepted[into] == 0) != (kind == reflect.Chan || kind == reflect.Func || kind == reflect.Complex128) && into != reflect.TypeFor[error]() && into != reflect.TypeFor[netip.Addr]() {
			t.Errorf("%v accepts %d values", into, accepted[into])
		}
	}
}

// changesAsDocumented: see docs/library.md#types.
func changesAsDocumented(into reflect.Type, text string) bool {
	isText := strings.HasPrefix(text, "\"")
	switch into {
	case reflect.TypeFor[[]byte](), reflect.TypeFor[blob]():
		return isText // str is accepted, as kombu before 5.3 sent bytes
	case reflect.TypeFor[time.Time](), reflect.TypeFor[*time.Time]():
		return isText // and so are times as text
	case reflect.TypeFor[string](), reflect.TypeFor[*string]():
		return strings.Contains(text, `"time"`)
	case reflect.TypeFor[float32]():
		return strings.ContainsAny(text, ".e") // a float is rounded to a float32
	case reflect.TypeFor[single](), reflect.TypeFor[*single](), reflect.TypeFor[struct{}]():
		return strings.HasPrefix(text, "{") // members that the struct does not have, and cases
	case reflect.TypeFor[big.Rat](), reflect.TypeFor[*big.Float]():
		return isText || strings.Contains(text, `"decimal"`) // these are written as text
	}
	return false
}

// What a handler passes on through an any is written as it came.
func TestValuesPassThroughAny(t *testing.T) {
	t.Parallel()
	for _, text := range append([]string{
		`{"__type__": "datetime", "__value__": "2024-05-06T00:00:00"}`,
		`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09.000001"}`,
		`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09+00:00:30"}`,
		`{"__type__": "time", "__value__": "07:08:09.123456+02:00"}`,
		`{"__type__": "time", "__value__": "00:00:00"}`,
		`[[], {}, null, "", 0, 0.0, -0.0, NaN, 123456789012345678901234567890]`,
	}, wrapped...) {
		var v any
		if err := protocol.DecodeJSON(json.RawMessage(text), &v); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if got, err := protocol.EncodeJSON(v); err != nil || string(got) != text {
			t.Errorf("%s comes back as %s, %v", text, got, err)
		}
		if got, err := protocol.EncodeJSON([]any{map[string]any{"k": v}}); err != nil || string(got) != `[{"k": `+text+`}]` {
			t.Errorf("%s comes back as %s, %v", text, got, err)
		}
	}
	var none *int
	if err := protocol.DecodeJSON(json.RawMessage("null"), &none); err != nil || none != nil {
		t.Errorf("null into a pointer: %v, %v", none, err)
	}
}

func TestRetryMessage(t *testing.T) {
	t.Parallel()
	d := delivery(`[[1], {"a":1}, {"chain": [{"task":"t","options":{"task_id":"x"}}]}]`)
	for name, value := range map[string]any{
		"x-death": []any{}, "x-first-death-queue": "q", "x-last-death-reason": "r", "x-delivery-count": int32(1), "compression": nil, "x-tenant": "acme",
		"parent_id": "p", "retries": int32(2), "timelimit": []any{int32(9), 1.5}, "ignore_result": true, "origin": "gen1@host",
	} {
		d.Headers[name] = value
	}
	d.Exchange, d.RoutingKey = "shop", "mail.send"
	m, err := protocol.Decode(d, nil)
	if err != nil {
		t.Fatal(err)
	}
	p, err := protocol.RetryMessage(m, protocol.RetryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]any{
		"retries": int32(3), "parent_id": "p", "x-tenant": "acme", "timelimit": []any{int32(9), 1.5}, "ignore_result": true, "eta": nil,
		"origin": "gen1@host", "argsrepr": "(1,)", "kwargsrepr": "{'a': 1}", "root_id": m.ID,
	} {
		if !reflect.DeepEqual(p.Headers[name], want) {
			t.Errorf("header %s: got %#v, want %#v", name, p.Headers[name], want)
		}
	}
	for name := range p.Headers {
		if strings.HasPrefix(name, "x-") && name != "x-tenant" || name == "compression" {
			t.Errorf("header %s was not removed", name)
		}
	}
	if p.Properties.Priority != nil || p.Properties.Expiration != "" || p.Exchange != "shop" || p.RoutingKey != "mail.send" {
		t.Errorf("%+v to %q %q", p.Properties, p.Exchange, p.RoutingKey)
	}
	if want := `[[1], {"a":1}, {"callbacks": null, "errbacks": null, "chain": [{"task":"t","options":{"task_id":"x"}}], "chord": null}]`; string(p.Body) != want {
		t.Errorf("body %s, want %s", p.Body, want)
	}

	p, err = protocol.RetryMessage(m, protocol.RetryOptions{
		Args: []json.RawMessage{json.RawMessage(`"x"`), json.RawMessage("2")}, Kwargs: protocol.Object{}, Queue: "other",
		ETA: time.Date(2031, 1, 2, 3, 4, 5, 0, time.FixedZone("", 3600)),
	})
	if err != nil || p.Exchange != "" || p.RoutingKey != "other" || p.Headers["eta"] != "2031-01-02T02:04:05+00:00" || p.Headers["argsrepr"] != "('x', 2)" ||
		!strings.HasPrefix(string(p.Body), `[["x", 2], {}, `) {
		t.Errorf("%v %+v %s", err, p, p.Body)
	}
	if _, err := protocol.RetryMessage(m, protocol.RetryOptions{Args: []json.RawMessage{json.RawMessage("{")}}); !errors.Is(err, protocol.ErrMalformed) {
		t.Errorf("new arguments that are not JSON: %v", err)
	}
}

func TestTraceback(t *testing.T) {
	t.Parallel()
	e := protocol.NewException("goworker", "OrderError", "no stock")
	want := "Traceback (most recent call last):\n  File \"shop/add.go\", line 12, in shop.add\ngoworker.OrderError: no stock\n"
	if got := protocol.Traceback(e, protocol.Frame{File: "shop/add.go", Line: 12, Function: "shop.add"}); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := protocol.Traceback(protocol.NewException("builtins", "RuntimeError")); got != "RuntimeError\n" {
		t.Errorf("got %q", got)
	}
}

// Exceptions show bytes as Python does, for instance the object of a UnicodeDecodeError.
func TestBytesInTheTextOfAnException(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ content, want string }{
		{"", `b''`},
		{"abc", `b'abc'`},
		{"\xff\x00\n\t\r\\\x7f", `b'\xff\x00\n\t\r\\\x7f'`},
		{"h\u00e4", `b'h\xc3\xa4'`},
		{`it's`, `b"it's"`},
		{`it's "x"`, `b'it\'s "x"'`},
	} {
		text, err := protocol.EncodeJSON([]byte(c.content))
		if err != nil {
			t.Fatal(err)
		}
		e := protocol.Exception{Type: "E", Args: []json.RawMessage{text}}
		if e.Text() != c.want || e.Repr() != "E("+c.want+")" {
			t.Errorf("%q: %s, want %s", c.content, e.Repr(), c.want)
		}
	}
}

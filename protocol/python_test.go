package protocol_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

type question [2]any

// askPython runs testdata/ask_python.py with a version of Celery and returns
// its answers.
func askPython(t *testing.T, version string, questions []question) []json.RawMessage {
	t.Helper()
	text, err := json.Marshal(questions)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), devenv.Celery(t, version), "testdata/ask_python.py")
	command.Stdin = bytes.NewReader(text)
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, stderr.String())
	}
	var answers []json.RawMessage
	if err := json.Unmarshal(out, &answers); err != nil || len(answers) != len(questions) {
		t.Fatalf("%d answers to %d questions: %v", len(answers), len(questions), err)
	}
	return answers
}

func answer[T any](t *testing.T, text json.RawMessage) T {
	t.Helper()
	var v T
	if err := protocol.DecodeJSON(text, &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return v
}

// jsonTexts are values as Python writes them, the unusual ones first.
func jsonTexts() []string {
	texts := []string{
		`null`, `true`, `false`, `0`, `-1`, `255`, `256`, `65536`, `2147483647`, `2147483648`, `-2147483648`, `-2147483649`,
		`-128`, `128`, `32768`, `-32768`, `9223372036854775808`, `-9223372036854775808`, `123456789012345678901234567890`,
		`-` + strings.Repeat("9", 700), strings.Repeat("9", 4000),
		`1.0`, `0.1`, `-0.0`, `1e+16`, `1e-05`, `1.5e+300`, `123456789.125`, `NaN`, `Infinity`, `-Infinity`,
		`""`, `"\u00fc\u20ac \ud83d\ude00 \ud800 \udc00 \u0000 \n\t\r\b\f \"\\ / \u007f"`, `"it's"`, `"both ' and \""`,
		`[]`, `{}`, `[[]]`, `[{}]`, `{"a": []}`, `[1, [2, [3, [4, [5]]]]]`, `{"z": 1, "a": {"y": 2, "b": [null, true]}}`,
		`{"": 0}`, `{"__type__": "x"}`, `{"__type__": "a", "__value__": 1, "c": 2}`,
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		texts = append(texts, randomJSON(random, 4))
	}
	return texts
}

func randomJSON(r *rand.Rand, depth int) string {
	kinds := 7
	if depth == 0 {
		kinds = 5
	}
	switch r.IntN(kinds) {
	case 0:
		return []string{"null", "true", "false", "NaN"}[r.IntN(4)]
	case 1:
		return fmt.Sprint(r.Int64N(1<<40) - 1<<39)
	case 2:
		text, _ := protocol.EncodeJSON(math.Float64frombits(r.Uint64()))
		return string(text)
	case 3, 4:
		runes := make([]rune, r.IntN(40))
		for i := range runes {
			runes[i] = []rune("abc def'\"\\\n\x00\u00e9\u4e2d\U0001F600")[r.IntN(15)]
		}
		text, _ := protocol.EncodeJSON(string(runes))
		return string(text)
	case 5:
		items := make([]string, r.IntN(5))
		for i := range items {
			items[i] = randomJSON(r, depth-1)
		}
		return "[" + strings.Join(items, ", ") + "]"
	}
	items := make([]string, r.IntN(5))
	for i := range items {
		items[i] = fmt.Sprintf("\"k%d\": %s", i, randomJSON(r, depth-1))
	}
	return "{" + strings.Join(items, ", ") + "}"
}

var wrapped = []string{
	`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09.123456+00:00"}`,
	`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09-05:30"}`,
	`{"__type__": "datetime", "__value__": "2024-05-06T07:08:09"}`,
	`{"__type__": "date", "__value__": "2024-05-06"}`,
	`{"__type__": "time", "__value__": "07:08:09.123456"}`,
	`{"__type__": "time", "__value__": "07:08:09-05:30"}`,
	`{"__type__": "decimal", "__value__": "12.340"}`,
	`{"__type__": "decimal", "__value__": "NaN"}`,
	`{"__type__": "uuid", "__value__": {"hex": "12345678123456781234567812345678"}}`,
	`{"__type__": "bytes", "__value__": "h\u00e4llo"}`,
	`{"__type__": "base64", "__value__": "/wD+"}`,
}

// versioned are UUIDs as only kombu 5.3.0 writes them.
var versioned = []string{
	`{"__type__": "uuid", "__value__": {"hex": "12345678123456781234567812345678", "version": 4}}`,
	`{"__type__": "uuid", "__value__": {"version": 1, "hex": "12345678-1234-5678-1234-567812345678"}}`,
	`{"__type__": "uuid", "__value__": {"hex": "12345678123456781234567812345678", "version": null}}`,
}

// readableObjects are the wrapped values whose Python pickles can be read. In the last,
// Python pickles a UUID once and refers to it by its memo.
var readableObjects = append(slices.Clone(wrapped[:9]), wrapped[10], "["+wrapped[8]+", "+wrapped[8]+"]")

// Python reads our pickle of a JSON text as the same value as the text itself,
// with the keys in the same order.
func TestPythonReadsOurPickles(t *testing.T) {
	t.Parallel()
	texts := slices.Concat(jsonTexts(), wrapped, versioned)
	for _, number := range []string{".5", "1.", "+1.50", "007", "1E+400", "-0.00", "sNaN", "-NaN", "NaN12", "Infinity", "inf"} {
		text, err := protocol.EncodeJSON(protocol.Decimal(number))
		if err != nil {
			t.Fatal(err)
		}
		texts = append(texts, string(text))
	}
	texts = append(texts, "["+strings.Join(wrapped, ", ")+"]")
	for _, version := range []string{"5.4.0", "5.7.0"} {
		var questions []question
		for _, text := range texts {
			pickle, err := protocol.PickleJSON(json.RawMessage(text))
			if err != nil {
				t.Fatalf("%s: %v", text, err)
			}
			questions = append(questions, question{"of_pickle", []string{hex.EncodeToString(pickle), text}})
		}
		for i, text := range askPython(t, version, questions) {
			if got := answer[[2]string](t, text); got[0] != got[1] {
				t.Errorf("%s: %s:\ngot  %s\nwant %s", version, texts[i], got[0], got[1])
			}
		}
	}
}

// ReadResult of a Python pickle, protocols 2 to 5, equals the JSON that Python
// writes for the same value.
func TestReadPythonsPickles(t *testing.T) {
	t.Parallel()
	texts := jsonTexts()
	var questions []question
	for _, text := range texts {
		questions = append(questions, question{"pickles", text})
	}
	for _, text := range readableObjects {
		texts = append(texts, text)
		questions = append(questions, question{"object_pickles", text})
	}
	for i, text := range askPython(t, "5.7.0", questions) {
		got := answer[[5]string](t, text)
		for j, pickle := range got[1:] {
			column, err := hex.DecodeString(pickle)
			if err != nil {
				t.Fatal(err)
			}
			value, err := protocol.ReadResult(column)
			if err != nil || string(value) != got[0] {
				t.Errorf("%s, protocol %d: %v:\ngot  %s\nwant %s", texts[i], j+2, err, value, got[0])
			}
		}
	}
}

// Celery's AsyncResult reads our exceptions back as the exceptions they are.
func TestPythonReadsOurExceptions(t *testing.T) {
	t.Parallel()
	exceptions := []protocol.Exception{
		protocol.NewException("builtins", "ValueError", "boom"),
		{Module: "builtins", Type: "ValueError", Args: []json.RawMessage{json.RawMessage(`"boom"`), json.RawMessage("42")}},
		protocol.NewException("builtins", "RuntimeError"),
		protocol.NewException("builtins", "KeyError", "it's"),
		protocol.NewException("celery.exceptions", "TaskRevokedError", "expired"),
		protocol.NewException("goworker", "OrderError", "no stock for \u00fc"),
		protocol.NotRegistered("shop.nope"),
	}
	var questions []question
	for _, e := range exceptions {
		column, err := protocol.EncodeResult(protocol.Result{State: protocol.StateFailure, Exception: &e}, protocol.EncodingPickle)
		if err != nil {
			t.Fatal(err)
		}
		questions = append(questions, question{"exception", []string{hex.EncodeToString(column), ""}})
	}
	for i, text := range askPython(t, "5.7.0", questions) {
		e := exceptions[i]
		var got [5]json.RawMessage
		if err := json.Unmarshal(text, &got); err != nil {
			t.Fatal(err)
		}
		name, repr, str, kind := answer[string](t, got[0]), answer[string](t, got[1]), answer[string](t, got[2]), answer[string](t, got[4])
		if name != e.Type || kind != "tuple" || string(got[3]) != `["exc_type", "exc_message", "exc_module"]` {
			t.Errorf("%s: got %s, %s of %s", e.Type, name, got[3], kind)
		}
		if e.Module == "builtins" && (repr != e.Repr() || str != e.Text()) {
			t.Errorf("got repr %s and str %q, Python has %s and %q", e.Repr(), e.Text(), repr, str)
		}
	}
}

func TestPythonWritesTheSameJSON(t *testing.T) {
	t.Parallel()
	texts := append(jsonTexts(), wrapped...)
	var questions []question
	for _, text := range texts {
		questions = append(questions, question{"dumps", text})
	}
	random := rand.New(rand.NewPCG(3, 4))
	var floats []float64
	for range 300 {
		f := math.Float64frombits(random.Uint64())
		if random.IntN(2) == 0 {
			f = math.Round(random.NormFloat64()*1e4) * math.Pow(10, float64(random.IntN(30)-12))
		}
		if !math.IsNaN(f) && !math.IsInf(f, 0) {
			floats = append(floats, f)
			questions = append(questions, question{"float", fmt.Sprintf("%x", f)})
		}
	}
	answers := askPython(t, "5.7.0", questions)
	for i, text := range texts {
		var v any
		if err := protocol.DecodeJSON(json.RawMessage(text), &v); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		// A Go map has no order, so texts are compared only where no map is
		// involved.
		if strings.Contains(text, `":`) && !strings.Contains(text, "__type__") {
			continue
		}
		if strings.Contains(text, `"a": `) || strings.Contains(text, `"c": `) {
			continue
		}
		got, err := protocol.EncodeJSON(v)
		if want := answer[string](t, answers[i]); err != nil || string(got) != want {
			t.Errorf("%s: %v:\ngot  %s\nwant %s", text, err, got, want)
		}
	}
	for i, f := range floats {
		got, err := protocol.EncodeJSON(f)
		if want := answer[string](t, answers[len(texts)+i]); err != nil || string(got) != want {
			t.Errorf("%v: got %s, Python has %s", f, got, want)
		}
	}
}

func TestPythonAcceptsTheSameJSON(t *testing.T) {
	t.Parallel()
	texts := []string{
		``, ` `, `nul`, `None`, `+1`, `01`, `1.`, `.5`, `1e`, `1e+`, `-`, `--1`, `0x1`, `nan`, `-NaN`, `inf`, `Infinit`, `1_000`,
		`"`, `"\`, `"\u12`, `"\u12g4"`, `"\x41"`, "\"\n\"", "\"\x7f\"", `'a'`, `"\ud800"`, `"\/"`,
		`[`, `[1`, `[1,`, `[1,]`, `[,1]`, `[1 2]`, `{`, `{"a"`, `{"a":`, `{"a":1`, `{"a":1,}`, `{a:1}`, `{1:2}`, `{"a" 1}`,
		"\ufeff1", " 1 ", "\u00a01", "1 1", "[1]x", "{\"a\": 1, \"a\": 2}", "\t[\r\n1 , 2 ]\n", "1E400", "-1e-400", "-0",
	}
	var questions []question
	for _, text := range texts {
		questions = append(questions, question{"load", text})
	}
	for i, text := range askPython(t, "5.7.0", questions) {
		if want, err := answer[bool](t, text), protocol.CheckJSON([]byte(texts[i])); want != (err == nil) {
			t.Errorf("%q: %v, Python accepts it: %v", texts[i], err, want)
		}
	}
}

func TestPythonReadsTheSameTimes(t *testing.T) {
	t.Parallel()
	texts := []string{
		"2031-01-02T03:04:05.678901+00:00", "2031-01-02T03:04:05+02:00", "2031-01-02T03:04:05Z", "2031-01-02T03:04:05z",
		"2031-01-02T03:04:05", "2031-01-02 03:04:05", "2031-01-02x03:04", "2031-01-02T03", "2031-01-02T0304", "2031-01-02T030405",
		"2031-01-02T030405.5", "2031-01-02T03:04:05,123456789", "2031-01-02T03:04:05.1", "2031-01-02T03:04:05-0530",
		"2031-01-02T03:04:05-05", "2031-01-02T03+01", "2031-01-02T03:04-01:30", "2031", "2031-02", "203102", "20310203", "2031-034",
		"2031034", "2031-W05", "2031W05", "2031-W05-3", "2031W053", "2031-W053", "2031W05-3", "2031-W54", "2031-W00", "2020-W53-7",
		"2031-366", "2032-366", "2031-02-30", "20310230", "2031-13-01", "2031-00-01", "2031-01-00", "0000-01-01", "9999-12-31T23:59:59",
		"9999-12-31T24:00", "2031-01-02T24:00:00", "2031-01-02T24:00:01", "2031-01-02T25:00", "2031-01-02T03:60", "2031-01-02T03:04:60",
		"2031-01-02T", "2031-01-02T3", "2031-01-02T03:", "2031-01-02T03:04:", "2031-01-02T03:0405", "2031-01-02T0304:05",
		"2031-01-02T03:04:05.", "2031-01-02T03:04:05.x", "2031-01-02T03:04:05+", "2031-01-02T03:04:05+1", "2031-01-02T03:04:05+24:00",
		"2031-01-02T03:04:05+01:60", "2031-01-02T03:04:05+01:00:00", "2031-01-02T03:04:05 +01:00", "tomorrow", "x", "20", "203",
		"2031-1-2", "2031-01-02\u00e903:04", "2031-01-02T03.5", "2031-01-02T03:04.5", "2031-01-02T03:04:05Zx", "2031-01-02T03Z",
		"20311301", "2031133", "2031133T01", "20311331T01", "2031-133T01:02",
	}
	var questions []question
	for _, text := range texts {
		questions = append(questions, question{"iso", text})
	}
	for i, text := range askPython(t, "5.7.0", questions) {
		want := answer[*string](t, text)
		got, err := protocol.ParseTime(texts[i])
		switch {
		case (err == nil) != (want != nil):
			t.Errorf("%q: %v %v, Python has %v", texts[i], got, err, want)
		case err == nil && protocol.FormatTime(got) != *want:
			t.Errorf("%q: %s, Python has %s", texts[i], protocol.FormatTime(got), *want)
		}
	}
}

// The header argsrepr equals what saferepr of Celery 5.7 writes, including
// where it cuts.
func TestPythonShowsTheSameArguments(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("word ", 300)
	lists := []string{
		`[]`, `[1]`, `["a", 2.5]`, `["` + long + `"]`, `["` + strings.Repeat("x", 2000) + `", 1]`, `[{"k": "` + long + `"}, [1, [2, [3, [4]]]]]`,
		`["it's"]`, `[{"__type__": "decimal", "__value__": "12.340"}]`,
		`[{"__type__": "uuid", "__value__": {"hex": "12345678123456781234567812345678"}}]`,
		`[{"__type__": "uuid", "__value__": {"hex": "12345678123456781234567812345678", "version": 5}}]`,
		`[[` + strings.TrimSuffix(strings.Repeat(`"abc", `, 400), ", ") + `], {"z": 1}]`,
		`[[` + strings.TrimSuffix(strings.Repeat(`["abc"], `, 200), ", ") + `], {"z": 1}]`,
		`[{` + strings.TrimSuffix(strings.Repeat(`"a key": ["v"], `, 1), ", ") + `}]`,
	}
	random := rand.New(rand.NewPCG(5, 6))
	for range 150 {
		items := make([]string, random.IntN(60))
		for i := range items {
			items[i] = randomJSON(random, 4)
		}
		lists = append(lists, "["+strings.Join(items, ", ")+"]")
	}
	var questions []question
	for _, list := range lists {
		questions = append(questions, question{"argsrepr", list}, question{"kwargsrepr", `{"k": ` + list + `, "l": 1}`}, question{"repr", list})
	}
	answers := askPython(t, "5.7.0", questions)
	for i, list := range lists {
		var args []json.RawMessage
		if err := protocol.DecodeJSON(json.RawMessage(list), &args); err != nil {
			t.Fatal(err)
		}
		s := protocol.NewSignature("t", nil, protocol.Object{{Key: "k", Value: json.RawMessage(list)}, {Key: "l", Value: json.RawMessage("1")}})
		if len(args) == 0 {
			continue
		}
		p, _, err := s.Apply(protocol.ApplyOptions{Args: args})
		if err != nil {
			t.Fatal(err)
		}
		for j, header := range []string{"argsrepr", "kwargsrepr"} {
			if want := answer[string](t, answers[3*i+j]); p.Headers[header] != want {
				t.Errorf("%s of %.300s:\ngot  %s\nwant %s", header, list, p.Headers[header], want)
			}
		}
		e := protocol.Exception{Type: "E", Args: []json.RawMessage{json.RawMessage(list)}}
		if want := "E(" + answer[string](t, answers[3*i+2]) + ")"; e.Repr() != want && !strings.Contains(list, "__type__") {
			t.Errorf("repr of %.300s:\ngot  %s\nwant %s", list, e.Repr(), want)
		}
	}
}

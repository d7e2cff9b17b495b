package protocol_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Every captured result can be read, and exceptions are written byte for byte
// as Celery 5.7 writes them.
func TestCapturedResultRows(t *testing.T) {
	t.Parallel()
	refused, read := 0, 0
	for _, file := range capturedFiles(t, "worker_*.json") {
		for _, s := range capturedScenarios(t, file) {
			for _, row := range s.Rows {
				if row.ResultHex == nil {
					continue
				}
				column, err := hex.DecodeString(*row.ResultHex)
				if err != nil {
					t.Fatal(err)
				}
				value, err := protocol.ReadResult(column)
				var pickled *protocol.PickleError
				if errors.As(err, &pickled) {
					refused++
					continue
				}
				if err != nil {
					t.Errorf("%s/%s: %v", file, s.Name, err)
					continue
				}
				read++
				if row.ResultText != nil && string(value) != *row.ResultText {
					t.Errorf("%s/%s: read %s, want %s", file, s.Name, value, *row.ResultText)
				}
				if row.Status == protocol.StateFailure || row.Status == protocol.StateRevoked {
					checkException(t, file+"/"+s.Name, value, row)
				}
			}
		}
	}
	if read < 300 || refused < 1 || refused > 8 {
		t.Errorf("%d rows read, %d refused", read, refused)
	}
}

func checkException(t *testing.T, name string, value json.RawMessage, row capturedRow) {
	t.Helper()
	var stored struct {
		Type    string            `json:"exc_type"`
		Message []json.RawMessage `json:"exc_message"`
		Module  string            `json:"exc_module"`
	}
	if err := protocol.DecodeJSON(value, &stored); err != nil {
		t.Errorf("%s: %s: %v", name, value, err)
		return
	}
	e := protocol.Exception{Type: stored.Type, Module: stored.Module, Args: stored.Message}
	r := protocol.Result{State: row.Status, Exception: &e}
	for _, encoding := range []protocol.Encoding{protocol.EncodingJSON, protocol.EncodingPickle} {
		column, err := protocol.EncodeResult(r, encoding)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if back, err := protocol.ReadResult(column); err != nil || string(back) != string(value) {
			t.Errorf("%s: %s gives back %s %v, want %s", name, encoding, back, err, value)
		}
	}
	// For a nested exception, or one with a __str__ of its own, Python prints
	// more than the arguments.
	if row.Traceback == nil || e.Type == "EncodeError" || strings.Contains(*row.Traceback, "exception was the direct cause") {
		return
	}
	lines := strings.Split(strings.TrimSuffix(*row.Traceback, "\n"), "\n")
	if got := protocol.Traceback(e); got != lines[len(lines)-1]+"\n" && len(e.Args) == 1 {
		t.Errorf("%s: last line of the traceback: got %q, want %q", name, got, lines[len(lines)-1])
	}
}

// Hand-made rows that Python can read equal the rows that this package writes.
// The exception is integers, which a pickle can hold in several forms.
func TestForeignRowsAreWrittenTheSame(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"x": 5, "y": null, "z": true, "f": 1.5, "l": ["q", -7]}`: "80027d285801000000784b055801000000794e58010000007a88580100000066473ff800000000000058010000006c5d285801000000714af9ffffff65752e",
		`"boom"`: "80025804000000626f6f6d2e",
	} {
		got, err := protocol.PickleJSON(json.RawMessage(text))
		if err != nil || hex.EncodeToString(got) != want {
			t.Errorf("%s:\ngot  %x %v\nwant %s", text, got, err, want)
		}
	}
	var file struct {
		Rows []struct {
			Hex *string `json:"result_hex"`
		} `json:"rows"`
	}
	readCaptured(t, "foreign_rows_pickle_and_json_read_by_python.json", &file)
	for _, row := range file.Rows {
		if row.Hex == nil || *row.Hex == "" {
			continue
		}
		column, err := hex.DecodeString(*row.Hex)
		if err != nil {
			t.Fatal(err)
		}
		value, err := protocol.ReadResult(column)
		if err != nil {
			// Protocols 0 and 1 have no header, and 5.7 refuses them too.
			if column[0] == 0x80 {
				t.Errorf("%s: %v", *row.Hex, err)
			}
			continue
		}
		if column[0] != 0x80 {
			continue
		}
		again, err := protocol.PickleJSON(value)
		if err != nil || hex.EncodeToString(again) != *row.Hex {
			t.Logf("%s is written as %x", *row.Hex, again)
		}
		if back, err := protocol.ReadResult(again); err != nil || string(back) != string(value) {
			t.Errorf("%s: %s is read back as %s, %v", *row.Hex, value, back, err)
		}
	}
}

func TestEncodeResultOfNone(t *testing.T) {
	t.Parallel()
	for _, encoding := range []protocol.Encoding{protocol.EncodingJSON, protocol.EncodingPickle} {
		for _, value := range []string{"", "null", " null "} {
			column, err := protocol.EncodeResult(protocol.Result{State: protocol.StateSuccess, Value: json.RawMessage(value)}, encoding)
			if column != nil || err != nil {
				t.Errorf("%s of %q: %x, %v", encoding, value, column, err)
			}
		}
	}
}

func TestStampsAreStoredAsCelery57Does(t *testing.T) {
	t.Parallel()
	found := false
	for _, s := range capturedScenarios(t, "worker_celery-5.7.0.json") {
		for _, captured := range s.Messages {
			m, err := protocol.Decode(captured.delivery(t), nil)
			if err != nil {
				t.Fatal(err)
			}
			row, ok := rowOf(s, m.ID)
			if !ok || row.Name == nil {
				continue
			}
			got := protocol.StampsJSON(m)
			found = found || got != nil
			if (got == nil) != (row.StampsText == nil) || got != nil && string(got) != *row.StampsText {
				t.Errorf("%s: got %s, want %v", s.Name, got, row.StampsText)
			}
		}
	}
	if !found {
		t.Error("no stamps among the captures")
	}
}

// Pickles that need Python classes, and data that is not a pickle, are refused
// with a typed error.
func TestReadResultRefuses(t *testing.T) {
	t.Parallel()
	unsafe := map[string]string{
		"os.system('true')":              "8002636f730a73797374656d0a58040000007472756585522e",
		"STACK_GLOBAL in 4":              "80048c026f738c0673797374656d932e",
		"an instance by NEWOBJ":          "8002636275696c74696e730a6c6973740a29812e",
		"BUILD":                          "80027d7d622e",
		"a persistent id":                "80025801000000785 12e",
		"an extension from a code":       "800282012e",
		"a known name in another module": "8002636f730a6461746574696d650a2e",
	}
	for name, text := range unsafe {
		_, err := protocol.ReadResult(unhex(t, strings.ReplaceAll(text, " ", "")))
		var refused *protocol.PickleError
		if !errors.As(err, &refused) || !refused.Unsafe {
			t.Errorf("%s: %v", name, err)
		}
	}
	broken := map[string]string{
		"nothing":                    "",
		"no more than a header":      "8002",
		"protocol 9":                 "80092e",
		"protocol 1 has no header":   "71002e",
		"no value":                   "80022e",
		"a mark for a value":         "8002282e",
		"two values":                 "80024e4e2e",
		"text longer than the rest":  "800258ffffffff782e",
		"8-byte length":              "80048dffffffffffffffff782e",
		"text that is no UTF-8":      "80025801000000ff2e",
		"memo that was never set":    "800268012e",
		"odd items of a dictionary":  "80027d284e752e",
		"append to a tuple":          "8002294e612e",
		"a list as a key":            "80027d285d4e752e",
		"a class for a value":        "8002636461746574696d650a646174650a2e",
		"a UUID without its number":  "800263757569640a555549440a29812e",
		"a UUID with too many bits":  "800263757569640a555549440a29817d5803000000696e748a11000000000000000000000000000000000173622e",
		"a Decimal of no number":     "800263646563696d616c0a446563696d616c0a5801000000788552" + "2e",
		"a list within itself":       "80025d7100680061" + "2e",
		"a LONG4 of too many digits": "80028b00000100" + strings.Repeat("7f", 65536) + "2e",
	}
	for name, text := range broken {
		column := unhex(t, text)
		if value, err := protocol.ReadResult(column); err == nil {
			t.Errorf("%s: read as %.80s", name, value)
		}
	}
}

// Tasks of Celery up to 5.6 may return what JSON has no form for. The error names it.
func TestUnreadableResultsAreNamed(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"80049509000000000000008f94284b014b02902e":                                                       "a set",     // {1, 2}
		"8004950800000000000000284b014b0291942e":                                                         "a set",     // frozenset({1, 2})
		"80049524000000000000008c086461746574696d65948c0974696d6564656c74619493944b014b004b00879452942e": "timedelta", // days=1
		"80049524000000000000008c086461746574696d65948c0974696d6564656c74619493944b054b004b00879452942e": "timedelta", // days=5
	} {
		if _, err := protocol.ReadResult(unhex(t, text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestUnpickleHasALimit(t *testing.T) {
	t.Parallel()
	_, err := protocol.Unpickle(unhex(t, billionLaughs()), 1<<16)
	var refused *protocol.PickleError
	if !errors.As(err, &refused) {
		t.Errorf("a billion billionLaughs: %v", err)
	}
}

// billionLaughs is a pickle of a hundred bytes whose value has 2^40 texts.
func billionLaughs() string {
	out := "80025803000000686121"
	for range 40 {
		// Put it into the memo, get it from there, make a pair of both.
		out += "7101680186"
	}
	return out + "2e"
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(text, err)
	}
	return b
}

package change

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
)

func TestRecordComesBack(t *testing.T) {
	t.Parallel()
	for _, want := range []Record{
		{Version: 1},
		{Version: 1, Files: &Files{}, Undone: true},
		{Version: 1, Files: &Files{}, Image: &Image{}},
		{Version: 2, Files: &Files{}, Usage: &Usage{Attempt: 1, Output: 5}},
	} {
		text, err := want.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Decode(text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s is %+v, %v; want %+v", text, got, err, want)
		}
	}
	if got, err := Decode(nil); err != nil || !reflect.DeepEqual(got, Record{Version: 1}) {
		t.Errorf("nothing is %+v, %v", got, err)
	}
}

func TestRecordOfAnotherFormat(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`{"version":99,"files":7}`: "a newer mm-orchestrator",
		`{"version":0}`:            "format 0",
		`{}`:                       "format 0",
		`{"version":1,"files":7}`:  "cannot be read",
		`{"version":"x"}`:          "cannot be read",
		`[]`:                       "cannot be read",
	} {
		if _, err := Decode(json.RawMessage(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

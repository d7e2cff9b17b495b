package store

import (
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

func TestTablesRoundTrip(t *testing.T) {
	t.Parallel()
	for _, table := range []map[string]any{
		nil,
		{},
		{
			"nil": nil, "yes": true, "text": "ä\x00 </b>", "not text": "\xff\xfe", "bytes": []byte{0, 255}, "none": []byte{},
			"i8": int8(-1), "u8": uint8(200), "i16": int16(-300), "u16": uint16(60000), "i32": int32(math.MinInt32), "u32": uint32(math.MaxUint32),
			"i64": int64(math.MinInt64), "u64": uint64(math.MaxUint64), "f32": float32(1.1), "f64": 1.1, "inf": math.Inf(-1),
			"time": time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
			"list": []any{int32(1), "a", []any{}, map[string]any{"x": nil}},
			"deep": map[string]any{"empty": map[string]any{}},
		},
		{"#int64": "7"},
		{"a": map[string]any{"#text": "b"}, "b": map[string]any{"\xff": int64(1), "#x": []any{int64(2)}}},
	} {
		text, err := encodeTable(table)
		if err != nil {
			t.Fatal(err)
		}
		back, err := decodeTable(text)
		if err != nil || !reflect.DeepEqual(back, table) {
			t.Errorf("%#v\ncame back as %#v, %v\nfrom %s", table, back, err, text)
		}
	}
}

func TestPropertiesRoundTrip(t *testing.T) {
	t.Parallel()
	zero, nine := uint8(0), uint8(9)
	for _, p := range []protocol.Properties{
		{},
		{ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: 2, Priority: &zero, CorrelationID: "c", ReplyTo: "r", Expiration: "60000"},
		{ContentType: "\xff", Priority: &nine},
		{MessageID: "m", Type: "t", AppID: "a", Timestamp: time.Date(2026, 2, 22, 12, 0, 1, 0, time.UTC)},
	} {
		text, err := encodeProperties(p)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeProperties(text); err != nil || !reflect.DeepEqual(back, p) {
			t.Errorf("%+v came back as %+v, %v", p, back, err)
		}
	}
}

func TestTablesThatNobodyWrote(t *testing.T) {
	t.Parallel()
	for _, text := range []string{``, `1`, `[]`, `{"a": 1.5}`, `{"a": 4294967296}`, `{"a": {"#what": "x"}}`, `{"a": {"#table": [[1]]}}`,
		`{"a": {"#bytes": "!"}}`, `{"a": {"#table": [["!", 1]]}}`, `{"a": [{"#int8": "999"}]}`} {
		if table, err := decodeTable([]byte(text)); err == nil {
			t.Errorf("%s became %v", text, table)
		}
	}
}

package protocol_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// BenchmarkDecode decodes a message without followers, as Celery 5.7 sends it.
func BenchmarkDecode(b *testing.B) {
	id := "00000000-0000-4000-8000-000000000000"
	d := protocol.Delivery{
		Headers: map[string]any{
			"lang": "py", "task": "shop.add", "id": id, "shadow": nil, "eta": nil, "expires": nil, "group": nil, "group_index": nil,
			"retries": int32(0), "timelimit": []any{nil, nil}, "root_id": id, "parent_id": nil, "argsrepr": "(1, 2)",
			"kwargsrepr": "{}", "origin": "gen1@bench", "ignore_result": false, "replaced_task_nesting": int32(0),
			"stamped_headers": nil, "stamps": map[string]any{},
		},
		Properties: protocol.Properties{ContentType: "application/json", ContentEncoding: "utf-8", CorrelationID: id},
		Body:       []byte(`[[1, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]`),
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := protocol.Decode(d, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// Of a repeated key, the last value counts, at the place of the first.
func TestRepeatedKeys(t *testing.T) {
	t.Parallel()
	for _, n := range []int{1, 7, 8, 9, 20} {
		var text, want []string
		for i := range n {
			text = append(text, fmt.Sprintf(`"k%d": %d`, i, i))
			want = append(want, fmt.Sprintf("k%d=%d", i, i+100))
		}
		for i := range n {
			text = append(text, fmt.Sprintf(`"k%d": %d`, i, i+100))
		}
		m, err := protocol.Decode(protocol.Delivery{
			Headers: map[string]any{"task": "shop.add", "id": "a"}, Properties: protocol.Properties{ContentType: "application/json"},
			Body: []byte("[[], {" + strings.Join(text, ",") + "}, {}]"),
		}, nil)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, member := range m.Kwargs {
			got = append(got, member.Key+"="+string(member.Value))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d keys: got %v", n, got)
		}
	}
}

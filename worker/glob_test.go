package worker

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"os/exec"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// Routes match what Celery's match: a text without a star is a name, all others are
// patterns of Python's fnmatch.
func TestPythonMatchesTheSameRoutes(t *testing.T) {
	t.Parallel()
	type question struct{ Pattern, Name string }
	questions := []question{
		{"[!a]*", "b.x"}, {"[!a]*", "a.x"}, {"[!a-c]*", "b.x"}, {"[^a]*", "b.x"}, {"[^a]*", "^.x"}, {`\*`, `\x`}, {`\*`, "*"}, {"a/*", "a/b/c"},
		{"*é?", "aéb"}, {"[a-é]*", "ä"}, {"[]a]*", "]"}, {"[!]a]*", "]"}, {"[!]*", "[!]"}, {"[!]*", "x"}, {"[z-a]*", "z"}, {"[!z-a]*", "z"},
		{"[ab]?", "bc"}, {"[ab]?", "[ab]?"}, {"a?", "ab"}, {"a[b", "a[b"}, {"a", "a"},
		{"[a-]*", "-"}, {"[-a]*", "-"}, {"[!-a]*", "-"}, {"[a-c-e]*", "d"}, {"[--/]*", "."}, {"[*", "["}, {"*", ""}, {"", ""}, {"*a*b", "xaxbxb"}, {"shop.*", "shop.add"},
	}
	random := rand.New(rand.NewPCG(7, 8))
	text := func(characters string, most int) string {
		out := make([]rune, random.IntN(most))
		for i := range out {
			out[i] = []rune(characters)[random.IntN(len([]rune(characters)))]
		}
		return string(out)
	}
	for range 10000 {
		pattern := text("[]!-abcé*?^\\", 9)
		if random.IntN(2) == 0 {
			pattern = "*[" + text("]!-abcd^\\&", 7) + "]" + text("*?a", 3)
		}
		questions = append(questions, question{pattern, text("abcd-]^!é\n", 5)})
	}
	input, err := json.Marshal(questions)
	if err != nil {
		t.Fatal(err)
	}
	command := exec.CommandContext(t.Context(), devenv.Celery(t, "5.7.0"), "-c", `
import json, sys
from celery.app.routes import MapRoute
json.dump([MapRoute({q["Pattern"]: {"queue": "mail"}})(q["Name"]) is not None for q in json.load(sys.stdin)], sys.stdout)`)
	command.Stdin = bytes.NewReader(input)
	output, err := command.Output()
	var want []bool
	if err != nil || json.Unmarshal(output, &want) != nil || len(want) != len(questions) {
		t.Fatalf("Python: %v, %d answers", err, len(want))
	}
	wrong := 0
	for i, q := range questions {
		if _, got := newRouter(Config{TaskRoutes: []Route{{Task: q.Pattern, Queue: "mail"}}}).route(q.Name); got != want[i] {
			if wrong++; wrong > 20 {
				t.FailNow()
			}
			t.Errorf("%q, %q: got %v, Python has %v", q.Pattern, q.Name, got, want[i])
		}
	}
}

package artifacts

import (
	"strings"
	"testing"
)

// What may become a long secret is not judged again after every byte that a program
// writes, but soon after its end, and at the end of a line at once.
func TestLooksAtBufferedText(t *testing.T) {
	t.Parallel()
	const size = 10 << 10
	looks := 0
	undecidedFor := func(text []byte, i int, end bool) (span, verdict) {
		looks++
		if len(text)-i < size && !end {
			return span{}, undecided
		}
		return span{}, absent
	}
	for name, c := range map[string]struct{ text, written string }{
		"one line":     {"abcd" + strings.Repeat("x", size+size/16), "abcd" + strings.Repeat("x", size-4)},
		"a line's end": {"abcd" + strings.Repeat("x", size-3) + "\n", "abcd" + strings.Repeat("x", size-3) + "\n"},
	} {
		looks = 0
		var out strings.Builder
		w := &RedactingWriter{matcher: newMatcher([]*pattern{{text: "abcd", detect: undecidedFor}}), next: &out, room: new(room)}
		for i := range len(c.text) {
			if _, err := w.Write([]byte(c.text[i : i+1])); err != nil {
				t.Fatal(err)
			}
		}
		if !strings.HasPrefix(out.String(), c.written) {
			t.Errorf("%s: %d bytes of %d are written", name, out.Len(), len(c.text))
		}
		if most := patient + 100; looks > most {
			t.Errorf("%s: %d looks at %d bytes, want at most %d", name, looks, len(c.text), most)
		}
		if err := w.Close(); err != nil || out.String() != c.text {
			t.Errorf("%s: %v, %d bytes of %d", name, err, out.Len(), len(c.text))
		}
	}
}

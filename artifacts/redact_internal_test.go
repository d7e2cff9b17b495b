package artifacts

import (
	"encoding/binary"
	"math/rand/v2"
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

// The search looks at several positions at a time and skips none at which a pattern or an
// escape may begin: texts are made of parts of patterns and of what stands between them.
func TestSkipStopsAtEachPositionThatCounts(t *testing.T) {
	t.Parallel()
	for _, environ := range [][]string{{"A_TOKEN=s3cr3t-value-one", "B_KEY=another/+ &é-value", "C_PASSWORD=xyzzy42"}, {"A_TOKEN=s3cr3t-value-one", "B_PASSWORD=abc"}} {
		m := NewRedactor(environ).matcher()
		pieces := []string{"a", "s3", "s3cr", "3t", "\\", "%2", "ano", "another/", "://", "Bear", "xy", "xyzz", "ab", "abc", " ", "é", "\x1b", "--"}
		random := rand.New(rand.NewPCG(1, 2))
		for range 3000 {
			var text []byte
			for range random.IntN(12) {
				text = append(text, pieces[random.IntN(len(pieces))]...)
			}
			counts := func(from int) int {
				for ; from+gramSize <= len(text); from++ {
					gram := binary.LittleEndian.Uint32(text[from:])
					if m.list(gram) != nil || escapeByte[gram>>24] || m.short[byte(gram)] != nil {
						break
					}
				}
				return from
			}
			for from := range text {
				if got, want := m.skip(new(nextEscape), text, from), counts(from); got != want {
					t.Fatalf("in %q, from %d on, it stops at %d, want %d", text, from, got, want)
				}
			}
			escape := new(nextEscape)
			for from := 0; from < len(text); from++ {
				got, want := m.skip(escape, text, from), counts(from)
				if got != want {
					t.Fatalf("in %q, from %d on after others, it stops at %d, want %d", text, from, got, want)
				}
				from = got
			}
		}
	}
}

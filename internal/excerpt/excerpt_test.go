package excerpt

import (
	"fmt"
	"strings"
	"testing"
)

func TestWhatIsKept(t *testing.T) {
	t.Parallel()
	for _, pieces := range [][]string{{"abcdefgh"}, {"abc", "defgh"}, {"", "a", "bcdefg", "h"}} {
		full := 0
		head, tail := &Head{Limit: 5, OnFull: func() { full++ }}, &Tail{Limit: 5}
		for _, piece := range pieces {
			for _, w := range []interface{ Write([]byte) (int, error) }{head, tail} {
				if n, err := w.Write([]byte(piece)); n != len(piece) || err != nil {
					t.Errorf("%q: Write(%q) = %d, %v", pieces, piece, n, err)
				}
			}
		}
		if string(head.Kept) != "abcde" || !head.Full || full != 1 || tail.String() != "defgh" {
			t.Errorf("%q: head %q, full %v (told %d times), tail %q", pieces, head.Kept, head.Full, full, tail)
		}
	}
	exact := &Head{Limit: 5}
	fmt.Fprint(exact, "abcde")
	if exact.Full {
		t.Error("a head that has room for all is full")
	}
	none := &Head{}
	if fmt.Fprint(none, strings.Repeat("x", 1000)); len(none.Kept) != 0 || !none.Full {
		t.Errorf("a head without room keeps %q, full %v", none.Kept, none.Full)
	}
}

// Half of a credential is none that a redactor knows.
func TestWordsAreWhole(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]struct{ head, tail string }{
		"":                   {"", ""},
		"a word":             {"a word", "a word"},
		"ten letter":         {"ten letter", "ten letter"},
		"one two three":      {"one two ", " two three"},
		"one\ttwo-three":     {"one\t", "\ttwo-three"},
		"one-two-\nthree":    {"one-two-\n", "\nthree"},
		"one-two-three-four": {"", ""},
		"one two two one":    {"one two ", " two one"},
	} {
		head, tail := &Head{Limit: 10}, &Tail{Limit: 10}
		fmt.Fprint(head, text)
		fmt.Fprint(tail, text)
		if head.Words() != want.head || tail.Words() != want.tail {
			t.Errorf("%q: head %q, tail %q, want %q and %q", text, head.Words(), tail.Words(), want.head, want.tail)
		}
	}
	head, tail := &Head{Limit: 1000}, &Tail{Limit: 1000}
	long := strings.Repeat("x", 2000)
	fmt.Fprint(head, "one "+long)
	fmt.Fprint(tail, long+" two")
	if h, l := head.Words(), tail.Words(); h != "one "+long[:1000-4-maxCredential] || l != long[:1000-4-maxCredential]+" two" {
		t.Errorf("of a long word, %d bytes are in the head and %d in the tail, want %d", len(h), len(l), 1000-maxCredential)
	}
}

package artifacts

import (
	"bytes"
	"math/rand/v2"
	"testing"
	"unicode/utf8"
)

// The short way of a TextWriter for ASCII gives the same text as the rules, one
// character at a time, wherever the text is cut.
func TestTextIsTheSameByTheShortWay(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	parts := []string{"a", "plain text, ", "\r", "\n", "\r\n", "\x00", "é", "€", "\xc3", "\xff", "\x7f", "\x01", "\x80"}
	for range 20000 {
		var in []byte
		for range random.IntN(12) {
			in = append(in, parts[random.IntN(len(parts))]...)
		}
		for _, keepCR := range []bool{false, true} {
			var out bytes.Buffer
			w := &TextWriter{next: &out, keepCR: keepCR}
			for rest := in; len(rest) > 0; {
				n := 1 + random.IntN(len(rest))
				_, _ = w.Write(rest[:n])
				rest = rest[n:]
			}
			_ = w.Close()
			if want := textByTheRules(in, keepCR); !bytes.Equal(out.Bytes(), want) {
				t.Fatalf("%q, keepCR %t: %q, want %q", in, keepCR, out.Bytes(), want)
			}
		}
	}
}

func textByTheRules(in []byte, keepCR bool) (out []byte) {
	afterCR := false
	for len(in) > 0 {
		r, size := utf8.DecodeRune(in)
		in = in[size:]
		switch {
		case r == '\n' && afterCR, r == 0:
		case r == '\r' && !keepCR:
			out = append(out, '\n')
		default:
			out = utf8.AppendRune(out, r)
		}
		afterCR = r == '\r' && !keepCR
	}
	return out
}

// Patterns with the same hash are found by their own bytes.
func TestPatternsWithOneHash(t *testing.T) {
	t.Parallel()
	first := map[uint32]string{}
	var a, b string
	for i := uint32(0); a == ""; i++ {
		text := string([]byte{byte('a' + i%26), byte('a' + i/26%26), byte('a' + i/676%26), byte('a' + i/17576%26)})
		gram := uint32(text[0]) | uint32(text[1])<<8 | uint32(text[2])<<16 | uint32(text[3])<<24
		if other, found := first[gramHash(gram)]; found {
			a, b = other, text
		}
		first[gramHash(gram)] = text
	}
	r := NewRedactor([]string{"A_TOKEN=" + a + "Qx81", "B_TOKEN=" + b + "Zw72"})
	if got := r.String("x " + a + "Qx81 y " + b + "Zw72 z " + a + "Zw72"); got != "x *** y *** z "+a+"Zw72" {
		t.Errorf("%q", got)
	}
}

package artifacts_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

// Every form of every secret is masked in every place, however the text is cut.
func TestNoFormOfASecretLeaks(t *testing.T) {
	t.Parallel()
	secrets := leaktest.Secrets()
	var environ []string
	for name, secret := range secrets {
		environ = append(environ, name+"="+secret)
	}
	r := artifacts.NewRedactor(environ)
	contexts := [][2]string{{"", ""}, {"password=", "\n"}, {`{"a": "`, `"}`}, {`x\`, "x"}, {"100%", "%"}, {"\x1b[1m", "\x1b[0m"}, {"http://mm:", "@host/"}, {"AAAA ", " AAAA"}}
	var failures atomic.Int32
	for name, secret := range secrets {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			contexts := contexts
			if len(secret) > 400 {
				contexts = contexts[:3] // they take longer, and their lines are secrets like the others
			}
			search := leaktest.NewSearch(map[string]string{name: secret})
			random := rand.New(rand.NewPCG(1, uint64(len(secret))))
			for _, form := range leaktest.Spell(secret, random) {
				for i, context := range contexts {
					text := context[0] + form.Text + context[1]
					got := r.String(text)
					if _, left := search.Find(got); left != "" {
						if failures.Add(1) < 60 {
							t.Errorf("%s in %q…: %q is left of\n%.300q in\n%.300q", form.How, context[0], left, text, got)
						}
						continue
					}
					// All cuts in one place, some in the others.
					step := 1 + len(text)/100
					if i > 0 {
						step = 1 + len(text)/2
					}
					for cut := 1; cut < len(text); cut += step {
						var out bytes.Buffer
						w := r.Writer(&out)
						_, _ = w.Write([]byte(text[:cut]))
						_, _ = w.Write([]byte(text[cut:]))
						_ = w.Close()
						if out.String() != got {
							t.Fatalf("%s in %q…, cut at %d: %q, at once %q", form.How, context[0], cut, out.String(), got)
						}
					}
					size := 1 + len(text)/50
					if pieces := inPieces(r, text, size); pieces != got {
						t.Fatalf("%s in %q…, by %d: %q, at once %q", form.How, context[0], size, pieces, got)
					}
					if again := r.String(got); again != got {
						t.Errorf("%s in %q…: %q, redacted again %q", form.How, context[0], got, again)
					}
				}
			}
		})
	}
}

// A program that rewrites a line prints carriage returns, which become line breaks in the
// log. A secret that they interrupt is masked all the same, also if it is short.
func TestCarriageReturnsInSecrets(t *testing.T) {
	t.Parallel()
	for _, secret := range []string{"hunter2!", "Ge@heim/88 w7Kq", "tok_Zr5uTq8LmW2xNv4B"} {
		for at := 1; at < len(secret); at++ {
			text := "a " + secret[:at] + "\r" + secret[at:] + " b\r\nc"
			for size := 1; size <= len(text); size++ {
				o := artifacts.NewCapture(artifacts.NewRedactor([]string{"MY_TOKEN=" + secret}))
				for rest := text; rest != ""; rest = rest[min(size, len(rest)):] {
					_, _ = io.WriteString(o.Stdout, rest[:min(size, len(rest))])
				}
				if got := o.Close().Text(""); got != "a *** b\nc" {
					t.Fatalf("%q by %d: %q", text, size, got)
				}
			}
		}
	}
}

// A long secret is found over two lines wherever it is cut.
func TestSecretsOverTwoLines(t *testing.T) {
	t.Parallel()
	const secret = "tok_Zr5uTq8LmW2xNv4B"
	r := artifacts.NewRedactor([]string{"MY_TOKEN=" + secret})
	for at := 1; at < len(secret); at++ {
		got := r.String(secret[:at] + "\n" + secret[at:])
		if _, left := leaktest.NewSearch(map[string]string{"": secret}).Find(got); left != "" {
			t.Errorf("cut at %d: %q", at, got)
		}
	}
}

// Spellings of some programs: configparser and alembic double the percent sign, YAML and
// mail fold a text at a space, programs print bytes with separators of their own.
func TestSpellingsOfSomePrograms(t *testing.T) {
	t.Parallel()
	r := artifacts.NewRedactor([]string{"X=postgres://mm:Ge%40heim%2F88@db/x", "MY_TOKEN=Ge@heim/88 w7Kq", "MY_PASSPHRASE=correct horse battery staple"})
	for _, text := range []string{
		"Ge%%40heim%%2F88", "Ge%%40heim/88 w7Kq", "Ge@heim%%2f88%%20w7Kq",
		"correct horse\n  battery staple", "correct\nhorse\r\n\tbattery\nstaple", "correct horse\n#12 0.345 battery staple", "correct horse battery \nstaple",
		"47-65-40-68-65-69-6d-2f-38-38-20-77-37-4b-71", "47-65-40-68-65-69-6D-2F-38-38-20-77-37-4B-71",
		"47, 0x65, 0x40, 0x68, 0x65, 0x69, 0x6d, 0x2f, 0x38, 0x38, 0x20, 0x77, 0x37, 0x4b, 0x71", "47, 0x65, 0x40, 0x68, 0x65, 0x69, 0x6D, 0x2F, 0x38, 0x38, 0x20, 0x77, 0x37, 0x4B, 0x71",
	} {
		text = "is 0x" + text + "."
		got := r.String(text)
		if got != "is 0x***." {
			t.Errorf("%q became %q", text, got)
		}
		for size := 1; size <= len(text); size++ {
			if pieces := inPieces(r, text, size); pieces != got {
				t.Fatalf("%q by %d: %q, at once %q", text, size, pieces, got)
			}
		}
	}
	for _, clean := range []string{"100%% of 40%%", "correct\nhorse\nbattery"} {
		if got := r.String(clean); got != clean {
			t.Errorf("%q became %q", clean, got)
		}
	}
}

// Passwords of URLs are read as old SQLAlchemy does too, which takes + for a space.
func TestPlusInThePasswordOfAURL(t *testing.T) {
	t.Parallel()
	r := artifacts.NewRedactor([]string{"X=https://mm:Ge%40heim%2F88+w7Kq@h/"})
	for _, text := range []string{"Ge@heim/88 w7Kq", "Ge@heim/88+w7Kq", "Ge%40heim%2F88+w7Kq", "Ge%40heim/88%20w7Kq"} {
		if got := r.String("a " + text + " b"); got != "a *** b" {
			t.Errorf("%q: %q", text, got)
		}
	}
}

// Texts that look like a secret everywhere do not stop the worker: neither the secrets nor
// the texts come from its operator only.
func TestHostileTextsTakeNoLongTime(t *testing.T) {
	t.Parallel()
	ab := strings.Repeat("ab", 10) + "x"
	for _, tt := range []struct{ secret, text string }{
		{strings.Repeat("a", 300) + "b", "a"}, {strings.Repeat(`\`, 30) + "x", `\`}, {strings.Repeat("%25", 20) + "x", "%25"}, {strings.Repeat("&amp;", 20) + "x", "&amp;"},
		{ab, "ab\n"}, {ab, "ab\x1b[1m"}, {ab, "\x1b"}, {ab, "ab\b"}, {ab, `\u0061\u0062`}, {ab, "://ab:"}, {ab, "a://a:{" + strings.Repeat(",(;", 300)}, {ab, "-----BEGIN PRIVATE KEY-----"}, {ab, "Authorization: Bearer "},
	} {
		r := artifacts.NewRedactor([]string{"MY_TOKEN=" + tt.secret})
		text := strings.Repeat(tt.text, (128<<10)/len(tt.text))
		took := threadTime(t, func() { _ = r.String(text) })
		// Ordinary text takes a thousandth of that. The worst of these takes less than
		// a second without the race detector.
		if took > 20*time.Second {
			t.Errorf("%.10q: %v for %d bytes", tt.text, took, len(text))
		}
	}
}

// threadTime returns how long the processor has worked on f, whatever else it does
// meanwhile.
func threadTime(t *testing.T, f func()) time.Duration {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	used := func() time.Duration {
		const ofThisThread = 1 // RUSAGE_THREAD of Linux
		var usage syscall.Rusage
		if err := syscall.Getrusage(ofThisThread, &usage); err != nil {
			t.Fatal(err)
		}
		return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
	}
	before := used()
	f()
	return used() - before
}

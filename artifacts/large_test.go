package artifacts_test

import (
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// BenchmarkLargeLog is the whole way of 1 GiB into an artifact: text, redaction,
// checksum and file. It reports the peak of the process's memory.
func BenchmarkLargeLog(b *testing.B) {
	clean := buildLog(8 << 20)
	for _, n := range []int{10, 50} {
		r := artifacts.NewRedactor(sampleSecrets(n))
		b.Run(fmt.Sprintf("%d_secrets", n), func(b *testing.B) {
			b.SetBytes(int64(128 * len(clean)))
			for b.Loop() {
				largeLog(b, r, clean)
			}
		})
	}
}

func largeLog(b *testing.B, r *artifacts.Redactor, clean []byte) {
	dir, err := artifacts.Open(b.TempDir(), r)
	if err != nil {
		b.Fatal(err)
	}
	log, err := dir.Log("build.log")
	if err != nil {
		b.Fatal(err)
	}
	begin := processorTime()
	o := log.Output()
	for range 128 {
		for rest := clean; len(rest) > 0; {
			n := min(32<<10, len(rest))
			_, _ = o.Stdout.Write(rest[:n])
			rest = rest[n:]
		}
	}
	o.Close()
	if _, err := log.Finish(); err != nil {
		b.Fatal(err)
	}
	// The machine may have other work; what counts is a whole core.
	b.ReportMetric(float64(128*len(clean))/1e6/(processorTime()-begin).Seconds(), "MB/cpu-s")
	b.ReportMetric(float64(peakMemory(b))/1024, "MiB-peak")
}

// BenchmarkByteByByte is a secret of 10 KB with a colour in it, in writes of one byte.
func BenchmarkByteByByte(b *testing.B) {
	secret := strings.Repeat("Zr5uTq8LmW2xNv4B", 640)
	r := artifacts.NewRedactor([]string{"MY_TOKEN=" + secret})
	text := []byte(secret[:99] + "\x1b[1m" + secret[99:])
	b.SetBytes(int64(len(text)))
	for b.Loop() {
		w := r.Writer(io.Discard)
		for i := range text {
			_, _ = w.Write(text[i : i+1])
		}
		_ = w.Close()
	}
}

func peakMemory(b *testing.B) (kib int) {
	b.Helper()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		b.Skip(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, found := strings.CutPrefix(line, "VmHWM:"); found {
			for _, c := range value {
				if c >= '0' && c <= '9' {
					kib = 10*kib + int(c-'0')
				}
			}
		}
	}
	return kib
}

// A long secret is found although the program prints it byte by byte, each in a write of
// its own.
func TestLongSecretsByteByByte(t *testing.T) {
	t.Parallel()
	secret := strings.Repeat("Zr5uTq8LmW2xNv4B", 512) // 8 KiB, which repeats itself
	r := artifacts.NewRedactor([]string{"MY_TOKEN=" + secret + "end"})
	for name, text := range map[string]string{"found": secret + "end", "nearly": secret + "enx", "coloured": strings.ReplaceAll(secret, "8L", "8\x1b[1mL") + "end"} {
		var out strings.Builder
		w := r.Writer(&out)
		for i := range len(text) {
			_, _ = io.WriteString(w, text[i:i+1])
		}
		_ = w.Close()
		if name != "nearly" && out.String() != "***" {
			t.Errorf("%s: %.100q", name, out.String())
		}
	}
}

// BenchmarkText is a log without secrets on its way through a TextWriter.
func BenchmarkText(b *testing.B) {
	clean := buildLog(8 << 20)
	b.SetBytes(int64(len(clean)))
	for b.Loop() {
		w := artifacts.NewTextWriter(io.Discard)
		_, _ = w.Write(clean)
		_ = w.Close()
	}
}

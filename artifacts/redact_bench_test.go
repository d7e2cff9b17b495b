package artifacts_test

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// sampleSecrets are variables with secrets as an environment has them: tokens,
// hexadecimal keys, passwords in addresses, and now and then a key of many lines.
func sampleSecrets(n int) (environ []string) {
	for i := range n {
		sum := sha256.Sum256(fmt.Append(nil, "sample", i))
		token := base64.RawURLEncoding.EncodeToString(sum[:])
		switch i % 5 {
		case 0:
			environ = append(environ, fmt.Sprintf("SERVICE_%d_TOKEN=ghp_%s", i, token))
		case 1:
			environ = append(environ, fmt.Sprintf("SERVICE_%d_KEY=%s", i, hex.EncodeToString(sum[:])))
		case 2:
			environ = append(environ, fmt.Sprintf("SERVICE_%d_URL=postgres://mm:%s%%2F%%40x@db/moonmind", i, token[:20]))
		case 3:
			environ = append(environ, fmt.Sprintf("SERVICE_%d_PASSWORD=%s/+ &é", i, token[:12]))
		case 4:
			if i%10 == 4 {
				environ = append(environ, fmt.Sprintf("SERVICE_%d_SECRET=%s", i, strings.Repeat(token, 7)))
				break
			}
			var key strings.Builder
			key.WriteString("-----BEGIN PRIVATE KEY-----\n")
			for range 25 {
				sum = sha256.Sum256(sum[:])
				more := sha256.Sum256(append(sum[:], 'x'))
				key.WriteString(base64.StdEncoding.EncodeToString(append(sum[:], more[:16]...)) + "\n")
			}
			key.WriteString("-----END PRIVATE KEY-----\n")
			environ = append(environ, fmt.Sprintf("SERVICE_%d_SSH_KEY=%s", i, key.String()))
		}
	}
	return environ
}

// buildLog is text as BuildKit prints it.
func buildLog(size int) []byte {
	var out strings.Builder
	for i := 0; out.Len() < size; i++ {
		fmt.Fprintf(&out, "#%d %d.%03d Get:%d http://deb.debian.org/debian bookworm/main amd64 libfoo%d-dev amd64 1.%d.2-3+deb12u1 [%d kB]\n", i%20, i/1000, i%1000, i, i%97, i%13, i*7%9999)
		fmt.Fprintf(&out, "#%d sha256:%x %d.12MB / 30.43MB 1.3s\n", i%20, sha256.Sum256(fmt.Append(nil, i)), i%30)
		fmt.Fprintf(&out, "2026-01-02T03:04:05.%06dZ level=info msg=\"GET /api/orchestrator/runs/%d\" status=200 duration=%dms\n", i%1000000, i, i%977)
	}
	return []byte(out.String()[:size])
}

func BenchmarkRedaction(b *testing.B) {
	clean := buildLog(8 << 20)
	for _, n := range []int{10, 50} {
		environ := sampleSecrets(n)
		r := artifacts.NewRedactor(environ)
		_, value, _ := strings.Cut(environ[0], "=")
		hits := []byte(strings.ReplaceAll(string(clean), "libfoo7-dev", value))
		coloured := []byte(strings.ReplaceAll(string(clean), "level=info", "\x1b[32mlevel\x1b[0m=info"))
		escaped := []byte(strings.ReplaceAll(string(clean), "/", "%2F"))
		for _, text := range []struct {
			name string
			text []byte
		}{{"clean", clean}, {"hits", hits}, {"coloured", coloured}, {"escaped", escaped}} {
			b.Run(fmt.Sprintf("%d_secrets/%s", n, text.name), func(b *testing.B) {
				b.SetBytes(int64(len(text.text)))
				begin, n := processorTime(), 0
				defer func() {
					// The machine may have other work; what counts is a whole core.
					b.ReportMetric(float64(n*len(text.text))/1e6/(processorTime()-begin).Seconds(), "MB/cpu-s")
				}()
				for b.Loop() {
					n++
					w := r.Writer(io.Discard)
					_, _ = w.Write(text.text)
					_ = w.Close()
				}
			})
		}
	}
}

// processorTime is the time that processors have spent on this process.
func processorTime() time.Duration {
	var usage syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

func BenchmarkNewRedactor(b *testing.B) {
	environ := sampleSecrets(50)
	for b.Loop() {
		artifacts.NewRedactor(environ)
	}
}

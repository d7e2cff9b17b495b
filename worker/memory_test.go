package worker_test

import (
	"bytes"
	"compress/zlib"
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// compressedMessage returns a message for shop.add whose body decompresses to many
// times its size.
func compressedMessage(t *testing.T, seconds float64) protocol.Publishing {
	t.Helper()
	m := workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil, workertest.Option("countdown", seconds))
	var body bytes.Buffer
	z := zlib.NewWriter(&body)
	random := rand.New(rand.NewPCG(1, 2))
	fmt.Fprintf(z, `[[1, 2], {"pad": ["%x"`, random.Uint64())
	for range 4_000 {
		_, _ = z.Write([]byte(`, "abcdefgh"`))
	}
	_, _ = z.Write([]byte(`]}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]`))
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	m.Headers["compression"], m.Body = "application/x-gzip", body.Bytes()
	return m
}

// gauge returns the value of a metric.
func gauge(t *testing.T, metrics *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := metrics.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.GetMetric()[0].GetGauge().GetValue()
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// bytesInUse returns the bytes in use by heap and stacks.
func bytesInUse() int {
	var m runtime.MemStats
	for range 2 { // what a finalizer or a pool has kept is collected in the second round
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// Messages that wait for their ETA cost what the broker has delivered, and not what
// that decompresses to. It is not parallel, so that no other test allocates meanwhile.
func TestDelayedMessagesAreKeptAsBytes(t *testing.T) {
	const messages = 1000
	r := newTestEnv(t)
	metrics := prometheus.NewRegistry()
	cfg := r.config()
	cfg.Logger, cfg.Metrics = nil, metrics
	w := newWorker(t, cfg)
	registerShop(w)
	workertest.Start(t, w)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	before := bytesInUse()
	m := compressedMessage(t, 3600)
	for sent := 0; sent < messages; {
		for range 100 {
			r.send(m)
			sent++
		}
		eventually(t, "all messages wait", func() bool { return int(gauge(t, metrics, "celery_worker_messages_held")) == sent })
	}
	used := bytesInUse() - before
	decoded, err := workertest.Decoded(m)
	if err != nil {
		t.Fatal(err)
	}
	size := len(decoded.RawKwargs)
	t.Logf("%d messages of %d bytes, which decompress to %d: %d bytes each", messages, len(m.Body), size, used/messages)
	// Headers, a goroutine and a share of the consumers cost about 20 KiB.
	if most := messages * (2*len(m.Body) + 32<<10); used > most {
		t.Errorf("%d messages use %d KiB, want at most %d", messages, used>>10, most>>10)
	}
	if !strings.HasPrefix(string(decoded.RawKwargs), `{"pad"`) || size < 100*len(m.Body) {
		t.Fatalf("the body of %d bytes decompresses to %d: the test shows nothing", len(m.Body), size)
	}
}

// A message whose body decompresses beyond the limit fails by itself: the worker goes
// on.
func TestBodyThatDecompressesToTooMuch(t *testing.T) {
	t.Parallel()
	r := newTestEnv(t)
	w := newWorker(t, r.config())
	worker.Handle(w, "shop.add", func(context.Context, struct {
		Args []any `celery:"*"`
	}) (int, error) {
		return 3, nil
	})
	workertest.Start(t, w)
	m := workertest.Message("orders", "shop.add", nil, nil)
	var body bytes.Buffer
	z := zlib.NewWriter(&body)
	_, _ = z.Write([]byte("[[" + strings.Repeat("1,", 4<<20) + "1], {}, {}]"))
	_ = z.Close()
	m.Headers["compression"], m.Body = "application/x-gzip", body.Bytes()
	r.send(m)
	r.result(r.send(workertest.Message("orders", "shop.add", workertest.Args(1, 2), nil)))
	if _, stored := r.results.Find(m.TaskID); stored {
		t.Error("a message that cannot be read has a result")
	}
	if n := r.depth("orders"); n != 0 {
		t.Errorf("%d messages are in the queue, want none", n)
	}
}

package protocol_test

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/andybalholm/brotli"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Every compression that kombu has is read, under the content type that kombu
// sends and under its other names.
func TestEveryCompressionOfKombuIsRead(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"testdata/compressed_kombu-5.6.2.json", "testdata/compressed_kombu-5.7.0.json"} {
		text, err := os.ReadFile(file)
		var captured struct {
			Bodies   map[string]string
			Messages []struct {
				Name, Header, Body string
				Compressed         []byte
			}
		}
		if err != nil || json.Unmarshal(text, &captured) != nil || len(captured.Messages) != 18 {
			t.Fatalf("%s: %v, %d messages", file, err, len(captured.Messages))
		}
		for _, m := range captured.Messages {
			for _, name := range []string{m.Header, m.Name} {
				d := delivery(string(m.Compressed))
				d.Headers["compression"] = name
				if body, err := protocol.Decompress(d, protocol.MaxBodySize); err != nil || string(body) != captured.Bodies[m.Body] {
					t.Errorf("%s: %s: %s: %d bytes, %v", file, name, m.Body, len(body), err)
				}
				if _, err := protocol.Decode(d, nil); err != nil {
					t.Errorf("%s: %s: %s: %v", file, name, m.Body, err)
				}
				// A body that was cut, or of which a byte differs, is an error or the same body.
				for cut := range min(len(m.Compressed), 24) {
					d.Body = m.Compressed[:cut]
					if body, err := protocol.Decompress(d, protocol.MaxBodySize); err == nil && len(body) > 0 {
						t.Errorf("%s: %s: cut to %d bytes: %d bytes", name, m.Body, cut, len(body))
					}
					d.Body = bytes.Clone(m.Compressed)
					d.Body[cut] ^= 0x55
					_, _ = protocol.Decompress(d, protocol.MaxBodySize)
				}
			}
		}
	}
}

// Decompress reads what Python reads: streams of several blocks, with any check,
// and several streams. It refuses what Python refuses.
func TestStreamsOfXZ(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	noise := make([]byte, 10_000)
	for i := range noise {
		noise[i] = byte(random.Uint32())
	}
	var streams []string
	contents := []string{"", "x", strings.Repeat("[1, 2]", 5_000), string(noise)}
	for _, content := range contents {
		for _, config := range []xz.WriterConfig{{}, {BlockSize: 1000}, {CheckSum: xz.CRC32}, {CheckSum: xz.SHA256}, {NoCheckSum: true}, {DictCap: 1 << 22}} {
			var out bytes.Buffer
			w, err := config.NewWriter(&out)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write([]byte(content)); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			streams = append(streams, out.String())
		}
	}
	for range 40 {
		streams = append(streams, streams[random.IntN(24)]+streams[random.IntN(24)])
	}
	streams = append(streams, "\x00\x00\x00\x00", "", "\x00"+streams[1])
	for i := range 200 {
		n := random.IntN(24)
		if n%6 == 4 {
			continue // without a check, damage may stay unseen
		}
		damaged := []byte(streams[n])
		for range 1 + i%3 {
			damaged[random.IntN(len(damaged))] ^= 1 << random.IntN(8)
		}
		streams = append(streams, string(damaged))
	}
	var questions []question
	for _, s := range streams {
		questions = append(questions, question{"xz", hex.EncodeToString([]byte(s))})
	}
	for i, text := range askPython(t, "5.7.0", questions) {
		d := delivery(streams[i])
		d.Headers["compression"] = "xz"
		body, err := protocol.Decompress(d, protocol.MaxBodySize)
		if string(text) == "null" {
			// The library does not look at the last bits of a damaged chunk, but the
			// check after the block has been passed.
			if err == nil && !slices.Contains(contents, string(body)) {
				t.Errorf("stream %d: %d bytes, Python refuses it", i, len(body))
			}
			continue
		}
		if want := answer[string](t, text); hex.EncodeToString(body) != want {
			t.Errorf("stream %d: %d bytes, %v; Python has %d", i, len(body), err, len(want)/2)
		}
	}
}

// bombs returns size zeros with each compression, in as few bytes as possible.
func bombs(t *testing.T, size int) map[string][]byte {
	t.Helper()
	zeros := make([]byte, size)
	pack := func(write func(*bytes.Buffer) error) []byte {
		var out bytes.Buffer
		if err := write(&out); err != nil {
			t.Fatal(err)
		}
		return out.Bytes()
	}
	return map[string][]byte{
		"xz": pack(func(out *bytes.Buffer) error {
			w, err := xz.WriterConfig{DictCap: 1 << 25}.NewWriter(out)
			if err == nil {
				_, err = w.Write(zeros)
			}
			if err == nil {
				err = w.Close()
			}
			return err
		}),
		"brotli": pack(func(out *bytes.Buffer) error {
			w := brotli.NewWriterOptions(out, brotli.WriterOptions{Quality: 5, LGWin: 24})
			_, _ = w.Write(zeros)
			return w.Close()
		}),
		"zstd": pack(func(out *bytes.Buffer) error {
			w, err := zstd.NewWriter(out, zstd.WithWindowSize(1<<25), zstd.WithEncoderConcurrency(1))
			if err == nil {
				_, err = w.Write(zeros)
			}
			if err == nil {
				err = w.Close()
			}
			return err
		}),
	}
}

// A message that decompresses to more than its limit costs no more than the
// limit, and what a message says about its size and its window costs nothing.
func TestDecompressionCostsNoMoreThanItsLimit(t *testing.T) {
	const limit = 1 << 20
	for name, body := range bombs(t, 16<<20) {
		d := delivery(string(body))
		d.Headers["compression"] = name
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err := protocol.Decompress(d, limit)
		runtime.ReadMemStats(&after)
		allocated := after.TotalAlloc - before.TotalAlloc
		t.Logf("%s: %d bytes compressed, %d KiB allocated, %v", name, len(body), allocated>>10, err)
		if small, err := protocol.Decompress(d, 17<<20); len(small) > 0 || err == nil {
			t.Errorf("%s: %d bytes, %v: more than 200 times the compressed size", name, len(small), err)
		}
		if err == nil || !strings.Contains(err.Error(), "decompress to more than") {
			t.Errorf("%s: %v", name, err)
		}
		most := uint64(8 * limit)
		if name == "brotli" {
			most = 40 << 20 // its window
		}
		if allocated > most {
			t.Errorf("%s: %d KiB were allocated for a limit of %d KiB", name, allocated>>10, limit>>10)
		}
	}
}

// A dictionary of 4 GiB that an xz stream asks for is not allocated.
func TestDictionariesOfXZCostNothing(t *testing.T) {
	var out bytes.Buffer
	w, err := xz.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = w.Write([]byte("[[1], {}, {}]"))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	stream := out.Bytes()
	header := stream[12 : 12+(int(stream[12])+1)*4]
	at := bytes.Index(header, []byte{0x21, 1})
	header[at+2] = 40
	binary.LittleEndian.PutUint32(header[len(header)-4:], crc32.ChecksumIEEE(header[:len(header)-4]))
	d := delivery(string(stream))
	d.Headers["compression"] = "xz"
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	m, err := protocol.Decode(d, nil)
	runtime.ReadMemStats(&after)
	if allocated := after.TotalAlloc - before.TotalAlloc; err != nil || string(m.RawArgs) != "[1]" || allocated > 1<<20 {
		t.Errorf("%v, %d KiB were allocated", err, allocated>>10)
	}
}

// A zstd frame of unknown size, whose window is larger than the limit, is read,
// and so are several frames.
func TestFramesOfZstd(t *testing.T) {
	t.Parallel()
	var body bytes.Buffer
	for range 3 {
		w, err := zstd.NewWriter(&body, zstd.WithWindowSize(1<<25), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("[1]")); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("[2]")); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		w, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		body.Write(w.EncodeAll([]byte("[3]"), nil))
	}
	for _, d := range []protocol.Delivery{delivery(body.String()), delivery(body.String()[body.Len()/3*2:])} {
		d.Headers["compression"] = "zstd"
		got, err := protocol.Decompress(d, 1<<20)
		if want := strings.Repeat("[1][2][3]", len(d.Body)*3/body.Len()); err != nil || string(got) != want {
			t.Errorf("got %q, %v, want %q", got, err, want)
		}
	}
}

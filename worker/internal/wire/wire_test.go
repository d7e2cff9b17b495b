package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"testing"
)

// headerInt64 is the properties block of testdata/header_int64_py-amqp-5.3.1.json:
// py-amqp's bytes for the headers small=7, big=2**40, neg=-5.
const headerInt64 = "b000106170706c69636174696f6e2f6a736f6e0000002105736d616c6c4900000007036269674c0000010000000000036e656749fffffffb02"

func frame(kind byte, payload []byte) []byte {
	b := []byte{kind, 0, 1}
	b = binary.BigEndian.AppendUint32(b, uint32(len(payload)))
	return append(append(b, payload...), 0xce)
}

func headerFrame(properties []byte) []byte {
	return frame(frameHeader, append(make([]byte, 12), properties...))
}

func TestIncomingLongIntegersAreReadable(t *testing.T) {
	block, err := hex.DecodeString(headerInt64)
	if err != nil {
		t.Fatal(err)
	}
	in := headerFrame(block)
	r := frameRewriter{rewrite: rewriteIncoming}
	out := r.feed(nil, in)
	want := bytes.Replace(in, []byte("bigL"), []byte("bigl"), 1)
	if !bytes.Equal(out, want) {
		t.Errorf("got  %x\nwant %x", out, want)
	}
}

func TestPriorityZeroSurvivesBothWays(t *testing.T) {
	// Flags: delivery mode and priority.
	out := frameRewriter{rewrite: rewriteOutgoing}
	got := out.feed(nil, headerFrame([]byte{0x18, 0x00, 2 | PriorityZero, 1}))
	if want := headerFrame([]byte{0x18, 0x00, 2, 0}); !bytes.Equal(got, want) {
		t.Errorf("outgoing: got %x, want %x", got, want)
	}
	in := frameRewriter{rewrite: rewriteIncoming}
	got = in.feed(nil, got)
	if want := headerFrame([]byte{0x18, 0x00, 2 | PriorityZero, 0}); !bytes.Equal(got, want) {
		t.Errorf("incoming: got %x, want %x", got, want)
	}
	// Absent: no mark, not even one that a stranger has set.
	got = in.feed(nil, headerFrame([]byte{0x10, 0x00, 2 | PriorityZero}))
	if want := headerFrame([]byte{0x10, 0x00, 2}); !bytes.Equal(got, want) {
		t.Errorf("incoming without priority: got %x, want %x", got, want)
	}
}

func TestTablesThatTheLibraryRefusesBecomeOpaque(t *testing.T) {
	deep := []byte{}
	for range 40 {
		deep = append([]byte{'F'}, binary.BigEndian.AppendUint32(nil, uint32(len(deep)))...)
		deep = append([]byte{1, 'k'}, deep...)
	}
	for name, table := range map[string][]byte{
		"unknown type":     append([]byte("\x03key?"), bytes.Repeat([]byte{7}, 40)...),
		"length that lies": append([]byte("\x03keyS\xff\xff\xff\xff"), bytes.Repeat([]byte{7}, 40)...),
		"short":            []byte("\x01k?"),
		"one byte":         {0},
		"deep":             deep,
		"void padding":     bytes.Repeat([]byte{1, 'k', 'V'}, 9000),
	} {
		properties := binary.BigEndian.AppendUint32([]byte{0x20, 0}, uint32(len(table)))
		in := frameRewriter{rewrite: rewriteIncoming}
		out := in.feed(nil, headerFrame(append(properties, table...)))
		payload := out[frameHeaderSize : len(out)-1]
		if size := int(binary.BigEndian.Uint32(out[3:])); size != len(payload) {
			t.Errorf("%s: the frame says %d bytes and has %d", name, size, len(payload))
		}
		h := parseContentHeader(payload)
		if h.headers == nil || !rewriteTable(h.headers, 0) {
			t.Errorf("%s: the result is not readable: %x", name, payload)
		}
	}
}

// FuzzFrameRewriter checks that the way a stream is cut does not matter, that
// nothing is lost, added or moved, and that nothing panics.
func FuzzFrameRewriter(f *testing.F) {
	block, _ := hex.DecodeString(headerInt64)
	stream := append(headerFrame(block), frame(frameBody, []byte("body"))...)
	stream = append(stream, frame(frameHeartbeat, nil)...)
	f.Add(stream, uint8(3), false)
	f.Add(append([]byte("AMQP\x00\x00\x09\x01"), stream...), uint8(1), true)
	f.Fuzz(func(t *testing.T, stream []byte, chunk uint8, outgoing bool) {
		make := func() frameRewriter {
			if outgoing {
				return frameRewriter{rewrite: rewriteOutgoing, skip: 8}
			}
			return frameRewriter{rewrite: rewriteIncoming}
		}
		whole, pieces := make(), make()
		want := whole.feed(nil, bytes.Clone(stream))
		var got []byte
		step := int(chunk)%17 + 1
		for rest := bytes.Clone(stream); len(rest) > 0; {
			n := min(step, len(rest))
			got = pieces.feed(got, rest[:n])
			rest = rest[n:]
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("cut into %d: got %x, want %x", step, got, want)
		}
		if len(want) > len(stream) {
			t.Fatalf("%d bytes went in, %d came out", len(stream), len(want))
		}
	})
}

// What is written between Hold and Release is one write to the socket.
func TestHeldFramesAreOneWrite(t *testing.T) {
	t.Parallel()
	ours, theirs := net.Pipe()
	c := New(ours)
	frame := frame(frameMethod, []byte("x"))
	done := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte("AMQP\x00\x00\x09\x01"))
		c.Hold()
		for range 3 {
			if n, writeErr := c.Write(frame); n != len(frame) {
				err = errors.Join(err, writeErr, io.ErrShortWrite)
			}
		}
		err = errors.Join(err, c.Release())
		_, writeErr := c.Write(frame)
		done <- errors.Join(err, writeErr)
	}()
	buffer := make([]byte, 100)
	for i, want := range []int{8, 3 * len(frame), len(frame)} {
		// A pipe hands over one write at a time.
		if n, err := theirs.Read(buffer); n != want || err != nil {
			t.Errorf("write %d has %d bytes, want %d: %v", i, n, want, err)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	_ = theirs.Close()
	if _, err := c.Write(frame); err == nil {
		t.Error("no error after the other end was closed")
	}
	c.Hold()
	_, _ = c.Write(frame)
	if err := c.Release(); err == nil {
		t.Error("Release has no error")
	}
}

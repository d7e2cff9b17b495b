package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
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

// opened returns a Conn after its handshake, for what does not read or write.
func opened() *Conn {
	c := New(nil)
	c.frameSize.Store(FrameSize)
	return c
}

// received returns the headers of a content header that has come through c.
func received(t *testing.T, c *Conn, header []byte) map[string]any {
	t.Helper()
	out := c.in.feed(nil, header)
	payload := out[frameHeaderSize : len(out)-1]
	if size := int(binary.BigEndian.Uint32(out[3:])); size != len(payload) {
		t.Errorf("the frame says %d bytes and has %d", size, len(payload))
	}
	h := parseContentHeader(payload)
	if len(h.headers) == 0 {
		return Headers(nil, decimal)
	}
	packed, ok := bytes.CutPrefix(h.headers, []byte(packedKey))
	if !ok || len(packed) < 4 || len(packed)-4 != int(binary.BigEndian.Uint32(packed)) {
		t.Fatalf("amqp091-go gets the table %x", h.headers)
	}
	return Headers(amqp.Table{"": packed[4:]}, decimal)
}

func TestIncomingLongIntegersAreReadable(t *testing.T) {
	block, err := hex.DecodeString(headerInt64)
	if err != nil {
		t.Fatal(err)
	}
	got := received(t, opened(), headerFrame(block))
	if want := (map[string]any{"small": int32(7), "big": int64(1) << 40, "neg": int32(-5)}); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// The types are those of amqp091-go.
func TestHeadersOfAllTypes(t *testing.T) {
	for field, want := range map[string]any{
		"V":                                 nil,
		"t\x01":                             true,
		"b\xff":                             int8(-1),
		"B\xff":                             uint8(255),
		"s\xff\xfe":                         int16(-2),
		"u\xff\xfe":                         uint16(65534),
		"I\xff\xff\xff\xfe":                 int32(-2),
		"i\xff\xff\xff\xfe":                 uint32(1<<32 - 2),
		"l\xff\xff\xff\xff\xff\xff\xff\xfe": int64(-2),
		"f\x3f\x80\x00\x00":                 float32(1),
		"d\xbf\xf0\x00\x00\x00\x00\x00\x00": float64(-1),
		"D\x02\x00\x00\x00\x07":             amqp.Decimal{Scale: 2, Value: 7},
		"T\x00\x00\x00\x00\x00\x00\x00\x09": time.Unix(9, 0),
		"S\x00\x00\x00\x02\xc3\xa9":         "é",
		"x\x00\x00\x00\x02\x00\xff":         []byte{0, 255},
		"A\x00\x00\x00\x04Vt\x00V":          []any{nil, false, nil},
		"F\x00\x00\x00\x04\x01at\x01":       map[string]any{"a": true},
	} {
		got := Headers(amqp.Table{"": []byte("\x01k" + field)}, decimal)
		if value, ok := got["k"]; !ok || len(got) != 1 || !reflect.DeepEqual(value, want) {
			t.Errorf("%q: got %#v, want %#v", field, got, want)
		}
	}
}

func TestPriorityZeroSurvivesBothWays(t *testing.T) {
	// Flags: delivery mode and priority.
	out := frameRewriter{rewrite: rewriteOutgoing}
	got := out.feed(nil, headerFrame([]byte{0x18, 0x00, 2 | PriorityZero, 1}))
	if want := headerFrame([]byte{0x18, 0x00, 2, 0}); !bytes.Equal(got, want) {
		t.Errorf("outgoing: got %x, want %x", got, want)
	}
	in := opened().in
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

func TestTablesThatCannotBeReadAreReplaced(t *testing.T) {
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
		"key alone":        []byte("\x01kF\x00\x00\x00\x03\x01at"),
		"deep":             deep,
		"void padding":     bytes.Repeat([]byte{1, 'k', 'V'}, 9000),
		"long frame":       append([]byte("\x01kS\x00\x01\xff\xdc"), bytes.Repeat([]byte{'v'}, 0x1ffdc)...),
	} {
		properties := binary.BigEndian.AppendUint32([]byte{0x20, 0}, uint32(len(table)))
		if got := received(t, opened(), headerFrame(append(properties, table...))); len(got) != 1 {
			t.Errorf("%s: got %v", name, got)
		} else if _, replaced := got[unreadableHeaders]; !replaced {
			t.Errorf("%s: got %v", name, got)
		}
	}
	// One that is as long as amqp091-go can read it.
	table := append([]byte("\x01kS\x00\x01\xff\xd3"), bytes.Repeat([]byte{'v'}, 0x1ffd3)...)
	properties := binary.BigEndian.AppendUint32([]byte{0x20, 0}, uint32(len(table)))
	if got, _ := received(t, opened(), headerFrame(append(properties, table...)))["k"].(string); len(got) != 0x1ffd3 {
		t.Errorf("the longest header has %d bytes", len(got))
	}
}

func decimal(scale uint8, value int32) any { return amqp.Decimal{Scale: scale, Value: value} }

func FuzzHeaders(f *testing.F) {
	f.Add([]byte("\x01kA\x00\x00\x00\x04Vt\x00V"))
	f.Add([]byte("\x01kF\x00\x00\x00\x04\x01at\x01"))
	f.Fuzz(func(t *testing.T, table []byte) { Headers(amqp.Table{"": table}, decimal) })
}

// A connection whose broker is silent fails, one that is in use does not.
func TestSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		c := New(ours)
		_ = ours.SetDeadline(time.Now().Add(time.Second)) // that of the handshake
		c.Opened(FrameSize, 16*time.Second)
		go func() {
			for range 10 {
				time.Sleep(15 * time.Second)
				_, _ = theirs.Write(frame(frameHeartbeat, nil))
			}
		}()
		began := time.Now()
		_, err := io.Copy(io.Discard, c)
		if passed := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || passed < 165*time.Second || passed > 166*time.Second {
			t.Errorf("after %v: %v", passed, err)
		}
	})
}

// EndBy applies to a read that waits, and to reads after others.
func TestEndBy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		c := New(ours)
		c.Opened(FrameSize, time.Hour)
		began := time.Now()
		go func() {
			time.Sleep(time.Second)
			c.EndBy(time.Now().Add(2 * time.Second))
			_, _ = theirs.Write(frame(frameHeartbeat, nil))
		}()
		_, err := io.Copy(io.Discard, c)
		if passed := time.Since(began); !errors.Is(err, os.ErrDeadlineExceeded) || passed != 3*time.Second {
			t.Errorf("after %v: %v", passed, err)
		}
	})
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
			return opened().in
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
		// Only header tables become longer, and the shortest has 26 bytes with its frame.
		if most := len(stream) + len(stream)/26*(len(packedKey)+4); len(want) > most {
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

// Package wire lies between amqp091-go and the socket. It changes the bytes of content
// header frames, which amqp091-go cannot read or write as Celery needs it, and takes from
// amqp091-go what it does once for each frame.
//
//  1. Header tables are handed to amqp091-go as bytes, and [Headers] reads them. amqp091-go
//     does not know the type 'L', which py-amqp writes for integers beyond 32 bits
//     (docs/celery.md#header-types), and closes the connection at any table that it cannot
//     read: the broker would deliver the message again, for ever. It also takes several
//     times as long, and half of the memory of a task that does nothing.
//  2. amqp091-go does not send a priority of 0, and reads an absent priority as 0.
//     Celery distinguishes them. In both directions the bit [PriorityZero] in the
//     delivery mode marks a priority that is present and 0.
//  3. A Conn notices by itself that the broker is silent. amqp091-go would wake another
//     goroutine for each frame, to set a new deadline.
//  4. What is written between Hold and Release is one write to the socket.
package wire

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// PriorityZero is a bit of DeliveryMode, where AMQP uses only the values 1
	// and 2. A message that is sent with it also needs a Priority of 1, as a
	// placeholder.
	PriorityZero = 0x80
	// FrameSize is the largest frame that is proposed to the broker.
	FrameSize = 131072
)

const (
	frameHeaderSize = 7 // type, channel, payload size
	frameOverhead   = frameHeaderSize + 1
	frameMethod     = 1
	frameHeader     = 2
	frameBody       = 3
	frameHeartbeat  = 8

	// maxHeaderFrame is more than FrameSize. Longer frames pass unchanged, and amqp091-go
	// refuses them.
	maxHeaderFrame = 1 << 20

	flagContentType     = 0x8000
	flagContentEncoding = 0x4000
	flagHeaders         = 0x2000
	flagDeliveryMode    = 0x1000
	flagPriority        = 0x0800
)

// Conn is the connection that amqp091-go reads and writes. It is no net.Conn, so that
// amqp091-go sets no deadlines.
type Conn struct {
	conn    net.Conn
	in, out frameRewriter
	// ready has rewritten bytes that Read has not returned yet, and buffer is for
	// reading. Only the reading goroutine uses them.
	ready  bytes.Buffer
	buffer []byte
	// frameSize is that of Opened; 0 before.
	frameSize atomic.Int64
	silence   deadline

	mu      sync.Mutex // guards all below, also during a write
	written []byte     // what is to be written
	held    bool       // see Hold
}

// New returns a Conn on c, for amqp091-go's Open. Until [Conn.Opened], the deadlines of c
// are those of its owner, and amqp091-go reads the header tables.
func New(c net.Conn) *Conn {
	w := &Conn{
		conn:    c,
		out:     frameRewriter{rewrite: rewriteOutgoing, skip: len("AMQP\x00\x00\x09\x01")},
		buffer:  make([]byte, 16<<10),
		silence: deadline{conn: c},
	}
	w.in.rewrite = w.rewriteIncoming
	return w
}

// Opened is called when the handshake is over, with what it has agreed on. From now on,
// reading fails when the broker has sent nothing during silence, unless that is 0.
func (c *Conn) Opened(frameSize int, silence time.Duration) {
	c.frameSize.Store(int64(frameSize))
	c.silence.begin(silence)
}

// EndBy makes reading and writing fail from that time on.
func (c *Conn) EndBy(at time.Time) { c.silence.end(at) }

// Close closes the connection.
func (c *Conn) Close() error { return c.conn.Close() }

func (c *Conn) Read(p []byte) (int, error) {
	for c.ready.Len() == 0 {
		n, err := c.conn.Read(c.buffer)
		if n > 0 {
			c.silence.renew()
			// ready is empty: its own memory takes the bytes.
			c.ready.Reset()
			c.ready.Write(c.in.feed(c.ready.AvailableBuffer(), c.buffer[:n]))
		}
		if err != nil && c.ready.Len() == 0 {
			return 0, err
		}
	}
	return c.ready.Read(p)
}

// deadline lets reads fail after a silence. It is set anew only where that changes it
// noticeably: a busy connection reads thousands of times per second.
type deadline struct {
	conn net.Conn

	mu      sync.Mutex // guards all below
	silence time.Duration
	set     time.Time // when it was set last
}

func (d *deadline) begin(silence time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	_ = d.conn.SetDeadline(time.Time{}) // that of the handshake
	d.silence = silence
	d.renewAt(time.Now())
}

func (d *deadline) renew() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); now.Sub(d.set) > d.silence/16 {
		d.renewAt(now)
	}
}

func (d *deadline) renewAt(now time.Time) {
	if d.silence > 0 {
		d.set = now
		_ = d.conn.SetReadDeadline(now.Add(d.silence))
	}
}

func (d *deadline) end(at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.silence = 0
	_ = d.conn.SetDeadline(at)
}

func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.written = c.out.feed(c.written, p)
	if c.held && len(c.written) < heldMax {
		return len(p), nil
	}
	if err := c.flush(); err != nil {
		return 0, err
	}
	return len(p), nil
}

// heldMax is how many bytes Hold keeps back.
const heldMax = 64 << 10

// Hold keeps back what is written until Release writes all of it at once: amqp091-go
// writes each method by itself.
func (c *Conn) Hold() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = true
}

// Release ends what Hold began. Its error is one of writing.
func (c *Conn) Release() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.held = false
	return c.flush()
}

// flush writes to the socket. The caller has locked c.mu.
func (c *Conn) flush() error {
	if len(c.written) == 0 {
		return nil
	}
	_, err := c.conn.Write(c.written)
	c.written = c.written[:0]
	if cap(c.written) > heldMax {
		c.written = nil
	}
	return err
}

// frameRewriter parses a stream of AMQP frames, which arrives in pieces of any
// size, and replaces the payload of each content header by what rewrite appends to dst
// instead. rewrite may change the payload. After a frame of an unknown type frameRewriter
// changes nothing any more.
type frameRewriter struct {
	rewrite func(dst, payload []byte) []byte

	// skip counts bytes that come before the first frame.
	skip int
	// header collects the seven bytes that begin a frame.
	header [frameHeaderSize]byte
	filled int
	// rest counts the payload bytes and the end byte still to come.
	rest int64
	// payload collects a content header until it is whole.
	payload    []byte
	collecting bool
	// foreign is set when the stream is not AMQP.
	foreign bool
}

// feed consumes src and appends to dst all bytes that are complete.
func (r *frameRewriter) feed(dst, src []byte) []byte {
	for len(src) > 0 {
		switch {
		case r.foreign:
			return append(dst, src...)

		case r.skip > 0:
			n := min(r.skip, len(src))
			dst, src = append(dst, src[:n]...), src[n:]
			r.skip -= n

		case r.filled < frameHeaderSize:
			n := copy(r.header[r.filled:], src)
			src = src[n:]
			if r.filled += n; r.filled == frameHeaderSize {
				r.beginFrame()
				if !r.collecting {
					dst = append(dst, r.header[:]...)
				}
			}

		case r.collecting:
			n := int(min(r.rest, int64(len(src))))
			r.payload = append(r.payload, src[:n]...)
			src = src[n:]
			if r.rest -= int64(n); r.rest == 0 {
				last := len(r.payload) - 1
				payload := len(dst) + frameHeaderSize
				dst = r.rewrite(append(dst, r.header[:]...), r.payload[:last])
				binary.BigEndian.PutUint32(dst[payload-4:], uint32(len(dst)-payload))
				dst = append(dst, r.payload[last])
				r.endFrame()
			}

		default:
			n := int(min(r.rest, int64(len(src))))
			dst, src = append(dst, src[:n]...), src[n:]
			if r.rest -= int64(n); r.rest == 0 {
				r.endFrame()
			}
		}
	}
	return dst
}

func (r *frameRewriter) beginFrame() {
	size := int64(binary.BigEndian.Uint32(r.header[3:]))
	r.rest = size + 1
	switch r.header[0] {
	case frameMethod, frameBody, frameHeartbeat:
	case frameHeader:
		r.collecting = size <= maxHeaderFrame
	default:
		r.foreign = true
	}
}

func (r *frameRewriter) endFrame() {
	r.filled, r.collecting = 0, false
	if cap(r.payload) > 64<<10 {
		r.payload = nil
	}
	r.payload = r.payload[:0]
}

// contentHeader has the fields of a content header that are rewritten. The payload
// has class (2 bytes), weight (2), body size (8), flags (2), and the properties in
// the order of their flags. A nil slice is a property that is absent or
// truncated.
type contentHeader struct {
	headers      []byte // the table without its length
	headersAt    int    // where it begins in the payload
	deliveryMode []byte
	priority     []byte
}

func parseContentHeader(payload []byte) contentHeader {
	var h contentHeader
	if len(payload) < 14 {
		return h
	}
	flags := binary.BigEndian.Uint16(payload[12:])
	rest := payload[14:]
	if flags&1 != 0 {
		return h // more flag words, which AMQP 0-9-1 does not have
	}
	for _, flag := range []uint16{flagContentType, flagContentEncoding} {
		if flags&flag == 0 {
			continue
		}
		if len(rest) < 1 || len(rest) < 1+int(rest[0]) {
			return h
		}
		rest = rest[1+int(rest[0]):]
	}
	if flags&flagHeaders != 0 {
		table, after, ok := cutLong(rest)
		if !ok {
			return h
		}
		h.headers, h.headersAt, rest = table, len(payload)-len(after)-len(table), after
	}
	if flags&flagDeliveryMode != 0 {
		if len(rest) < 1 {
			return h
		}
		h.deliveryMode, rest = rest[:1], rest[1:]
	}
	if flags&flagPriority != 0 && len(rest) >= 1 {
		h.priority = rest[:1]
	}
	return h
}

func (c *Conn) rewriteIncoming(dst, payload []byte) []byte {
	h := parseContentHeader(payload)
	if h.deliveryMode != nil {
		h.deliveryMode[0] &^= PriorityZero
		if h.priority != nil && h.priority[0] == 0 {
			h.deliveryMode[0] |= PriorityZero
		}
	}
	frameSize := int(c.frameSize.Load())
	if h.headers == nil || frameSize == 0 {
		return append(dst, payload...)
	}
	before, after := payload[:h.headersAt-4], payload[h.headersAt+len(h.headers):]
	if len(payload)+len(packedKey)+4+frameOverhead > frameSize {
		// amqp091-go would close the connection, and the broker would deliver it again.
		h.headers = []byte{'?'} // no table
	}
	dst = append(dst, before...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(packedKey)+4+len(h.headers)))
	dst = append(dst, packedKey...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(h.headers)))
	return append(append(dst, h.headers...), after...)
}

func rewriteOutgoing(dst, payload []byte) []byte {
	h := parseContentHeader(payload)
	if h.deliveryMode != nil && h.deliveryMode[0]&PriorityZero != 0 {
		h.deliveryMode[0] &^= PriorityZero
		if h.priority != nil {
			h.priority[0] = 0
		}
	}
	return append(dst, payload...)
}

// cutLong splits a value with a 32-bit length off the front of b.
func cutLong(b []byte) (content, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := int64(binary.BigEndian.Uint32(b))
	if n > int64(len(b)-4) {
		return nil, nil, false
	}
	return b[4 : 4+n : 4+n], b[4+n:], true
}

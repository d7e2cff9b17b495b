// Package wire rewrites the bytes of an AMQP connection. amqp091-go lacks three things
// that Celery's messages need. Only content header frames are changed, in both
// directions, and none becomes longer.
//
//  1. py-amqp writes header integers beyond 32 bits as field type 'L', which
//     amqp091-go does not know: it closes the connection, and the broker delivers
//     the message again, for ever (docs/celery.md#header-types). 'L' is changed
//     to 'l', which has the same meaning in amqp091-go.
//  2. A header table with anything else that amqp091-go cannot read (unknown
//     types, deep nesting, wrong lengths) is replaced by a short one. The worker
//     then rejects the message because its headers are missing, and does not lose
//     the connection.
//  3. amqp091-go does not send a priority of 0, and reads an absent priority as 0.
//     Celery distinguishes them. In both directions the bit [PriorityZero] in the
//     delivery mode marks a priority that is present and 0.
package wire

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"
)

const (
	// PriorityZero is a bit of DeliveryMode, where AMQP uses only the values 1
	// and 2. A message that is sent with it also needs a Priority of 1, as a
	// placeholder.
	PriorityZero = 0x80
	// unreadableHeaders is the only key of a table that replaces an unreadable
	// one.
	unreadableHeaders = "x-unreadable-headers"
)

const (
	frameHeaderSize = 7 // type, channel, payload size
	frameMethod     = 1
	frameHeader     = 2
	frameBody       = 3
	frameHeartbeat  = 8

	// maxHeaderFrame is more than the frame size that the worker negotiates
	// (131072). Longer frames pass unchanged, and amqp091-go refuses them.
	maxHeaderFrame = 1 << 20

	flagContentType     = 0x8000
	flagContentEncoding = 0x4000
	flagHeaders         = 0x2000
	flagDeliveryMode    = 0x1000
	flagPriority        = 0x0800

	// The limits of amqp091-go for tables that it reads.
	maxFieldDepth    = 32
	maxTableElements = 8192
)

// Conn is a connection to a broker that rewrites content headers.
type Conn struct {
	net.Conn
	in, out frameRewriter
	// ready has rewritten bytes that Read has not returned yet, and buffer is for
	// reading. Only the reading goroutine uses them.
	ready  bytes.Buffer
	buffer []byte

	mu      sync.Mutex // guards all below, also during a write
	written []byte     // what is to be written
	held    bool       // see Hold
}

// New returns c with the rewriting, for amqp091-go's Open.
func New(c net.Conn) *Conn {
	return &Conn{
		Conn:   c,
		in:     frameRewriter{rewrite: rewriteIncoming},
		out:    frameRewriter{rewrite: rewriteOutgoing, skip: len("AMQP\x00\x00\x09\x01")},
		buffer: make([]byte, 16<<10),
	}
}

func (c *Conn) Read(p []byte) (int, error) {
	for c.ready.Len() == 0 {
		n, err := c.Conn.Read(c.buffer)
		if n > 0 {
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
	_, err := c.Conn.Write(c.written)
	c.written = c.written[:0]
	if cap(c.written) > heldMax {
		c.written = nil
	}
	return err
}

// frameRewriter parses a stream of AMQP frames, which arrives in pieces of any
// size, and replaces the payload of each content header by the result of rewrite.
// The result may share memory with the payload and must not be longer. After a
// frame of an unknown type frameRewriter changes nothing any more.
type frameRewriter struct {
	rewrite func(payload []byte) []byte

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
				end := r.payload[len(r.payload)-1]
				payload := r.rewrite(r.payload[:len(r.payload)-1])
				binary.BigEndian.PutUint32(r.header[3:], uint32(len(payload)))
				dst = append(append(append(dst, r.header[:]...), payload...), end)
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

func rewriteIncoming(payload []byte) []byte {
	h := parseContentHeader(payload)
	if h.deliveryMode != nil {
		h.deliveryMode[0] &^= PriorityZero
		if h.priority != nil && h.priority[0] == 0 {
			h.deliveryMode[0] |= PriorityZero
		}
	}
	// rewriteTable may have changed some types when it fails. This does no harm,
	// since the whole table is replaced then.
	if h.headers != nil && !rewriteTable(h.headers, 0) {
		return replaceTable(payload, h.headersAt, len(h.headers))
	}
	return payload
}

// replaceTable replaces the table at payload[at:], which has size bytes and whose
// length precedes it, by a readable one.
func replaceTable(payload []byte, at, size int) []byte {
	table := append([]byte{byte(len(unreadableHeaders))}, unreadableHeaders...)
	table = append(table, 'V')
	if len(table) > size {
		table = nil
	}
	binary.BigEndian.PutUint32(payload[at-4:], uint32(len(table)))
	n := copy(payload[at:], table)
	return append(payload[:at+n], payload[at+size:]...)
}

func rewriteOutgoing(payload []byte) []byte {
	h := parseContentHeader(payload)
	if h.deliveryMode == nil || h.deliveryMode[0]&PriorityZero == 0 {
		return payload
	}
	h.deliveryMode[0] &^= PriorityZero
	if h.priority != nil {
		h.priority[0] = 0
	}
	return payload
}

// rewriteTable changes 'L' to 'l' in a table and reports whether amqp091-go can
// read the table.
func rewriteTable(table []byte, depth int) bool {
	if depth > maxFieldDepth {
		return false
	}
	for elements := 0; len(table) > 0; elements++ {
		if elements >= maxTableElements {
			return false
		}
		key := 1 + int(table[0])
		if len(table) < key {
			return false
		}
		rest, ok := rewriteField(table[key:], depth)
		if !ok {
			return false
		}
		table = rest
	}
	return true
}

func rewriteArray(array []byte, depth int) bool {
	if depth > maxFieldDepth {
		return false
	}
	for elements := 0; len(array) > 0; elements++ {
		if elements >= maxTableElements {
			return false
		}
		rest, ok := rewriteField(array, depth)
		if !ok {
			return false
		}
		array = rest
	}
	return true
}

// rewriteField rewrites the field at the start of b and returns the bytes after
// it.
func rewriteField(b []byte, depth int) (rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, false
	}
	kind := b[0]
	size := 0
	switch kind {
	case 'V':
	case 't', 'b', 'B':
		size = 1
	case 's', 'u':
		size = 2
	case 'I', 'i', 'f':
		size = 4
	case 'D':
		size = 5
	case 'l', 'd', 'T':
		size = 8
	case 'L':
		b[0], size = 'l', 8
	case 'S', 'x', 'A', 'F':
		content, after, whole := cutLong(b[1:])
		switch {
		case !whole:
			return nil, false
		case kind == 'A':
			return after, rewriteArray(content, depth+1)
		case kind == 'F':
			return after, rewriteTable(content, depth+1)
		}
		return after, true
	default:
		return nil, false
	}
	if len(b) < 1+size {
		return nil, false
	}
	return b[1+size:], true
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

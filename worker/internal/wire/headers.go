package wire

import (
	"math"
	"time"
)

const (
	// packedKey begins the table that amqp091-go reads in place of a message's own: the
	// only key, which is empty, and the type of its value, which are the bytes of the
	// message's table.
	packedKey = "\x00x"
	// unreadableHeaders is the only key of the headers that replace unreadable ones.
	unreadableHeaders = "x-unreadable-headers"

	// The limits of amqp091-go for tables that it reads.
	maxFieldDepth    = 32
	maxTableElements = 8192
	// usualHeaders is how many headers a message of Celery has.
	usualHeaders = 21
)

// Headers returns the headers of a message that amqp091-go has received through a [Conn].
// The values have the types of amqp091-go, except that tables are maps; decimal makes the
// value of a decimal number, which is value divided by 10 to the power of scale. Headers that
// cannot be read are replaced: the message is then rejected, because it names no task, and
// the connection is not lost.
func Headers(received map[string]any, decimal func(scale uint8, value int32) any) map[string]any {
	packed, ok := received[""].([]byte)
	if !ok {
		return received // there are none
	}
	r := reader{left: string(packed), decimal: decimal}
	headers := r.table(make(map[string]any, usualHeaders), 0)
	if r.failed {
		return map[string]any{unreadableHeaders: nil}
	}
	return headers
}

// reader reads the fields of a table. The keys and texts that it returns are parts of
// what it reads, and take no memory of their own.
type reader struct {
	left    string // what has not been read yet
	failed  bool   // what was read is no table
	decimal func(scale uint8, value int32) any
}

// next returns the next n bytes.
func (r *reader) next(n int) string {
	if n < 0 || n > len(r.left) {
		r.failed, r.left = true, ""
		return ""
	}
	read := r.left[:n]
	r.left = r.left[n:]
	return read
}

func (r *reader) number(size int) (n uint64) {
	for _, b := range []byte(r.next(size)) {
		n = n<<8 | uint64(b)
	}
	return n
}

// long returns a value with a length of 32 bits in front.
func (r *reader) long() string { return r.next(int(r.number(4))) }

// table adds the fields of a table that ends with the text.
func (r *reader) table(to map[string]any, depth int) map[string]any {
	for elements := 0; r.more(elements, depth); elements++ {
		key := r.next(int(r.number(1)))
		to[key] = r.field(depth)
	}
	return to
}

func (r *reader) array(depth int) (list []any) {
	for elements := 0; r.more(elements, depth); elements++ {
		list = append(list, r.field(depth))
	}
	return list
}

// more reports whether there is another element of a table or an array.
func (r *reader) more(elements, depth int) bool {
	if len(r.left) > 0 && (depth > maxFieldDepth || elements >= maxTableElements) {
		r.failed = true
	}
	return len(r.left) > 0 && !r.failed
}

func (r *reader) field(depth int) any {
	switch kind := r.number(1); kind {
	case 'V':
		return nil
	case 't':
		return r.number(1) != 0
	case 'b':
		return int8(r.number(1))
	case 'B':
		return uint8(r.number(1))
	case 's':
		return int16(r.number(2))
	case 'u':
		return uint16(r.number(2))
	case 'I':
		return int32(r.number(4))
	case 'i':
		return uint32(r.number(4))
	case 'l', 'L':
		return int64(r.number(8))
	case 'f':
		return math.Float32frombits(uint32(r.number(4)))
	case 'd':
		return math.Float64frombits(r.number(8))
	case 'D':
		return r.decimal(uint8(r.number(1)), int32(r.number(4)))
	case 'T':
		return time.Unix(int64(r.number(8)), 0)
	case 'S':
		return r.long()
	case 'x':
		return []byte(r.long())
	case 'A', 'F':
		inner := reader{left: r.long(), decimal: r.decimal}
		defer func() { r.failed = r.failed || inner.failed }()
		if kind == 'A' {
			return inner.array(depth + 1)
		}
		return inner.table(map[string]any{}, depth+1)
	}
	r.failed = true
	return nil
}

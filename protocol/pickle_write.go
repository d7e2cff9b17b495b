package protocol

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"math/big"
	"strconv"
	"time"
)

// Opcodes of Python's pickle module that are written or read here.
const (
	opMark            = '('
	opStop            = '.'
	opNone            = 'N'
	opNewTrue         = 0x88
	opNewFalse        = 0x89
	opBinInt          = 'J'
	opBinInt1         = 'K'
	opBinInt2         = 'M'
	opLong1           = 0x8a
	opLong4           = 0x8b
	opBinFloat        = 'G'
	opBinUnicode      = 'X'
	opShortBinUnicode = 0x8c
	opBinUnicode8     = 0x8d
	opBinBytes        = 'B'
	opShortBinBytes   = 'C'
	opBinBytes8       = 0x8e
	opEmptyList       = ']'
	opAppend          = 'a'
	opAppends         = 'e'
	opEmptyDict       = '}'
	opSetItem         = 's'
	opSetItems        = 'u'
	opEmptyTuple      = ')'
	opTuple           = 't'
	opTuple1          = 0x85
	opTuple2          = 0x86
	opTuple3          = 0x87
	opBinPut          = 'q'
	opLongBinPut      = 'r'
	opBinGet          = 'h'
	opLongBinGet      = 'j'
	opMemoize         = 0x94
	opFrame           = 0x95
	opProto           = 0x80
	opPop             = '0'
	opGlobal          = 'c'
	opReduce          = 'R'
	opStackGlobal     = 0x93
	opByteArray8      = 0x96
	opNewObj          = 0x81
	opBuild           = 'b'
)

// PickleJSON converts JSON text to a pickle of protocol 2, which every version
// of Celery reads (docs/celery.md#result-encoding). A type wrapper becomes the
// Python object that it stands for; one whose value is invalid stays a
// dictionary. The error is a [*SyntaxError].
func PickleJSON(text json.RawMessage) ([]byte, error) {
	if err := checkJSON(text); err != nil {
		return nil, err
	}
	w := pickleWriter{scanner: scanner{text: text}, out: []byte{opProto, 2}}
	if err := w.value(); err != nil {
		return nil, err
	}
	return append(w.out, opStop), nil
}

type pickleWriter struct {
	scanner
	out []byte
}

func (w *pickleWriter) value() error {
	k, err := w.peek()
	if err != nil {
		return err
	}
	switch k {
	case kindArray:
		return w.list()
	case kindObject:
		if name, value, ok := w.wrapper(); ok {
			if !w.instance(name, value) {
				w.out = append(w.out, opEmptyDict, opMark)
				w.str("__type__")
				w.str(name)
				w.str("__value__")
				if err := w.inner(value); err != nil {
					return err
				}
				w.out = append(w.out, opSetItems)
			}
			return nil
		}
		return w.dict()
	}
	text, err := w.scalar(k)
	if err != nil {
		return err
	}
	switch k {
	case kindNull:
		w.out = append(w.out, opNone)
	case kindBool:
		w.bool(text[0] == 't')
	case kindString:
		w.str(unquoteJSON(text))
	default:
		w.number(text)
	}
	return nil
}

// inner writes a value that the scanner has already moved past.
func (w *pickleWriter) inner(text json.RawMessage) error {
	outer := w.scanner
	w.scanner = scanner{text: text, depth: outer.depth + 1}
	err := w.value()
	w.scanner = outer
	return err
}

func (w *pickleWriter) list() error {
	w.out = append(w.out, opEmptyList, opMark)
	start := len(w.out)
	err := w.array(w.value)
	w.close(start, opAppends)
	return err
}

func (w *pickleWriter) dict() error {
	w.out = append(w.out, opEmptyDict, opMark)
	start := len(w.out)
	err := w.object(func(key string) error {
		w.str(key)
		return w.value()
	})
	w.close(start, opSetItems)
	return err
}

// close ends a container, or removes the mark if the container is empty.
func (w *pickleWriter) close(start int, op byte) {
	if len(w.out) == start {
		w.out = w.out[:start-1]
		return
	}
	w.out = append(w.out, op)
}

func (w *pickleWriter) bool(b bool) {
	if b {
		w.out = append(w.out, opNewTrue)
	} else {
		w.out = append(w.out, opNewFalse)
	}
}

func (w *pickleWriter) str(s string) {
	w.out = append(w.out, opBinUnicode)
	w.out = binary.LittleEndian.AppendUint32(w.out, uint32(len(s)))
	w.out = append(w.out, s...)
}

func (w *pickleWriter) number(text []byte) {
	if !isInteger(text) {
		w.out = append(w.out, opBinFloat)
		w.out = binary.BigEndian.AppendUint64(w.out, math.Float64bits(parseFloat(text)))
		return
	}
	if n, err := strconv.ParseInt(string(text), 10, 32); err == nil {
		w.int(int32(n))
		return
	}
	n, _ := new(big.Int).SetString(string(text), 10)
	w.long(n)
}

func (w *pickleWriter) int(n int32) {
	if 0 <= n && n <= math.MaxUint8 {
		w.out = append(w.out, opBinInt1, byte(n))
		return
	}
	w.out = append(w.out, opBinInt)
	w.out = binary.LittleEndian.AppendUint32(w.out, uint32(n))
}

// long writes an integer as its shortest two's complement, little-endian.
func (w *pickleWriter) long(n *big.Int) {
	size := n.BitLen()/8 + 1
	if n.Sign() < 0 {
		// -128 needs one byte, though 128 needs two.
		size = new(big.Int).Not(n).BitLen()/8 + 1
		n = new(big.Int).Add(n, new(big.Int).Lsh(big.NewInt(1), uint(size)*8))
	}
	if size <= math.MaxUint8 {
		w.out = append(w.out, opLong1, byte(size))
	} else {
		w.out = append(w.out, opLong4)
		w.out = binary.LittleEndian.AppendUint32(w.out, uint32(size))
	}
	b := n.FillBytes(make([]byte, size))
	for i := len(b) - 1; i >= 0; i-- {
		w.out = append(w.out, b[i])
	}
}

// instance writes the Python object that a type wrapper stands for.
func (w *pickleWriter) instance(name string, value json.RawMessage) bool {
	x, err := unwrap(name, value)
	if err != nil {
		return false
	}
	switch x := x.(type) {
	case []byte:
		w.bytes(x)
	case Decimal:
		if !pythonDecimal.MatchString(string(x)) {
			return false
		}
		w.call("decimal", "Decimal", func() { w.str(string(x)) })
	case UUID:
		w.call("uuid", "UUID", func() { w.str(x.String()) })
	case Date:
		w.call("datetime", "date", func() {
			w.int(int32(x.Year))
			w.int(int32(x.Month))
			w.int(int32(x.Day))
		})
	case time.Time:
		w.datetime(x)
	case TimeOfDay:
		return w.timeOfDay(x)
	default:
		return false
	}
	return true
}

// call writes module.name(arguments).
func (w *pickleWriter) call(module, name string, arguments func()) {
	w.out = append(w.out, opGlobal)
	w.out = append(w.out, module+"\n"+name+"\n"...)
	w.out = append(w.out, opMark)
	arguments()
	w.out = append(w.out, opTuple, opReduce)
}

// bytes writes bytes as Python 3 does in protocol 2, which has no opcode for
// them: by way of a str in Latin-1.
func (w *pickleWriter) bytes(b []byte) {
	latin := make([]rune, len(b))
	for i, c := range b {
		latin[i] = rune(c)
	}
	w.call("_codecs", "encode", func() {
		w.str(string(latin))
		w.str("latin1")
	})
}

func (w *pickleWriter) datetime(t time.Time) {
	w.call("datetime", "datetime", func() {
		for _, n := range []int{t.Year(), int(t.Month()), t.Day(), t.Hour(), t.Minute(), t.Second(), t.Nanosecond() / 1000} {
			w.int(int32(n))
		}
		if t.Location() != Naive {
			_, offset := t.Zone()
			w.zone(offset)
		}
	})
}

// zone writes a datetime.timezone of an offset in seconds.
func (w *pickleWriter) zone(offset int) {
	w.call("datetime", "timezone", func() {
		w.call("datetime", "timedelta", func() {
			w.int(0)
			w.int(int32(offset))
		})
	})
}

// timeOfDay writes nothing and returns false if it cannot read the text.
func (w *pickleWriter) timeOfDay(text TimeOfDay) bool {
	p := isoText{rest: string(text), offsetSeconds: true}
	clock, ok := p.clock()
	if !ok || clock.hour > 23 {
		return false
	}
	w.call("datetime", "time", func() {
		for _, n := range []int{clock.hour, clock.minute, clock.second, clock.micros} {
			w.int(int32(n))
		}
		if !clock.naive {
			w.zone(clock.offset)
		}
	})
	return true
}

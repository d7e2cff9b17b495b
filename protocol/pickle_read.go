package protocol

import (
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"math"
	"math/big"
	"slices"
	"strconv"
	"unicode/utf8"
)

// PickleError says why [ReadResult] did not read a pickle. The error is
// permanent: a retry fails in the same way.
type PickleError struct {
	// Offset is the position of the opcode, in bytes.
	Offset int
	// Why is the reason, one clause.
	Why string
	// Unsafe says that the pickle needs a Python class or function, which this
	// package never runs.
	Unsafe bool
}

// Error names the position and the reason.
func (e *PickleError) Error() string {
	return fmt.Sprintf("pickle cannot be read, at byte %d: %s", e.Offset, e.Why)
}

// A pickle is read into values of these types: nil, bool, *big.Int, float64,
// string, pyBytes, *pyList, pyTuple, *pyDict, and those of pickle_objects.go.
type (
	pyBytes []byte
	pyTuple []any
	pyList  struct{ items []any }
	pyDict  struct{ keys, values []any }
	pyMark  struct{}
)

// pickleReader interprets the opcodes of protocols 2 to 5 that build plain
// values, and computes the results of the few calls in knownGlobals. It refuses
// every other class and function, so no pickle can run code.
//
// The reader's memory is proportional to the input. A value in the memo can be
// used many times, so the JSON can be much larger than the pickle; jsonWriter
// limits its size.
type pickleReader struct {
	in    []byte
	pos   int
	start int
	stack []any
	memo  map[uint32]any
}

func (r *pickleReader) fail(why string) error { return &PickleError{Offset: r.start, Why: why} }

// readPickle reads one pickle.
func readPickle(in []byte) (any, error) {
	r := pickleReader{in: in, memo: map[uint32]any{}}
	if len(in) < 2 || in[0] != opProto {
		return nil, r.fail("it is not a pickle of protocol 2 or later")
	}
	if in[1] < 2 || in[1] > 5 {
		return nil, r.fail(fmt.Sprintf("protocol %d is not one of 2 to 5", in[1]))
	}
	r.pos = 2
	for {
		r.start = r.pos
		op, err := r.take(1)
		if err != nil {
			return nil, err
		}
		if op[0] == opStop {
			if len(r.stack) != 1 {
				return nil, r.fail("the stack does not hold one value at the end")
			}
			return r.pop()
		}
		if err := r.run(op[0]); err != nil {
			return nil, err
		}
	}
}

func (r *pickleReader) take(n uint64) ([]byte, error) {
	if n > uint64(len(r.in)-r.pos) {
		return nil, r.fail("the pickle ends too early")
	}
	b := r.in[r.pos : r.pos+int(n)]
	r.pos += int(n)
	return b, nil
}

// unsigned reads a little-endian number.
func (r *pickleReader) unsigned(size uint64) (uint64, error) {
	b, err := r.take(size)
	if err != nil {
		return 0, err
	}
	var n uint64
	for i := len(b) - 1; i >= 0; i-- {
		n = n<<8 | uint64(b[i])
	}
	return n, nil
}

// counted reads a length and that many bytes.
func (r *pickleReader) counted(size uint64) ([]byte, error) {
	n, err := r.unsigned(size)
	if err != nil {
		return nil, err
	}
	return r.take(n)
}

func (r *pickleReader) push(x any) error {
	r.stack = append(r.stack, x)
	return nil
}

func (r *pickleReader) pop() (any, error) {
	if len(r.stack) == 0 {
		return nil, r.fail("the stack is empty")
	}
	x := r.stack[len(r.stack)-1]
	if _, ok := x.(pyMark); ok {
		return nil, r.fail("a value is expected before the mark")
	}
	r.stack = r.stack[:len(r.stack)-1]
	return x, nil
}

// sinceMark pops everything above the last mark, and the mark.
func (r *pickleReader) sinceMark() ([]any, error) {
	for i := len(r.stack) - 1; i >= 0; i-- {
		if _, ok := r.stack[i].(pyMark); ok {
			items := slices.Clone(r.stack[i+1:])
			r.stack = r.stack[:i]
			return items, nil
		}
	}
	return nil, r.fail("there is no mark")
}

// last pops n values.
func (r *pickleReader) last(n int) ([]any, error) {
	items := make([]any, n)
	for i := n - 1; i >= 0; i-- {
		x, err := r.pop()
		if err != nil {
			return nil, err
		}
		items[i] = x
	}
	return items, nil
}

func (r *pickleReader) run(op byte) error {
	switch op {
	case opFrame:
		_, err := r.take(8)
		return err
	case opProto:
		_, err := r.take(1)
		return err
	case opMark:
		return r.push(pyMark{})
	case opPop:
		_, err := r.pop()
		return err
	case opNone:
		return r.push(nil)
	case opNewTrue:
		return r.push(true)
	case opNewFalse:
		return r.push(false)
	case opBinInt, opBinInt1, opBinInt2, opLong1, opLong4:
		return r.integer(op)
	case opBinFloat:
		b, err := r.take(8)
		if err != nil {
			return err
		}
		return r.push(math.Float64frombits(binary.BigEndian.Uint64(b)))
	case opShortBinUnicode:
		return r.text(1)
	case opBinUnicode:
		return r.text(4)
	case opBinUnicode8:
		return r.text(8)
	case opShortBinBytes:
		return r.bytes(1)
	case opBinBytes:
		return r.bytes(4)
	case opBinBytes8, opByteArray8:
		return r.bytes(8)
	case opEmptyList:
		return r.push(&pyList{})
	case opEmptyDict:
		return r.push(&pyDict{})
	case opAppend, opAppends, opSetItem, opSetItems:
		return r.fill(op)
	case opEmptyTuple, opTuple, opTuple1, opTuple2, opTuple3:
		return r.tuple(op)
	case opMemoize, opBinPut, opLongBinPut, opBinGet, opLongBinGet:
		return r.remember(op)
	case opGlobal:
		return r.global()
	case opStackGlobal:
		return r.stackGlobal()
	case opReduce:
		return r.reduce()
	case opNewObj:
		return r.newObject()
	case opBuild:
		return r.build()
	case 'i', 'o', 0x92, 0x82, 0x83, 0x84, 'P', 'Q':
		// INST, OBJ, NEWOBJ_EX, EXT, PERSID.
		return r.unsafe("an object of a Python class")
	case 0x8f, 0x91:
		// EMPTY_SET, FROZENSET.
		return r.unsafe("a set")
	}
	return r.fail(fmt.Sprintf("opcode %#02x does not build plain values", op))
}

func (r *pickleReader) integer(op byte) error {
	var b []byte
	var err error
	switch op {
	case opBinInt1:
		b, err = r.take(1)
		b = append(slices.Clone(b), 0)
	case opBinInt2:
		b, err = r.take(2)
		b = append(slices.Clone(b), 0)
	case opBinInt:
		b, err = r.take(4)
	case opLong1:
		b, err = r.counted(1)
	case opLong4:
		b, err = r.counted(4)
	}
	if err != nil {
		return err
	}
	if len(b) > maxDigits/2 {
		return r.fail("an integer with too many digits")
	}
	b = slices.Clone(b)
	slices.Reverse(b)
	n := new(big.Int).SetBytes(b)
	if len(b) > 0 && b[0] >= 0x80 {
		n.Sub(n, new(big.Int).Lsh(big.NewInt(1), uint(len(b))*8))
	}
	return r.push(n)
}

func (r *pickleReader) text(size uint64) error {
	b, err := r.counted(size)
	if err != nil {
		return err
	}
	for rest := string(b); rest != ""; {
		c, n := nextRune(rest)
		if c == utf8.RuneError && n == 1 {
			return r.fail("a text is not UTF-8")
		}
		rest = rest[n:]
	}
	return r.push(string(b))
}

func (r *pickleReader) bytes(size uint64) error {
	b, err := r.counted(size)
	if err != nil {
		return err
	}
	return r.push(pyBytes(b))
}

func (r *pickleReader) fill(op byte) error {
	var items []any
	var err error
	switch op {
	case opAppend:
		items, err = r.last(1)
	case opSetItem:
		items, err = r.last(2)
	default:
		items, err = r.sinceMark()
	}
	if err != nil {
		return err
	}
	if len(r.stack) == 0 {
		return r.fail("the stack is empty")
	}
	switch target := r.stack[len(r.stack)-1].(type) {
	case *pyList:
		if op == opAppend || op == opAppends {
			target.items = append(target.items, items...)
			return nil
		}
	case *pyDict:
		if (op == opSetItem || op == opSetItems) && len(items)%2 == 0 {
			for i := 0; i < len(items); i += 2 {
				target.keys = append(target.keys, items[i])
				target.values = append(target.values, items[i+1])
			}
			return nil
		}
	}
	return r.fail("there is no list or dictionary to add items to")
}

func (r *pickleReader) tuple(op byte) error {
	var items []any
	var err error
	switch op {
	case opTuple:
		items, err = r.sinceMark()
	case opTuple1:
		items, err = r.last(1)
	case opTuple2:
		items, err = r.last(2)
	case opTuple3:
		items, err = r.last(3)
	}
	if err != nil {
		return err
	}
	return r.push(pyTuple(items))
}

func (r *pickleReader) remember(op byte) error {
	index, err := uint64(len(r.memo)), error(nil)
	switch op {
	case opBinPut, opBinGet:
		index, err = r.unsigned(1)
	case opLongBinPut, opLongBinGet:
		index, err = r.unsigned(4)
	}
	if err != nil {
		return err
	}
	if op == opBinGet || op == opLongBinGet {
		x, ok := r.memo[uint32(index)]
		if !ok {
			return r.fail("the memo has no value of that number")
		}
		return r.push(x)
	}
	x, err := r.pop()
	if err != nil {
		return err
	}
	r.memo[uint32(index)] = x
	return r.push(x)
}

// jsonWriter writes the values of a pickle as JSON.
type jsonWriter struct {
	out   []byte
	limit int
	depth int
}

func (w *jsonWriter) value(x any) error {
	if w.depth > maxDepth {
		return &PickleError{Why: "nested too deeply, or it contains itself"}
	}
	if len(w.out) > w.limit {
		return &PickleError{Why: "its value is too large"}
	}
	switch x := x.(type) {
	case nil:
		w.out = append(w.out, "null"...)
	case bool:
		w.out = strconv.AppendBool(w.out, x)
	case *big.Int:
		w.out = x.Append(w.out, 10)
	case float64:
		w.out = appendFloat(w.out, x)
	case string:
		w.out = appendQuoted(w.out, x)
	case pyBytes:
		if utf8.Valid(x) {
			w.out = append(w.out, wrap("bytes", quoteJSON(string(x)))...)
		} else {
			w.out = append(w.out, wrap("base64", quoteJSON(base64.StdEncoding.EncodeToString(x)))...)
		}
	case pyWrapped:
		w.out = append(w.out, x...)
	case *pyUUID:
		if !x.built {
			return &PickleError{Why: "it contains a UUID without its number"}
		}
		w.out = append(w.out, wrapUUID(x.value)...)
	case pyTuple:
		return w.list(x)
	case *pyList:
		return w.list(x.items)
	case *pyDict:
		return w.dict(x)
	case pyDelta, pyZone:
		return &PickleError{Why: "it contains a timedelta or a timezone of Python, which has no form in JSON"}
	default:
		return &PickleError{Why: "it contains a class where a value is expected"}
	}
	return nil
}

func (w *jsonWriter) list(items []any) error {
	w.depth++
	defer func() { w.depth-- }()
	w.out = append(w.out, '[')
	for i, item := range items {
		if i > 0 {
			w.out = append(w.out, ", "...)
		}
		if err := w.value(item); err != nil {
			return err
		}
	}
	w.out = append(w.out, ']')
	return nil
}

func (w *jsonWriter) dict(d *pyDict) error {
	w.depth++
	defer func() { w.depth-- }()
	w.out = append(w.out, '{')
	for i, key := range d.keys {
		if i > 0 {
			w.out = append(w.out, ", "...)
		}
		// json.dumps converts keys of these types in the same way.
		switch key := key.(type) {
		case string:
			w.out = appendQuoted(w.out, key)
		case nil, bool, *big.Int, float64:
			plain := jsonWriter{limit: w.limit}
			if err := plain.value(key); err != nil {
				return err
			}
			w.out = appendQuoted(w.out, string(plain.out))
		default:
			return &PickleError{Why: "a key of a dictionary is neither text nor a number"}
		}
		w.out = append(w.out, ": "...)
		if err := w.value(d.values[i]); err != nil {
			return err
		}
	}
	w.out = append(w.out, '}')
	return nil
}

// unpickle converts a pickle to JSON; each may have at most limit bytes.
func unpickle(column []byte, limit int) (json.RawMessage, error) {
	if len(column) > limit {
		return nil, &PickleError{Why: "it is too large"}
	}
	x, err := readPickle(column)
	if err != nil {
		return nil, err
	}
	w := jsonWriter{limit: limit}
	if err := w.value(x); err != nil {
		return nil, err
	}
	return w.out, nil
}

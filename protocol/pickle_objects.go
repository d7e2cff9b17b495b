package protocol

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/big"
	"time"
)

// pyGlobal is the name of a Python class or function. The reader never calls
// it; for those in knownGlobals it computes the result itself.
type pyGlobal string

// pyWrapped is an object in the form of its type wrapper.
type pyWrapped json.RawMessage

// pyZone is a datetime.timezone, and pyDelta a datetime.timedelta of seconds.
type (
	pyZone  time.Duration
	pyDelta time.Duration
)

// pyUUID is a uuid.UUID, which Python pickles as an empty object and the number that is
// set afterwards. It is a pointer on the stack, since the memo may have it in between.
type pyUUID struct {
	value UUID
	built bool
}

// knownGlobals are the classes and functions in pickles of values that have a
// type wrapper: in those that PickleJSON writes, and in those that Python writes
// for datetime, date, time, Decimal and, with protocol 2, bytes. Python's own pickles of
// UUIDs are read by newObject and build.
var knownGlobals = map[pyGlobal]func(args pyTuple) (any, bool){
	"_codecs.encode":     makeBytes,
	"decimal.Decimal":    makeDecimal,
	"uuid.UUID":          makeUUID,
	"datetime.date":      makeDate,
	"datetime.datetime":  makeDatetime,
	"datetime.time":      makeTime,
	"datetime.timezone":  makeZone,
	"datetime.timedelta": makeDelta,
}

func (r *pickleReader) unsafe(what string) error {
	return &PickleError{Offset: r.start, Unsafe: true,
		Why: "it contains " + what + ", and only plain values can be read outside Python"}
}

// global reads the operands of opGlobal (protocols 0 to 3): two lines of text.
func (r *pickleReader) global() error {
	module, err := r.line()
	if err != nil {
		return err
	}
	name, err := r.line()
	if err != nil {
		return err
	}
	return r.pushGlobal(module, name)
}

func (r *pickleReader) line() (string, error) {
	end := bytes.IndexByte(r.in[r.pos:], '\n')
	if end < 0 {
		return "", r.fail("the pickle ends too early")
	}
	line := string(r.in[r.pos : r.pos+end])
	r.pos += end + 1
	return line, nil
}

// stackGlobal takes the operands of opStackGlobal (protocol 4) from the stack.
func (r *pickleReader) stackGlobal() error {
	names, err := r.last(2)
	if err != nil {
		return err
	}
	module, ok := names[0].(string)
	name, ok2 := names[1].(string)
	if !ok || !ok2 {
		return r.fail("the name of a class is not text")
	}
	return r.pushGlobal(module, name)
}

func (r *pickleReader) pushGlobal(module, name string) error {
	g := pyGlobal(module + "." + name)
	if _, ok := knownGlobals[g]; !ok {
		return r.unsafe("an object of Python's " + quote(string(g)))
	}
	return r.push(g)
}

// reduce replaces a function and its arguments on the stack by the result.
func (r *pickleReader) reduce() error {
	call, err := r.last(2)
	if err != nil {
		return err
	}
	g, ok := call[0].(pyGlobal)
	args, ok2 := call[1].(pyTuple)
	if !ok || !ok2 {
		return r.unsafe("a call")
	}
	x, ok := knownGlobals[g](args)
	if !ok {
		return r.fail(string(g) + " does not accept these arguments")
	}
	return r.push(x)
}

// newObject makes an empty object of a class. Only UUIDs are read this way.
func (r *pickleReader) newObject() error {
	call, err := r.last(2)
	if err != nil {
		return err
	}
	class, ok := call[0].(pyGlobal)
	args, ok2 := call[1].(pyTuple)
	if !ok || !ok2 || class != "uuid.UUID" || len(args) > 0 {
		return r.unsafe("an object of a Python class")
	}
	return r.push(&pyUUID{})
}

// build sets the state of the object below it on the stack.
func (r *pickleReader) build() error {
	both, err := r.last(2)
	if err != nil {
		return err
	}
	id, ok := both[0].(*pyUUID)
	state, ok2 := both[1].(*pyDict)
	if !ok || !ok2 {
		return r.unsafe("an object of a Python class")
	}
	for i, key := range state.keys { // besides int there may be is_safe
		n, isInt := state.values[i].(*big.Int)
		if key == "int" && isInt && n.Sign() >= 0 && n.BitLen() <= 8*len(id.value) {
			n.FillBytes(id.value[:])
			id.built = true
		}
	}
	if !id.built {
		return r.fail("a UUID has no number of 128 bits")
	}
	return r.push(id)
}

// makeBytes is _codecs.encode(text, "latin1").
func makeBytes(args pyTuple) (any, bool) {
	if len(args) != 2 || args[1] != "latin1" {
		return nil, false
	}
	text, ok := args[0].(string)
	out := make(pyBytes, 0, len(text))
	for _, c := range text {
		if c > 0xFF {
			return nil, false
		}
		out = append(out, byte(c))
	}
	return out, ok
}

func makeDecimal(args pyTuple) (any, bool) {
	if len(args) != 1 {
		return nil, false
	}
	text, ok := args[0].(string)
	return pyWrapped(wrap("decimal", quoteJSON(text))), ok && pythonDecimal.MatchString(text)
}

func makeUUID(args pyTuple) (any, bool) {
	if len(args) != 1 {
		return nil, false
	}
	text, ok := args[0].(string)
	u, err := parseUUID(quoteJSON(text))
	return pyWrapped(wrapUUID(u)), ok && err == nil
}

func makeDate(args pyTuple) (any, bool) {
	n, ok := numbers(args, 3)
	if state, isBytes := stateOf(args, 4); isBytes {
		n, ok = []int{int(state[0])<<8 | int(state[1]), int(state[2]), int(state[3])}, true
	}
	if !ok || n[0] < 1 || n[0] > 9999 || !isDay(n[0], n[1], n[2]) {
		return nil, false
	}
	return pyWrapped(wrap("date", quoteJSON(Date{n[0], n[1], n[2]}.String()))), true
}

// makeDatetime accepts the ten bytes that Python pickles, or the seven numbers
// of an ordinary call, each optionally followed by a zone.
func makeDatetime(args pyTuple) (any, bool) {
	args, zone := cutZone(args)
	n, ok := numbers(args, 7)
	if s, isBytes := stateOf(args, 10); isBytes {
		n, ok = []int{int(s[0])<<8 | int(s[1]), int(s[2] & 0x7F), int(s[3]), int(s[4]), int(s[5]), int(s[6]),
			int(s[7])<<16 | int(s[8])<<8 | int(s[9])}, true
	}
	if !ok || n[0] < 1 || n[0] > 9999 || !isDay(n[0], n[1], n[2]) || !isClock(n[3:]) {
		return nil, false
	}
	text := Date{n[0], n[1], n[2]}.String() + "T" + clockText(n[3:]) + zone
	return pyWrapped(wrap("datetime", quoteJSON(text))), true
}

// makeTime accepts the six bytes that Python pickles, or the four numbers of an
// ordinary call, each optionally followed by a zone.
func makeTime(args pyTuple) (any, bool) {
	args, zone := cutZone(args)
	n, ok := numbers(args, 4)
	if s, isBytes := stateOf(args, 6); isBytes {
		n, ok = []int{int(s[0] & 0x7F), int(s[1]), int(s[2]), int(s[3])<<16 | int(s[4])<<8 | int(s[5])}, true
	}
	if !ok || !isClock(n) {
		return nil, false
	}
	return pyWrapped(wrap("time", quoteJSON(clockText(n)+zone))), true
}

// cutZone removes the last argument if it is a zone, and returns its text.
func cutZone(args pyTuple) (rest pyTuple, zone string) {
	if len(args) == 0 {
		return args, ""
	}
	z, ok := args[len(args)-1].(pyZone)
	if !ok {
		return args, ""
	}
	return args[:len(args)-1], time.Time{}.In(time.FixedZone("", int(time.Duration(z)/time.Second))).Format("-07:00")
}

// isClock checks hour, minute, second and microsecond.
func isClock(n []int) bool {
	return 0 <= n[0] && n[0] <= 23 && 0 <= n[1] && n[1] <= 59 && 0 <= n[2] && n[2] <= 59 && 0 <= n[3] && n[3] <= 999_999
}

// clockText is the text of Python's time.isoformat.
func clockText(n []int) string {
	text := fmt.Sprintf("%02d:%02d:%02d", n[0], n[1], n[2])
	if n[3] != 0 {
		text += fmt.Sprintf(".%06d", n[3])
	}
	return text
}

func makeZone(args pyTuple) (any, bool) {
	if len(args) != 1 {
		return nil, false
	}
	d, ok := args[0].(pyDelta)
	return pyZone(d), ok && time.Duration(d)%time.Minute == 0 && time.Duration(d).Abs() < 24*time.Hour
}

func makeDelta(args pyTuple) (any, bool) {
	n, ok := numbers(args, min(max(len(args), 2), 3))
	if !ok || n[0] < -1 || n[0] > 1 || n[1] < -86400 || n[1] > 86400 || len(n) > 2 && n[2] != 0 {
		return nil, false
	}
	return pyDelta(time.Duration(n[0]*86400+n[1]) * time.Second), true
}

// numbers returns the arguments if they are exactly count small integers.
func numbers(args pyTuple, count int) ([]int, bool) {
	if len(args) != count {
		return nil, false
	}
	out := make([]int, count)
	for i, a := range args {
		n, ok := a.(*big.Int)
		if !ok || !n.IsInt64() || n.Int64() != int64(int32(n.Int64())) {
			return nil, false
		}
		out[i] = int(n.Int64())
	}
	return out, true
}

// stateOf returns the first argument if it is bytes of the given length.
func stateOf(args pyTuple, size int) (pyBytes, bool) {
	if len(args) != 1 {
		return nil, false
	}
	b, ok := args[0].(pyBytes)
	return b, ok && len(b) == size
}

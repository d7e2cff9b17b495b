package artifacts

import (
	"bytes"
	"unicode/utf16"
	"unicode/utf8"
)

// A reading is one way to read the text at a position: as bytes that it spells, or,
// with n = 0, as an interruption that spells nothing.
type reading struct {
	bytes [utf8.UTFMax]byte
	n     int
	// end is where the text goes on.
	end int
}

// readings are all ways to read the text at a position:
//
//   - a byte as it is;
//   - percent-encoding, also of bytes that need none and of encoded text, %% for a
//     percent sign, and + for a space;
//   - the backslash escapes of JSON, C, Python and shells, also doubled as in JSON
//     inside of JSON;
//   - entities of XML and HTML;
//   - interruptions: the control sequences of terminals, carriage returns and
//     backspaces, also escaped as JSON writes them, and, if folded is set, a line
//     break with the prefix of the next line.
type readings struct {
	list  []reading
	space [24]reading
	// open: there may be more ways, which depend on text that has not been read yet.
	open bool

	text   []byte
	end    bool
	folded bool
}

// Limits on the lengths of escapes, in bytes. They bound what a writer buffers.
const (
	maxLevels     = 4
	maxBackslash  = 16
	maxSequence   = 64
	maxTitle      = 512
	maxLinePrefix = 96
)

func (r *readings) read(text []byte, i int, end, folded bool) {
	r.list, r.open, r.text, r.end, r.folded = r.space[:0], false, text, end, folded
	c := text[i]
	r.byte(c, i+1)
	switch c {
	case '%':
		r.percent(i)
	case '+':
		r.byte(' ', i+1)
	case '\\':
		r.backslash(i)
	case '&':
		r.entity(i)
	case 0x1b:
		r.sequence(i + 1)
	case '\r':
		r.interruption(i + 1)
		if next, found := r.peek(i + 1); found && next != '\n' {
			r.byte('\n', i+1) // as Python reads it
		}
	case '\b':
		r.interruption(i + 1)
		// Printed twice to be bold.
		if next, found := r.peek(i + 1); found && i > 0 && next == text[i-1] {
			r.interruption(i + 2)
		}
	case '\n':
		if folded {
			r.list = r.list[:0]
			r.lineBreak(i + 1)
		}
	}
}

func (r *readings) add(bytes string, end int) {
	if len(r.list) == cap(r.list) {
		return
	}
	new := reading{n: len(bytes), end: end}
	copy(new.bytes[:], bytes)
	r.list = append(r.list, new)
}

func (r *readings) byte(c byte, end int) {
	if len(r.list) < cap(r.list) {
		r.list = append(r.list, reading{bytes: [utf8.UTFMax]byte{c}, n: 1, end: end})
	}
}

func (r *readings) interruption(end int) { r.add("", end) }

// character adds a character that an escape names. Of control characters it adds also
// what they do.
func (r *readings) character(c rune, end int) {
	r.add(string(c), end)
	switch c {
	case '\n':
		if r.folded {
			r.interruption(end)
		}
	case '\r', '\b':
		r.interruption(end)
	case 0x1b:
		r.sequence(end)
	}
}

// peek returns the byte at a position. Without one, more text may come.
func (r *readings) peek(i int) (byte, bool) {
	if i < len(r.text) {
		return r.text[i], true
	}
	r.open = r.open || !r.end
	return 0, false
}

// word reports whether a word stands at a position. If more text could complete it,
// there may be more ways.
func (r *readings) word(i int, word string) bool {
	rest := r.text[min(i, len(r.text)):]
	if len(rest) < len(word) {
		if string(rest) == word[:len(rest)] {
			r.open = r.open || !r.end
		}
		return false
	}
	return string(rest[:len(word)]) == word
}

// digits reads exactly n digits of a base.
func (r *readings) digits(i, n, base int) (value rune, ok bool) {
	for range n {
		c, found := r.peek(i)
		if !found {
			return 0, false
		}
		digit := digitValue(c)
		if digit >= base {
			return 0, false
		}
		value = value*rune(base) + rune(digit)
		i++
	}
	return value, true
}

func digitValue(c byte) int {
	switch {
	case c >= '0' && c <= '9':
		return int(c - '0')
	case c >= 'a' && c <= 'f':
		return int(c-'a') + 10
	case c >= 'A' && c <= 'F':
		return int(c-'A') + 10
	}
	return 16
}

// percent reads %40, and %2540, which is that encoded again; and %%, as configparser and
// alembic write a percent sign, with and without what it encodes.
func (r *readings) percent(i int) {
	i++
	if r.word(i, "%") {
		r.byte('%', i+1)
		if value, ok := r.digits(i+1, 2, 16); ok {
			r.byte(byte(value), i+3)
		}
	}
	for range maxLevels {
		if value, ok := r.digits(i, 2, 16); ok {
			r.byte(byte(value), i+2)
		}
		if !r.word(i, "25") {
			return
		}
		i += 2
	}
}

// backslash reads an escape of JSON, C, Python or a shell after any number of
// backslashes.
func (r *readings) backslash(i int) {
	run := i
	for run < len(r.text) && run-i < maxBackslash && r.text[run] == '\\' {
		run++
	}
	for n := 2; n <= min(run-i, 4); n *= 2 {
		r.byte('\\', i+n)
	}
	c, found := r.peek(run)
	if !found {
		return
	}
	switch c {
	case 'n':
		r.character('\n', run+1)
	case 'r':
		r.character('\r', run+1)
	case 't':
		r.character('\t', run+1)
	case 'b':
		r.character('\b', run+1)
	case 'f':
		r.character('\f', run+1)
	case 'v':
		r.character('\v', run+1)
	case 'a':
		r.character('\a', run+1)
	case 'e', 'E':
		r.character(0x1b, run+1)
	case 'x':
		if value, ok := r.digits(run+1, 2, 16); ok {
			if value < utf8.RuneSelf {
				r.character(value, run+3)
			} else {
				r.byte(byte(value), run+3) // a byte in C, a character in Python
				r.character(value, run+3)
			}
		}
	case 'u':
		value, ok := r.digits(run+1, 4, 16)
		if !ok {
			return
		}
		end := run + 5
		if utf16.IsSurrogate(value) {
			escape := string(r.text[i:run]) + "u"
			if !r.word(end, escape) {
				return
			}
			low, ok := r.digits(end+len(escape), 4, 16)
			if !ok {
				return
			}
			value, end = utf16.DecodeRune(value, low), end+len(escape)+4
		}
		r.character(value, end)
	case 'U':
		if value, ok := r.digits(run+1, 8, 16); ok && value <= utf8.MaxRune {
			r.character(value, run+9)
		}
	case '0', '1', '2', '3', '4', '5', '6', '7':
		for n := 1; n <= 3; n++ {
			value, ok := r.digits(run, n, 8)
			if !ok {
				break
			}
			if value < utf8.RuneSelf {
				r.character(value, run+n)
			} else if value < 256 {
				r.byte(byte(value), run+n)
			}
		}
	case '\n':
		r.byte('\n', run+1)
		if r.folded {
			r.lineBreak(run + 1)
		}
	default:
		if !isWord(c) || c == '_' {
			r.byte(c, run+1)
		}
	}
}

// entities are the entities of XML, and of HTML where a secret may have them.
var entities = []struct{ name, text string }{
	{"amp;", "&"}, {"lt;", "<"}, {"gt;", ">"}, {"quot;", `"`}, {"apos;", "'"}, {"nbsp;", "\u00a0"}, {"sol;", "/"}, {"plus;", "+"}, {"commat;", "@"}, {"equals;", "="}, {"colon;", ":"},
}

// entity reads &lt; and &amp;lt;, which is that encoded again.
func (r *readings) entity(i int) {
	i++
	for range maxLevels {
		for _, e := range entities {
			if r.word(i, e.name) {
				r.add(e.text, i+len(e.name))
			}
		}
		if r.word(i, "#") {
			r.numeric(i + 1)
		}
		if !r.word(i, "amp;") {
			return
		}
		i += len("amp;")
	}
}

// numeric reads the rest of &#64; or &#x40;.
func (r *readings) numeric(i int) {
	base := 10
	if c, found := r.peek(i); found && (c == 'x' || c == 'X') {
		base = 16
		i++
	}
	value := rune(0)
	for n := 0; n <= 8; n++ {
		c, found := r.peek(i + n)
		if !found {
			return
		}
		if c == ';' {
			if n > 0 && value <= utf8.MaxRune {
				r.character(value, i+n+1)
			}
			return
		}
		digit := digitValue(c)
		if digit >= base {
			return
		}
		value = min(value*rune(base)+rune(digit), utf8.MaxRune+1)
	}
}

// sequence reads the rest of a terminal's control sequence, after its escape
// character.
func (r *readings) sequence(i int) {
	c, found := r.peek(i)
	if !found {
		return
	}
	switch {
	case c == '[':
		for j := i + 1; j < i+maxSequence; j++ {
			c, found := r.peek(j)
			if !found || c < 0x20 || c > 0x7e {
				return
			}
			if c >= 0x40 {
				r.interruption(j + 1)
				return
			}
		}
	case c == ']' || c == 'P' || c == 'X' || c == '^' || c == '_':
		for j := i + 1; j < i+maxTitle; j++ {
			c, found := r.peek(j)
			if !found || c == '\n' {
				return
			}
			if c == '\a' {
				r.interruption(j + 1)
				return
			}
			if c == 0x1b {
				if r.word(j+1, `\`) {
					r.interruption(j + 2)
				}
				return
			}
		}
	case c >= 0x20 && c <= 0x2f:
		if c, found := r.peek(i + 1); found && c >= 0x30 && c <= 0x7e {
			r.interruption(i + 2)
		}
	case c >= 0x30 && c <= 0x7e:
		r.interruption(i + 1)
	}
}

// lineBreak reads what programs put between the lines of a text, from the beginning of
// a line on: nothing, or one or several prefixes.
func (r *readings) lineBreak(i int) {
	line := r.text[min(i, len(r.text)):]
	if end := bytes.IndexByte(line, '\n'); end >= 0 {
		line = line[:end]
	} else if len(line) < maxLinePrefix && !r.end {
		r.open = true
	}
	line = line[:min(len(line), maxLinePrefix)]
	ends := make([]int, 1, 8)
	for k := 0; k < len(ends) && k < 4; k++ {
		for _, prefix := range linePrefixes {
			if n := prefix(line[ends[k]:]); n > 0 && len(ends) < cap(ends) {
				ends = append(ends, ends[k]+n)
			}
		}
	}
	for _, end := range ends {
		r.byte('\n', i+end)
		r.interruption(i + end)
	}
	for _, end := range ends { // folded at a space
		r.byte(' ', i+end)
	}
}

// linePrefixes return the length of a prefix that programs put before the lines of
// others, or 0.
var linePrefixes = []func(line []byte) int{
	// Indentation.
	func(line []byte) int { return len(line) - len(bytes.TrimLeft(line, " \t\r")) },
	// BuildKit: "#12 0.345 ", and "#12 " in front of what has no time.
	func(line []byte) int {
		if len(line) == 0 || line[0] != '#' {
			return 0
		}
		n := 1 + countDigits(line[1:])
		if n == 1 {
			return 0
		}
		if !bytes.HasPrefix(line[n:], []byte(" ")) {
			return 0
		}
		n++
		seconds := countDigits(line[n:])
		if seconds == 0 || !bytes.HasPrefix(line[n+seconds:], []byte(".")) {
			return n
		}
		rest := n + seconds + 1
		if fraction := countDigits(line[rest:]); fraction > 0 && bytes.HasPrefix(line[rest+fraction:], []byte(" ")) {
			return rest + fraction + 1
		}
		return n
	},
	// docker compose: "web-1  | ".
	func(line []byte) int {
		n := 0
		for n < len(line) && (isWord(line[n]) || line[n] == '-' || line[n] == '.') {
			n++
		}
		for n < len(line) && line[n] == ' ' {
			n++
		}
		if n == len(line) || line[n] != '|' {
			return 0
		}
		n++
		if n < len(line) && line[n] == ' ' {
			n++
		}
		return n
	},
	// Time stamps: "2026-01-02T03:04:05.678Z ", "[2026-01-02 03:04:05] ", "03:04:05 ".
	func(line []byte) int {
		n := 0
		colons := 0
		for n < len(line) && n < 40 && (line[n] >= '0' && line[n] <= '9' || bytes.IndexByte([]byte("-:.,TZ+[] "), line[n]) >= 0) {
			if line[n] == ':' {
				colons++
			}
			n++
			if colons >= 2 && line[n-1] == ' ' {
				return n
			}
		}
		return 0
	},
	// Diffs, quoted mail, comments, tables.
	func(line []byte) int {
		if len(line) > 0 && bytes.IndexByte([]byte("+-><#|*"), line[0]) >= 0 {
			return 1
		}
		return 0
	},
}

func countDigits(line []byte) int {
	n := 0
	for n < len(line) && line[n] >= '0' && line[n] <= '9' {
		n++
	}
	return n
}

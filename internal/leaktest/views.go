package leaktest

import (
	"encoding/hex"
	"html"
	"slices"
	"strings"
	"unicode/utf8"
)

// views are what a reader can make of a text. The tests of some packages search all that
// they leave, so that a step whose mark the text does not have costs nothing.
func (s *Search) views(text string) []string {
	found := []string{text}
	add := func(view string) {
		if !slices.Contains(found, view) {
			found = append(found, view)
		}
	}
	for _, steps := range [][]func(string) string{
		{strip}, {strip, oneLine}, {plainBold}, {strip, html.UnescapeString, html.UnescapeString}, {strip, unpercent, unpercent},
		{strip, unescape, unescape}, {unescape, strip}, {unquote}, {unpercent, oneLine}, {unescape, oneLine},
	} {
		view := text
		for _, step := range steps {
			view = step(view)
			add(view)
		}
	}
	// A piece that counts must be in one run of letters. Short secrets count as a whole.
	letters := window / 3 * 4
	if len(s.short) > 0 {
		letters = 8
	}
	for _, view := range found[:len(found):len(found)] {
		for _, decoded := range in64(view, letters) {
			add(decoded)
		}
		for _, decoded := range in16(view) {
			add(decoded)
		}
	}
	return found
}

var quotes = strings.NewReplacer(`'\''`, "'", `'"'"'`, "'", "''", "'")

// strip removes what a terminal does not show.
func strip(text string) string {
	i := strings.IndexAny(text, "\x1b\r\b")
	if i < 0 {
		return text
	}
	out := make([]byte, 0, len(text))
	for ; i >= 0; i = strings.IndexAny(text, "\x1b\r\b") {
		out = append(out, text[:i]...)
		n := control(text[i:])
		if n == 0 {
			out, n = append(out, text[i]), 1
		}
		text = text[i+n:]
	}
	return string(append(out, text...))
}

// control is the length of the control sequence with which a text begins, 0 for none.
func control(text string) int {
	if text[0] != '\x1b' {
		return 1 // \r or \b
	}
	run := func(from int, first, last byte) int {
		for from < len(text) && first <= text[from] && text[from] <= last {
			from++
		}
		return from
	}
	in := func(at int, first, last byte) bool { return at < len(text) && first <= text[at] && text[at] <= last }
	switch {
	case in(1, '[', '['):
		if end := run(run(2, '0', '?'), ' ', '/'); in(end, '@', '~') {
			return end + 1
		}
	case in(1, ']', ']'):
		end := strings.IndexAny(text[2:], "\a\x1b") + 2
		if end >= 2 && text[end] == '\a' {
			return end + 1
		}
		if end >= 2 && in(end+1, '\\', '\\') {
			return end + 2
		}
	case in(1, ' ', '/') && in(2, '0', '~'):
		return 3
	}
	return 0
}

// plainBold removes the second one of letters that are printed twice.
func plainBold(text string) string {
	i := strings.IndexByte(text, '\b')
	if i < 0 {
		return text
	}
	out := make([]byte, 0, len(text))
	for ; i >= 0; i = strings.IndexByte(text, '\b') {
		out = append(out, text[:i]...)
		_, n := utf8.DecodeRuneInString(text[i+1:])
		text = text[i+1+n:]
	}
	return string(append(out, text...))
}

// unquote is the text of quoted words of a shell or of YAML.
func unquote(text string) string {
	if !strings.Contains(text, "'") {
		return text
	}
	return quotes.Replace(text)
}

// oneLine joins lines without what programs put in front of each.
func oneLine(text string) string {
	var out strings.Builder
	for {
		end := strings.IndexByte(text, '\n')
		if end < 0 {
			break
		}
		line := strings.TrimSuffix(text[:end], "\r")
		out.WriteString(strings.TrimSuffix(line, `\`))
		text = text[end+1:]
		for n := prefix(text); n > 0; n = prefix(text) {
			text = text[n:]
		}
	}
	if out.Len() == 0 {
		return text
	}
	out.WriteString(text)
	return out.String()
}

// prefix is the length of what a program puts in front of a line: the number and the
// time of BuildKit, the service of compose, a time, spaces, or the mark of a diff.
func prefix(text string) int {
	run := func(from int, in func(c byte) bool) int {
		for from < len(text) && in(text[from]) {
			from++
		}
		return from
	}
	has := func(at int, word string) bool { return strings.HasPrefix(text[min(at, len(text)):], word) }
	digit := func(c byte) bool { return '0' <= c && c <= '9' }
	blank := func(c byte) bool { return c == ' ' || c == '\t' }
	if has(0, "#") {
		if n := run(1, digit); n > 1 && has(n, " ") {
			n++
			if whole := run(n, digit); whole > n && has(whole, ".") {
				if part := run(whole+1, digit); part > whole+1 && has(part, " ") {
					return part + 1
				}
			}
			return n
		}
	}
	if n := run(0, func(c byte) bool { return digit(c) || 'a' <= c && c <= 'z' || c == '-' }); n > 0 {
		if n = run(n, func(c byte) bool { return c == ' ' }); has(n, "| ") {
			return n + 2
		}
	}
	if n := run(0, func(c byte) bool { return digit(c) || strings.IndexByte("T:.Z-", c) >= 0 }); n >= 19 && has(n, " ") {
		return n + 1
	}
	if n := run(0, blank); n > 0 {
		return n
	}
	if has(0, "+") || has(0, ">") || has(0, "-") {
		if has(1, " ") {
			return 2
		}
		return 1
	}
	return 0
}

func unpercent(text string) string {
	if !strings.Contains(text, "%") {
		return text
	}
	var out strings.Builder
	for i := 0; i < len(text); i++ {
		if text[i] == '%' && i+2 < len(text) {
			if value, ok := hexByte(text[i+1:]); ok {
				out.WriteByte(value)
				i += 2
				continue
			}
		}
		out.WriteByte(text[i])
	}
	return out.String()
}

// hexByte is the value of the first two digits of a text.
func hexByte(text string) (byte, bool) {
	var value [1]byte
	if len(text) < 2 {
		return 0, false
	}
	_, err := hex.Decode(value[:], []byte(text[:2]))
	return value[0], err == nil
}

// unescape replaces escapes of JSON, Go, C and shells, however often the backslash was
// escaped itself.
func unescape(text string) string {
	if !strings.Contains(text, `\`) {
		return text
	}
	var out strings.Builder
	for i := 0; i < len(text); {
		if text[i] != '\\' {
			out.WriteByte(text[i])
			i++
			continue
		}
		for i < len(text) && text[i] == '\\' {
			i++
		}
		if i == len(text) || text[i] == '\n' {
			out.WriteByte('\\')
			continue
		}
		rest := text[i:]
		if rest[0] == 'u' && len(rest) >= 5 {
			high, isHigh := hexByte(rest[1:])
			low, isLow := hexByte(rest[3:])
			if isHigh && isLow {
				out.WriteRune(rune(high)<<8 | rune(low))
				i += 5
				continue
			}
		}
		if rest[0] == 'x' {
			if value, ok := hexByte(rest[1:]); ok {
				out.WriteByte(value)
				i += 3
				continue
			}
		}
		octal := func(c byte) bool { return '0' <= c && c <= '7' }
		if len(rest) >= 3 && octal(rest[0]) && octal(rest[1]) && octal(rest[2]) {
			out.WriteByte((rest[0]-'0')<<6 | (rest[1]-'0')<<3 | (rest[2] - '0'))
			i += 3
			continue
		}
		_, size := utf8.DecodeRuneInString(rest)
		switch rest[0] {
		case 'n':
			out.WriteByte('\n')
		case 't':
			out.WriteByte('\t')
		default:
			out.WriteString(rest[:size])
		}
		i += size
	}
	return out.String()
}

// letters64 are the values of the letters of base64, of both alphabets, and 64 for others.
var letters64 = func() (values [256]byte) {
	for i := range values {
		values[i] = 64
	}
	for i, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/") {
		values[c] = byte(i)
	}
	values['-'], values['_'] = 62, 63
	return values
}()

// in64 are the runs of at least so many letters as base64, if they begin with the first,
// second, third or fourth letter. A zero byte is between two runs.
func in64(text string, letters int) (decoded [4]string) {
	var out [4][]byte
	for i := 0; i < len(text); i++ {
		begin := i
		for i < len(text) && letters64[text[i]] < 64 {
			i++
		}
		if i-begin < letters {
			continue
		}
		for cut := range out {
			run := text[min(begin+cut, i):i]
			for ; len(run) >= 4; run = run[4:] {
				value := uint32(letters64[run[0]])<<18 | uint32(letters64[run[1]])<<12 | uint32(letters64[run[2]])<<6 | uint32(letters64[run[3]])
				out[cut] = append(out[cut], byte(value>>16), byte(value>>8), byte(value))
			}
			if len(run) >= 2 { // no padding
				out[cut] = append(out[cut], letters64[run[0]]<<2|letters64[run[1]]>>4)
			}
			if len(run) == 3 {
				out[cut] = append(out[cut], letters64[run[1]]<<4|letters64[run[2]]>>2)
			}
			out[cut] = append(out[cut], 0)
		}
	}
	for cut := range out {
		decoded[cut] = string(out[cut])
	}
	return decoded
}

// in16 are the runs of at least six bytes in hexadecimal, with or without a space or colon
// after each, if they begin with the first or the second digit.
func in16(text string) (decoded [2]string) {
	var out [2][]byte
	var digits []byte
	for i := 0; i < len(text); {
		digits = digits[:0]
		for i+1 < len(text) && isHex(text[i]) && isHex(text[i+1]) {
			digits = append(digits, text[i], text[i+1])
			if i += 2; i < len(text) && (text[i] == ' ' || text[i] == ':') {
				i++
			}
		}
		if len(digits) == 0 {
			i++
		}
		if len(digits) < 12 {
			continue
		}
		for cut := range out {
			for run := digits[cut:]; len(run) >= 2; run = run[2:] {
				value, _ := hexByte(string(run[:2]))
				out[cut] = append(out[cut], value)
			}
			out[cut] = append(out[cut], 0)
		}
	}
	return [2]string{string(out[0]), string(out[1])}
}

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}

package artifacts

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
)

// A matcher finds all spellings of many secrets in one pass over a text.
//
// At each position it looks up the next four bytes in a filter of one bit per hash,
// which few positions of an ordinary text pass; only there it compares. The
// comparison reads escapes (see escapes.go), so that a secret need not be listed in
// every mixture of them, and skips what terminals and programs insert. What is found
// at a position depends only on the text from there on and on the few bytes before
// it, never on how the text was cut into writes.
type matcher struct {
	// filter has the first four bytes of all patterns.
	filter bitset
	// near has the first three bytes and the next three of these, see skip.
	near bitset
	// heads has for each gramHash an index into lists, or 0.
	heads []int32
	lists []gramList
	// short has the patterns of less than four bytes, by their first byte.
	short    [256][]*pattern
	anyShort bool
	// prefixes has the first one to three bytes of all secrets of four or more. Those
	// of detectors are not in it: what they mask begins later, so that the writer
	// need not buffer these bytes and looks at them again instead.
	prefixes prefixSet
	// starts has those of detectors too.
	starts prefixSet
	// escapes says that there is a pattern that is found in escaped form too.
	escapes bool
}

// A gramList has the patterns that begin with the same four bytes, the longest first.
type gramList struct {
	gram     uint32
	patterns []*pattern
	// next is the index of another list with the same hash, or 0.
	next int32
}

// list returns the patterns that begin with four bytes.
func (m *matcher) list(gram uint32) []*pattern {
	for at := m.heads[gramHash(gram)]; at != 0; at = m.lists[at].next {
		if m.lists[at].gram == gram {
			return m.lists[at].patterns
		}
	}
	return nil
}

// A bitset is a set of hashes, with one bit for each. It is large enough that few of its
// bits are set for some thousand patterns, and small enough that a processor's caches
// hold two of them beside the text.
type bitset [1 << (hashBits - 6)]uint64

const hashBits = 18

func (s *bitset) add(text uint32) {
	h := text * hashFactor >> (32 - hashBits)
	s[h>>6] |= 1 << (h & 63)
}

// has is true also for a few texts that have not been added.
func (s *bitset) has(text uint32) bool {
	h := text * hashFactor >> (32 - hashBits)
	return s[h>>6]&(1<<(h&63)) != 0
}

// last3 are the bytes of four without the first one.
const last3 = 0xffffff00

// gramSize is how many bytes the filter looks at.
const gramSize = 4

const hashFactor = 0x9E3779B1

// headCount is the number of heads: hundreds of patterns have short lists, and the
// table takes 64 KiB.
const headCount = 1 << 14

func gramHash(gram uint32) uint32 { return gram * hashFactor >> (32 - 14) }

// A pattern is one spelling of a secret, or the beginning of a text that a detector
// looks at.
type pattern struct {
	text string
	// folded: the pattern is long enough to be found over several lines.
	folded bool
	// guarded: the pattern is a common word, which is masked only as a value.
	guarded bool
	// special is where the first byte of text is that may stand for something else
	// than itself. Set by newMatcher.
	special int
	// literal: the pattern is only found as it is, because it has so many backslashes
	// in a row that they could be read in too many ways. Set by newMatcher.
	literal bool
	// detect judges a text that begins with text, see detector.
	detect detector
}

// Lengths in bytes from which a pattern is found in escaped form, and over several
// lines. Shorter ones would be found in text that is not the secret.
const (
	escapedFrom = 4
	foldedFrom  = 16
)

// verdict is what is known at a position.
type verdict int

const (
	absent verdict = iota
	// undecided: that depends on text that has not been read yet.
	undecided
	present
)

func newMatcher(patterns []*pattern) *matcher {
	m := &matcher{heads: make([]int32, headCount), lists: make([]gramList, 1)}
	add := func(gram uint32, p *pattern) {
		m.filter.add(gram)
		m.near.add(gram << 8)
		m.near.add(gram & last3)
		at := m.heads[gramHash(gram)]
		for at != 0 && m.lists[at].gram != gram {
			at = m.lists[at].next
		}
		if at == 0 {
			at = int32(len(m.lists))
			m.lists = append(m.lists, gramList{gram: gram, next: m.heads[gramHash(gram)]})
			m.heads[gramHash(gram)] = at
		}
		m.lists[at].patterns = append(m.lists[at].patterns, p)
	}
	for _, p := range patterns {
		p.prepare()
		if p.detect != nil && len(p.text) == gramSize-1 {
			m.starts.add(p.text)
			for last := range 256 {
				add(binary.LittleEndian.Uint32(append([]byte(p.text), byte(last))), p)
			}
			continue
		}
		if len(p.text) < gramSize {
			m.short[p.text[0]] = append(m.short[p.text[0]], p)
			m.anyShort = true
			continue
		}
		m.escapes = m.escapes || p.detect == nil
		add(binary.LittleEndian.Uint32([]byte(p.text)), p)
		m.starts.add(p.text)
		if p.detect == nil {
			m.prefixes.add(p.text)
		}
	}
	for _, list := range m.lists {
		slices.SortFunc(list.patterns, func(a, b *pattern) int { return len(b.text) - len(a.text) })
	}
	return m
}

// A prefixSet has the first one, two and three bytes of patterns; of three bytes, a
// hash.
type prefixSet [gramSize - 1][1 << 16 / 64]uint64

func prefixKey(text []byte) uint32 {
	switch len(text) {
	case 1:
		return uint32(text[0])
	case 2:
		return uint32(text[0]) | uint32(text[1])<<8
	}
	return (uint32(text[0]) | uint32(text[1])<<8 | uint32(text[2])<<16) * 0x9E3779B1 >> 16
}

func (s *prefixSet) add(text string) {
	for n := 1; n < gramSize; n++ {
		k := prefixKey([]byte(text[:n]))
		s[n-1][k/64] |= 1 << (k % 64)
	}
}

func (s *prefixSet) has(text []byte) bool {
	k := prefixKey(text)
	return s[len(text)-1][k/64]>>(k%64)&1 != 0
}

// begins reports whether a secret may begin with up to three bytes.
func (m *matcher) begins(text []byte) bool {
	if len(text) == 0 {
		return m.escapes
	}
	return m.prefixes.has(text)
}

// escapeBytes are the bytes with which escapes and interruptions begin.
var escapeBytes = [...]byte{'%', '\\', '&', 0x1b, '\r', '\b'}

var escapeByte = func() (table [256]bool) {
	for _, c := range escapeBytes {
		table[c] = true
	}
	return table
}()

// nextEscape finds the next escapeByte in a text that does not change meanwhile: for each
// of them it remembers where the next one is, so that each part of the text is searched
// once. The zero value knows nothing of a text yet.
type nextEscape struct {
	at    [len(escapeBytes)]int
	first int // the least of them
}

// from returns the position of the first escapeByte from i > 0 on, or the end of the text.
// i does not decrease from call to call.
func (e *nextEscape) from(text []byte, i int) int {
	if e.first >= i {
		return e.first
	}
	e.first = len(text)
	for k, c := range escapeBytes {
		if e.at[k] < i {
			e.at[k] = len(text)
			if n := bytes.IndexByte(text[i:], c); n >= 0 {
				e.at[k] = i + n
			}
		}
		e.first = min(e.first, e.at[k])
	}
	return e.first
}

// span is a part of a text.
type span struct{ from, to int }

// find returns the first position from i on at which something is present or
// undecided, and adds the spans to mask to spans. Without such a position it returns
// the end of the text and absent. end says that no more text follows. escape is zero for
// the first call with a text, and the same one for those that go on in it.
func (m *matcher) find(room *room, escape *nextEscape, text []byte, i int, end bool, spans []span) (int, []span, verdict) {
	slowUntil := i
	for j := i; j < min(i+gramSize-1, len(text)); j++ {
		if escapeByte[text[j]] {
			slowUntil = j + 1
		}
	}
	for ; i < len(text); i++ {
		if i >= slowUntil {
			i = m.skip(escape, text, i)
			if i+gramSize > len(text) || escapeByte[text[i+gramSize-1]] {
				slowUntil = i + gramSize
			}
			if i == len(text) {
				break
			}
		} else if i+gramSize <= len(text) && escapeByte[text[i+gramSize-1]] {
			slowUntil = i + gramSize
		}
		if found, v := m.at(room, text, i, end, i < slowUntil, spans); v != absent {
			return i, found, v
		}
	}
	return i, spans, absent
}

// skip returns the first position from i on that has to be looked at.
func (m *matcher) skip(escape *nextEscape, text []byte, i int) int {
	if m.anyShort {
		for ; i+gramSize <= len(text); i++ {
			gram := binary.LittleEndian.Uint32(text[i:])
			if m.filter.has(gram) && m.list(gram) != nil || escapeByte[gram>>24] || m.short[byte(gram)] != nil {
				return i
			}
		}
		return i
	}
	for i+gramSize <= len(text) {
		// Four positions at a time. A pattern at one of two neighbouring positions has
		// the three bytes from the second one on as its first or its next ones, so that
		// mostly two look-ups suffice for four positions. Each is a branch that is rarely
		// taken: a processor predicts it and does not wait for the look-up before.
		end := min(escape.from(text, i+gramSize-1)+1, len(text))
		rest := text[i:end]
		for len(rest) >= 8 {
			ahead := binary.LittleEndian.Uint64(rest)
			if m.near.has(uint32(ahead)&last3) && (m.filter.has(uint32(ahead)) || m.filter.has(uint32(ahead>>8))) ||
				m.near.has(uint32(ahead>>16)&last3) && (m.filter.has(uint32(ahead>>16)) || m.filter.has(uint32(ahead>>24))) {
				break
			}
			rest = rest[4:]
		}
		i = end - len(rest)
		for last := i + 3; i <= last && i+gramSize <= len(text); i++ {
			gram := binary.LittleEndian.Uint32(text[i:])
			if m.filter.has(gram) && m.list(gram) != nil || escapeByte[gram>>24] {
				return i
			}
		}
	}
	return i
}

// at judges one position. slow says that an escape or the end of the text is so near
// that its first four bytes are not to be taken as they are.
func (m *matcher) at(room *room, text []byte, i int, end, slow bool, spans []span) ([]span, verdict) {
	longest := span{}
	// consider reports whether the position is undecided.
	consider := func(list []*pattern) bool {
		for _, p := range list {
			s, v := p.match(room, text, i, end)
			switch {
			case v == undecided:
				return true
			case v == present && p.detect != nil:
				spans = append(spans, s)
			case v == present && s.to > longest.to:
				longest = s
			}
		}
		return false
	}
	before := len(spans)
	open := false
	if m.anyShort {
		open = consider(m.short[text[i]])
	}
	switch {
	case open:
	case !slow:
		open = consider(m.list(binary.LittleEndian.Uint32(text[i:])))
	default:
		grams := &room.grams
		open = grams.read(m, text, i, end)
		for k := 0; k < len(grams.found) && !open; k++ {
			open = consider(m.list(grams.found[k]))
		}
	}
	if open {
		return spans[:before], undecided
	}
	if longest.to > 0 {
		spans = append(spans, longest)
	}
	if len(spans) > before {
		return spans, present
	}
	return spans, absent
}

// A gramReader reads the first four bytes that a text spells, in each of its readings.
type gramReader struct {
	found []uint32
	// left is how many more steps may be taken: texts that consist of escapes only
	// have very many readings.
	left int
	// levels have the readings of the escapes in front.
	levels [maxReadings]readings
}

// A room is memory to work in. Each writer has its own.
type room struct {
	grams    gramReader
	readings readings
}

// read reports whether that depends on text that has not been read yet, and the text
// so far may be the beginning of a pattern.
func (g *gramReader) read(m *matcher, text []byte, i int, end bool) (open bool) {
	g.found, g.left = g.found[:0], maxSteps
	var prefix [gramSize]byte
	return g.extend(m, text, i, end, prefix, 0, 0)
}

// maxSteps limits the escapes that are read to judge one position, in all readings of
// its beginning.
const maxSteps = 40

// maxReadings limits the escapes in a beginning: interruptions have no bytes.
const maxReadings = 12

func (g *gramReader) extend(m *matcher, text []byte, i int, end bool, prefix [gramSize]byte, n, depth int) (open bool) {
	for {
		if n == gramSize {
			gram := binary.LittleEndian.Uint32(prefix[:])
			if m.filter.has(gram) && !slices.Contains(g.found, gram) {
				g.found = append(g.found, gram)
			}
			return false
		}
		if i == len(text) {
			return !end && m.begins(prefix[:n])
		}
		if n > 0 && !m.starts.has(prefix[:n]) {
			return false
		}
		if escapeByte[text[i]] {
			return g.branch(m, text, i, end, prefix, n, depth)
		}
		prefix[n] = text[i]
		n++
		i++
	}
}

// branch follows all readings of an escape.
func (g *gramReader) branch(m *matcher, text []byte, i int, end bool, prefix [gramSize]byte, n, depth int) (open bool) {
	if g.left--; depth == maxReadings || g.left < 0 {
		return false
	}
	all := &g.levels[depth]
	all.read(text, i, end, false)
	for _, r := range all.list {
		if r.n == 0 && n == 0 {
			continue
		}
		longer := prefix
		added := copy(longer[n:], r.bytes[:r.n])
		if g.extend(m, text, r.end, end, longer, n+added, depth+1) {
			open = true
		}
	}
	return open || all.open && m.begins(prefix[:n])
}

// match judges whether the pattern stands at a position.
func (p *pattern) match(room *room, text []byte, i int, end bool) (span, verdict) {
	rest := text[i:]
	if p.detect != nil {
		switch {
		case len(rest) >= len(p.text) && string(rest[:len(p.text)]) == p.text:
			return p.detect(text, i, end)
		case len(rest) < len(p.text) && !end && p.text[:len(rest)] == string(rest):
			return span{}, undecided
		}
		return span{}, absent
	}
	if len(rest) >= len(p.text) && string(rest[:len(p.text)]) == p.text {
		return p.accept(text, span{i, i + len(p.text)}, end)
	}
	same := commonPrefix(rest, p.text)
	special := p.special < same
	if same == len(rest) && !end {
		return span{}, undecided
	}
	if p.literal || !special && (same == len(rest) || !interrupts[rest[same]]) {
		return span{}, absent
	}
	to, v := p.spelled(&room.readings, text, i, end)
	if v != present {
		return span{}, v
	}
	return p.accept(text, span{i, to}, end)
}

func (p *pattern) prepare() {
	if p.detect != nil {
		return // shared between matchers
	}
	p.literal = len(p.text) < escapedFrom || strings.Contains(p.text, `\\\\\\\\`)
	p.special = len(p.text)
	for i := range len(p.text) {
		if interrupts[p.text[i]] {
			p.special = i
			return
		}
	}
}

// commonPrefix returns how many bytes two texts have in common at their beginning.
func commonPrefix(text []byte, pattern string) int {
	n := min(len(text), len(pattern))
	i := 0
	for i+16 <= n && string(text[i:i+16]) == pattern[i:i+16] {
		i += 16
	}
	for i < n && text[i] == pattern[i] {
		i++
	}
	return i
}

// interrupts are the bytes that may stand for something else than themselves.
var interrupts = func() [256]bool {
	table := escapeByte
	table['\n'], table['+'] = true, true
	return table
}()

// accept applies the rule for common words: they are masked where they stand as a
// value, after an equals sign or a colon.
func (p *pattern) accept(text []byte, s span, end bool) (span, verdict) {
	if !p.guarded {
		return s, present
	}
	before := bytes.TrimRight(text[max(0, s.from-lookBehind):s.from], " \t\"'`")
	if len(before) == 0 || before[len(before)-1] != '=' && before[len(before)-1] != ':' {
		return s, absent
	}
	if s.to == len(text) && !end {
		return s, undecided
	}
	if s.to < len(text) && isWord(text[s.to]) {
		return s, absent
	}
	return s, present
}

func isWord(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c >= 0x80
}

// states are the positions that a text may have been read to, for one position in a
// pattern. There is more than one if an escape can be read in several ways.
type states struct {
	list  []int
	space [8]int
}

// maxStates limits the readings that are followed at the same time.
const maxStates = 16

func (s *states) add(position int) {
	if s.list == nil {
		s.list = s.space[:0]
	}
	if len(s.list) < maxStates && !slices.Contains(s.list, position) {
		s.list = append(s.list, position)
	}
}

// spelled judges whether a text spells the pattern with escapes or interruptions, and
// returns where it ends.
func (p *pattern) spelled(all *readings, text []byte, i int, end bool) (int, verdict) {
	limit := i + 24*len(p.text) + 1024 // bounds what a writer buffers
	var ring [5]states                 // by position in the pattern modulo 5: an escape has at most 4 bytes
	ring[0].add(i)
	open := false
	left := 4*len(p.text) + 4*maxSteps // escapes that are read
	for at := range len(p.text) {
		now := &ring[at%5]
		// The list grows in the loop, by positions after interruptions.
		for k := 0; k < len(now.list); k++ {
			position := now.list[k]
			if position >= limit {
				continue
			}
			if position == len(text) {
				open = open || !end
				continue
			}
			if c := text[position]; !interrupts[c] {
				if c == p.text[at] {
					ring[(at+1)%5].add(position + 1)
				}
				continue
			}
			if left--; left < 0 {
				return 0, absent
			}
			all.read(text, position, end, p.folded)
			open = open || all.open
			for _, r := range all.list {
				switch {
				case r.n == 0:
					if at > 0 {
						now.add(r.end)
					}
				case strings.HasPrefix(p.text[at:], string(r.bytes[:r.n])):
					ring[(at+r.n)%5].add(r.end)
				}
			}
		}
		now.list = nil
	}
	last := &ring[len(p.text)%5]
	switch {
	case open:
		return 0, undecided
	case len(last.list) == 0:
		return 0, absent
	}
	return slices.Max(last.list), present
}

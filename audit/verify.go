package audit

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"
)

// A Fault says what is wrong with a record.
type Fault string

// The faults.
const (
	Edited     Fault = "edited"
	Removed    Fault = "removed"
	OutOfOrder Fault = "out of order"
	Repeated   Fault = "repeated"
	// Cut: records are missing at the end.
	Cut Fault = "cut"
	// Added: records follow that the head does not know.
	Added Fault = "added"
)

// A Finding is a place where a trail is broken.
type Finding struct {
	// Seq is the record, To the last one of several that follow each other; otherwise it
	// is the same.
	Seq, To int64
	Fault   Fault
	// Text says more.
	Text string
}

func (f Finding) String() string {
	which := fmt.Sprintf("record %d is", f.Seq)
	if f.To > f.Seq {
		which = fmt.Sprintf("records %d to %d are", f.Seq, f.To)
	}
	text := which + " " + string(f.Fault)
	if f.Fault == Cut {
		text = which + " missing at the end"
	}
	if f.Text != "" {
		text += ": " + f.Text
	}
	return text
}

// An Entry is a record as it is kept.
type Entry struct {
	Text []byte
	// Seq and Hash are those of the database's row; 0 and "" in a file.
	Seq  int64
	Hash string
	// Unterminated says that a file ends within the line.
	Unterminated bool
}

// A Report is what a Verifier has found.
type Report struct {
	// Records is how many were read. First and Last are their times.
	Records     int64
	First, Last time.Time
	// Head is that of the records that were read.
	Head Head
	// Findings are sorted by record, empty for a good trail. There are at most
	// maxFindings; More counts the others.
	Findings []Finding
	More     int
}

// Good says that nothing is wrong.
func (r Report) Good() bool { return len(r.Findings) == 0 }

const (
	maxFindings = 20
	maxGaps     = 100
)

// A Verifier checks a trail, record by record. It needs the same memory for any length.
//
// A record that was altered is found by the hash in the next one, the last by a head.
// Without a head, a cut end and an edit of the last record are not found.
type Verifier struct {
	run   string
	start Head
	heads []namedHead
	end   *Head

	report Report
	// next is the number of the next record. tip is the hash of the record before it, ""
	// if that is not known; tip2 is another one that counts as well.
	next      int64
	tip, tip2 string
	// doubtful is the number of a record that does not fit to the one before it; 0 for
	// none. The next record tells which of both is edited.
	doubtful int64
	gaps     []gap
	over     bool // more gaps than maxGaps
}

type gap struct{ from, to int64 }

type namedHead struct {
	name string
	Head
}

// NewVerifier returns a Verifier for the trail of a run. start is that of [Start], or the
// head of the records that the retention has removed. end is the head of the whole
// trail, nil if it is not known.
func NewVerifier(run string, start Head, end *Head) *Verifier {
	v := &Verifier{run: run, start: start, end: end, next: start.Length + 1, tip: start.Hash}
	v.report.Head = start
	return v
}

// Expect adds a head that was noted at some time. The trail may have grown since.
func (v *Verifier) Expect(name string, head Head) {
	v.heads = append(v.heads, namedHead{name, head})
}

func (v *Verifier) find(fault Fault, from, to int64, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if n := len(v.report.Findings); n > 0 && (fault == OutOfOrder || fault == Repeated) {
		if last := &v.report.Findings[n-1]; last.Fault == fault && last.To == from-1 && last.Text == text {
			last.To = to
			return
		}
	}
	if len(v.report.Findings) == maxFindings {
		v.report.More++
		return
	}
	v.report.Findings = append(v.report.Findings, Finding{from, to, fault, text})
}

// Add checks the next record.
func (v *Verifier) Add(e Entry) {
	v.report.Records++
	record, err := Decode(e.Text)
	switch {
	case e.Unterminated:
		v.settle(false)
		v.find(Cut, v.next, v.next, "the last line is not complete")
		v.skip()
		return
	case err != nil:
		v.settle(false)
		v.find(Edited, v.next, v.next, "%s", err)
		v.skip()
		return
	}
	if v.report.First.IsZero() {
		v.report.First = record.At
	}
	v.report.Last = record.At
	fits := v.tip != "" && (record.Prev == v.tip || v.tip2 != "" && record.Prev == v.tip2)
	switch {
	case record.Seq == v.next:
		v.inOrder(e, record, fits)
	case fits:
		// A record of another place would not have this hash.
		v.settle(true)
		v.find(Edited, v.next, v.next, "it calls itself record %d", record.Seq)
		v.skip()
	case record.Seq > v.next:
		v.settle(false)
		v.addGap(gap{v.next, record.Seq - 1})
		v.next, v.tip, v.tip2 = record.Seq, "", ""
		v.inOrder(e, record, false)
	case v.fillGap(record.Seq):
		v.find(OutOfOrder, record.Seq, record.Seq, "found after record %d", v.next-1)
	default:
		v.find(Repeated, record.Seq, record.Seq, "found again after record %d", v.next-1)
	}
}

// skip passes a record of which nothing is known but that it is edited.
func (v *Verifier) skip() {
	v.next++
	v.tip, v.tip2 = "", ""
}

// settle reports the doubtful record, or the one before it. fits says that the record
// after it has its hash.
func (v *Verifier) settle(fits bool) {
	if v.doubtful == 0 {
		return
	}
	if fits || v.tip == "" {
		v.find(Edited, v.doubtful-1, v.doubtful-1, "record %d has another hash of it", v.doubtful)
	} else {
		v.find(Edited, v.doubtful, v.doubtful, "its hash of the record before is not that record's, and the record after it has another hash of it")
	}
	v.doubtful = 0
}

// inOrder checks a record that has the expected number.
func (v *Verifier) inOrder(e Entry, record Record, fits bool) {
	seq := v.next
	doubted := v.doubtful != 0 && v.tip != ""
	if doubted {
		v.settle(fits)
	}
	edited := false
	hash := Hash(record.Prev, e.Text)
	v.next++
	switch {
	case v.run != "" && record.Run != v.run:
		v.find(Edited, seq, seq, "it is of run %q", cutFor(record.Run))
		edited = true
	case e.Hash != "" && e.Hash != hash:
		v.find(Edited, seq, seq, "its text does not have the hash that is kept with it")
		v.tip, v.tip2 = e.Hash, hash
		v.report.Head = Head{seq, hash}
		return
	case e.Seq != 0 && e.Seq != seq:
		v.find(OutOfOrder, seq, seq, "it is kept as record %d", e.Seq)
	}
	switch {
	case edited || fits || v.tip == "" || doubted:
	case seq == v.start.Length+1:
		v.find(Edited, seq, seq, "its hash of the record before is not %s", v.start.Hash)
		edited = true
	default:
		v.doubtful = seq
	}
	v.tip, v.tip2 = hash, ""
	v.report.Head = Head{seq, hash}
	if edited {
		v.tip = ""
	}
	for _, head := range v.heads {
		// An edit before it is found without a head, if the trail was not written anew.
		if head.Length == seq && head.Hash != hash && len(v.report.Findings) == 0 && v.doubtful == 0 {
			v.find(Edited, seq, seq, "this record or one before it is not the one that %s was noted for: all that follows was written anew", head.name)
		}
	}
}

func cutFor(text string) string {
	if len(text) > 80 {
		return text[:80] + "…"
	}
	return text
}

func (v *Verifier) addGap(g gap) {
	if len(v.gaps) == maxGaps {
		v.over = true
		v.find(Removed, g.from, g.to, "")
		return
	}
	v.gaps = append(v.gaps, g)
}

// fillGap says whether a record is one of those that were missing, and counts it as
// found.
func (v *Verifier) fillGap(seq int64) bool {
	at := slices.IndexFunc(v.gaps, func(g gap) bool { return g.from <= seq && seq <= g.to })
	if at < 0 {
		return false
	}
	g := v.gaps[at]
	v.gaps = slices.Delete(v.gaps, at, at+1)
	for _, left := range []gap{{g.from, seq - 1}, {seq + 1, g.to}} {
		if left.from <= left.to && len(v.gaps) < maxGaps {
			v.gaps = append(v.gaps, left)
		}
	}
	return true
}

// End returns what was found.
func (v *Verifier) End() Report {
	last := v.next - 1
	if v.doubtful != 0 {
		// No record follows that would tell.
		v.settle(v.end == nil || v.end.Length != last || v.end.Hash == v.tip)
	}
	for _, g := range v.gaps {
		v.find(Removed, g.from, g.to, "")
	}
	length, name := int64(-1), "the head"
	if v.end != nil {
		length = v.end.Length
	}
	for _, head := range v.heads {
		if head.Length > length && head.Length > last {
			length, name = head.Length, head.name
		}
	}
	switch {
	case length > last:
		v.find(Cut, last+1, length, "%s has %d records, and %d are there", name, length, last-v.start.Length)
	case v.end != nil && v.end.Length < last:
		v.find(Added, v.end.Length+1, last, "the head has %d records", v.end.Length)
	case v.end != nil && v.end.Hash != v.report.Head.Hash && len(v.report.Findings) == 0:
		v.find(Edited, last, last, "the head has another hash of it")
	}
	slices.SortStableFunc(v.report.Findings, func(a, b Finding) int { return cmp.Compare(a.Seq, b.Seq) })
	return v.report
}

// VerifyFile checks a trail that has one record in each line.
func VerifyFile(r io.Reader, v *Verifier) (Report, error) {
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		entry, err := readLine(lines)
		if len(entry.Text) > 0 || err == nil {
			v.Add(entry)
		}
		switch {
		case errors.Is(err, io.EOF):
			return v.End(), nil
		case err != nil:
			return Report{}, err
		}
	}
}

// readLine reads a line, and at most a little more than maxLine of it.
func readLine(r *bufio.Reader) (Entry, error) {
	var text []byte
	for {
		part, err := r.ReadSlice('\n')
		if room := maxLine + 1 - len(text); room > 0 {
			text = append(text, part[:min(room, len(part))]...)
		}
		switch {
		case err == nil:
			return Entry{Text: bytes.TrimSuffix(text, []byte("\n"))}, nil
		case errors.Is(err, bufio.ErrBufferFull):
		default:
			return Entry{Text: text, Unterminated: len(text) > 0}, err
		}
	}
}

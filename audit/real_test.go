package audit_test

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/audit"
)

// realTrail is that of a run whose worker was killed twice, and which was rolled back.
func realTrail(t testing.TB) (lines [][]byte, head audit.Head, run string) {
	t.Helper()
	text, err := os.ReadFile("testdata/trail.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	noted, err := os.ReadFile("testdata/trail.head")
	if err != nil {
		t.Fatal(err)
	}
	if head, err = audit.ParseHead(string(noted)); err != nil {
		t.Fatal(err)
	}
	lines = bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	first, err := audit.Decode(lines[0])
	if err != nil {
		t.Fatal(err)
	}
	return lines, head, first.Run
}

// TestRealTrailWithEveryAlteration: each byte, each range of records and each pair of
// them, in a whole trail.
func TestRealTrailWithEveryAlteration(t *testing.T) {
	t.Parallel()
	lines, head, run := realTrail(t)
	verify := func(text []byte) audit.Report {
		t.Helper()
		report, err := audit.VerifyFile(bytes.NewReader(text), audit.NewVerifier(run, audit.Start(), &head))
		if err != nil {
			t.Fatal(err)
		}
		return report
	}
	text := join(lines...)
	if report := verify(text); !report.Good() || report.Head != head {
		t.Fatalf("the whole trail: %+v", report)
	}
	found := func(what string, altered []byte, fault audit.Fault, record int) {
		t.Helper()
		if report := verify(altered); report.Good() || report.Findings[0].Fault != fault || report.Findings[0].Seq != int64(record) {
			t.Fatalf("%s: found %v, want %s at %d", what, report.Findings, fault, record)
		}
	}
	record := 1
	for at, was := range text {
		altered := slices.Clone(text)
		switch {
		case was == '\n' && record == len(lines):
			found("the last end of line", text[:at], audit.Cut, record)
		case was == '\n':
			altered[at] = ' '
			found(fmt.Sprintf("end of record %d", record), altered, audit.Edited, record)
			record++
		default:
			altered[at] = was ^ 1
			found(fmt.Sprintf("byte %d, in record %d", at, record), altered, audit.Edited, record)
			if at%7 == 0 {
				found(fmt.Sprintf("cut before byte %d, in record %d", at, record), text[:at], audit.Cut, record)
			}
		}
	}
	for from := range lines {
		for to := from + 1; to <= len(lines); to++ {
			if from == 0 && to == len(lines) {
				continue
			}
			fault := audit.Removed
			if to == len(lines) {
				fault = audit.Cut
			}
			found(fmt.Sprintf("records %d to %d removed", from+1, to), join(slices.Concat(lines[:from], lines[to:])...), fault, from+1)
			found(fmt.Sprintf("record %d again before %d", from+1, to+1), join(slices.Insert(slices.Clone(lines), to, lines[from])...), audit.Repeated, from+1)
			if to < len(lines) {
				swapped := slices.Clone(lines)
				swapped[from], swapped[to] = swapped[to], swapped[from]
				found(fmt.Sprintf("records %d and %d swapped", from+1, to+1), join(swapped...), audit.OutOfOrder, from+1)
			}
		}
	}
}

// TestDocsHaveEveryKind: the table of docs/audit.md and the constants are the same.
func TestDocsHaveEveryKind(t *testing.T) {
	t.Parallel()
	source, err := os.ReadFile("record.go")
	if err != nil {
		t.Fatal(err)
	}
	var kinds, described []string
	for _, m := range regexp.MustCompile(`(?m)^\t[A-Z][A-Za-z]+ +Kind = "([a-z-]+)"`).FindAllStringSubmatch(string(source), -1) {
		kinds = append(kinds, m[1])
	}
	docs, err := os.ReadFile("../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := bytes.Cut(docs, []byte("### Kinds of records\n"))
	table, _, _ = bytes.Cut(table, []byte("\n\nThree things"))
	for line := range bytes.Lines(table) {
		if cells := bytes.Split(line, []byte("|")); len(cells) > 3 {
			for _, m := range regexp.MustCompile("`([a-z-]+)`").FindAllSubmatch(cells[1], -1) {
				described = append(described, string(m[1]))
			}
		}
	}
	slices.Sort(kinds)
	slices.Sort(described)
	if len(kinds) < 25 || !slices.Equal(kinds, described) {
		t.Errorf("kinds are\n%q, described are\n%q", kinds, described)
	}
}

package audit_test

import (
	"bytes"
	"fmt"
	"io"
	"math/bits"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
)

const run = "6a1f7d52-8a51-4a53-9a0f-1d1a4a9b0c11"

// trail returns the lines of a trail with n records, and its head.
func trail(t testing.TB, n int) (lines [][]byte, head audit.Head) {
	t.Helper()
	exit := -9
	samples := []audit.Record{
		{Kind: audit.RunStarted, Text: "service <orchestrator> & \"co\"\n"},
		{Kind: audit.CommandStarted, Step: "patch", Attempt: 1, Start: 2, Command: &audit.Command{Number: 1, Argv: []string{"git", "apply", "ä\u2028"}, Dir: "/workspace"}},
		{Kind: audit.CommandEnded, Step: "patch", DurationMS: 12, Command: &audit.Command{Number: 1, Argv: []string{"git", "apply"}, Exit: &exit, OutputBytes: 1 << 40}},
		{Kind: audit.FileChanged, File: &audit.File{Path: "a\tb", After: &audit.Version{SHA256: strings.Repeat("a", 64), Mode: "100644"}}},
		{Kind: audit.ApprovalGranted, Approval: &audit.Approval{Approver: "ops-lead", Role: "admin", GrantedAt: time.Unix(0, 0), Digest: "d"}},
		{Kind: audit.StepEnded, Status: "succeeded", Artifacts: []audit.Artifact{{Type: "log", Path: "patch.log", SizeBytes: 0}}},
	}
	head = audit.Start()
	for i := range n {
		r := samples[i%len(samples)]
		r.ID, r.Run, r.At = fmt.Sprintf("id-%d", i), run, time.Unix(int64(i), 123456789)
		body, err := r.Body()
		if err != nil {
			t.Fatal(err)
		}
		line := audit.Join(head.Length+1, head.Hash, body)
		head = head.Next(line)
		lines = append(lines, line)
	}
	return lines, head
}

func verify(t testing.TB, text []byte, head *audit.Head) audit.Report {
	t.Helper()
	report, err := audit.VerifyFile(bytes.NewReader(text), audit.NewVerifier(run, audit.Start(), head))
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func join(lines ...[]byte) []byte { return append(bytes.Join(lines, []byte("\n")), '\n') }

// only fails the test unless there is exactly this finding.
func only(t testing.TB, report audit.Report, fault audit.Fault, from, to int64, what string) {
	t.Helper()
	if len(report.Findings) != 1 || report.Findings[0].Fault != fault || report.Findings[0].Seq != from || report.Findings[0].To != to {
		t.Fatalf("%s: found %v, want %s at %d to %d", what, report.Findings, fault, from, to)
	}
}

func TestGoodTrail(t *testing.T) {
	t.Parallel()
	for n := range 9 {
		lines, head := trail(t, n)
		text := join(lines...)
		if n == 0 {
			text = nil
		}
		report := verify(t, text, &head)
		if !report.Good() || report.Records != int64(n) || report.Head != head {
			t.Errorf("%d records: %+v, want the head %s", n, report, head)
		}
	}
	lines, _ := trail(t, 2)
	const want = `{"seq":1,"prev":"` + audit.Genesis + `","id":"id-0","at":"1970-01-01T00:00:00.123456Z","run":"` + run +
		`","kind":"run-started","text":"service <orchestrator> & \"co\"\n"}`
	if string(lines[0]) != want {
		t.Errorf("record is\n%s, want\n%s", lines[0], want)
	}
}

// Every edit of one byte is found, and named with its record, with the head in the
// database and, but for the last record, without.
func TestEverySingleByteEdit(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 3)
	text := join(lines...)
	record := 1
	for at, was := range text {
		for b := range 256 {
			if byte(b) == was {
				continue
			}
			text[at] = byte(b)
			report := verify(t, text, &head)
			if report.Good() || report.Findings[0].Seq != int64(record) {
				t.Fatalf("byte %d, of record %d, is %#x in place of %q: found %v", at, record, b, was, report.Findings)
			}
			if was != '\n' && b != '\n' && (len(report.Findings) != 1 || report.Findings[0].Fault != audit.Edited) {
				t.Fatalf("byte %d, of record %d, is %#x in place of %q: found %v, want that this record is edited and nothing else", at, record, b, was, report.Findings)
			}
			if oneBit := bits.OnesCount8(byte(b)^was) == 1; oneBit && record < len(lines) {
				if report := verify(t, text, nil); report.Good() {
					t.Fatalf("byte %d, of record %d, is %#x in place of %q: without a head nothing is found", at, record, b, was)
				}
			}
		}
		text[at] = was
		if was == '\n' {
			record++
		}
	}
}

func TestEveryRemoval(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 7)
	n := int64(len(lines))
	for from := range lines {
		for to := from; to < len(lines); to++ {
			text := join(slices.Delete(slices.Clone(lines), from, to+1)...)
			if to-from+1 == len(lines) {
				text = nil
			}
			fault := audit.Removed
			if int64(to) == n-1 {
				fault = audit.Cut
			}
			only(t, verify(t, text, &head), fault, int64(from)+1, int64(to)+1, fmt.Sprintf("records %d to %d removed", from+1, to+1))
		}
	}
}

// A file that ends anywhere is found, also within a record.
func TestEveryCutTail(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 4)
	text := join(lines...)
	for size := range text {
		report := verify(t, text[:size], &head)
		whole := int64(bytes.Count(text[:size], []byte("\n")))
		if report.Good() || report.Findings[0].Fault != audit.Cut || report.Findings[0].Seq != whole+1 {
			t.Fatalf("cut after %d bytes: found %v", size, report.Findings)
		}
	}
}

func TestEverySwapAndMove(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 6)
	for a := range lines {
		for b := a + 1; b < len(lines); b++ {
			swapped := slices.Clone(lines)
			swapped[a], swapped[b] = swapped[b], swapped[a]
			report := verify(t, join(swapped...), &head)
			// The moved records that stand after a later one are named.
			if report.Good() || report.Findings[0].Fault != audit.OutOfOrder || report.Findings[0].Seq != int64(a)+1 {
				t.Fatalf("records %d and %d swapped: found %v", a+1, b+1, report.Findings)
			}
			moved := slices.Insert(slices.Delete(slices.Clone(lines), a, a+1), b, lines[a])
			only(t, verify(t, join(moved...), &head), audit.OutOfOrder, int64(a)+1, int64(a)+1, fmt.Sprintf("record %d moved to place %d", a+1, b+1))
		}
	}
}

func TestEveryDuplicate(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 6)
	for a := range lines {
		for at := a + 1; at <= len(lines); at++ {
			text := join(slices.Insert(slices.Clone(lines), at, lines[a])...)
			only(t, verify(t, text, &head), audit.Repeated, int64(a)+1, int64(a)+1, fmt.Sprintf("record %d again at %d", a+1, at+1))
		}
		for at := range lines {
			if at == a {
				continue
			}
			replaced := slices.Clone(lines)
			replaced[at] = lines[a]
			if report := verify(t, join(replaced...), &head); report.Good() {
				t.Fatalf("record %d in the place of record %d is not found", a+1, at+1)
			}
		}
	}
}

// Who can write the file can compute hashes too. A head that was noted elsewhere shows
// it.
func TestTrailWrittenAnew(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 6)
	other := audit.Start()
	for i, line := range lines {
		r, err := audit.Decode(line)
		if err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			r.DurationMS++
		}
		body, err := r.Body()
		if err != nil {
			t.Fatal(err)
		}
		lines[i] = audit.Join(other.Length+1, other.Hash, body)
		other = other.Next(lines[i])
	}
	if report := verify(t, join(lines...), &other); !report.Good() {
		t.Fatal(report.Findings)
	}
	only(t, verify(t, join(lines...), &head), audit.Edited, 6, 6, "written anew from record 3")
	noted, _ := trail(t, 4)
	earlier := audit.Start()
	for _, line := range noted {
		earlier = earlier.Next(line)
	}
	v := audit.NewVerifier(run, audit.Start(), &other)
	v.Expect("the head of the log", earlier)
	report, err := audit.VerifyFile(bytes.NewReader(join(lines...)), v)
	if err != nil {
		t.Fatal(err)
	}
	only(t, report, audit.Edited, 4, 4, "written anew, with a head of the log")
}

// A record that was appended without its head, a foreign record, and the beginning
// that the retention has removed.
func TestOtherFaults(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 6)
	_, earlier := trail(t, 4)
	only(t, verify(t, join(lines...), &earlier), audit.Added, 5, 6, "two records too many")
	report, err := audit.VerifyFile(bytes.NewReader(join(lines[4:]...)), audit.NewVerifier(run, earlier, &head))
	if err != nil || !report.Good() || report.Records != 2 {
		t.Errorf("a trail whose beginning was removed: %+v, %v", report, err)
	}
	report, err = audit.VerifyFile(bytes.NewReader(join(lines...)), audit.NewVerifier("another", audit.Start(), &head))
	if err != nil || len(report.Findings) != 6 || report.Findings[0].Fault != audit.Edited {
		t.Errorf("the trail of another run: %v, %v", report.Findings, err)
	}
}

// The database keeps a hash beside each record. An edit of the text, of the hash, and
// of both are found at the record.
func TestEditsOfRows(t *testing.T) {
	t.Parallel()
	lines, head := trail(t, 5)
	for at := range lines {
		for _, what := range []string{"text", "hash", "both"} {
			v := audit.NewVerifier(run, audit.Start(), &head)
			prev := audit.Genesis
			for i, line := range lines {
				e := audit.Entry{Text: line, Seq: int64(i) + 1, Hash: audit.Hash(prev, line)}
				prev = e.Hash
				if i == at {
					if what != "hash" {
						e.Text = bytes.Replace(line, []byte(`"run"`), []byte(` "run"`), 1)
					}
					switch what {
					case "hash":
						e.Hash = strings.Repeat("0", 64)
					case "both":
						r, _ := audit.Decode(e.Text)
						e.Hash = audit.Hash(r.Prev, e.Text)
					}
				}
				v.Add(e)
			}
			only(t, v.End(), audit.Edited, int64(at)+1, int64(at)+1, fmt.Sprintf("%s of record %d edited", what, at+1))
		}
	}
}

func TestHeads(t *testing.T) {
	t.Parallel()
	_, head := trail(t, 3)
	if again, err := audit.ParseHead(head.String()); err != nil || again != head {
		t.Errorf("%s is read as %s, %v", head, again, err)
	}
	for _, text := range []string{"", "3", "3:", "x:" + head.Hash, "-1:" + head.Hash, "3:" + head.Hash[1:], "3:" + head.Hash + "0"} {
		if _, err := audit.ParseHead(text); err == nil {
			t.Errorf("%q is read as a head", text)
		}
	}
}

func TestRedaction(t *testing.T) {
	t.Parallel()
	redact := func(text string) string {
		text = strings.ReplaceAll(text, "s3cret", "[REDACTED]")
		if before, _, found := strings.Cut(text, "--password "); found {
			return before + "--password [REDACTED]"
		}
		return text
	}
	argv := []string{"tool", "--password", "hunter2", "s3cret-url"}
	r := audit.Record{Kind: audit.CommandStarted, Run: run, By: "s3cret", Text: "is s3cret", Command: &audit.Command{Argv: argv, Dir: "/s3cret", Ended: "s3cret"},
		File: &audit.File{Path: "s3cret.txt"}, Approval: &audit.Approval{Approver: "s3cret"}, Image: &audit.Image{Name: "s3cret", Digests: []string{"s3cret@x"}},
		Artifacts: []audit.Artifact{{Path: "s3cret.log"}}, Rule: &audit.Rule{Name: "s3cret", Limit: "s3cret"}, Container: &audit.Container{Service: "s3cret"}}
	r.Redact(redact)
	body, err := r.Body()
	if err != nil || bytes.Contains(body, []byte("s3cret")) || bytes.Contains(body, []byte("hunter2")) {
		t.Errorf("record is %s, %v", body, err)
	}
	if argv[2] != "hunter2" || argv[3] != "s3cret-url" {
		t.Error("the caller's arguments are altered")
	}
	long := audit.Record{Kind: audit.CommandStarted, Run: run, Text: strings.Repeat("ä", 1<<20), Command: &audit.Command{Argv: slices.Repeat([]string{strings.Repeat("x", 9000)}, 100)}}
	long.Redact(nil)
	if body, err = long.Body(); err != nil || len(body) > 100<<10 || !bytes.Contains(body, []byte("bytes in all")) || !bytes.Contains(body, []byte("more arguments")) {
		t.Errorf("a long record has %d bytes, %v", len(body), err)
	}
}

// endless has n good records, made while they are read.
type endless struct {
	left int
	head audit.Head
	rest []byte
}

func (e *endless) Read(p []byte) (int, error) {
	if len(e.rest) == 0 {
		if e.left == 0 {
			return 0, io.EOF
		}
		e.left--
		body := fmt.Appendf(nil, `"id":"%d","at":"2026-01-01T00:00:00.000000Z","run":"%s","kind":"step-ended"}`, e.left, run)
		line := audit.Join(e.head.Length+1, e.head.Hash, body)
		e.head = e.head.Next(line)
		e.rest = append(line, '\n')
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	return n, nil
}

func TestMemoryDoesNotGrow(t *testing.T) {
	size := func(n int) uint64 {
		source := &endless{left: n, head: audit.Start()}
		v := audit.NewVerifier(run, audit.Start(), nil)
		report, err := audit.VerifyFile(source, v)
		if err != nil || !report.Good() || report.Head != source.head {
			t.Fatalf("%+v, %v", report, err)
		}
		runtime.GC()
		var after runtime.MemStats
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(v)
		return after.HeapAlloc
	}
	few, many := size(100), size(50_000)
	if many > few+256<<10 {
		t.Errorf("after 100 records %d bytes are in use, after 50000 %d", few, many)
	}
}

// Whatever the bytes are, Verify ends without a panic and has few findings; and only the
// trail itself is good.
func FuzzVerify(f *testing.F) {
	lines, head := trail(f, 6)
	text := join(lines...)
	f.Add(text)
	f.Add(join(lines[3], lines[0], lines[0], lines[5]))
	f.Add(bytes.ReplaceAll(text, []byte("\n"), nil))
	f.Add([]byte("{\"seq\":9223372036854775807,\"kind\":\"x\"}\n{\"seq\":1,\"kind\":\"x\"}\n"))
	f.Add([]byte("\n\n{}\n[]"))
	f.Fuzz(func(t *testing.T, given []byte) {
		report := verify(t, given, &head)
		if len(report.Findings) > 25 {
			t.Errorf("%d findings", len(report.Findings))
		}
		if report.Good() != bytes.Equal(given, text) {
			t.Errorf("good is %v for\n%s", report.Good(), given)
		}
	})
}

// A summary says what a record has in one text, without a word twice.
func TestSummary(t *testing.T) {
	t.Parallel()
	exit, signal := 1, -9
	at := time.Date(2026, 11, 27, 14, 15, 51, 0, time.UTC)
	for _, test := range []struct {
		record audit.Record
		want   string
	}{
		{audit.Record{Kind: audit.StepStarted, Worker: "w", Text: "worker v has left the step unfinished"}, "on worker w: worker v has left the step unfinished"},
		{audit.Record{Kind: audit.CommandStarted, Command: &audit.Command{Argv: []string{"git", "status"}}}, "git status"},
		{audit.Record{Kind: audit.CommandEnded, DurationMS: 1500, Command: &audit.Command{Argv: []string{"git"}, Exit: &exit, OutputBytes: 17}}, "git (exit 1, 17 bytes, 1.5s)"},
		{audit.Record{Kind: audit.CommandEnded, Command: &audit.Command{Argv: []string{"git"}, Exit: &signal, Found: true}}, "git (signal 9, found by a later worker)"},
		{audit.Record{Kind: audit.CommandEnded, Command: &audit.Command{Argv: []string{"git"}, Ended: "it was ended"}}, "git (it was ended)"},
		{audit.Record{Kind: audit.FileChanged, File: &audit.File{Path: "a", After: &audit.Version{Mode: "100644", SHA256: strings.Repeat("ab", 32)}}}, "a: none -> 100644 abababababab"},
		{audit.Record{Kind: audit.ImageBuilt, Image: &audit.Image{Name: "web", Before: "sha256:aaaaaaaaaaaabb", After: "sha256:b"}}, "web: sha256:aaaaaaaaaaaa -> sha256:b"},
		{audit.Record{Kind: audit.ContainerReplaced, Container: &audit.Container{Service: "web", Before: "c1", ImageBefore: "i1"}}, "service web, container c1 (i1) -> none (none)"},
		{audit.Record{Kind: audit.ContainerChanging, Container: &audit.Container{Service: "web"}, Text: "tag it"}, "service web: tag it"},
		{audit.Record{Kind: audit.ApprovalGiven, By: "ann", Approval: &audit.Approval{Approver: "ann", Role: "sre", ExpiresAt: at}}, "by ann (sre), until 2026-11-27T14:15:51Z"},
		{audit.Record{Kind: audit.LimitReached, Rule: &audit.Rule{Name: "limits.build.idle", Limit: "10m"}, Text: "no output for 10m"}, "limits.build.idle 10m: no output for 10m"},
		{audit.Record{Kind: audit.Revoked, By: "ann", Text: "wrong branch"}, "by ann: wrong branch"},
		{audit.Record{Kind: audit.StepEnded, Status: "failed", DurationMS: 326, Text: "no"}, "failed, after 326ms: no"},
	} {
		if got := test.record.Summary(); got != test.want {
			t.Errorf("%s: %q, want %q", test.record.Kind, got, test.want)
		}
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/audit"
)

// tampered is a trail of a real run that was killed and rolled back, in the database and
// in a file, for somebody who may do anything with both.
type tampered struct {
	testEnv
	t         *testing.T
	pool      *pgxpool.Pool
	run, head string
	lines     [][]byte
	copy      string
}

func newTampered(t *testing.T) *tampered {
	t.Helper()
	s := &tampered{testEnv: newTestEnv(t), t: t, copy: filepath.Join(t.TempDir(), "copy.jsonl")}
	pool, err := pgxpool.New(t.Context(), s.database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	s.pool = pool
	text, err := os.ReadFile("../../audit/testdata/trail.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	head, err := os.ReadFile("../../audit/testdata/trail.head")
	if err != nil {
		t.Fatal(err)
	}
	s.head = strings.TrimSpace(string(head))
	s.lines = bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n"))
	first, err := audit.Decode(s.lines[0])
	if err != nil {
		t.Fatal(err)
	}
	s.run = first.Run
	s.sql(`ALTER TABLE mm_orchestrator.audit DISABLE TRIGGER USER`)
	s.sql(`ALTER TABLE mm_orchestrator.audit_heads DISABLE TRIGGER USER`)
	parsed, err := audit.ParseHead(s.head)
	if err != nil {
		t.Fatal(err)
	}
	s.sql(`INSERT INTO mm_orchestrator.audit_heads (run_id, length, head) VALUES ($1, $2, $3)`, s.run, parsed.Length, parsed.Hash)
	s.store()
	return s
}

func (s *tampered) sql(query string, args ...any) {
	s.t.Helper()
	if _, err := s.pool.Exec(s.t.Context(), query, args...); err != nil {
		s.t.Fatal(err)
	}
}

// store makes the trail in the database whole again.
func (s *tampered) store() {
	s.t.Helper()
	s.sql(`DELETE FROM mm_orchestrator.audit`)
	at := audit.Start()
	var seqs []int64
	var ids, records, hashes []string
	for _, line := range s.lines {
		r, err := audit.Decode(line)
		if err != nil {
			s.t.Fatal(err)
		}
		at = at.Next(line)
		seqs, ids, records, hashes = append(seqs, at.Length), append(ids, r.ID), append(records, string(line)), append(hashes, at.Hash)
	}
	if at.String() != s.head {
		s.t.Fatalf("the head is %s, want %s", at, s.head)
	}
	s.sql(`INSERT INTO mm_orchestrator.audit (run_id, seq, id, record, hash) SELECT $1, * FROM unnest($2::bigint[], $3::text[], $4::text[], $5::text[])`, s.run, seqs, ids, records, hashes)
}

// verify runs `audit verify` for the run and returns the exit code and the faults.
func (s *tampered) verify(args ...string) (int, []verifyFinding) {
	s.t.Helper()
	p := start(s.t, s.env(), append([]string{"audit", "verify", s.run, "--json"}, args...)...)
	code := p.exit()
	var report verifyReport
	if err := json.Unmarshal([]byte(p.stdout.String()), &report); err != nil {
		s.t.Fatalf("%v: %s%s", err, p.stdout.String(), p.stderr.String())
	}
	if report.Good != (code == exitOK) || code != exitOK && !strings.Contains(p.stderr.String(), "  record") {
		s.t.Errorf("exit code %d, report %+v, says %s", code, report, p.stderr.String())
	}
	return code, report.Faults
}

// found fails the test unless verify finds this fault first.
func (s *tampered) found(what string, fault audit.Fault, record int, args ...string) {
	s.t.Helper()
	code, faults := s.verify(args...)
	if code != exitFailure || len(faults) == 0 || faults[0].Fault != string(fault) || faults[0].Record != int64(record) {
		s.t.Errorf("%s: exit code %d, found %+v, want %s at %d", what, code, faults, fault, record)
	}
}

// write writes a copy and returns the arguments that check it.
func (s *tampered) write(lines ...[]byte) []string {
	s.t.Helper()
	if err := os.WriteFile(s.copy, append(bytes.Join(lines, []byte("\n")), '\n'), 0o644); err != nil {
		s.t.Fatal(err)
	}
	return []string{"--copy", s.copy}
}

// edited is a line with one byte replaced, by another letter or digit where it can be,
// so that it stays JSON.
func edited(line []byte, at int) []byte {
	line = slices.Clone(line)
	if line[at] == '7' {
		line[at] = '8'
	} else {
		line[at] = '7'
	}
	return line
}

// TestTamperedTrail: whoever can write to the database and to the copies alters a real
// trail, in each way at each record. The command finds it and names the record.
func TestTamperedTrail(t *testing.T) {
	t.Parallel()
	s := newTampered(t)
	if code, faults := s.verify(); code != exitOK {
		t.Fatalf("the whole trail: %+v", faults)
	}
	if code, faults := s.verify(append(s.write(s.lines...), "--head", s.head)...); code != exitOK {
		t.Fatalf("the whole copy: %+v", faults)
	}
	n := len(s.lines)
	for i, line := range s.lines {
		record := i + 1
		at := (i*37 + len(line)/2) % len(line) // somewhere in it
		change := func(what string, fault audit.Fault, want int, lines ...[]byte) {
			t.Helper()
			copied := s.write(lines...)
			s.found("copy: "+what, fault, want, copied...)
			s.found("copy with a head: "+what, fault, want, append(copied, "--head", s.head)...)
		}
		with := func(line []byte) [][]byte { return slices.Concat(s.lines[:i], [][]byte{line}, s.lines[record:]) }
		change(fmt.Sprintf("byte %d of record %d edited", at, record), audit.Edited, record, with(edited(line, at))...)
		removed := audit.Removed
		if record == n {
			removed = audit.Cut
		}
		change(fmt.Sprintf("record %d removed", record), removed, record, slices.Concat(s.lines[:i], s.lines[record:])...)
		if i > 0 {
			change(fmt.Sprintf("cut before record %d", record), audit.Cut, record, s.lines[:i]...)
		}
		change(fmt.Sprintf("record %d again at the end", record), audit.Repeated, record, slices.Concat(s.lines, [][]byte{line})...)
		if record < n {
			swapped := slices.Clone(s.lines)
			swapped[i], swapped[record] = swapped[record], swapped[i]
			change(fmt.Sprintf("records %d and %d swapped", record, record+1), audit.OutOfOrder, record, swapped...)
		}

		// The same in the database.
		s.sql(`UPDATE mm_orchestrator.audit SET record = $2 WHERE seq = $1`, record, string(edited(line, at)))
		s.found(fmt.Sprintf("row %d edited", record), audit.Edited, record)
		s.sql(`DELETE FROM mm_orchestrator.audit WHERE seq = $1`, record)
		s.found(fmt.Sprintf("row %d removed", record), removed, record)
		s.sql(`DELETE FROM mm_orchestrator.audit WHERE seq > $1`, record)
		s.found(fmt.Sprintf("rows from %d on removed", record), audit.Cut, record)
		s.store()
		if record < n {
			s.sql(`UPDATE mm_orchestrator.audit SET seq = 100000 - seq WHERE seq IN ($1::bigint, $1::bigint + 1)`, record)
			s.sql(`UPDATE mm_orchestrator.audit SET seq = CASE seq WHEN 100000 - $1::bigint THEN $1::bigint + 1 ELSE $1::bigint END WHERE seq > 90000`, record)
			if code, faults := s.verify(); code != exitFailure || faults[0].Record > int64(record+1) {
				t.Errorf("rows %d and %d swapped: %+v", record, record+1, faults)
			}
			s.store()
		}
	}
}

// TestRewrittenTrail: whoever writes a whole trail anew, with its hashes and its head, is
// found by a head from elsewhere, and by nothing else.
func TestRewrittenTrail(t *testing.T) {
	t.Parallel()
	s := newTampered(t)
	old := s.head
	lines := slices.Clone(s.lines)
	at := audit.Start()
	for i, line := range s.lines {
		r, err := audit.Decode(line)
		if err != nil {
			t.Fatal(err)
		}
		if i == 4 {
			r.Command.Argv = []string{"true"}
		}
		body, err := r.Body()
		if err != nil {
			t.Fatal(err)
		}
		lines[i] = audit.Join(r.Seq, at.Hash, body)
		at = at.Next(lines[i])
	}
	s.lines, s.head = lines, at.String()
	s.sql(`UPDATE mm_orchestrator.audit_heads SET head = $1`, at.Hash)
	s.store()
	if code, faults := s.verify(); code != exitOK {
		t.Errorf("without a head: %+v", faults)
	}
	s.found("with the head of the log", audit.Edited, 41, "--head", old)
	copied := s.write(lines...)
	s.found("the copy, with the head of the log", audit.Edited, 41, append(copied, "--head", old)...)
	// The head of an earlier step's end is enough.
	early := audit.Start()
	original, err := os.ReadFile("../../audit/testdata/trail.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(original) {
		if early = early.Next(bytes.TrimSuffix(line, []byte("\n"))); early.Length == 14 {
			break
		}
	}
	s.found("with an early head", audit.Edited, 14, "--head", early.String())
}

// TestRemovedTrailAndItsCopy: what the retention has removed can be checked in a copy.
func TestRemovedTrailAndItsCopy(t *testing.T) {
	t.Parallel()
	s := newTampered(t)
	s.sql(`DELETE FROM mm_orchestrator.audit`)
	s.sql(`UPDATE mm_orchestrator.audit_heads SET removed_length = length, removed_head = head, removed_at = now()`)
	if code, faults := s.verify(); code != exitOK {
		t.Errorf("the database: %+v", faults)
	}
	if code, faults := s.verify(s.write(s.lines...)...); code != exitOK {
		t.Errorf("the copy: %+v", faults)
	}
	s.found("the cut copy", audit.Cut, 41, s.write(s.lines[:40]...)...)
	s.found("the edited copy", audit.Edited, 9, s.write(slices.Concat(s.lines[:8], [][]byte{edited(s.lines[8], 120)}, s.lines[9:])...)...)
	p := start(t, s.env(), "audit", "show", s.run)
	if p.exit() != exitOK || !strings.Contains(p.stdout.String(), "records 1 to 41 were removed at 2") {
		t.Errorf("show: %s%s", p.stdout.String(), p.stderr.String())
	}
}

// docsScript is a shell script of docs/audit.md that has this line.
func docsScript(t *testing.T, line string) string {
	t.Helper()
	text, err := os.ReadFile("../../docs/audit.md")
	if err != nil {
		t.Fatal(err)
	}
	for i, block := range strings.Split(string(text), "```") {
		if i%2 == 1 && strings.Contains(block, line) {
			return block
		}
	}
	t.Fatalf("docs/audit.md has no script with %q", line)
	return ""
}

// TestDocsCheckWithoutThisProgram: the shell script of docs/audit.md prints the head, and
// a line for each record that does not fit.
func TestDocsCheckWithoutThisProgram(t *testing.T) {
	t.Parallel()
	script := docsScript(t, "done < audit.jsonl")
	text, err := os.ReadFile("../../audit/testdata/trail.jsonl")
	if err != nil {
		t.Fatal(err)
	}
	head, err := os.ReadFile("../../audit/testdata/trail.head")
	if err != nil {
		t.Fatal(err)
	}
	check := func(text []byte) string {
		t.Helper()
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "audit.jsonl"), text, 0o644); err != nil {
			t.Fatal(err)
		}
		shell := exec.Command("sh", "-ec", script)
		shell.Dir = dir
		out, err := shell.CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return string(out)
	}
	if got := check(text); got != string(head) {
		t.Errorf("it prints %q, want %q", got, head)
	}
	lines := bytes.SplitAfter(text, []byte("\n"))
	for name, altered := range map[string][][]byte{
		"edited":  slices.Concat(lines[:8], [][]byte{edited(lines[8], 200)}, lines[9:]),
		"removed": slices.Concat(lines[:8], lines[9:]),
		"swapped": slices.Concat(lines[:8], [][]byte{lines[9], lines[8]}, lines[10:]),
		"again":   slices.Concat(lines[:9], lines[8:]),
	} {
		if got := check(bytes.Join(altered, nil)); !strings.Contains(got, "is broken\n") {
			t.Errorf("%s: it prints %q", name, got)
		}
	}
	if got := check(bytes.Join(lines[:40], nil)); got == string(head) || strings.Contains(got, "broken") {
		t.Errorf("cut: it prints %q", got)
	}
}

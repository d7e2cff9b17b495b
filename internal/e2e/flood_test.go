package e2e

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// A build may print any amount of text, and may print secrets. The worker's
// memory must not grow with the log, and no file, row or log line may contain
// any form of a secret.
func TestLargeOutputWithSecretsNeitherFillsMemoryNorLeaksSecrets(t *testing.T) {
	t.Parallel()
	const limitKiB = 64 << 10
	var vectors struct {
		Scrubbing []struct {
			Secrets  []string `json:"secrets"`
			Variants []string `json:"variants_longest_first"`
		} `json:"scrubbing"`
	}
	readJSON(t, "testdata/redaction_vectors.json", &vectors)
	var environment, names, forms []string
	for _, vector := range vectors.Scrubbing {
		for _, secret := range vector.Secrets {
			// Shorter secrets also occur in ordinary words and ids, so the test
			// cannot require that they are absent.
			if len(secret) >= 6 {
				name := fmt.Sprintf("SERVICE_%d_TOKEN", len(names))
				names = append(names, name)
				environment = append(environment, name+"="+secret)
			}
		}
		for _, form := range vector.Variants {
			if len(form) >= 6 {
				forms = append(forms, form)
			}
		}
	}
	if len(names) < 4 || len(forms) < 8 {
		t.Fatalf("the vectors give %d secrets and %d forms: too few to prove anything", len(names), len(forms))
	}
	s := newStack(t, stackConfig{Environment: environment})
	for _, c := range []struct {
		code       int
		status     string
		print, log int64
	}{
		// Redaction makes the log shorter than the output.
		{0, "succeeded", 384 << 20, 256 << 20},
		// After a failure the message quotes the output too.
		{1, "rolled_back", 48 << 20, 32 << 20},
	} {
		command := append([]string{"flood", strconv.FormatInt(c.print, 10), strconv.Itoa(c.code)}, names...)
		run := s.submit(newest, append(s.withoutDocker(), set("build.command", command))...)
		if row := s.awaitRun(run.RunID); row["status"] != c.status {
			t.Errorf("the run is %s, want %s", row["status"], c.status)
		}
		path := filepath.Join(s.artifacts, run.RunID, "build.log")
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() < c.log {
			t.Errorf("build.log has %d bytes, want at least %d", info.Size(), c.log)
		}
		peak := s.peakMemory()
		t.Logf("log of %d MiB, the worker's peak is %d MiB", info.Size()>>20, peak>>10)
		if peak >= limitKiB {
			t.Errorf("the worker's memory reached %d KiB, the limit is %d", peak, limitKiB)
		}
		for name, text := range s.files(run.RunID) {
			requireAbsent(t, "artifact "+name, []byte(text), forms)
		}
	}
	s.requireAbsentFromRows(forms)
	s.requireEmptyQueue()
	requireAbsent(t, "the worker's log", []byte(s.worker.log()), forms)
}

// peakMemory returns the worker's peak resident memory, in KiB.
func (s *stack) peakMemory() int {
	s.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.worker.command.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			peak, err := strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(value), "kB")))
			if err != nil {
				s.t.Fatal(err)
			}
			return peak
		}
	}
	s.t.Fatal("no VmHWM in the process's status")
	return 0
}

func requireAbsent(t *testing.T, where string, text []byte, forms []string) {
	t.Helper()
	for _, form := range forms {
		if at := bytes.Index(text, []byte(form)); at >= 0 {
			t.Errorf("%s contains %q: …%q", where, form, text[max(0, at-40):min(len(text), at+40)])
		}
	}
}

// requireAbsentFromRows checks every table, ours and the shared ones.
func (s *stack) requireAbsentFromRows(forms []string) {
	s.t.Helper()
	var hidden []string
	for _, form := range forms {
		hidden = append(hidden, form, hex.EncodeToString([]byte(form))) // bytea shows as hex
	}
	tables := s.mustRows(`SELECT jsonb_build_object('name', format('%I.%I', table_schema, table_name))
		FROM information_schema.tables WHERE table_schema NOT IN ('pg_catalog', 'information_schema')`)
	for _, table := range tables {
		name := table["name"].(string)
		rows, err := s.conn.Query(s.t.Context(), `SELECT t::text FROM `+name+` t`)
		if err != nil {
			s.t.Fatal(err)
		}
		texts, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			s.t.Fatal(err)
		}
		for _, text := range texts {
			requireAbsent(s.t, "table "+name, []byte(text), hidden)
		}
	}
}

package store_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

func TestParseIDPrefix(t *testing.T) {
	t.Parallel()
	const id = "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11"
	for text, want := range map[string]string{
		id:                                       id,
		strings.ToUpper(id):                      id,
		"urn:uuid:" + id:                         id,
		"URN:UUID:" + id:                         id,
		"{" + id + "}":                           id,
		"urn:uuid:{" + strings.ToUpper(id) + "}": id,
		" " + id + "\n":                          id,
		strings.ReplaceAll(id, "-", ""):          id,
		"6f1c":                                   "6f1c",
		"6F1C2F0E":                               "6f1c2f0e",
		"6f1c2f0e-":                              "6f1c2f0e",
		"6f1c2f0e-8":                             "6f1c2f0e-8",
		"6f1c2f0e8a":                             "6f1c2f0e-8a",
		"{6f1c2f0e":                              "6f1c2f0e",
		"urn:uuid:6f1c":                          "6f1c",
	} {
		if got, err := store.ParseIDPrefix(text); err != nil || got.String() != want {
			t.Errorf("%q: got %q, %v, want %q", text, got, err, want)
		}
	}
	for _, text := range []string{
		"", "6f1", "-", "----", "x", "latest", "not-an-id", "--json", "6f-1c", "6f1c-2f0e", "6f1c2f0e--8a5b", "-6f1c2f0e", "6f1c2f0e 8a5b",
		id + "0", id + "-", id + "x", "6f1c2f0e8a5b4f2e9f630d6c0c6e5a110", "6f1c%", "6f1c'", "\x00\x00\x00\x00", "６f1c", strings.Repeat("a", 1<<20),
	} {
		if got, err := store.ParseIDPrefix(text); !errors.Is(err, store.ErrInvalid) || len(err.Error()) > 500 {
			t.Errorf("%.80q: got %q, %.80v", text, got, err)
		}
	}
}

func TestListRunsByID(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	ids := []string{
		"6f1c0000-0000-4000-8000-000000000000", "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11", "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a12",
		"6f1cffff-ffff-4fff-bfff-ffffffffffff", "6f1d0000-0000-4000-8000-000000000000",
	}
	for _, id := range ids {
		d.Create(t, storetest.Seed{ID: id})
	}
	for _, tt := range []struct {
		prefix string
		limit  int
		want   []string
	}{
		{"6f1c", 10, ids[:4]},
		{"6f1c", 2, ids[:2]},
		{"6f1c2", 10, ids[1:3]},
		{"6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a1", 10, ids[1:3]},
		{"6F1C2F0E8A5B4F2E9F630D6C0C6E5A11", 10, ids[1:2]},
		{"6f1d", 10, ids[4:]},
		{"6f1e", 10, nil},
	} {
		prefix, err := store.ParseIDPrefix(tt.prefix)
		if err != nil {
			t.Fatal(err)
		}
		runs, err := s.ListRunsByID(t.Context(), prefix, tt.limit)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, run := range runs {
			got = append(got, run.ID)
		}
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("%s: got %s, want %s", tt.prefix, got, tt.want)
		}
	}
	if _, err := s.ListRunsByID(t.Context(), store.IDPrefix{}, 10); !errors.Is(err, store.ErrInvalid) {
		t.Errorf("no id: %v", err)
	}

	// The planner may use the primary key; with so few rows it would not.
	tx, err := d.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(t.Context()) }()
	if _, err := tx.Exec(t.Context(), `SET LOCAL enable_seqscan TO off; SET LOCAL enable_bitmapscan TO off`); err != nil {
		t.Fatal(err)
	}
	rows, err := tx.Query(t.Context(), "EXPLAIN "+store.SelectRunsByID, ids[1], ids[2], 10)
	if err != nil {
		t.Fatal(err)
	}
	plan, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if text := strings.Join(plan, "\n"); err != nil || !strings.Contains(text, "Index Cond: ((id >= ") {
		t.Errorf("no index is used: %v\n%s", err, text)
	}
}

package moonmind_test

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// The run's row of a test is that of MoonMind's API, before and after an approval, as
// this package writes it and as storetest does. The rows in store/testdata are MoonMind's.
func TestGatedRunsHaveTheRowsOfTheAPI(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../store/testdata/orchestrator_run_rows.json")
	if err != nil {
		t.Fatal(err)
	}
	var rows map[string]storetest.Row
	if err := json.Unmarshal(text, &rows); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		create  func(t *testing.T, db *storetest.Database) string
		approve func(t *testing.T, db *storetest.Database, run string)
	}{
		"this package": {
			create: func(t *testing.T, db *storetest.Database) string {
				t.Helper()
				run := moonmind.Run{ID: moonmind.NewID(), Queue: "q", Plan: storetest.Plan(t, nil), ArtifactRoot: "/x"}
				if err := moonmind.SetGate(t.Context(), db.Pool, "pre-run"); err != nil {
					t.Fatal(err)
				}
				if _, err := moonmind.Create(t.Context(), db.Pool, run); err != nil {
					t.Fatal(err)
				}
				return run.ID
			},
			approve: func(t *testing.T, db *storetest.Database, run string) {
				t.Helper()
				if err := moonmind.Approve(t.Context(), db.Pool, run); err != nil {
					t.Fatal(err)
				}
				if err := moonmind.Approve(t.Context(), db.Pool, run); err == nil {
					t.Error("a run that does not wait was approved again")
				}
			},
		},
		"storetest": {
			create: func(t *testing.T, db *storetest.Database) string {
				t.Helper()
				return db.Create(t, storetest.Seed{Gate: true})
			},
			approve: func(t *testing.T, db *storetest.Database, run string) { t.Helper(); db.Approve(t, run) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			db := storetest.New(t)
			run := c.create(t, db)
			compare(t, db.Run(t, run), rows["awaiting_approval"])
			c.approve(t, db, run)
			compare(t, db.Run(t, run), rows["approved_and_queued"])
		})
	}
}

// compare compares two rows without what differs from run to run: ids, times, texts of
// the run. It compares which of them there are, and their form.
func compare(t *testing.T, got, want storetest.Row) {
	t.Helper()
	forms := []struct{ pattern, form string }{
		{`"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"`, `"ID"`},
		{`"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)"`, `"TIME"`},
	}
	form := func(row storetest.Row) map[string]string {
		columns := map[string]string{}
		for column, value := range row {
			text, err := json.Marshal(value)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range forms {
				text = regexp.MustCompile(f.pattern).ReplaceAll(text, []byte(f.form))
			}
			columns[column] = string(text)
		}
		for _, differs := range []string{"instruction", "artifact_root", "queued_at", "id"} {
			delete(columns, differs)
		}
		if token, is := row["approval_token"].(string); is {
			var raw []byte
			if _, err := fmt.Sscanf(token, `\x%x`, &raw); err == nil {
				token = string(raw)
			}
			columns["approval_token"] = token
		}
		return columns
	}
	have, need := form(got), form(want)
	for column, value := range need {
		if have[column] != value {
			t.Errorf("column %s is %s, and of MoonMind %s", column, have[column], value)
		}
	}
	for column := range have {
		if _, known := need[column]; !known {
			t.Errorf("column %s is none of MoonMind's", column)
		}
	}
}

package postgres_test

import (
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

// In a database with a time zone of its own, rows are as Python's: AsyncResult gives the
// same clock for both, both cleanups remove what is old and nothing else, and Load gives the
// moment, whoever has written the row. The zones have no daylight saving time.
func TestDatesInADatabaseWithATimeZone(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ celery, driver, zone string }{
		{"5.4.0", "psycopg2", "Asia/Tokyo"}, {"5.4.0", "psycopg", "America/Phoenix"},
		{"5.7.0", "psycopg2", "America/Phoenix"}, {"5.7.0", "psycopg", "Asia/Tokyo"},
	} {
		t.Run(c.celery+" "+c.zone, func(t *testing.T) {
			t.Parallel()
			database := devenv.Database(t)
			execute(t, database, `DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET timezone TO %L', current_database(), '`+c.zone+`'); END $$`)
			zone, err := time.LoadLocation(c.zone)
			if err != nil {
				t.Fatal(err)
			}
			b := open(t, postgres.Config{URL: database})
			now := time.Now().UTC().Truncate(time.Microsecond)
			at := map[string]time.Time{"one": now.Add(-30 * time.Minute), "two": now.Add(-31 * time.Minute), "three": now.Add(-32 * time.Minute), "old": now.Add(-90 * time.Minute)}
			ended := func(id string) results.Outcome {
				o := outcome(id, "3")
				o.DateDone = at[id]
				return o
			}
			for _, all := range [][]results.Outcome{{ended("one")}, {ended("old")}, {ended("two"), ended("three")}} {
				if written, err := b.Store(t.Context(), all...); err != nil || !written[0] {
					t.Fatal(written, err)
				}
			}

			dates := datesInPython(t, c.celery, strings.Replace(database, "postgres://", "db+postgresql+"+c.driver+"://", 1), "python", "one", "two", "three", "old")
			if dates["old"] != nil {
				t.Errorf("Python has kept a result that is 90 min old: %s", *dates["old"])
			}
			for _, id := range []string{"one", "two", "three"} {
				if want := at[id].In(zone).Format(clock); dates[id] == nil {
					t.Errorf("Python has removed %s, which is 30 min old", id)
				} else if got := parse(t, *dates[id]).Format(clock); got != want {
					t.Errorf("%s: AsyncResult.date_done is %s, want %s", id, got, want)
				}
			}
			// Python's own row has the clock of the zone too.
			ofPython := parse(t, *dates["python"])
			at["python"] = time.Date(ofPython.Year(), ofPython.Month(), ofPython.Day(), ofPython.Hour(), ofPython.Minute(), ofPython.Second(), ofPython.Nanosecond(), zone).UTC()
			if at["python"].Before(now) || at["python"].After(time.Now()) {
				t.Errorf("Python's row of now is of %s", at["python"])
			}

			for _, mode := range []string{"cache_statement", "exec", "simple_protocol"} {
				reader := open(t, postgres.Config{URL: database + "?default_query_exec_mode=" + mode})
				found, err := reader.Load(t.Context(), "python", "one", "two", "three")
				if err != nil {
					t.Fatal(err)
				}
				for _, o := range found {
					if !o.DateDone.Equal(at[o.TaskID]) {
						t.Errorf("%s: %s ended at %s, want %s", mode, o.TaskID, o.DateDone, at[o.TaskID])
					}
				}
			}

			execute(t, database, `UPDATE celery_taskmeta SET date_done = date_done - interval '90 min' WHERE task_id = 'two'`,
				`INSERT INTO celery_taskmeta (id, task_id, status, date_done) SELECT 1000, 'old of python', 'SUCCESS', date_done - interval '90 min' FROM celery_taskmeta WHERE task_id = 'python'`)
			if n, err := b.Cleanup(t.Context(), time.Hour); n != 2 || err != nil {
				t.Errorf("Cleanup has removed %d, %v", n, err)
			}
			left, err := b.Load(t.Context(), "python", "one", "three")
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range left {
				if o.State != "SUCCESS" {
					t.Errorf("Cleanup has removed %s", o.TaskID)
				}
			}
		})
	}
}

// A session with another time zone than the database's, as options in the URL give it, has
// the same zone for what it writes, reads and removes.
func TestDatesInASessionWithATimeZone(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	b := open(t, postgres.Config{URL: database + "?timezone=Asia/Tokyo"})
	want := outcome("a", "1")
	if _, err := b.Store(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	got, err := b.Load(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, []results.Outcome{want})
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var stored string
	if err := conn.QueryRow(t.Context(), `SELECT date_done::text FROM celery_taskmeta`).Scan(&stored); err != nil || stored != "2026-11-22 23:35:40.590168" {
		t.Errorf("stored %s, %v", stored, err)
	}
}

// clock is a time without a zone, as Python prints it.
const clock = "2006-01-02T15:04:05.000000"

func parse(t *testing.T, text string) time.Time {
	t.Helper()
	at, err := time.Parse("2006-01-02T15:04:05.999999", text)
	if err != nil {
		t.Fatal(err)
	}
	return at
}

// datesInPython runs testdata/dates.py.
func datesInPython(t *testing.T, version, backend string, ids ...string) map[string]*string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), devenv.Celery(t, version), append([]string{"testdata/dates.py", backend}, ids...)...).Output()
	if err != nil {
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			t.Fatalf("%v\n%s", err, exit.Stderr)
		}
		t.Fatal(err)
	}
	var dates map[string]*string
	if err := json.Unmarshal(out, &dates); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return dates
}

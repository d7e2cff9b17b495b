package postgres_test

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func open(t testing.TB, config postgres.Config) *postgres.Backend {
	t.Helper()
	b, err := postgres.OpenConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

func execute(t testing.TB, database string, statements ...string) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, statement := range statements {
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
}

func outcome(id, value string) results.Outcome {
	retries := 2
	return results.Outcome{
		TaskID: id, State: protocol.StateSuccess, Value: json.RawMessage(value), DateDone: time.Date(2026, 11, 22, 14, 35, 40, 590168000, time.UTC),
		HasRequest: true, Task: "shop.add", Args: json.RawMessage(`[2, 3]`), Kwargs: json.RawMessage(`{}`), Worker: "w@h", Queue: "shop", Retries: &retries,
		Children: json.RawMessage(`[[["c", null], null]]`), Stamps: json.RawMessage(`{"stamped_headers": ["t"], "stamps": {"t": 1}}`),
	}
}

// A program that has only a Celery URL stores and reads in an empty database.
func TestOpenNeedsOnlyCelerysURL(t *testing.T) {
	t.Parallel()
	database := strings.Replace(devenv.Database(t), "postgres://", "db+postgresql+psycopg2://", 1)
	b, err := postgres.Open(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	failure := protocol.NewException("shop.errors", "OutOfStock", "é", "B")
	failed := outcome("failed", "")
	failed.State, failed.Value, failed.Exception, failed.Traceback = protocol.StateFailure, nil, &failure, "Traceback …"
	want := []results.Outcome{outcome("ok", `{"n": 12345678901234567890, "x": [1.5, null, true]}`), failed}
	written, err := b.Store(t.Context(), want...)
	if err != nil || !written[0] || !written[1] {
		t.Fatal(written, err)
	}
	got, err := b.Load(t.Context(), "ok", "never", "failed")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, got, []results.Outcome{want[0], {TaskID: "never", State: protocol.StatePending}, want[1]})
	written, err = b.Store(t.Context(), failed, outcome("ok", "1"))
	if err != nil || !written[0] || written[1] {
		t.Error(written, err)
	}
}

// With OmitRequest, nobody who may read results reads the arguments of tasks, and what
// another worker has written of the request stays.
func TestOmitRequest(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	all := open(t, postgres.Config{URL: database})
	omits := open(t, postgres.Config{URL: database, OmitRequest: true})
	started := outcome("both", "1")
	started.State = protocol.StateStarted
	if _, err := all.Store(t.Context(), started); err != nil {
		t.Fatal(err)
	}
	for _, outcomes := range [][]results.Outcome{{outcome("both", "1")}, {outcome("alone", "2")}, {outcome("with", "3"), outcome("others", "4")}} {
		if written, err := omits.Store(t.Context(), outcomes...); err != nil || slices.Contains(written, false) {
			t.Fatal(written, err)
		}
	}
	got, err := all.Load(t.Context(), "both", "alone", "with", "others")
	if err != nil {
		t.Fatal(err)
	}
	want := []results.Outcome{outcome("both", "1"), outcome("alone", "2"), outcome("with", "3"), outcome("others", "4")}
	for i := range want[1:] {
		o := &want[i+1]
		*o = results.Outcome{TaskID: o.TaskID, State: o.State, Value: o.Value, DateDone: o.DateDone, Children: o.Children}
	}
	equal(t, got, want)
}

func equal(t *testing.T, got, want any) {
	t.Helper()
	text := func(v any) string {
		out, err := json.MarshalIndent(v, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		return string(out)
	}
	if text(got) != text(want) {
		t.Errorf("got %s\nwant %s", text(got), text(want))
	}
}

// Every row that Python workers of four versions have stored is read: pickles and
// JSON, with and without the columns of 5.7.
func TestRowsOfPythonWorkers(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile("../../testdata/celery/worker_celery-" + version + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var file struct {
				Scenarios map[string]struct {
					Rows []struct {
						TaskID    string  `json:"task_id"`
						Status    string  `json:"status"`
						Result    *string `json:"result_hex"`
						Traceback *string `json:"traceback"`
						Name      *string `json:"name"`
						Args      *string `json:"args_text"`
						Queue     *string `json:"queue"`
						Children  *string `json:"children_text"`
					} `json:"celery_taskmeta_rows_in_insert_order"`
				}
			}
			if err := json.Unmarshal(text, &file); err != nil {
				t.Fatal(err)
			}
			database := devenv.Database(t)
			b := open(t, postgres.Config{URL: database})
			if version != "5.7.0" {
				execute(t, database, `ALTER TABLE celery_taskmeta DROP COLUMN children, DROP COLUMN stamps`)
			}
			pool, err := pgxpool.New(t.Context(), database)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			rows, unreadable := 0, 0
			for name, scenario := range file.Scenarios {
				for _, row := range scenario.Rows {
					rows++
					var column []byte
					if row.Result != nil {
						if column, err = hex.DecodeString(*row.Result); err != nil {
							t.Fatal(err)
						}
					}
					_, err := pool.Exec(t.Context(), `INSERT INTO celery_taskmeta (id, task_id, status, result, traceback, name, args, queue)
						VALUES (nextval('task_id_sequence'), $1, $2, $3, $4, $5, convert_to($6, 'UTF8'), $7)`,
						row.TaskID, row.Status, column, row.Traceback, row.Name, row.Args, row.Queue)
					if err == nil && row.Children != nil {
						_, err = pool.Exec(t.Context(), `UPDATE celery_taskmeta SET children = convert_to($2, 'UTF8') WHERE task_id = $1`, row.TaskID, *row.Children)
					}
					if err != nil {
						t.Fatalf("%s: %v", name, err)
					}
					loaded, err := b.Load(t.Context(), row.TaskID)
					if err != nil {
						t.Fatalf("%s: %v", name, err)
					}
					got := loaded[0]
					isException := row.Status == "FAILURE" || row.Status == "RETRY" || row.Status == "REVOKED"
					switch {
					case got.State != row.Status, row.Traceback != nil && got.Traceback != *row.Traceback, row.Name != nil && got.Task != *row.Name,
						row.Args != nil && string(got.Args) != *row.Args, row.Children != nil && string(got.Children) != *row.Children:
						t.Errorf("%s: loaded %+v from %+v", name, got, row)
					case got.Unreadable != nil:
						unreadable++
						t.Logf("%s: %v", name, got.Unreadable)
					case isException && (got.Exception == nil || got.Exception.Type == ""), !isException && got.Exception != nil:
						t.Errorf("%s: exception %+v in state %s", name, got.Exception, got.State)
					}
				}
			}
			if rows < 40 || unreadable > 0 {
				t.Errorf("%d rows, of which %d could not be read", rows, unreadable)
			}
		})
	}
}

// A result that the table can never hold is permanent: a worker tries once.
func TestWhatTheTableCanNeverHoldIsPermanent(t *testing.T) {
	t.Parallel()
	b := open(t, postgres.Config{URL: devenv.Database(t)})
	for name, o := range map[string]results.Outcome{
		"long id": outcome(strings.Repeat("x", 156), "1"), "no id": outcome("", "1"), "no JSON": outcome("a", "{"),
	} {
		_, err := b.Store(t.Context(), outcome("beside", "1"), o)
		if !results.IsPermanent(err) || !errors.Is(err, postgres.ErrInvalid) {
			t.Errorf("%s: %v, want a permanent error", name, err)
		}
	}
	if got, err := b.Load(t.Context(), "beside"); err != nil || got[0].State != protocol.StatePending {
		t.Errorf("a refused call has stored %+v, %v", got, err)
	}
	execute(t, b2url(t, b), `DROP TABLE celery_taskmeta`)
	if _, err := b.Store(t.Context(), outcome("a", "1")); !errors.Is(err, postgres.ErrSchema) || results.IsPermanent(err) {
		t.Errorf("without a table: %v, want ErrSchema, which an operator can mend", err)
	}
}

// b2url returns the URL of a backend's database with the test server's login.
func b2url(t *testing.T, b *postgres.Backend) string {
	t.Helper()
	u, err := url.Parse(os.Getenv("MM_TEST_DATABASE_URL"))
	if err != nil {
		t.Fatal(err)
	}
	_, u.Path, _ = strings.Cut(b.Place(), "/")
	return u.String()
}

// Wait returns when the task has ended, or its context.
func TestWaitReturnsWhenTheTaskHasEnded(t *testing.T) {
	t.Parallel()
	b, _, sent := tables(t)
	store(t, b, "a", protocol.StateStarted, true)
	type answer struct {
		outcome results.Outcome
		err     error
	}
	// wait returns when Wait has looked at the task a few times.
	wait := func(ctx context.Context) <-chan answer {
		t.Helper()
		looks := make(chan struct{}, 3)
		sent.told.Store(&looks)
		defer sent.told.Store(nil)
		ended := make(chan answer, 1)
		go func() {
			o, err := b.Wait(ctx, "a")
			ended <- answer{o, err}
		}()
		for range 3 {
			select {
			case <-looks:
			case a := <-ended:
				t.Fatalf("the task runs, and Wait returned %+v", a)
			}
		}
		return ended
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	ended, enough := wait(ctx), errors.New("enough")
	cancel(enough)
	if a := <-ended; a.err != enough {
		t.Errorf("the context has ended: %+v, want its cause", a)
	}
	ended = wait(t.Context())
	store(t, b, "a", protocol.StateSuccess, true)
	if a := <-ended; a.err != nil || a.outcome.State != protocol.StateSuccess || string(a.outcome.Value) != "3" {
		t.Errorf("the task has ended: %+v", a)
	}
}

func TestCleanupRemovesWhatEndedLongAgo(t *testing.T) {
	t.Parallel()
	b := open(t, postgres.Config{URL: devenv.Database(t) + "?options=-c%20TimeZone%3DAsia/Tokyo", Encoding: protocol.EncodingJSON})
	fresh, running := outcome("fresh", "1"), outcome("running", "1")
	fresh.DateDone = time.Now().Add(-time.Hour)
	running.State, running.DateDone = "PROGRESS", time.Time{}
	if _, err := b.Store(t.Context(), outcome("old", "1"), fresh, running); err != nil {
		t.Fatal(err)
	}
	if n, err := b.Cleanup(t.Context(), 2*time.Hour); n != 1 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
	left, err := b.Load(t.Context(), "old", "fresh", "running")
	if err != nil || left[0].State != "PENDING" || left[1].State != "SUCCESS" || left[2].State != "PROGRESS" {
		t.Errorf("left %+v, %v", left, err)
	}
}

// Old groups, which Python workers store, are removed too. Their table need not exist.
func TestCleanupRemovesOldGroups(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	b := open(t, postgres.Config{URL: database})
	execute(t, database, `INSERT INTO celery_tasksetmeta (id, taskset_id, date_done)
		VALUES (1, 'old', now() AT TIME ZONE 'UTC' - interval '2 days'), (2, 'fresh', now() AT TIME ZONE 'UTC' - interval '1 hour')`)
	if n, err := b.Cleanup(t.Context(), 24*time.Hour); n != 0 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var left string
	if err := conn.QueryRow(t.Context(), `SELECT string_agg(taskset_id, ' ') FROM celery_tasksetmeta`).Scan(&left); err != nil || left != "fresh" {
		t.Errorf("left is %q, %v", left, err)
	}
	execute(t, database, `DROP TABLE celery_tasksetmeta`)
	if _, err := b.Cleanup(t.Context(), 24*time.Hour); err != nil {
		t.Error(err)
	}
}

// So many old results that the server needs longer than one try may take are removed
// all the same.
func TestCleanupOfManyResults(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	b := open(t, postgres.Config{URL: database, TryTimeout: 3500 * time.Millisecond, RetryFor: -1})
	execute(t, database, `INSERT INTO celery_taskmeta (id, task_id, status, date_done) SELECT n, n, 'SUCCESS', '2020-01-01' FROM generate_series(1, 40000) AS n`,
		`CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.001); RETURN OLD; END'`,
		`CREATE TRIGGER slow BEFORE DELETE ON celery_taskmeta FOR EACH ROW WHEN (OLD.id % 10 = 0) EXECUTE FUNCTION slow()`)
	if n, err := b.Cleanup(t.Context(), 24*time.Hour); n != 40000 || err != nil {
		t.Errorf("removed %d, %v", n, err)
	}
}

// A role that may write but not alter uses the tables of an older Celery; one that
// may create nothing is told what is missing.
func TestARoleWithFewRights(t *testing.T) {
	t.Parallel()
	database := devenv.Database(t)
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	role := strings.Trim(u.Path, "/") + "_few"
	execute(t, database, `CREATE ROLE "`+role+`" LOGIN PASSWORD 'open'`)
	t.Cleanup(func() {
		conn, err := pgx.Connect(context.Background(), database)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), `DROP OWNED BY "`+role+`"; DROP ROLE "`+role+`"`); err != nil {
			t.Error(err)
		}
	})
	owner := *u
	u.User = url.UserPassword(role, "open")
	if _, err := postgres.Open(t.Context(), u.String()); !errors.Is(err, postgres.ErrRefused) || !strings.Contains(err.Error(), "permission denied") {
		t.Errorf("without tables: %v", err)
	}
	open(t, postgres.Config{URL: owner.String()})
	execute(t, database, `ALTER TABLE celery_taskmeta DROP COLUMN children, DROP COLUMN stamps`,
		`GRANT SELECT, INSERT, UPDATE ON celery_taskmeta TO "`+role+`"`, `GRANT USAGE ON SEQUENCE task_id_sequence TO "`+role+`"`)
	b := open(t, postgres.Config{URL: u.String()})
	if written, err := b.Store(t.Context(), outcome("a", "1")); err != nil || !written[0] {
		t.Error(written, err)
	}
	// It may use the sequence, and so move it when it is behind the table.
	execute(t, database, `INSERT INTO celery_taskmeta (id, task_id, status) SELECT n, 'old ' || n, 'FAILURE' FROM generate_series(2, 500) AS n`)
	if written, err := b.Store(t.Context(), outcome("b", "1")); err != nil || !written[0] {
		t.Error(written, err)
	}
}

func TestConfigurationErrorsNameTheFieldAndNoPassword(t *testing.T) {
	t.Parallel()
	for _, config := range []postgres.Config{
		{}, {URL: "redis://x"}, {URL: "db+postgresql://u:hunter2@h:x/d"}, {URL: "db+postgresql://u:hunter2@127.0.0.1:1/d"},
		{URL: "postgresql://h/d", Encoding: "yaml"}, {URL: "postgresql://h/d", Table: strings.Repeat("x", 64)},
	} {
		_, err := postgres.OpenConfig(t.Context(), config)
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%+v: %v", config, err)
		}
		t.Log(err)
	}
}

package store_test

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

var _ results.Backend = (*store.Results)(nil)

var doneAt = time.Date(2026, 11, 22, 19, 35, 40, 590168000, time.FixedZone("east", 5*3600))

func success(id, value string) protocol.Result {
	retries := 0
	return protocol.Result{
		TaskID: id, State: protocol.StateSuccess, Value: json.RawMessage(value), DateDone: doneAt,
		HasRequest: true, Task: "moonmind.workflows.orchestrator.tasks.execute_plan_step",
		Args: json.RawMessage(`["5c845fbe", "analyze"]`), Kwargs: json.RawMessage(`{}`), Worker: "orchestrator@vm", Queue: "orchestrator.run", Retries: &retries,
	}
}

func failed(id string) protocol.Result {
	r := success(id, "")
	exception := protocol.NewException("builtins", "ValueError", "boom é")
	r.State, r.Exception, r.Traceback = protocol.StateFailure, &exception, "Traceback (most recent call last):\nValueError: boom é"
	return r
}

func save(t *testing.T, results *store.Results, all ...protocol.Result) []bool {
	t.Helper()
	written, err := results.Store(t.Context(), all...)
	if err != nil {
		t.Fatal(err)
	}
	return written
}

const taskmeta = `SELECT * FROM celery_taskmeta ORDER BY id`

func TestFirstSuccessStays(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	results := storetest.Results(t, d.Open(t), protocol.EncodingJSON)
	started := protocol.Result{TaskID: "a", State: protocol.StateStarted, Value: json.RawMessage(`{"pid": 1}`)}
	equal(t, "written", save(t, results, started, failed("b")), []bool{true, true})
	equal(t, "written", save(t, results, failed("a"), success("b", "1"), success("c", "null"), success("b", "2"), failed("c")),
		[]bool{true, true, true, false, false})
	equal(t, "written", save(t, results, success("a", "3"), failed("b"), started), []bool{true, false, false})
	rows := d.Rows(t, `SELECT id, task_id, status, convert_from(result, 'UTF8') AS result, date_done FROM celery_taskmeta ORDER BY id`)
	done := "2026-11-22T14:35:40.590168" // UTC, without a zone
	equal(t, "rows", rows, []storetest.Row{
		{"id": 1, "task_id": "a", "status": "SUCCESS", "result": "3", "date_done": done},
		{"id": 2, "task_id": "b", "status": "SUCCESS", "result": "1", "date_done": done},
		{"id": 3, "task_id": "c", "status": "SUCCESS", "result": nil, "date_done": done},
	})
	equal(t, "nothing", save(t, results), []bool(nil))
}

// TestColumnsOfAResult compares rows with those of a Python worker.
func TestColumnsOfAResult(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	results := storetest.Results(t, d.Open(t), "")
	raw := load[struct{ Taskmeta []storetest.Row }](t, "reference_verify_times_out.json")
	for _, row := range raw.Taskmeta {
		r := success(row["task_id"].(string), marshal(t, row["result_decoded"]))
		r.State, r.Task, r.Worker, r.Queue = row["status"].(string), row["name"].(string), row["worker"].(string), row["queue"].(string)
		r.Args, r.Kwargs = json.RawMessage(row["args"].(string)), json.RawMessage(row["kwargs"].(string))
		r.DateDone, _ = time.Parse("2006-01-02T15:04:05.999999", row["date_done"].(string))
		if r.State == protocol.StateFailure {
			var e struct {
				Type    string            `json:"exc_type"`
				Message []json.RawMessage `json:"exc_message"`
				Module  string            `json:"exc_module"`
			}
			if err := json.Unmarshal(r.Value, &e); err != nil {
				t.Fatal(err)
			}
			r.Value, r.Exception, r.Traceback = nil, &protocol.Exception{Type: e.Type, Module: e.Module, Args: e.Message}, "tb"
		}
		save(t, results, r)
	}
	got := d.Rows(t, `SELECT *, convert_from(args, 'UTF8') AS args_text, convert_from(kwargs, 'UTF8') AS kwargs_text,
		encode(result, 'hex') AS result_hex FROM celery_taskmeta ORDER BY id`)
	for i, want := range raw.Taskmeta {
		want["date_done"] = strings.TrimRight(want["date_done"].(string), "0") // as row_to_json prints it
		for _, column := range []string{"task_id", "status", "name", "worker", "retries", "queue", "date_done"} {
			if got[i][column] != want[column] {
				t.Errorf("%s: %v, want %v", column, got[i][column], want[column])
			}
		}
		if got[i]["args_text"] != want["args"] || got[i]["kwargs_text"] != want["kwargs"] || got[i]["children"] != nil || got[i]["stamps"] != nil {
			t.Errorf("row %v", got[i])
		}
		column, err := hex.DecodeString(got[i]["result_hex"].(string))
		if err != nil {
			t.Fatal(err)
		}
		value, err := protocol.ReadResult(column)
		if err != nil {
			t.Fatal(err)
		}
		var decoded any
		if err := json.Unmarshal(value, &decoded); err != nil {
			t.Fatal(err)
		}
		equal(t, "result", decoded, want["result_decoded"])
	}
}

func TestResultWithoutRequestAndOddText(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	results := storetest.Results(t, d.Open(t), "")
	body := protocol.Result{TaskID: "body", State: protocol.StateFailure, Exception: failed("x").Exception, DateDone: doneAt}
	odd := failed("odd")
	odd.Task, odd.Worker, odd.Traceback, odd.Args = strings.Repeat("é", 200), "", "a\x00b\xff", nil
	odd.Children, odd.Stamps = json.RawMessage(`[[["c", null], null]]`), json.RawMessage(`{"stamped_headers": [], "stamps": {}}`)
	save(t, results, body, odd)
	rows := d.Rows(t, taskmeta)
	for _, column := range []string{"name", "args", "kwargs", "worker", "retries", "queue", "traceback", "children", "stamps"} {
		if rows[0][column] != nil {
			t.Errorf("%s is %v without a request", column, rows[0][column])
		}
	}
	if rows[1]["name"] != strings.Repeat("é", 155) || rows[1]["worker"] != nil || rows[1]["traceback"] != "ab�" ||
		rows[1]["args"] != `\x6e756c6c` || rows[1]["children"] == nil || rows[1]["stamps"] == nil {
		t.Errorf("row %v", rows[1])
	}
	for _, id := range []string{"", strings.Repeat("x", 156)} {
		_, err := results.Store(t.Context(), success("fine", "1"), success(id, "1"))
		if !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%v, want ErrInvalid", err)
		}
	}
	if n := len(d.Rows(t, taskmeta)); n != 2 {
		t.Errorf("%d rows after an error", n)
	}
}

// TestResultsOfManyWorkers: the same ids from many sides at once; one SUCCESS
// each.
func TestResultsOfManyWorkers(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	ids := []string{"a", "b", "c", "d", "e", "f"}
	var mu sync.Mutex
	wins := map[string]int{}
	var group sync.WaitGroup
	for w := range 4 {
		results := storetest.Results(t, d.Open(t), protocol.EncodingJSON)
		group.Go(func() {
			var all []protocol.Result
			for i := range ids {
				all = append(all, success(ids[(i*5+w)%len(ids)], "1"))
			}
			written, err := results.Store(t.Context(), all...)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for i, ok := range written {
				if ok {
					wins[all[i].TaskID]++
				}
			}
		})
	}
	group.Wait()
	for _, id := range ids {
		if wins[id] != 1 {
			t.Errorf("%s was written %d times", id, wins[id])
		}
	}
}

// TestTablesOfEveryCelery: tables as each version makes them, in odd schemas
// too; 5.7's columns are used when they appear.
func TestTablesOfEveryCelery(t *testing.T) {
	t.Parallel()
	plain := `CREATE SEQUENCE "s 1".task_id_sequence; CREATE TABLE "s 1"."my ""tasks" (id integer PRIMARY KEY, task_id varchar(155) UNIQUE,
		status varchar(50), result bytea, date_done timestamp, traceback text`
	extended := `, name varchar(155), args bytea, kwargs bytea, worker varchar(155), retries integer, queue varchar(155)`
	for name, table := range map[string]string{"plain": plain + ")", "extended": plain + extended + ")"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := storetest.Empty(t)
			if _, err := d.Pool.Exec(t.Context(), `CREATE SCHEMA "s 1"`); err != nil {
				t.Fatal(err)
			}
			for _, statement := range strings.SplitN(table, ";", 2) {
				if _, err := d.Pool.Exec(t.Context(), statement); err != nil {
					t.Fatal(err)
				}
			}
			results, err := store.NewResults(d.Open(t), store.ResultsConfig{Table: `my "tasks`, Schema: "s 1", SetSchema: "s 2"})
			if err != nil {
				t.Fatal(err)
			}
			r := success("a", "7")
			r.Children = json.RawMessage(`[]`)
			save(t, results, r)
			plan, err := results.PlanTables(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			report, err := results.EnsureTables(t.Context())
			if err != nil || len(report.Steps) != 5 || len(plan.Steps) != 5 {
				t.Errorf("%v, %v", report.Lines(), err)
			}
			if report, err := results.EnsureTables(t.Context()); err != nil || len(report.Steps) != 0 {
				t.Errorf("again: %v, %v", report.Lines(), err)
			}
			r.TaskID = "b"
			save(t, results, r)
			rows := d.Rows(t, `SELECT * FROM "s 1"."my ""tasks" ORDER BY id`)
			if rows[0]["children"] != nil || rows[1]["children"] != `\x5b5d` || (name == "extended") != (rows[0]["name"] != nil) {
				t.Errorf("rows %v", rows)
			}
		})
	}
}

func TestNoResultTable(t *testing.T) {
	t.Parallel()
	d := storetest.Empty(t)
	results := storetest.Results(t, d.Open(t), "")
	if _, err := results.Store(t.Context(), success("a", "1")); !errors.Is(err, store.ErrSchema) || !strings.Contains(err.Error(), "migrate") {
		t.Errorf("%v", err)
	}
	if _, err := results.EnsureTables(t.Context()); err != nil {
		t.Fatal(err)
	}
	save(t, results, success("a", "1"))
	// Somebody drops it and an older Celery makes its own.
	if _, err := d.Pool.Exec(t.Context(), `ALTER TABLE celery_taskmeta DROP COLUMN children, DROP COLUMN stamps`); err != nil {
		t.Fatal(err)
	}
	save(t, results, success("b", "1"))
	for _, config := range []store.ResultsConfig{{Encoding: "yaml"}, {Table: strings.Repeat("x", 64)}} {
		if _, err := store.NewResults(nil, config); !errors.Is(err, store.ErrInvalid) {
			t.Errorf("%+v: %v", config, err)
		}
	}
}

// TestCeleryReadsOurRows: AsyncResult of every version, over tables that we
// made and over tables that it made itself.
func TestCeleryReadsOurRows(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.5.3", "5.6.3", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			python := devenv.Celery(t, version)
			d := storetest.Empty(t)
			s := d.Open(t)
			read := func(ids ...string) map[string]map[string]string {
				t.Helper()
				backend := strings.Replace(d.URL, "postgres://", "db+postgresql+psycopg2://", 1)
				out, err := exec.CommandContext(t.Context(), python, append([]string{"testdata/read_results.py", backend}, ids...)...).Output()
				if err != nil {
					var exit *exec.ExitError
					errors.As(err, &exit)
					t.Fatalf("%v\n%s", err, exit.Stderr)
				}
				var seen map[string]map[string]string
				if err := json.Unmarshal(out, &seen); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				return seen
			}
			expect := func(id, got, want string) {
				t.Helper()
				if got != want {
					t.Errorf("%s: %s, want %s", id, got, want)
				}
			}
			pickled := storetest.Results(t, s, protocol.EncodingPickle)
			if version == "5.4.0" || version == "5.7.0" {
				read("unknown") // makes the tables in its own shape
			}
			report, err := pickled.EnsureTables(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%q", report.Lines())
			ids := []string{"value", "none", "failure", "revoked", "started"}
			encodings := []protocol.Encoding{protocol.EncodingPickle}
			if version == "5.7.0" {
				encodings = append(encodings, protocol.EncodingJSON)
			}
			for _, encoding := range encodings {
				if _, err := d.Pool.Exec(t.Context(), `DELETE FROM celery_taskmeta`); err != nil {
					t.Fatal(err)
				}
				started := success("started", `{"pid": 7, "hostname": "h"}`)
				started.State, started.DateDone = protocol.StateStarted, time.Time{}
				revoked := failed("revoked")
				gone := protocol.NewException("celery.exceptions", "TaskRevokedError", "expired")
				revoked.State, revoked.Exception, revoked.Traceback = protocol.StateRevoked, &gone, ""
				save(t, storetest.Results(t, s, encoding),
					success("value", `{"message": "Build completed é", "artifacts": ["build.log"], "metadata": {"n": 12345678901234567890, "f": 1.5, "b": true}}`),
					success("none", "null"), failed("failure"), revoked, started)
				seen := read(ids[:4]...)
				value := `{'message': 'Build completed é', 'artifacts': ['build.log'], 'metadata': {'n': 12345678901234567890, 'f': 1.5, 'b': True}}`
				expect("value", seen["value"]["state"], "'SUCCESS'")
				expect("value", seen["value"]["get"], value)
				expect("value", seen["value"]["result"], value)
				expect("value", seen["value"]["traceback"], "None")
				expect("value", seen["value"]["name"], "'moonmind.workflows.orchestrator.tasks.execute_plan_step'")
				expect("value", seen["value"]["args"], "['5c845fbe', 'analyze']")
				expect("value", seen["value"]["kwargs"], "{}")
				expect("value", seen["value"]["worker"], "'orchestrator@vm'")
				expect("value", seen["value"]["retries"], "0")
				expect("value", seen["value"]["queue"], "'orchestrator.run'")
				if !strings.HasPrefix(seen["value"]["date_done"], "datetime.datetime(2026, 11, 22, 14, 35, 40, 590168") {
					t.Errorf("date_done %s", seen["value"]["date_done"])
				}
				expect("none", seen["none"]["get"], "None")
				expect("failure", seen["failure"]["state"], "'FAILURE'")
				expect("failure", seen["failure"]["get"], "raises builtins.ValueError('boom é',)")
				expect("failure", seen["failure"]["result"], "ValueError('boom é')")
				expect("failure", seen["failure"]["traceback"], `'Traceback (most recent call last):\nValueError: boom é'`)
				expect("revoked", seen["revoked"]["state"], "'REVOKED'")
				expect("revoked", seen["revoked"]["get"], "raises celery.exceptions.TaskRevokedError('expired',)")
			}
		})
	}
}

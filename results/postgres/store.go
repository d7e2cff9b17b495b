package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/moonladderstudios/mm-orchestrator/internal/database"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

// Lengths of the columns, in characters.
const (
	resultTextLength   = 155 // task_id, name, worker, queue
	resultStatusLength = 50
)

// resultRow is a row of celery_taskmeta to be written.
type resultRow struct {
	taskID, status string
	result         []byte
	dateDone       *time.Time
	traceback      *string
	children       []byte
	name           *string
	args, kwargs   []byte
	worker         *string
	retries        *int32
	queue          *string
	stamps         []byte
}

// Store writes all results in one transaction, which is one statement if there is one
// result, and returns for each, in the same
// order, whether it was written. A stored SUCCESS is never overwritten, not even by
// another SUCCESS, as in Celery 5.7 (docs/celery.md#publish-store-acknowledge);
// written is false then. Two results for one task id in one call are written in
// their order.
//
// It returns ErrInvalid, marked by [results.Permanent], and writes nothing, for a
// task id that does not fit the column or a value that cannot be encoded.
func (b *Backend) Store(ctx context.Context, outcomes ...results.Outcome) (written []bool, err error) {
	if len(outcomes) == 0 {
		return nil, nil
	}
	rows := make([]resultRow, len(outcomes))
	for i, result := range outcomes {
		if rows[i], err = b.encode(result); err != nil {
			return nil, results.Permanent(err)
		}
	}
	doing := "store the results of " + strconv.Itoa(len(outcomes)) + " tasks"
	if len(outcomes) == 1 {
		doing = "store the result of task " + rows[0].taskID
	}
	moved := false
	for reread := false; ; reread = true {
		err = b.db.Retry(ctx, doing, func(ctx context.Context) error {
			table, err := b.knownTable(ctx, reread)
			if err != nil {
				return err
			}
			written = make([]bool, len(rows))
			if len(rows) == 1 {
				written[0], err = b.writeOne(ctx, table, rows[0])
				return err
			}
			return b.db.Transaction(ctx, func(tx pgx.Tx) error { return write(ctx, tx, table, rows, written) })
		})
		// The table may have been recreated with other columns since they were read.
		if !reread && errors.Is(err, ErrSchema) {
			continue
		}
		// Numbers are taken that the sequence gives: no other value has to be unique.
		if failed := (*database.Error)(nil); !moved && errors.As(err, &failed) && failed.Code == uniqueViolation {
			moved = true
			if err = b.moveSequence(ctx); err == nil {
				continue
			}
		}
		if errors.Is(err, ErrInvalid) {
			err = results.Permanent(err)
		}
		if err != nil {
			return nil, err
		}
		faultpoint.Hit(faultpoint.ResultCommitted, rows[0].taskID)
		return written, nil
	}
}

// uniqueViolation is the SQLSTATE of a value that is there already.
const uniqueViolation = "23505"

// moveSequence moves the sequence beyond the numbers of all rows: a table that was copied
// without it has numbers that the sequence has not given yet. It takes them one by one:
// setval could give back a number that another session has just taken, and needs more
// than the privilege to use the sequence. Those who come at the same time wait, and find it
// moved.
func (b *Backend) moveSequence(ctx context.Context) error {
	sequence := qualified(b.config.Schema, "task_id_sequence")
	return b.db.InTx(ctx, "move the sequence "+sequence, func(tx pgx.Tx) error {
		if err := LockTables(ctx, tx); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `
			SELECT count(nextval($1::text::regclass))
			FROM generate_series(nextval($1::text::regclass) + 1, (SELECT max(id) FROM `+b.table()+`))`, sequence)
		return err
	})
}

// encode returns the row of a result.
func (b *Backend) encode(result results.Outcome) (resultRow, error) {
	taskID := database.Clean(result.TaskID)
	if n := utf8.RuneCountInString(taskID); n == 0 || n > resultTextLength {
		return resultRow{}, database.Failure(ErrInvalid, "a task id of %d characters does not fit %s.task_id (1 to %d)", n, b.config.Table, resultTextLength)
	}
	value, err := protocol.EncodeResult(result, b.config.Encoding)
	if err != nil {
		return resultRow{}, database.Failure(ErrInvalid, "cannot encode the result of task %s: %v", taskID, err)
	}
	row := resultRow{
		taskID:    taskID,
		status:    database.Cut(result.State, resultStatusLength),
		result:    value,
		traceback: nullIfEmpty(database.Clean(result.Traceback)),
		children:  nullBytes(result.Children),
		stamps:    nullBytes(result.Stamps),
	}
	if !result.DateDone.IsZero() {
		done := result.DateDone.UTC().Truncate(time.Microsecond)
		row.dateDone = &done
	}
	if result.HasRequest {
		row.name = nullIfEmpty(database.Cut(result.Task, resultTextLength))
		row.worker = nullIfEmpty(database.Cut(result.Worker, resultTextLength))
		row.queue = nullIfEmpty(database.Cut(result.Queue, resultTextLength))
		// A request without arguments has JSON null, like Python's None, and not NULL.
		row.args, row.kwargs = jsonOrNull(result.Args), jsonOrNull(result.Kwargs)
		if result.Retries != nil {
			retries := int32(min(max(*result.Retries, 0), 1<<31-1))
			row.retries = &retries
		}
	}
	return row, nil
}

func nullIfEmpty(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}

func nullBytes(text json.RawMessage) []byte {
	if len(text) == 0 {
		return nil
	}
	return text
}

func jsonOrNull(text json.RawMessage) []byte {
	if len(text) == 0 {
		return []byte("null")
	}
	return text
}

// writeOne writes a row in one statement, which is a transaction of its own: one
// round trip and one flush.
func (b *Backend) writeOne(ctx context.Context, table *knownTable, row resultRow) (bool, error) {
	statement, arguments := table.upsert, table.arguments(&row)
	if !results.IsFinal(row.status) {
		statement = table.update
		// A prepared statement keeps its plan until the table is analyzed again. A plan
		// that was made for a small table would still scan it when it is large.
		if b.prepares {
			arguments = append([]any{pgx.QueryExecModeCacheDescribe}, arguments...)
		}
	}
	answer, err := b.db.Pool.Query(ctx, statement, arguments...)
	if err != nil {
		return false, err
	}
	faultpoint.Hit(faultpoint.ResultWritten, row.taskID)
	answer.Close()
	return answer.CommandTag().RowsAffected() == 1, answer.Err()
}

// write writes several rows in their order, in one round trip, and marks those that
// were written. There may be several for one task, so that it takes no number for a
// row that exists.
func write(ctx context.Context, tx pgx.Tx, table *knownTable, rows []resultRow, written []bool) error {
	batch := &pgx.Batch{}
	for i := range rows {
		batch.Queue(table.update, table.arguments(&rows[i])...).Exec(func(tag pgconn.CommandTag) error {
			written[i] = tag.RowsAffected() == 1
			return nil
		})
	}
	return tx.SendBatch(ctx, batch).Close()
}

// optionalColumn is a column that a table need not have.
type optionalColumn struct {
	name string
	// extended says that Celery writes it only with result_extended.
	extended bool
	value    func(*resultRow) any
}

// optionalColumns are those of result_extended and of Celery 5.7.
var optionalColumns = []optionalColumn{
	{"children", false, func(r *resultRow) any { return r.children }},
	{"name", true, func(r *resultRow) any { return r.name }},
	{"args", true, func(r *resultRow) any { return r.args }},
	{"kwargs", true, func(r *resultRow) any { return r.kwargs }},
	{"worker", true, func(r *resultRow) any { return r.worker }},
	{"retries", true, func(r *resultRow) any { return r.retries }},
	{"queue", true, func(r *resultRow) any { return r.queue }},
	{"stamps", true, func(r *resultRow) any { return r.stamps }},
}

// arguments returns the parameters of the table's statements for a row.
func (t *knownTable) arguments(r *resultRow) []any {
	arguments := make([]any, 0, 5+len(t.written))
	arguments = append(arguments, r.taskID, r.status, r.result, r.dateDone, r.traceback)
	for _, column := range t.written {
		arguments = append(arguments, column.value(r))
	}
	return arguments
}

// knownTable is what is known of the task table.
type knownTable struct {
	columns map[string]bool
	written []optionalColumn
	readAt  time.Time

	// upsert writes a row unless a SUCCESS is stored. It finds the row by the unique
	// index alone, so that its plan depends on no statistics. If the row exists, a
	// number of the sequence is lost.
	upsert string
	// update does the same and takes a number only for a new row. It is for states
	// that a task may report any number of times: id is an integer of 32 bits in
	// Celery's table, and all its numbers could be used up. With upsert for final
	// states alone, at most one number is lost each time that a task runs.
	update string
}

// statements sets the SQL for what is written. date_done is sent with its zone, and the
// server converts it to the time zone of the session, as it does for Python
// (docs/celery.md#time-zone).
func (t *knownTable) statements(table, sequence string) {
	names := []string{"status", "result", "date_done", "traceback"}
	for _, column := range t.written {
		names = append(names, column.name)
	}
	values, set := make([]string, len(names)), make([]string, len(names))
	for i, name := range names {
		// The casts are for sessions that prepare nothing: they do not ask the server
		// for the types.
		cast := map[string]string{
			"status": "text", "date_done": "timestamptz", "traceback": "text", "name": "text", "worker": "text", "queue": "text", "retries": "integer",
		}[name]
		if cast == "" {
			cast = "bytea"
		}
		values[i] = "$" + strconv.Itoa(i+2) + "::" + cast
		set[i] = name + " = EXCLUDED." + name
	}
	number := "nextval('" + strings.ReplaceAll(sequence, "'", "''") + "')"
	insert := func(id string) string {
		return `
			INSERT INTO ` + table + ` AS stored (id, task_id, ` + strings.Join(names, ", ") + `)
			VALUES (` + id + `, $1::text, ` + strings.Join(values, ", ") + `)
			ON CONFLICT (task_id) DO UPDATE SET ` + strings.Join(set, ", ") + `
			WHERE stored.status IS DISTINCT FROM 'SUCCESS'`
	}
	t.upsert = insert(number)
	t.update = insert("COALESCE((SELECT id FROM " + table + " WHERE task_id = $1::text), " + number + ")")
}

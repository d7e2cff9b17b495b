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

// Store writes all results in one transaction, and returns for each, in the same
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
	rounds := distinct(rows)
	for reread := false; ; reread = true {
		err = b.db.Retry(ctx, doing, func(ctx context.Context) error {
			columns, err := b.knownColumns(ctx, reread)
			if err != nil {
				return err
			}
			written = make([]bool, len(rows))
			return b.db.Transaction(ctx, func(tx pgx.Tx) error {
				for _, round := range rounds {
					if err := b.write(ctx, tx, columns, rows, round, written); err != nil {
						return err
					}
				}
				faultpoint.Hit(faultpoint.ResultWritten, rows[0].taskID)
				return nil
			})
		})
		// The table may have been recreated with other columns since they were read.
		if !reread && errors.Is(err, ErrSchema) {
			continue
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

// distinct splits the rows, by index, into rounds without repeated task ids, since
// one statement cannot write a row twice. It keeps the order of rows with the same
// task id.
func distinct(rows []resultRow) [][]int {
	var rounds [][]int
	seen := map[string]int{}
	for i, row := range rows {
		n := seen[row.taskID]
		seen[row.taskID]++
		if n == len(rounds) {
			rounds = append(rounds, nil)
		}
		rounds[n] = append(rounds[n], i)
	}
	return rounds
}

// write writes the rows of one round in one statement, and marks those that were
// written.
//
// The statement first updates, so that an existing row uses no number of the
// sequence, and then inserts the other rows. If another worker inserts a row in
// between, ON CONFLICT updates it under the same condition. date_done is sent with
// its zone and converted to UTC, so that the session's TimeZone does not matter.
func (b *Backend) write(ctx context.Context, tx pgx.Tx, columns map[string]bool, rows []resultRow, round []int, written []bool) error {
	n := len(round)
	ids, statuses := make([]string, n), make([]string, n)
	values, done, tracebacks := make([][]byte, n), make([]*time.Time, n), make([]*string, n)
	children, names := make([][]byte, n), make([]*string, n)
	args, kwargs, workers := make([][]byte, n), make([][]byte, n), make([]*string, n)
	retries, queues, stamps := make([]*int32, n), make([]*string, n), make([][]byte, n)
	index := make(map[string]int, n)
	for k, i := range round {
		row := rows[i]
		index[row.taskID] = i
		ids[k], statuses[k], values[k], done[k], tracebacks[k] = row.taskID, row.status, row.result, row.dateDone, row.traceback
		children[k], names[k], args[k], kwargs[k], workers[k] = row.children, row.name, row.args, row.kwargs, row.worker
		retries[k], queues[k], stamps[k] = row.retries, row.queue, row.stamps
	}
	stored, err := tx.Query(ctx, b.statement(columns), ids, statuses, values, done, tracebacks, children, names, args, kwargs, workers, retries, queues, stamps)
	if err != nil {
		return err
	}
	var id string
	_, err = pgx.ForEachRow(stored, []any{&id}, func() error {
		written[index[id]] = true
		return nil
	})
	return err
}

// optionalColumns are those of result_extended and of Celery 5.7, which a table need
// not have.
var optionalColumns = []string{"children", "name", "args", "kwargs", "worker", "retries", "queue", "stamps"}

// statement returns the SQL of write for a table with these columns. All 13 arrays
// are always sent; those of missing columns are not used.
func (b *Backend) statement(columns map[string]bool) string {
	names := []string{"status", "result", "date_done", "traceback"}
	for _, name := range optionalColumns {
		if columns[name] {
			names = append(names, name)
		}
	}
	set, insert, source := make([]string, len(names)), make([]string, len(names)), make([]string, len(names))
	for i, name := range names {
		source[i] = "given." + name
		if name == "date_done" {
			source[i] = "given.date_done AT TIME ZONE 'UTC'"
		}
		set[i], insert[i] = name+" = "+source[i], name+" = EXCLUDED."+name
	}
	table := b.table()
	sequence := qualified(b.config.Schema, "task_id_sequence")
	return `
		WITH given AS (
		    SELECT * FROM unnest($1::text[], $2::text[], $3::bytea[], $4::timestamptz[], $5::text[], $6::bytea[], $7::text[],
		                         $8::bytea[], $9::bytea[], $10::text[], $11::integer[], $12::text[], $13::bytea[])
		         WITH ORDINALITY
		         AS t (task_id, status, result, date_done, traceback, children, name, args, kwargs, worker, retries, queue, stamps, place)
		), updated AS (
		    UPDATE ` + table + ` AS stored SET ` + strings.Join(set, ", ") + `
		    FROM given
		    WHERE stored.task_id = given.task_id AND stored.status IS DISTINCT FROM 'SUCCESS'
		    RETURNING stored.task_id
		), inserted AS (
		    INSERT INTO ` + table + ` AS stored (id, task_id, ` + strings.Join(names, ", ") + `)
		    SELECT nextval('` + strings.ReplaceAll(sequence, "'", "''") + `'), given.task_id, ` + strings.Join(source, ", ") + `
		    FROM given
		    WHERE NOT EXISTS (SELECT FROM ` + table + ` AS known WHERE known.task_id = given.task_id)
		    ORDER BY given.place
		    ON CONFLICT (task_id) DO UPDATE SET ` + strings.Join(insert, ", ") + `
		    WHERE stored.status IS DISTINCT FROM 'SUCCESS'
		    RETURNING stored.task_id
		)
		SELECT task_id FROM updated UNION ALL SELECT task_id FROM inserted`
}

package store

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// ResultsConfig says where and how Celery results are stored. The names are those of
// Celery's settings database_table_names and database_table_schemas.
type ResultsConfig struct {
	// Encoding is that of the column result. Defaults to pickle, which every version
	// of Celery reads. Use JSON only if every reader is Celery 5.7 or later
	// (docs/celery.md#result-encoding).
	Encoding protocol.Encoding
	// Table is the table of task results. Defaults to "celery_taskmeta".
	Table string
	// Schema is that of Table. Defaults to the first of the role's search_path.
	Schema string
	// SetTable is the table of group results, which is created but not written.
	// Defaults to "celery_tasksetmeta".
	SetTable string
	// SetSchema is that of SetTable. Defaults to the first of the role's search_path.
	SetSchema string
}

// WithDefaults returns a copy with every unset field at its default.
func (c ResultsConfig) WithDefaults() ResultsConfig {
	if c.Encoding == "" {
		c.Encoding = protocol.EncodingPickle
	}
	if c.Table == "" {
		c.Table = "celery_taskmeta"
	}
	if c.SetTable == "" {
		c.SetTable = "celery_tasksetmeta"
	}
	return c
}

// Validate names the first field that cannot be used.
func (c ResultsConfig) Validate() error {
	if c.Encoding != protocol.EncodingPickle && c.Encoding != protocol.EncodingJSON {
		return failure(ErrInvalid, "result encoding %q: it is %q or %q", c.Encoding, protocol.EncodingPickle, protocol.EncodingJSON)
	}
	for _, name := range []string{c.Table, c.Schema, c.SetTable, c.SetSchema} {
		if len(name) > 63 || strings.ContainsRune(name, 0) {
			return failure(ErrInvalid, "result table or schema %q: PostgreSQL names have at most 63 bytes and no NUL", cut(name, 80))
		}
	}
	return nil
}

// Lengths of the columns, in characters.
const (
	resultTextLength   = 155 // task_id, name, worker, queue
	resultStatusLength = 50
)

// columnsKnownFor is how long the table's columns are cached. A Celery 5.7 that
// starts meanwhile adds columns that we should fill.
const columnsKnownFor = time.Minute

// Results is Celery's database result backend, db+postgresql://
// (docs/celery.md#result-table). It implements worker.ResultBackend.
type Results struct {
	store  *Store
	config ResultsConfig

	mu      sync.Mutex
	columns map[string]bool // of the task table; nil until read
	readAt  time.Time
}

// NewResults returns the result backend in the database of store. It does not access
// the database yet.
func NewResults(store *Store, config ResultsConfig) (*Results, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	return &Results{store: store, config: config}, nil
}

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
// It returns ErrInvalid, and writes nothing, for a task id that does not fit the
// column or a value that cannot be encoded. It works with tables made by Celery 5.4
// to 5.7, with and without result_extended.
func (r *Results) Store(ctx context.Context, results ...protocol.Result) (written []bool, err error) {
	if len(results) == 0 {
		return nil, nil
	}
	rows := make([]resultRow, len(results))
	for i, result := range results {
		if rows[i], err = r.encode(result); err != nil {
			return nil, err
		}
	}
	doing := "store the results of " + itoa(len(results)) + " tasks"
	if len(results) == 1 {
		doing = "store the result of task " + rows[0].taskID
	}
	rounds := distinct(rows)
	for reread := false; ; reread = true {
		err = r.store.retry(ctx, doing, func(ctx context.Context) error {
			columns, err := r.knownColumns(ctx, reread)
			if err != nil {
				return err
			}
			written = make([]bool, len(rows))
			return r.store.transaction(ctx, func(tx pgx.Tx) error {
				for _, round := range rounds {
					if err := r.write(ctx, tx, columns, rows, round, written); err != nil {
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
		if err != nil {
			return nil, err
		}
		faultpoint.Hit(faultpoint.ResultCommitted, rows[0].taskID)
		return written, nil
	}
}

// encode returns the row of a result.
func (r *Results) encode(result protocol.Result) (resultRow, error) {
	taskID := clean(result.TaskID)
	if n := utf8.RuneCountInString(taskID); n == 0 || n > resultTextLength {
		return resultRow{}, failure(ErrInvalid, "a task id of %d characters does not fit %s.task_id (1 to %d)", n, r.config.Table, resultTextLength)
	}
	value, err := protocol.EncodeResult(result, r.config.Encoding)
	if err != nil {
		return resultRow{}, failure(ErrInvalid, "cannot encode the result of task %s: %v", taskID, err)
	}
	row := resultRow{
		taskID:    taskID,
		status:    cut(result.State, resultStatusLength),
		result:    value,
		traceback: nullIfEmpty(clean(result.Traceback)),
		children:  nullBytes(result.Children),
		stamps:    nullBytes(result.Stamps),
	}
	if !result.DateDone.IsZero() {
		done := result.DateDone.UTC().Truncate(time.Microsecond)
		row.dateDone = &done
	}
	if result.HasRequest {
		row.name = nullIfEmpty(cut(result.Task, resultTextLength))
		row.worker = nullIfEmpty(cut(result.Worker, resultTextLength))
		row.queue = nullIfEmpty(cut(result.Queue, resultTextLength))
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
func (r *Results) write(ctx context.Context, tx pgx.Tx, columns map[string]bool, rows []resultRow, round []int, written []bool) error {
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
	stored, err := tx.Query(ctx, r.statement(columns), ids, statuses, values, done, tracebacks, children, names, args, kwargs, workers, retries, queues, stamps)
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
func (r *Results) statement(columns map[string]bool) string {
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
	table := qualified(r.config.Schema, r.config.Table)
	sequence := qualified(r.config.Schema, "task_id_sequence")
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

// knownColumns returns the columns of the task table, from the cache unless reread
// is set.
func (r *Results) knownColumns(ctx context.Context, reread bool) (map[string]bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.columns != nil && !reread && time.Since(r.readAt) < columnsKnownFor {
		return r.columns, nil
	}
	columns, err := readColumns(ctx, r.store.pool, qualified(r.config.Schema, r.config.Table))
	if err != nil {
		return nil, err
	}
	if len(columns) == 0 {
		return nil, failure(ErrSchema, "result table %s does not exist in %s: run `mm-orchestrator migrate`", r.config.Table, r.store.place)
	}
	r.columns, r.readAt = columns, time.Now()
	return columns, nil
}

// qualified quotes a name with its schema, if it has one.
func qualified(schema, name string) string {
	if schema == "" {
		return pgx.Identifier{name}.Sanitize()
	}
	return pgx.Identifier{schema, name}.Sanitize()
}

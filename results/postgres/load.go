package postgres

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
)

// Load returns the stored outcomes in the order of the ids, each as the newest that
// this or any other worker has stored. A task without a row is PENDING. Pickled and
// JSON results may stand in one table. When a value is of a Python class that has no
// form in JSON, the outcome's Unreadable says so, and all else is set.
func (b *Backend) Load(ctx context.Context, taskIDs ...string) ([]results.Outcome, error) {
	if len(taskIDs) == 0 {
		return nil, nil
	}
	doing := "read the result of task " + taskIDs[0]
	if len(taskIDs) > 1 {
		doing = "read the results of tasks"
	}
	var found map[string]results.Outcome
	err := b.db.Retry(ctx, doing, func(ctx context.Context) error {
		table, err := b.knownTable(ctx, false)
		if err != nil {
			return err
		}
		found, err = b.read(ctx, table.columns, taskIDs)
		if err != nil {
			// The table may have been recreated with other columns.
			b.forgetTable()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	outcomes := make([]results.Outcome, len(taskIDs))
	for i, id := range taskIDs {
		outcome, stored := found[id]
		if !stored {
			outcome = results.Outcome{TaskID: id, State: protocol.StatePending}
		}
		outcomes[i] = outcome
	}
	return outcomes, nil
}

func (b *Backend) read(ctx context.Context, columns map[string]bool, taskIDs []string) (map[string]results.Outcome, error) {
	// date_done has the clock of the session's time zone (docs/celery.md#time-zone).
	selected := []string{"task_id", "COALESCE(status, '')", "result", "date_done::timestamptz", "COALESCE(traceback, '')"}
	for _, column := range optionalColumns {
		name := column.name
		if !columns[name] {
			name = "NULL"
		}
		selected = append(selected, name)
	}
	rows, err := b.db.Pool.Query(ctx, "SELECT "+strings.Join(selected, ", ")+" FROM "+b.table()+" WHERE task_id = ANY ($1)", taskIDs)
	if err != nil {
		return nil, err
	}
	found := map[string]results.Outcome{}
	var o results.Outcome
	var column, children, args, kwargs, stamps []byte
	var done *time.Time
	var name, worker, queue *string
	_, err = pgx.ForEachRow(rows, []any{&o.TaskID, &o.State, &column, &done, &o.Traceback, &children, &name, &args, &kwargs, &worker, &o.Retries, &queue, &stamps}, func() error {
		row := o
		row.Task, row.Worker, row.Queue = deref(name), deref(worker), deref(queue)
		row.Args, row.Kwargs, row.Children, row.Stamps = slices.Clone(args), slices.Clone(kwargs), slices.Clone(children), slices.Clone(stamps)
		row.HasRequest = name != nil || args != nil
		if done != nil {
			row.DateDone = done.UTC()
		}
		row.SetColumn(column)
		found[row.TaskID] = row
		return nil
	})
	return found, err
}

func deref(text *string) string {
	if text == nil {
		return ""
	}
	return *text
}

// firstPause is the pause of Wait after its first look. Each pause is half as long
// again as the one before, up to Config.PollInterval.
const firstPause = 20 * time.Millisecond

// Wait returns the outcome of a task once it has ended. PostgreSQL tells nobody of a
// new row, so that Wait looks again and again, as Celery does.
func (b *Backend) Wait(ctx context.Context, taskID string) (results.Outcome, error) {
	for pause := min(firstPause, b.config.PollInterval); ; pause = min(pause*3/2, b.config.PollInterval) {
		outcomes, err := b.Load(ctx, taskID)
		if err != nil && ctx.Err() != nil {
			return results.Outcome{}, context.Cause(ctx)
		}
		if err != nil {
			return results.Outcome{}, err
		}
		if results.IsFinal(outcomes[0].State) {
			return outcomes[0], nil
		}
		select {
		case <-ctx.Done():
			return results.Outcome{}, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// cleanupRows bounds how many rows one statement of Cleanup deletes: a year of results
// cannot be deleted within Config.TryTimeout.
const cleanupRows = 5000

// Cleanup removes outcomes that ended longer ago than age, and returns how many. It
// does what Celery's daily task celery.backend_cleanup does with the setting
// result_expires, which is one day by default: it also removes groups that were stored
// longer ago, which are not counted. It also removes starts as old as that, of tasks that
// were never delivered again. A worker calls it for that task (see
// worker.Config.ResultExpires); no goroutine calls it by itself.
func (b *Backend) Cleanup(ctx context.Context, age time.Duration) (removed int64, err error) {
	before := time.Now().Add(-age)
	removed, err = b.removeOld(ctx, b.table(), "date_done < $1::timestamptz", before)
	if err != nil {
		return removed, err
	}
	groups := qualified(b.config.SetSchema, b.config.SetTable)
	var columns map[string]bool
	err = b.db.Retry(ctx, "look at the table "+b.config.SetTable, func(ctx context.Context) (err error) {
		columns, err = readColumns(ctx, b.db.Pool, groups)
		return err
	})
	// A program that keeps no groups need not have their table.
	if err == nil && len(columns) > 0 {
		_, err = b.removeOld(ctx, groups, "date_done < $1::timestamptz", before)
	}
	if err == nil && b.config.StartsTable != "" {
		_, err = b.removeOld(ctx, b.startsTable(), "started_at < $1::timestamptz", before)
	}
	return removed, err
}

// removeOld deletes the rows of a table that fulfil a condition.
func (b *Backend) removeOld(ctx context.Context, table, condition string, before time.Time) (removed int64, err error) {
	statement := "DELETE FROM " + table + " WHERE ctid = ANY (ARRAY(SELECT ctid FROM " + table + " WHERE " + condition + " LIMIT " + strconv.Itoa(cleanupRows) + "))"
	for {
		var rows int64
		err := b.db.Retry(ctx, "remove old rows from "+table, func(ctx context.Context) error {
			tag, err := b.db.Pool.Exec(ctx, statement, before)
			rows = tag.RowsAffected()
			return err
		})
		removed += rows
		if err != nil || rows < cleanupRows {
			return removed, err
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var parkedCommand = &command{
	name:       "parked",
	alsoCalled: []string{"waiting", "messages", "queue"},
	summary:    "list messages that wait in the database",
	about: "Lists the messages that workers of this program have taken from a queue and keep in the database, because another run has the workspace. A worker publishes each when its turn comes, " +
		"and the last worker that stops in order publishes all of them, so that a Python worker finds them in the queue. It only reads.\n\n" +
		"What is listed while no worker of this program lives was left by a crash: the next worker that starts sees to it. If none will, because a Python worker takes over, " +
		"`mm-orchestrator parked return` gives the messages back to the queue.\n\n" +
		"The order is that of publication: rollbacks first, then high priority, then the oldest run. Times are UTC. With --json the output has the keys workers and messages; " +
		"fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator parked", "what waits, and does a worker live that sees to it?"},
		{"mm-orchestrator parked return", "the way back to a Python worker after a crash"},
	},
	topics:      []topic{topicDatabase},
	subcommands: []*command{returnParkedCommand},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &parkedFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

var returnParkedCommand = &command{
	name:       "return",
	alsoCalled: []string{"publish", "restore", "requeue", "unpark", "flush"},
	summary:    "give parked messages back to their queue",
	about: "Publishes the parked messages of the configured queue to that queue, with the headers, the properties and the body that they came with, and forgets each one when the broker has confirmed it. " +
		"It is for the way back to a Python worker after a crash: a worker of this program that stops in order has done it already.\n\n" +
		"It refuses while a worker of this program lives on the queue, which publishes each message when its turn comes and would take and park it again. " +
		"Interrupted or run again it loses nothing; a message that it had just published may come twice.\n\n" +
		"Exit code 0: nothing is parked for the queue any more. 1: a worker lives, or a message could not be published. 69: broker or database cannot be reached.",
	examples: []example{
		{"mm-orchestrator parked return --dry-run", "which messages would it publish?"},
		{"mm-orchestrator parked return", "publish them, then start the Python worker"},
		{"mm-orchestrator parked return --queue box2.run", "those of another queue"},
	},
	topics: []topic{topicBroker, topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &returnParkedFlags{}
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Say what would be published, and change nothing.")
		fs.BoolVar(&f.force, "force", false, "Publish also while workers of this program live. They park again what has to wait.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

// Scripts rely on the JSON forms: fields may be added, none is renamed.

type parkedReport struct {
	Workers  []parkedWorker  `json:"workers"`
	Messages []parkedMessage `json:"messages"`
}

type parkedWorker struct {
	Queue string    `json:"queue"`
	Node  string    `json:"node"`
	Since time.Time `json:"since"`
}

type parkedMessage struct {
	Queue  string `json:"queue"`
	RunID  string `json:"run_id"`
	Step   string `json:"step"`
	TaskID string `json:"task_id"`
	// Why is workspace, busy or lost.
	Why       string    `json:"why"`
	Workspace string    `json:"workspace,omitempty"`
	HeldBy    string    `json:"held_by,omitempty"`
	Since     time.Time `json:"since"`
}

func parkedMessageOf(p store.ParkedRow) parkedMessage {
	return parkedMessage{p.Queue, p.RunID, string(p.Step), p.TaskID, string(p.Why), p.Workspace, p.Holder, p.Since}
}

// reason says in words why a message waits.
func (m parkedMessage) reason() string {
	switch {
	case m.Why == string(store.ParkedBusy):
		return "a worker was running the step"
	case m.Why == string(store.ParkedLost):
		return "rollback of a run that was lost"
	case m.HeldBy == "" || m.HeldBy == m.RunID:
		return "waits for the workspace, which is free"
	}
	return "run " + m.HeldBy + " has the workspace"
}

type parkedFlags struct{ json bool }

func (f *parkedFlags) run(ctx context.Context, p *program, in input) (err error) {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: time.Second}, c.tablesDatabase(), 0, p.say)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = sayMigrate(ctx, db, err) }()
	rows, err := db.ListParked(ctx, "")
	if err != nil {
		return err
	}
	workers, err := db.ListWorkers(ctx, "")
	if err != nil {
		return err
	}
	report := parkedReport{Workers: []parkedWorker{}, Messages: []parkedMessage{}}
	for _, w := range workers {
		report.Workers = append(report.Workers, parkedWorker{w.Queue, w.Node, w.Since})
	}
	for _, row := range rows {
		report.Messages = append(report.Messages, parkedMessageOf(row))
	}
	if f.json {
		return runPrinter{out: p.stdout, redactor: artifacts.NewRedactor(p.env)}.json(report)
	}
	if len(rows) == 0 {
		_, err := fmt.Fprintln(p.stdout, "no message is parked")
		return err
	}
	table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "RUN\tSTEP\tSINCE\tWHY")
	queue := ""
	for _, m := range report.Messages {
		if m.Queue != queue {
			queue = m.Queue
			fmt.Fprintf(table, "queue %s: %s\t\t\t\n", oneLine(queue, 80), whoPublishes(queue, workers))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", m.RunID, m.Step, clock(&m.Since), m.reason())
	}
	return table.Flush()
}

// whoPublishes says who sees to the parked messages of a queue.
func whoPublishes(queue string, workers []store.LiveWorker) string {
	var nodes []string
	for _, w := range workers {
		if w.Queue == queue {
			nodes = append(nodes, oneLine(w.Node, 40))
		}
	}
	if len(nodes) == 0 {
		return "no worker of this program lives"
	}
	return "published in turn by " + strings.Join(nodes, ", ")
}

type returnParkedFlags struct{ dryRun, force, json bool }

// returnedReport is what `parked return --json` prints.
type returnedReport struct {
	Queue  string `json:"queue"`
	DryRun bool   `json:"dry_run"`
	// Returned are the messages that the queue has again, or would have.
	Returned []parkedMessage `json:"returned"`
	// Left counts those of the queue that are still parked.
	Left int `json:"left"`
}

// deathPause is how long a worker that has just ended may seem to live: its
// session ends some moments after its process.
const deathPause = 2 * time.Second

func (f *returnParkedFlags) run(ctx context.Context, p *program, in input) (err error) {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: typedRetry}, c.tablesDatabase(), 0, p.say)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = sayMigrate(ctx, db, err) }()
	all, err := db.ListParked(ctx, "")
	if err != nil {
		return err
	}
	report := returnedReport{Queue: c.Queue, DryRun: f.dryRun, Returned: []parkedMessage{}}
	var parked []store.ParkedRow
	elsewhere := map[string]int{}
	for _, row := range all {
		if row.Queue == c.Queue {
			parked = append(parked, row)
		} else {
			elsewhere[row.Queue]++
		}
	}
	workers, err := liveWorkers(ctx, db, c.Queue)
	if err != nil {
		return err
	}
	switch {
	case len(parked) == 0:
	case len(workers) > 0 && !f.force:
		return &curedError{
			fmt.Errorf("worker %s lives on queue %q since %s, and publishes each parked message when its turn comes; nothing was published", workers[0].Node, c.Queue, clock(&workers[0].Since)),
			"Stop it in order: the last worker that stops gives all of them back by itself. Or add --force",
		}
	case f.dryRun:
		for _, row := range parked {
			report.Returned = append(report.Returned, parkedMessageOf(row))
		}
		report.Left = len(parked)
	default:
		report.Returned, err = p.returnParked(ctx, c, db, parked)
		report.Left = len(parked) - len(report.Returned)
		if err == nil && len(workers) == 0 {
			err = db.ClearHolds(ctx, c.Queue)
		}
	}
	if told := f.tell(p, report, elsewhere); err == nil {
		err = told
	}
	return err
}

// liveWorkers lists the workers of a queue that live, and waits some moments
// for those that have just ended.
func liveWorkers(ctx context.Context, db *store.Store, queue string) ([]store.LiveWorker, error) {
	for deadline := time.Now().Add(deathPause); ; {
		workers, err := db.ListWorkers(ctx, queue)
		if err != nil || len(workers) == 0 || time.Now().After(deadline) {
			return workers, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// returnParked publishes what is parked for the configured queue, and returns
// what the queue has again.
func (p *program) returnParked(ctx context.Context, c *configuration, db *store.Store, parked []store.ParkedRow) ([]parkedMessage, error) {
	returned := []parkedMessage{}
	config, err := c.worker(nil, quiet())
	if err != nil {
		return returned, err
	}
	w, err := worker.New(config)
	if err != nil {
		return returned, &configError{err.Error()}
	}
	rows := map[int64]store.ParkedRow{}
	for _, row := range parked {
		rows[row.ID] = row
	}
	err = w.WithConnection(ctx, func(publish func(context.Context, protocol.Publishing) error) error {
		_, err := orchestrator.ReturnParked(ctx, db, c.Queue, publish, func(m store.ParkedMessage) {
			row, known := rows[m.ID]
			if !known {
				row = store.ParkedRow{Queue: m.Queue, RunID: m.RunID, Step: m.Step, TaskID: m.TaskID, Why: m.Why, Since: m.Since}
			}
			returned = append(returned, parkedMessageOf(row))
		})
		if errors.Is(err, worker.ErrUnroutable) {
			return &curedError{err, fmt.Sprintf("The queue %q does not exist: start the worker that shall consume it, which makes it, and run this again", c.Queue)}
		}
		return err
	})
	return returned, c.cureBroker(err)
}

func (f *returnParkedFlags) tell(p *program, report returnedReport, elsewhere map[string]int) error {
	if f.json {
		return runPrinter{out: p.stdout, redactor: artifacts.NewRedactor(p.env)}.json(report)
	}
	what := "is back"
	if f.dryRun {
		what = "would be back"
	}
	for _, m := range report.Returned {
		fmt.Fprintf(p.stdout, "run %s: the message of step %s %s in queue %s\n", m.RunID, m.Step, what, oneLine(m.Queue, 80))
	}
	switch n := len(report.Returned); {
	case n > 0 && f.dryRun:
		fmt.Fprintf(p.stdout, "%d parked for queue %s; nothing was changed\n", n, oneLine(report.Queue, 80))
	case n > 0 || report.Left > 0:
		fmt.Fprintf(p.stdout, "%d returned to queue %s, %d still parked\n", n, oneLine(report.Queue, 80), report.Left)
	default:
		fmt.Fprintf(p.stdout, "no message is parked for queue %s\n", oneLine(report.Queue, 80))
	}
	for _, queue := range slices.Sorted(maps.Keys(elsewhere)) {
		n := elsewhere[queue]
		fmt.Fprintf(p.stdout, "%d parked for queue %s: give --queue %s to return them\n", n, oneLine(queue, 80), oneLine(queue, 80))
	}
	return nil
}

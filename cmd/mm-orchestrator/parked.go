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

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var parkedCommand = &command{
	name:     "parked",
	synonyms: []string{"waiting", "messages", "queue"},
	summary:  "list parked messages: those of runs that wait for their workspace",
	about: "Lists parked messages. While one run holds a workspace, workers take the messages of other runs for it from the queue and keep them in the database. A worker publishes each message when its run's turn comes. " +
		"The last worker that stops publishes all of them, so that a Python worker finds them in the queue, but not while the queue is paused (`mm-orchestrator pause`). This command only reads.\n\n" +
		"If messages are listed and no worker of this program is alive, the last one crashed. The next worker that starts will publish them. Before a Python worker takes over, " +
		"return them to the queue with `mm-orchestrator parked return`.\n\n" +
		"Messages are listed in the order of their turns: rollbacks first, then high priority, then the oldest run. Times are UTC. With --json the output has the keys workers, messages and pauses; " +
		"fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator parked", "which messages wait, and is a worker alive to publish them?"},
		{"mm-orchestrator parked return", "after a crash, before a Python worker takes over"},
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
	name:     "return",
	synonyms: []string{"publish", "restore", "requeue", "unpark", "flush"},
	summary:  "return parked messages to their queue",
	about: "Publishes the parked messages of the configured queue to that queue, with their original headers, properties and body, and deletes each one after the broker has confirmed it. " +
		"Use it before a Python worker takes over after a crash. After an orderly stop it is not needed: the last worker has returned the messages.\n\n" +
		"It refuses while a worker of this program is alive on the queue, because that worker would take the messages and park them again. " +
		"It can be interrupted and run again: no message is lost, and none is in the queue twice afterwards. For this it first looks at the messages that are ready in the queue, and removes those that are parked too: a worker that was killed while it parked them left them there.\n\n" +
		"Exit code 0: no message of the queue is parked any more. 1: a worker is alive, or a message could not be published. 69: broker or database unreachable.",
	examples: []example{
		{"mm-orchestrator parked return --dry-run", "which messages would it publish?"},
		{"mm-orchestrator parked return", "publish them, then start the Python worker"},
		{"mm-orchestrator parked return --queue box2.run", "the messages of another queue"},
	},
	topics: []topic{topicBroker, topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &returnParkedFlags{}
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Print which messages would be published, without publishing them.")
		fs.BoolVar(&f.force, "force", false, "Publish even if workers of this program are alive. They will park again what has to wait.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

// Scripts rely on the JSON forms: fields may be added, none is renamed.

type parkedReport struct {
	Workers  []parkedWorker  `json:"workers"`
	Messages []parkedMessage `json:"messages"`
	// Pauses are the open ones, of all queues.
	Pauses []pauseLine `json:"pauses"`
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
	// Why is the reason for parking: workspace, busy, lost, paused or requested.
	Why       string    `json:"why"`
	Workspace string    `json:"workspace,omitempty"`
	Holder    string    `json:"held_by,omitempty"`
	Since     time.Time `json:"since"`
}

func parkedMessageOf(p store.ParkedRow) parkedMessage {
	return parkedMessage{p.Queue, p.RunID, string(p.Step), p.TaskID, string(p.Why), p.Workspace, p.Holder, p.Since}
}

// reason explains why a message is parked.
func (m parkedMessage) reason() string {
	switch {
	case m.Why == string(store.ParkedBusy):
		return "a worker was running the step"
	case m.Why == string(store.ParkedLost) && m.Step == string(store.StepRollback):
		return "rollback of a lost run"
	case m.Why == string(store.ParkedLost):
		return "first step of a run that was approved here"
	case m.Why == string(store.ParkedPaused):
		return "the queue was paused"
	case m.Why == string(store.ParkedRequested):
		return "rollback that an operator has requested"
	case m.Holder == "" || m.Holder == m.RunID:
		return "waits for the workspace, which is free"
	}
	return "run " + m.Holder + " holds the workspace"
}

type parkedFlags struct{ json bool }

func (f *parkedFlags) run(ctx context.Context, p *program, in input) (err error) {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: time.Second}, c.tablesDatabase(), 0, p.reportWait)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	rows, err := db.ListParked(ctx, "")
	if err != nil {
		return err
	}
	pauses, err := db.ListPauses(ctx, store.PauseFilter{})
	if err != nil {
		return err
	}
	workers, err := db.ListWorkers(ctx, "")
	if err != nil {
		return err
	}
	show := runPrinter{out: p.stdout, redactor: p.redactor()}
	report := parkedReport{Workers: []parkedWorker{}, Messages: []parkedMessage{}, Pauses: []pauseLine{}}
	for _, pause := range pauses {
		report.Pauses = append(report.Pauses, show.pause(pause))
	}
	for _, w := range workers {
		report.Workers = append(report.Workers, parkedWorker{w.Queue, w.Node, w.Since})
	}
	for _, row := range rows {
		report.Messages = append(report.Messages, parkedMessageOf(row))
	}
	if f.json {
		return show.json(report)
	}
	for _, pause := range report.Pauses {
		fmt.Fprintln(p.stdout, pause.text())
	}
	if len(rows) == 0 {
		_, err := fmt.Fprintln(p.stdout, "no parked messages")
		return err
	}
	table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	queue := ""
	for i, m := range report.Messages {
		if i == 0 || m.Queue != queue {
			queue = m.Queue
			// A line without a tab is in no column and leaves their widths alone.
			fmt.Fprintf(table, "queue %s: %s\n", oneLine(queue, 80), whoPublishes(queue, workers))
			fmt.Fprintln(table, "RUN\tSTEP\tSINCE\tWHY")
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", m.RunID, m.Step, clock(&m.Since), m.reason())
	}
	return table.Flush()
}

// whoPublishes names the workers that will publish the parked messages of a queue.
func whoPublishes(queue string, workers []store.LiveWorker) string {
	var nodes []string
	for _, w := range workers {
		if w.Queue == queue {
			nodes = append(nodes, oneLine(w.Node, 40))
		}
	}
	if len(nodes) == 0 {
		return "no mm-orchestrator worker is alive"
	}
	return "published in turn by " + strings.Join(nodes, ", ")
}

type returnParkedFlags struct{ dryRun, force, json bool }

// returnedReport is what `parked return --json` prints.
type returnedReport struct {
	Queue  string `json:"queue"`
	DryRun bool   `json:"dry_run"`
	// Returned are the messages that were published, or would be.
	Returned []parkedMessage `json:"returned"`
	// Left is the number of messages of the queue that are still parked.
	Left int `json:"left"`
}

// sessionEndWait is how long a worker that has just ended may still look alive:
// the server ends its session some time after the process.
const sessionEndWait = 2 * time.Second

func (f *returnParkedFlags) run(ctx context.Context, p *program, in input) (err error) {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: interactiveRetry}, c.tablesDatabase(), 0, p.reportWait)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	all, err := db.ListParked(ctx, "")
	if err != nil {
		return err
	}
	report := returnedReport{Queue: c.Queue, DryRun: f.dryRun, Returned: []parkedMessage{}}
	var parked []store.ParkedRow
	otherQueues := map[string]int{}
	for _, row := range all {
		if row.Queue == c.Queue {
			parked = append(parked, row)
		} else {
			otherQueues[row.Queue]++
		}
	}
	workers, err := liveWorkers(ctx, db, c.Queue)
	if err != nil {
		return err
	}
	switch {
	case len(parked) == 0:
	case len(workers) > 0 && !f.force:
		return aliveError(c.Queue, workers)
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
	if printErr := f.print(p, report, otherQueues); err == nil {
		err = printErr
	}
	return err
}

// aliveError says that nothing was published because workers are alive.
func aliveError(queue string, workers []store.LiveWorker) error {
	var list []string
	for _, w := range workers {
		list = append(list, fmt.Sprintf("%s (since %s)", w.Node, clock(&w.Since)))
	}
	text := fmt.Sprintf("worker %s is alive on queue %q, and publishes each parked message when its turn comes; nothing was published", list[0], queue)
	if len(list) > 1 {
		text = fmt.Sprintf("workers %s are alive on queue %q, and publish each parked message when its turn comes; nothing was published", strings.Join(list, ", "), queue)
	}
	return &curedError{errors.New(text), "Stop " + itOrThem(len(list)) + " with SIGTERM: the last worker that stops returns all parked messages. Or add --force"}
}

// liveWorkers lists the live workers of a queue. If there are any it looks again
// for up to sessionEndWait, since they may have just ended.
func liveWorkers(ctx context.Context, db *store.Store, queue string) ([]store.LiveWorker, error) {
	for deadline := time.Now().Add(sessionEndWait); ; {
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

// returnParked publishes the parked messages of the configured queue, and returns
// those that were published, also with an error.
func (p *program) returnParked(ctx context.Context, c *configuration, db *store.Store, parked []store.ParkedRow) ([]parkedMessage, error) {
	returned := []parkedMessage{}
	rows := map[int64]store.ParkedRow{}
	for _, row := range parked {
		rows[row.ID] = row
	}
	tell := orchestrator.ReturnObserver{
		Returned: func(m store.ParkedMessage) {
			row, known := rows[m.ID]
			if !known {
				row = store.ParkedRow{Queue: m.Queue, RunID: m.RunID, Step: m.Step, TaskID: m.TaskID, Why: m.Why, Since: m.Since}
			}
			returned = append(returned, parkedMessageOf(row))
		},
		Unchecked: func(err error) {
			p.printNote(fmt.Sprintf("%v\nIf a worker was killed while it parked a message, that is in the queue twice, and a Python worker runs its step twice", err))
		},
	}
	err := p.withBroker(ctx, c, func(queue connectedWorker) error {
		if err := awaitNoConsumers(ctx, queue.Worker); err != nil {
			return err
		}
		_, err := orchestrator.ReturnParked(ctx, db, c.Queue, queue, tell)
		return err
	})
	return returned, err
}

// awaitNoConsumers waits until the queue has no consumer, for up to sessionEndWait: the
// broker returns what a killed worker has received some time after the process has ended.
// Other consumers are Python workers.
func awaitNoConsumers(ctx context.Context, w *worker.Worker) error {
	for deadline := time.Now().Add(sessionEndWait); ; {
		found, err := w.Inspect(ctx)
		if err != nil || !slices.ContainsFunc(found.Queues, func(q worker.QueueInspection) bool { return q.Consumers > 0 }) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (f *returnParkedFlags) print(p *program, report returnedReport, otherQueues map[string]int) error {
	if f.json {
		return runPrinter{out: p.stdout, redactor: p.redactor()}.json(report)
	}
	verb := "returned"
	if f.dryRun {
		verb = "would be returned"
	}
	for _, m := range report.Returned {
		fmt.Fprintf(p.stdout, "run %s: message of step %s %s to queue %s\n", m.RunID, m.Step, verb, oneLine(m.Queue, 80))
	}
	switch n := len(report.Returned); {
	case n > 0 && f.dryRun:
		fmt.Fprintf(p.stdout, "%s parked for queue %s; nothing was changed\n", counted(n, "message"), oneLine(report.Queue, 80))
	case n > 0 || report.Left > 0:
		fmt.Fprintf(p.stdout, "%s returned to queue %s, %d still parked\n", counted(n, "message"), oneLine(report.Queue, 80), report.Left)
	default:
		fmt.Fprintf(p.stdout, "no parked messages for queue %s\n", oneLine(report.Queue, 80))
	}
	for _, queue := range slices.Sorted(maps.Keys(otherQueues)) {
		n := otherQueues[queue]
		fmt.Fprintf(p.stdout, "%s parked for queue %s: add --queue %s to return %s\n", counted(n, "message"), oneLine(queue, 80), oneLine(queue, 80), itOrThem(n))
	}
	return nil
}

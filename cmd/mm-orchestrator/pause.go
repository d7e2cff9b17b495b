package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

var pauseCommand = &command{
	name:     "pause",
	synonyms: []string{"freeze", "hold", "suspend", "drain", "disable", "lock"},
	summary:  "let workers begin no new run of a queue",
	about: "Pauses the configured queue: workers of this program begin no new run until `mm-orchestrator resume`. They go on to consume the queue, and park the messages of runs that have to wait. " +
		"A run that has begun goes on to its end; with --park, its running step ends and its next step waits, and the run keeps its workspace meanwhile. A rollback never waits. " +
		"A run that is retried after its end counts as new.\n\n" +
		"While the queue is paused, `mm-orchestrator runs` and /readyz say so, and the metric mm_orchestrator_paused is 1. A paused worker stays ready: the platform must not restart it. " +
		"The pause is kept in the database: it outlives workers, and applies to those that start later. Workers in Python know nothing of it.\n\n" +
		"If the queue is paused already, the pause gets the new reason and mode, and keeps who began it and when.",
	examples: []example{
		{"mm-orchestrator pause --reason 'database upgrade until 14:00'", "begin no new run, finish those that have begun"},
		{"mm-orchestrator pause --park --reason 'disk is failing'", "stop after the running step"},
		{"mm-orchestrator pause --list", "the pauses until now: who, when and why"},
	},
	topics: []topic{topicBroker, topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &pauseFlags{}
		fs.StringVar(&f.reason, "reason", "", "Why the queue is paused, as `text`. Required.")
		fs.BoolVar(&f.park, "park", false, "Let also runs that have begun wait, after their running step.")
		fs.StringVar(&f.by, "by", "", "Who pauses the queue, as `text`. Default: the user and host of this process.")
		fs.BoolVar(&f.list, "list", false, "Change nothing, and list the newest 20 pauses of the queue.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

var resumeCommand = &command{
	name:     "resume",
	synonyms: []string{"unpause", "continue", "unfreeze", "enable", "unlock"},
	summary:  "end the pause of a queue",
	about: "Ends the pause of the configured queue, and publishes the parked messages whose turn has come: rollbacks first, then high priority, then the oldest run. " +
		"It does so itself, so that the order holds also while no worker is alive. If the broker cannot be reached, the pause has ended all the same: " +
		"workers publish the messages as soon as they can, and the command can be run again.\n\n" +
		"Exit code 0: the queue is not paused, and no message whose turn has come is parked. 69: broker or database unreachable.",
	examples: []example{
		{"mm-orchestrator resume", "let workers begin runs again"},
	},
	topics: []topic{topicBroker, topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &resumeFlags{}
		fs.StringVar(&f.by, "by", "", "Who ends the pause, as `text`. Default: the user and host of this process.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

// Scripts rely on the JSON forms: fields may be added, none is renamed.

type pauseLine struct {
	Queue string `json:"queue"`
	// Mode is finish or park.
	Mode      string     `json:"mode"`
	Reason    string     `json:"reason"`
	By        string     `json:"by,omitempty"`
	Since     time.Time  `json:"since"`
	ChangedBy string     `json:"changed_by,omitempty"`
	ChangedAt *time.Time `json:"changed_at,omitempty"`
	ResumedBy string     `json:"resumed_by,omitempty"`
	ResumedAt *time.Time `json:"resumed_at,omitempty"`
}

func (s runPrinter) pause(p store.Pause) pauseLine {
	return pauseLine{
		Queue: p.Queue, Mode: string(p.Mode), Reason: s.redactor.String(p.Reason), By: p.By, Since: p.Since,
		ChangedBy: p.ChangedBy, ChangedAt: p.ChangedAt, ResumedBy: p.ResumedBy, ResumedAt: p.ResumedAt,
	}
}

// text is one line for an operator.
func (p pauseLine) text() string {
	text := "queue " + p.Queue + " is paused since " + clock(&p.Since)
	if p.By != "" {
		text += " by " + p.By
	}
	if p.Mode == string(store.PausePark) {
		text += ", runs that have begun wait too"
	}
	return oneLine(text+": "+p.Reason, 1000)
}

type pauseFlags struct {
	reason, by       string
	park, list, json bool
}

func (f *pauseFlags) run(ctx context.Context, p *program, in input) (err error) {
	if f.list {
		for _, name := range []string{"reason", "park", "by"} {
			if in.parsed.Flags().Changed(name) {
				return &usageError{"--list changes nothing: remove it, or --" + name}
			}
		}
	} else if strings.TrimSpace(f.reason) == "" {
		return &usageError{"pause needs --reason: others will want to know why no run begins; " + seeHelp(in.parsed)}
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	show := runPrinter{out: p.stdout, redactor: p.redactor()}
	if f.list {
		return f.printList(ctx, db, c.Queue, show)
	}
	request := store.Pause{Queue: c.Queue, Mode: store.PauseFinish, Reason: p.redactor().String(f.reason), By: p.askedBy(f.by)}
	if f.park {
		request.Mode = store.PausePark
	}
	pause, already, err := db.PauseQueue(ctx, request)
	if err != nil {
		return err
	}
	line := show.pause(pause)
	if f.json {
		return show.json(line)
	}
	if already {
		fmt.Fprintf(p.stdout, "the pause has a new reason; %s\n", line.text())
	} else {
		fmt.Fprintln(p.stdout, line.text())
	}
	workspaces, err := db.ListWorkspaces(ctx, c.Queue, nil)
	if err != nil {
		return err
	}
	for _, w := range workspaces {
		if w.RunID == "" || !w.RunGoesOn || w.RunStatus == store.RunPending {
			continue
		}
		next := "goes on to its end"
		switch {
		case w.RunStatus == store.RunFailed:
			next = "is rolled back"
		case w.RunStatus == store.RunAwaitingApproval:
			next = "waits for its approval"
		case f.park && w.Working:
			next = "waits once its running step has ended"
		case f.park:
			next = "waits before its next step"
		}
		fmt.Fprintf(p.stdout, "run %s (%s) %s\n", w.RunID, w.RunStatus, next)
	}
	return nil
}

func (f *pauseFlags) printList(ctx context.Context, db *store.Store, queue string, show runPrinter) error {
	pauses, err := db.ListPauses(ctx, store.PauseFilter{Queue: queue, Ended: true, Limit: 20})
	if err != nil {
		return err
	}
	lines := make([]pauseLine, len(pauses))
	for i, pause := range pauses {
		lines[i] = show.pause(pause)
	}
	if f.json {
		return show.json(lines)
	}
	if len(lines) == 0 {
		_, err := fmt.Fprintf(show.out, "queue %s was never paused\n", oneLine(queue, 80))
		return err
	}
	for _, line := range lines {
		fmt.Fprintf(show.out, "%s  %s  %s, by %s: %s\n", clock(&line.Since), dash(clock(line.ResumedAt)), line.Mode, dash(oneLine(line.By, 80)), oneLine(line.Reason, 400))
		if line.ChangedAt != nil {
			fmt.Fprintf(show.out, "    changed %s by %s\n", clock(line.ChangedAt), dash(oneLine(line.ChangedBy, 80)))
		}
		if line.ResumedAt != nil {
			fmt.Fprintf(show.out, "    resumed %s by %s\n", clock(line.ResumedAt), dash(oneLine(line.ResumedBy, 80)))
		}
	}
	return nil
}

type resumeFlags struct {
	by   string
	json bool
}

// resumedReport is what `resume --json` prints.
type resumedReport struct {
	// Pause is the pause that has ended, null if the queue was not paused.
	Pause *pauseLine `json:"pause"`
	// Published are the messages that were returned to the queue.
	Published []parkedMessage `json:"published"`
}

func (f *resumeFlags) run(ctx context.Context, p *program, in input) (err error) {
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	pause, err := db.ResumeQueue(ctx, c.Queue, p.askedBy(f.by))
	if err != nil {
		return err
	}
	show := runPrinter{out: p.stdout, redactor: p.redactor()}
	report := resumedReport{Published: []parkedMessage{}}
	if pause != nil {
		line := show.pause(*pause)
		report.Pause = &line
	}
	report.Published, err = p.publishParked(ctx, c, db)
	switch {
	case f.json:
		err = errors.Join(show.json(report), err)
	case pause == nil:
		fmt.Fprintf(p.stdout, "queue %s is not paused\n", oneLine(c.Queue, 80))
	default:
		fmt.Fprintf(p.stdout, "queue %s is no longer paused. It was paused since %s by %s: %s\n",
			oneLine(c.Queue, 80), clock(&pause.Since), dash(oneLine(pause.By, 80)), oneLine(report.Pause.Reason, 1000))
	}
	if !f.json {
		for _, m := range report.Published {
			fmt.Fprintf(p.stdout, "run %s: message of step %s returned to queue %s\n", m.RunID, m.Step, oneLine(m.Queue, 80))
		}
	}
	if err != nil {
		return fmt.Errorf("the queue is not paused, but parked messages cannot be published yet; a worker publishes them, or `mm-orchestrator resume` if it is run again: %w", err)
	}
	return nil
}

// publishParked publishes the parked messages of the configured queue whose turn has
// come. It connects to the broker only if messages are parked.
func (p *program) publishParked(ctx context.Context, c *configuration, db *store.Store) ([]parkedMessage, error) {
	published := []parkedMessage{}
	if parked, err := db.LookAtParked(ctx, c.Queue); err != nil || parked.Newest == 0 {
		return published, err
	}
	err := p.withBroker(ctx, c, func(queue connectedWorker) error {
		_, err := orchestrator.PublishParked(ctx, db, c.Queue, queue.Publish, func(m store.ParkedMessage) {
			published = append(published, parkedMessageOf(store.ParkedRow{Queue: m.Queue, RunID: m.RunID, Step: m.Step, TaskID: m.TaskID, Why: m.Why, Since: m.Since}))
		})
		return err
	})
	return published, err
}

// connectedWorker is a worker that does not run, and publishes on a connection of its own.
type connectedWorker struct {
	*worker.Worker
	publish func(context.Context, protocol.Publishing) error
}

// Publish publishes a message and waits until the broker has confirmed it.
func (w connectedWorker) Publish(ctx context.Context, m protocol.Publishing) error {
	return w.publish(ctx, m)
}

// withBroker calls do with a connection to the broker of the configured queue.
func (p *program) withBroker(ctx context.Context, c *configuration, do func(connectedWorker) error) error {
	config, err := c.worker(nil, discardLogger())
	if err != nil {
		return err
	}
	w, err := worker.New(config)
	if err != nil {
		return &configError{err.Error()}
	}
	err = w.WithConnection(ctx, func(publish func(context.Context, protocol.Publishing) error) error {
		err := do(connectedWorker{w, publish})
		if errors.Is(err, worker.ErrUnroutable) {
			return &curedError{err, fmt.Sprintf("The queue %q does not exist: start the worker that will consume it, which declares it, and run this again", c.Queue)}
		}
		return err
	})
	return c.cureBroker(err)
}

// openCommand resolves the settings of a command that an operator runs, and opens the
// database.
func (p *program) openCommand(ctx context.Context, in input) (*configuration, *store.Store, error) {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return nil, nil, err
	}
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: interactiveRetry, Redact: p.redactor().String}, c.tablesDatabase(), 0, p.reportWait)
	return c, db, err
}

// askedBy is who asks for something: what the flag --by says, or the operator.
func (p *program) askedBy(by string) string {
	if by = oneLine(by, 255); by != "" {
		return by
	}
	return p.operator()
}

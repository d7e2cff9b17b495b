package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

var changesCommand = &command{
	name:     "changes",
	synonyms: []string{"change", "baseline", "baselines", "pins", "pin", "backups", "undo"},
	args:     "[RUN]",
	words:    1,
	summary:  "list what is kept to take back the changes of runs",
	about: "Lists the runs whose change is kept, oldest first: the content of the workspace before the run, in git, and a container that keeps the image of the service before the run. With RUN it shows what is kept of one run, " +
		"and the commands that take it back by hand. RUN is the id of a run or its first 4 or more digits.\n\n" +
		"A worker removes what it keeps when the run has been over for as long as --keep-changes says; work of somebody else that a rollback has set aside stays until `mm-orchestrator changes remove`. This command only reads the database.\n\n" +
		"Times are UTC. With --json the output is an array of changes, or one change; fields may be added, none is renamed. The content of the key record may change with every version.",
	examples: []example{
		{"mm-orchestrator changes", "of which runs is the change kept?"},
		{"mm-orchestrator changes 6f1c2f0e", "what is kept of one run, and how is it taken back by hand?"},
		{"mm-orchestrator changes remove 6f1c2f0e", "remove it now"},
	},
	topics:      []topic{topicDatabase, topicChanges},
	subcommands: []*command{removeChangesCommand},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &changesFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

var removeChangesCommand = &command{
	name:     "remove",
	synonyms: []string{"rm", "delete", "clean", "cleanup", "prune"},
	args:     "[RUN]",
	words:    1,
	summary:  "remove what is kept to take back the change of a run",
	about: "Removes the refs, pinned images and records that a worker keeps to take back the changes of runs, either of one run or, with --over-for, of all runs of the queue that have been over for so long. " +
		"Afterwards neither a retry nor this program can bring back what was before these runs. Files, images and containers in use are not touched.\n\n" +
		"It must run where the worker runs, with the same settings: it needs the workspace and the docker engine. Workers may be running.\n\n" +
		"Work of somebody else that a rollback has set aside is kept, unless --set-aside is given.\n\n" +
		"Exit code 0: all of it is removed. 1: something could not be removed, or the run is not over. 69: database unreachable.",
	examples: []example{
		{"mm-orchestrator changes remove 6f1c2f0e", "of one run"},
		{"mm-orchestrator changes remove --over-for 24h --dry-run", "what would be removed of all runs that ended more than a day ago?"},
		{"mm-orchestrator changes remove 6f1c2f0e --set-aside", "also the work that was set aside"},
	},
	topics: []topic{topicBroker, topicDatabase, topicFiles, topicSteps, topicChanges},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &removeChangesFlags{}
		fs.StringVar(&f.overFor, "over-for", "", "Remove the changes of all runs that have been over for this `duration`, such as 24h. Default: none.")
		fs.BoolVar(&f.setAside, "set-aside", false, "Remove also work of somebody else that was set aside.")
		fs.BoolVar(&f.force, "force", false, "Remove the change of RUN although the run is not over. Its rollback then runs the commands of its plan.")
		fs.BoolVarP(&f.dryRun, "dry-run", "n", false, "Print what would be removed, without removing it.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

type changesFlags struct{ json bool }

// changeLine is a change as `changes --json` prints it. Scripts rely on it: fields
// may be added, none is renamed.
type changeLine struct {
	RunID string `json:"run_id"`
	// Service and Status are missing if the run was deleted.
	Service string `json:"service,omitempty"`
	Status  string `json:"status,omitempty"`
	Queue   string `json:"queue"`
	// Workspace is its path.
	Workspace string     `json:"workspace"`
	Over      bool       `json:"over"`
	LastAt    time.Time  `json:"last_at"`
	KeptUntil *time.Time `json:"kept_until,omitempty"`
	// Keeps has files, image and set-aside.
	Keeps []string `json:"keeps"`
	// Undone says that a rollback has taken the change back.
	Undone       bool `json:"undone"`
	RunElsewhere bool `json:"run_elsewhere"`
	// ByHand says how the change is taken back by hand.
	ByHand []orchestrator.HandStep `json:"by_hand,omitempty"`
	Record json.RawMessage         `json:"record,omitempty"`
}

func (c *configuration) changeLine(found store.Change) (changeLine, error) {
	line := changeLine{
		RunID: found.RunID, Service: found.TargetService, Status: string(found.RunStatus), Queue: found.Queue,
		Workspace: strings.TrimPrefix(found.Workspace, found.Queue+":"), Over: found.Over, LastAt: found.LastAt,
		Keeps: []string{}, RunElsewhere: found.RunElsewhere, Record: found.Record,
	}
	record, err := change.Decode(found.Record)
	if err != nil {
		return line, err
	}
	line.Undone, line.ByHand = record.Undone, orchestrator.ByHand(found.RunID, record)
	switch {
	case found.Reduced:
		line.Keeps = append(line.Keeps, "set-aside")
	default:
		if record.Files != nil {
			line.Keeps = append(line.Keeps, "files")
		}
		if record.Image != nil {
			line.Keeps = append(line.Keeps, "image")
		}
	}
	if found.Over && !found.Reduced {
		until := found.LastAt.Add(c.KeepChanges)
		line.KeptUntil = &until
	}
	return line, nil
}

// keeps says in words what is kept.
func (l changeLine) keeps() string {
	text := dash(strings.ReplaceAll(strings.Join(l.Keeps, ", "), "set-aside", "work that was set aside"))
	if l.Undone {
		text += ", rolled back"
	}
	return text
}

// keptUntil says until when it is kept.
func (l changeLine) keptUntil() string {
	switch {
	case l.KeptUntil != nil:
		return clock(l.KeptUntil)
	case !l.Over:
		return "the run is not over"
	}
	return "removed by hand"
}

func (f *changesFlags) run(ctx context.Context, p *program, in input) (err error) {
	var wanted *store.IDPrefix
	if len(in.words) == 1 {
		prefix, err := parseRun(in)
		if err != nil {
			return err
		}
		wanted = &prefix
	}
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
	list, err := db.ListChanges(ctx, store.ChangeFilter{})
	if err != nil {
		return err
	}
	if wanted != nil {
		found, err := findChange(list, *wanted, db)
		if err != nil {
			return err
		}
		list = []store.Change{found}
	}
	lines := make([]changeLine, 0, len(list))
	for _, found := range list {
		// A record of a newer version is listed without what only that can read.
		line, err := c.changeLine(found)
		if wanted != nil {
			if err != nil {
				return err
			}
			if f.json {
				return runPrinter{out: p.stdout, redactor: p.redactor()}.json(line)
			}
			return p.printChange(line)
		}
		lines = append(lines, line)
	}
	if f.json {
		return runPrinter{out: p.stdout, redactor: p.redactor()}.json(lines)
	}
	if len(lines) == 0 {
		_, err := fmt.Fprintln(p.stdout, "no changes are kept")
		return err
	}
	table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "RUN\tSERVICE\tSTATUS\tLAST STEP\tKEPT UNTIL\tKEPT")
	for _, l := range lines {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\n", l.RunID, dash(oneLine(l.Service, 14)), dash(l.Status), clock(&l.LastAt), l.keptUntil(), l.keeps())
	}
	return table.Flush()
}

// findChange returns the only change whose run has an id that begins with prefix.
func findChange(list []store.Change, prefix store.IDPrefix, db *store.Store) (store.Change, error) {
	var found []store.Change
	for _, c := range list {
		if strings.HasPrefix(c.RunID, prefix.String()) {
			found = append(found, c)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return store.Change{}, &reworded{fmt.Sprintf("no change of a run %s is kept in database %s", prefix, db.Place()), store.ErrNotFound}
	}
	var text strings.Builder
	fmt.Fprintf(&text, "several runs match %s: give more digits", prefix)
	for _, c := range found[:min(len(found), maxCandidates)] {
		fmt.Fprintf(&text, "\n  %s  %s  %s", c.RunID, dash(oneLine(c.TargetService, 14)), dash(string(c.RunStatus)))
	}
	if len(found) > maxCandidates {
		text.WriteString("\n  and more")
	}
	return store.Change{}, errors.New(text.String())
}

func (p *program) printChange(l changeLine) error {
	head := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"run", l.RunID}, {"service", dash(oneLine(l.Service, 200))}, {"status", dash(l.Status)}, {"last step", clock(&l.LastAt)}, {"kept until", l.keptUntil()},
		{"queue", oneLine(l.Queue, 200)}, {"workspace", oneLine(l.Workspace, 4096)}, {"kept", l.keeps()},
	} {
		fmt.Fprintf(head, "%s\t%s\n", line[0], line[1])
	}
	if err := head.Flush(); err != nil {
		return err
	}
	for _, step := range l.ByHand {
		fmt.Fprintf(p.stdout, "\nTo %s, in %s:\n", step.What, oneLine(step.Directory, 4096))
		for _, command := range step.Commands {
			fmt.Fprintf(p.stdout, "    %s\n", oneLine(command, 4096))
		}
	}
	return nil
}

type removeChangesFlags struct {
	overFor                       string
	setAside, force, dryRun, json bool
}

// removedLine is what `changes remove --json` prints of one run.
type removedLine struct {
	RunID string `json:"run_id"`
	// DryRun says that nothing was removed.
	DryRun bool     `json:"dry_run"`
	Refs   []string `json:"refs"`
	Pins   []string `json:"pins"`
	// Archives are saved images.
	Archives []string `json:"archives"`
	// SetAside are refs that were kept.
	SetAside []string `json:"set_aside"`
	Error    string   `json:"error,omitempty"`
}

func (f *removeChangesFlags) run(ctx context.Context, p *program, in input) (err error) {
	overFor := f.overFor != ""
	var age durationValue
	if overFor {
		if err := age.Set(f.overFor); err != nil {
			return &usageError{fmt.Sprintf("--over-for is %q: %v; %s", f.overFor, err, seeHelp(in.parsed))}
		}
	}
	var wanted store.IDPrefix
	switch {
	case len(in.words) == 1 && overFor:
		return &usageError{"changes remove takes the id of a run or --over-for, not both; " + seeHelp(in.parsed)}
	case len(in.words) == 0 && !overFor:
		return &usageError{"changes remove needs the id of a run, or --over-for; " + seeHelp(in.parsed)}
	case overFor && f.force:
		return &usageError{"--force applies only to one run; " + seeHelp(in.parsed)}
	case !overFor:
		if wanted, err = parseRun(in); err != nil {
			return err
		}
	}
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
	filter := store.ChangeFilter{Queue: c.Queue, Over: !f.force, Age: time.Duration(age)}
	var list []store.Change
	if overFor {
		list, err = db.ListChanges(ctx, filter)
	} else {
		var all []store.Change
		if all, err = db.ListChanges(ctx, store.ChangeFilter{}); err == nil {
			var found store.Change
			if found, err = findChange(all, wanted, db); err == nil {
				list, err = []store.Change{found}, f.checkRun(c, found)
			}
		}
	}
	if err != nil {
		return err
	}
	if len(list) == 0 && !f.json {
		_, err := fmt.Fprintln(p.stdout, "nothing to remove")
		return err
	}
	return f.remove(ctx, p, c, db, filter, list)
}

// checkRun returns an error if the change of a run cannot be removed here.
func (f *removeChangesFlags) checkRun(c *configuration, found store.Change) error {
	switch {
	case found.Queue != c.Queue:
		return &curedError{
			fmt.Errorf("the change of run %s belongs to queue %q, and this is queue %q; nothing was removed", found.RunID, found.Queue, c.Queue),
			"Run this where the worker of that queue runs, or add --queue " + found.Queue,
		}
	case !found.Over && !f.force:
		return &curedError{
			fmt.Errorf("run %s is %s, and its rollback may need its change; nothing was removed", found.RunID, found.RunStatus),
			"Wait for its end, or stop it with `mm-orchestrator runs revoke`. Or add --force",
		}
	}
	return nil
}

func (f *removeChangesFlags) remove(ctx context.Context, p *program, c *configuration, db *store.Store, filter store.ChangeFilter, list []store.Change) error {
	steps, closeEngine, err := p.openSteps(c, db)
	if err != nil {
		return err
	}
	defer closeEngine()
	lines, failed := []removedLine{}, 0
	for _, found := range list {
		filter.RunID = found.RunID
		removed, err := steps.RemoveChange(ctx, filter, orchestrator.RemoveOptions{SetAside: f.setAside, DryRun: f.dryRun})
		if errors.Is(err, store.ErrNotFound) && len(list) > 1 {
			continue // retried meanwhile, or removed by a worker
		}
		line := removedLine{RunID: found.RunID, DryRun: f.dryRun, Refs: notNil(removed.Refs), Pins: notNil(removed.Pins), Archives: notNil(removed.Archives), SetAside: notNil(removed.SetAside)}
		if err != nil {
			failed++
			line.Error = p.redactor().String(err.Error())
		}
		lines = append(lines, line)
		if !f.json {
			f.print(p, line)
		}
	}
	if f.json {
		if err := (runPrinter{out: p.stdout, redactor: p.redactor()}).json(lines); err != nil {
			return err
		}
	}
	if failed > 0 {
		return fmt.Errorf("what is kept of %s could not be removed: run this again when the cause is mended", counted(failed, "run"))
	}
	return nil
}

func notNil(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}

func (f *removeChangesFlags) print(p *program, l removedLine) {
	if l.Error != "" {
		fmt.Fprintf(p.stdout, "run %s: not removed: %s\n", l.RunID, oneLine(l.Error, 2000))
		return
	}
	verb := "removed"
	if f.dryRun {
		verb = "would be removed"
	}
	fmt.Fprintf(p.stdout, "run %s: %s: %s, %s, %s\n", l.RunID, verb, counted(len(l.Refs), "ref"), counted(len(l.Pins), "pin"), counted(len(l.Archives), "saved image"))
	for _, ref := range l.SetAside {
		fmt.Fprintf(p.stdout, "  kept: %s, work that was set aside; add --set-aside to remove it\n", ref)
	}
}

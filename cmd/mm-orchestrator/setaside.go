package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

var setAsideCommand = &command{
	name:     "set-aside",
	args:     "[RUN]",
	words:    1,
	synonyms: []string{"aside", "stash"},
	summary:  "list what rollbacks have set aside",
	about: "Lists the files that rollbacks have set aside in the workspace's repository: versions that somebody had made of files which the rollback had to bring back, and edits that a run had deployed. " +
		"With RUN it lists those of one run. RUN is the id of a run or its beginning, as for `mm-orchestrator runs`.\n\n" +
		"The state of a file compares it with the work tree: present (the work tree has this version), replaced (it has the version of before the run or of HEAD, another one that was set aside, or no file, so that nothing is lost if this version takes its place), " +
		"edited (it has yet another version), or of git (a file of git's own folder, which only git commands bring back).\n\n" +
		"What was set aside is kept until `mm-orchestrator changes remove RUN --set-aside`. This command only reads, and must run where the worker runs.\n\n" +
		"With --json the output is an array of runs; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator runs set-aside", "everything that was set aside"},
		{"mm-orchestrator runs set-aside restore 6f1c2f0e", "bring back what was set aside in a run"},
	},
	topics:      []topic{topicBroker, topicDatabase, topicFiles, topicChanges},
	subcommands: []*command{restoreSetAsideCommand},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &setAsideFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

var restoreSetAsideCommand = &command{
	name:     "restore",
	args:     "RUN [NAME]",
	words:    2,
	synonyms: []string{"pop", "apply", "back"},
	summary:  "bring back what was set aside in a run",
	about: "Puts files that a rollback has set aside into the work tree, as they were, and stages again what was staged of them. NAME is one of those that `mm-orchestrator runs set-aside RUN` lists, by default aside. " +
		"What was set aside is kept. The command can be repeated.\n\n" +
		"If somebody has edited one of the files since, so that its present version is kept nowhere else, the command lists these files and changes nothing. With --overwrite it sets the present versions aside first, under a new name.\n\n" +
		"It must run where the worker runs, and refuses while a run holds the workspace.\n\n" +
		"Exit code 0: the files are there. 1: files were edited since, or could not be written.",
	examples: []example{
		{"mm-orchestrator runs set-aside restore 6f1c2f0e", "bring all of it back"},
		{"mm-orchestrator runs set-aside restore 6f1c2f0e --file api_service/requirements.txt", "one file"},
		{"mm-orchestrator runs set-aside restore 6f1c2f0e aside-2", "what an --overwrite has set aside"},
	},
	topics: []topic{topicBroker, topicDatabase, topicFiles, topicChanges},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &restoreSetAsideFlags{}
		fs.StringArrayVar(&f.files, "file", nil, "Bring back only this `path`, relative to the top of the work tree. May be given several times. Default: all.")
		fs.BoolVar(&f.overwrite, "overwrite", false, "Replace also files that were edited since, after their present versions are set aside.")
		return f.run
	},
}

// Scripts rely on the JSON forms: fields may be added, none is renamed.

type setAsideRun struct {
	RunID     string         `json:"run_id"`
	Workspace string         `json:"workspace"`
	Names     []setAsideName `json:"names"`
	// Error says why the run's workspace could not be looked at.
	Error string `json:"error,omitempty"`
}

type setAsideName struct {
	Name  string         `json:"name"`
	Ref   string         `json:"ref"`
	Files []setAsideFile `json:"files"`
}

type setAsideFile struct {
	Path string `json:"path"`
	// Mode is git's; it is missing for a file that had been removed.
	Mode string `json:"mode,omitempty"`
	// State is present, replaced, edited or "of git".
	State string `json:"state"`
}

type setAsideFlags struct{ json bool }

func (f *setAsideFlags) run(ctx context.Context, p *program, in input) (err error) {
	var wanted *store.IDPrefix
	if len(in.words) == 1 {
		prefix, err := parseRun(in)
		if err != nil {
			return err
		}
		wanted = &prefix
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	filter := store.ChangeFilter{Queue: c.Queue}
	if wanted != nil {
		filter.Queue = "" // the error names the queue
	}
	list, err := db.ListChanges(ctx, filter)
	if err != nil {
		return err
	}
	if wanted != nil {
		found, err := findChange(list, *wanted, db)
		if err == nil {
			err = ofQueue(c, found)
		}
		if err != nil {
			return err
		}
		list = []store.Change{found}
	}
	steps, closeEngine, err := p.openSteps(c, db)
	if err != nil {
		return err
	}
	defer closeEngine()
	runs := []setAsideRun{}
	failed := 0
	for _, found := range list {
		trees, err := steps.ListSetAside(ctx, found)
		if err == nil && len(trees) == 0 {
			continue
		}
		run := setAsideRun{RunID: found.RunID, Workspace: strings.TrimPrefix(found.Workspace, found.Queue+":"), Names: []setAsideName{}}
		if err != nil {
			if wanted != nil {
				return err
			}
			run.Error = p.redactor().String(err.Error())
			failed++
		}
		for _, tree := range trees {
			name := setAsideName{Name: tree.Name, Ref: tree.Ref, Files: []setAsideFile{}}
			for _, file := range tree.Files {
				name.Files = append(name.Files, setAsideFile{file.Path, file.Mode, string(file.State)})
			}
			run.Names = append(run.Names, name)
		}
		runs = append(runs, run)
	}
	if err := f.print(p, runs); err != nil {
		return err
	}
	if failed > 0 {
		return fmt.Errorf("the workspaces of %s could not be looked at", counted(failed, "run"))
	}
	return nil
}

func (f *setAsideFlags) print(p *program, runs []setAsideRun) error {
	if f.json {
		return runPrinter{out: p.stdout, redactor: p.redactor()}.json(runs)
	}
	if len(runs) == 0 {
		_, err := fmt.Fprintln(p.stdout, "nothing is set aside")
		return err
	}
	for _, run := range runs {
		fmt.Fprintf(p.stdout, "run %s, in %s\n", run.RunID, oneLine(run.Workspace, 400))
		if run.Error != "" {
			fmt.Fprintf(p.stdout, "  %s\n", oneLine(run.Error, 1000))
			continue
		}
		table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "  NAME\tSTATE\tFILE")
		for _, name := range run.Names {
			for _, file := range name.Files {
				path := oneLine(p.redactor().String(file.Path), 400)
				if file.Mode == "" {
					path += " (removed)"
				}
				fmt.Fprintf(table, "  %s\t%s\t%s\n", name.Name, file.State, path)
			}
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// ofQueue returns an error if the workspace of a change is not that of the configured
// queue.
func ofQueue(c *configuration, found store.Change) error {
	if found.Queue == c.Queue {
		return nil
	}
	return &curedError{
		fmt.Errorf("run %s belongs to queue %q, and this is queue %q", found.RunID, found.Queue, c.Queue),
		"Run this where the worker of that queue runs, or add --queue " + found.Queue,
	}
}

type restoreSetAsideFlags struct {
	files     []string
	overwrite bool
}

func (f *restoreSetAsideFlags) run(ctx context.Context, p *program, in input) (err error) {
	if len(in.words) == 0 {
		return &usageError{"runs set-aside restore needs the id of a run; " + seeHelp(in.parsed)}
	}
	wanted, err := parseRun(in)
	if err != nil {
		return err
	}
	options := orchestrator.RestoreOptions{Name: "aside", Files: f.files, Overwrite: f.overwrite}
	if len(in.words) == 2 {
		options.Name = in.words[1]
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	list, err := db.ListChanges(ctx, store.ChangeFilter{})
	if err != nil {
		return err
	}
	found, err := findChange(list, wanted, db)
	if err != nil {
		return err
	}
	if err := ofQueue(c, found); err != nil {
		return err
	}
	workspaces, err := db.ListWorkspaces(ctx, c.Queue, nil)
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(workspaces, func(w store.WorkspaceState) bool {
		return w.Workspace == found.Workspace && w.RunID != "" && w.RunGoesOn
	}); i >= 0 {
		return fmt.Errorf("run %s holds the workspace, and would take files that appear in it for edits of somebody: wait for its end; nothing was changed", workspaces[i].RunID)
	}
	steps, closeEngine, err := p.openSteps(c, db)
	if err != nil {
		return err
	}
	defer closeEngine()
	options.Begin = func(paths []string) error {
		return db.RecordByHand(ctx, found.RunID, audit.Record{
			Kind: audit.BroughtBack, By: p.operator(), Text: options.Name + ": " + strings.Join(oneLines(paths), ", "),
		})
	}
	back, err := steps.RestoreSetAside(ctx, found, options)
	if err != nil {
		return err
	}
	if len(back.Edited) > 0 && back.SetAside == "" {
		return &curedError{
			fmt.Errorf("nothing was changed, because these files were edited since they were set aside: %s", strings.Join(oneLines(back.Edited), ", ")),
			"Keep them, or add --overwrite, which sets their present versions aside first",
		}
	}
	printBroughtBack(p, found.RunID, options.Name, back)
	return nil
}

func printBroughtBack(p *program, runID, name string, back orchestrator.BroughtBack) {
	clean := func(path string) string { return oneLine(p.redactor().String(path), 400) }
	if back.SetAside != "" {
		fmt.Fprintf(p.stdout, "edited since, and set aside as %s: %s\n", back.SetAside, p.redactor().String(strings.Join(oneLines(back.Edited), ", ")))
	}
	for _, path := range back.Restored {
		fmt.Fprintf(p.stdout, "brought back: %s\n", clean(path))
	}
	for _, path := range back.Present {
		fmt.Fprintf(p.stdout, "there already: %s\n", clean(path))
	}
	for _, path := range back.NotStaged {
		fmt.Fprintf(p.stdout, "not staged again, because something else is staged: %s\n", clean(path))
	}
	for _, file := range back.OfGit {
		fmt.Fprintf(p.stdout, "left, as it is a file of git's own folder: %s; `git -C %s show %s` prints it\n", oneLine(file.Path, 400), change.ShellQuote(back.Top), change.ShellQuote(change.Ref(runID, name)+":"+oneLine(file.Path, 400)))
	}
	if len(back.Restored)+len(back.Present)+len(back.OfGit) == 0 {
		fmt.Fprintf(p.stdout, "nothing was set aside under %s\n", oneLine(name, 80))
	}
}

func oneLines(list []string) []string {
	short := make([]string, len(list))
	for i, text := range list {
		short[i] = oneLine(text, 400)
	}
	return short
}

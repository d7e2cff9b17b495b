package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

var runsCommand = &command{
	name:     "runs",
	synonyms: []string{"run", "list", "ls", "ps", "show", "view", "status", "describe", "logs"},
	args:     "[RUN]",
	words:    1,
	summary:  "list runs, or show a run with its steps and artifacts",
	about: "Lists runs, newest first, or shows one run with its artifacts and the latest attempt of each step. RUN is the id of a run or its first 4 or more digits, if only one run matches. This command only reads; `mm-orchestrator runs revoke` stops a run, and `mm-orchestrator runs rollback` takes back one that has succeeded.\n\n" +
		"Under each active run, a line says what it is doing: which step is running, since when, on which worker, and how often the attempt was started; " +
		"or which run it is waiting for, because both use the same workspace, and its position in the queue for it; " +
		"or which of its own steps it is waiting for, such as a step that was retried while the rollback is running; " +
		"or whose approval it is waiting for, and until when (MM_ORCHESTRATOR_PROFILES must name the workers' policy file, if they have one); " +
		"or that the queue is paused (`mm-orchestrator pause`), and whether the run keeps its workspace meanwhile. While a queue is paused, the first line says so, since when, by whom and why.\n\n" +
		"Times are UTC. With --json the output is an array of runs, or one run with the keys run, steps and artifacts; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator runs", "the newest 20 runs"},
		{"mm-orchestrator runs --status failed --service api", "failed runs of a service"},
		{"mm-orchestrator runs 6f1c2f0e", "one run with its steps and artifacts"},
	},
	wordHints: map[string]string{"list": "`mm-orchestrator runs` lists runs", "ls": "`mm-orchestrator runs` lists runs",
		"show": "`mm-orchestrator runs RUN` shows one", "view": "`mm-orchestrator runs RUN` shows one"},
	topics:      []topic{topicDatabase},
	subcommands: []*command{approveCommand, revokeCommand, rollbackCommand, setAsideCommand, exportCommand},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &runsFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		fs.StringVarP(&f.status, "status", "s", "", "Only runs of this `status`: "+oneOf(runStatuses)+". Default: any.")
		_ = fs.SetAnnotation("status", choices, runStatuses) // fails for unknown flags only
		fs.StringVar(&f.service, "service", "", "Only runs for this target `service`. Default: any.")
		fs.IntVarP(&f.limit, "limit", "L", 20, "How many runs to list, at most 1000.")
		return f.run
	},
}

var runStatuses = []string{"pending", "running", "awaiting_approval", "succeeded", "failed", "rolled_back"}

type runsFlags struct {
	json            bool
	status, service string
	limit           int
}

func (f *runsFlags) run(ctx context.Context, p *program, in input) (err error) {
	if f.status != "" && !slices.Contains(runStatuses, f.status) {
		return &usageError{fmt.Sprintf("--status is %q; it must be %s", f.status, oneOf(runStatuses))}
	}
	if f.limit < 1 || f.limit > 1000 {
		return &usageError{fmt.Sprintf("--limit is %d; it must be from 1 to 1000", f.limit)}
	}
	var wanted store.IDPrefix
	if len(in.words) == 1 {
		for _, name := range []string{"status", "service", "limit"} {
			if in.parsed.Flags().Changed(name) {
				return &usageError{fmt.Sprintf("--%s applies only to the list of runs: remove it, or the id %s", name, in.words[0])}
			}
		}
		var err error
		if wanted, err = parseRun(in); err != nil {
			return err
		}
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

	show := runPrinter{out: p.stdout, redactor: p.redactor()}
	if len(in.words) == 1 {
		id, err := findRun(ctx, db, wanted)
		if err != nil {
			return err
		}
		detail, err := db.FindRunDetail(ctx, id)
		if err != nil {
			return err
		}
		shown := show.detail(detail)
		if err := p.addApprovals(ctx, db, &shown.Run); err != nil {
			return err
		}
		if f.json {
			return show.json(shown)
		}
		if w := detail.Activity.Paused; w != nil {
			pauses, err := db.ListPauses(ctx, store.PauseFilter{Queue: w.Queue})
			if err != nil {
				return err
			}
			for _, pause := range pauses {
				fmt.Fprintln(p.stdout, show.pause(pause).text())
			}
		}
		return show.run(shown)
	}
	runs, err := db.ListRuns(ctx, store.RunFilter{Status: store.RunStatus(f.status), TargetService: f.service, Limit: f.limit})
	if err != nil {
		return err
	}
	pauses, err := db.ListPauses(ctx, store.PauseFilter{})
	if err != nil {
		return err
	}
	lines := make([]runLine, 0, len(runs))
	for _, run := range runs {
		lines = append(lines, show.line(run.Run, run.Activity))
	}
	waiting := make([]*runLine, len(lines))
	for i := range lines {
		waiting[i] = &lines[i]
	}
	if err := p.addApprovals(ctx, db, waiting...); err != nil {
		return err
	}
	if f.json {
		return show.json(lines)
	}
	for _, pause := range pauses {
		fmt.Fprintln(p.stdout, show.pause(pause).text())
	}
	return show.list(lines)
}

// parseRun parses the first argument as the id of a run or its beginning, before
// any database is opened.
func parseRun(in input) (store.IDPrefix, error) {
	prefix, err := store.ParseIDPrefix(maskedWord(in.words[0]))
	if err != nil {
		return store.IDPrefix{}, &usageError{err.Error() + "; " + in.command.hint(in.parsed, in.words[0])}
	}
	return prefix, nil
}

// maxCandidates is how many runs the error for an ambiguous id lists.
const maxCandidates = 10

// findRun returns the id of the only run whose id begins with prefix.
func findRun(ctx context.Context, db *store.Store, prefix store.IDPrefix) (string, error) {
	runs, err := db.ListRunsByID(ctx, prefix, maxCandidates+1)
	switch {
	case err != nil:
		return "", err
	case len(runs) == 0:
		return "", &reworded{fmt.Sprintf("there is no run %s in database %s", prefix, db.Place()), store.ErrNotFound}
	case len(runs) == 1:
		return runs[0].ID, nil
	}
	var text strings.Builder
	fmt.Fprintf(&text, "several runs match %s: give more digits", prefix)
	for _, run := range runs[:min(len(runs), maxCandidates)] {
		fmt.Fprintf(&text, "\n  %s  %s  %s  %s", run.ID, oneLine(run.TargetService, 14), run.Status, run.QueuedAt.Format("2006-01-02 15:04"))
	}
	if len(runs) > maxCandidates {
		text.WriteString("\n  and more")
	}
	return "", errors.New(text.String())
}

// Scripts rely on the JSON forms: fields may be added, none is renamed.

type runLine struct {
	ID            string     `json:"id"`
	TargetService string     `json:"target_service"`
	Status        string     `json:"status"`
	Priority      string     `json:"priority"`
	Instruction   string     `json:"instruction"`
	ArtifactRoot  string     `json:"artifact_root,omitempty"`
	QueuedAt      time.Time  `json:"queued_at"`
	StartedAt     *time.Time `json:"started_at"`
	CompletedAt   *time.Time `json:"completed_at"`
	// Working, Waiting, WaitingForStep, Paused and Approval say what an active run is
	// doing; each is missing if it does not apply.
	Working        *workingLine        `json:"working,omitempty"`
	Waiting        *waitingLine        `json:"waiting,omitempty"`
	WaitingForStep *waitingForStepLine `json:"waiting_for_step,omitempty"`
	Paused         *pausedLine         `json:"paused,omitempty"`
	Approval       *approvalLine       `json:"waiting_for_approval,omitempty"`
}

// approvalLine is a run that waits for an approval.
type approvalLine struct {
	// Roles are those that may approve.
	Roles []string  `json:"roles"`
	Since time.Time `json:"since"`
	// Until is when a run that is deployed, and waits before verify, is rolled back.
	Until *time.Time `json:"until,omitempty"`
	// Refused is the step that was refused, "" for none; its message has the reason.
	Refused string `json:"refused_step,omitempty"`
}

// pausedLine is a step that waits for the end of a pause.
type pausedLine struct {
	Step  string    `json:"step"`
	Since time.Time `json:"since"`
	Queue string    `json:"queue"`
	// Keeps is the workspace that the run keeps meanwhile.
	Keeps string `json:"keeps_workspace,omitempty"`
}

type workingLine struct {
	Step    string    `json:"step"`
	Attempt int       `json:"attempt"`
	Worker  string    `json:"worker"`
	Alive   bool      `json:"worker_alive"`
	Since   time.Time `json:"since"`
	Starts  int       `json:"starts"`
}

type waitingLine struct {
	Step      string    `json:"step"`
	Workspace string    `json:"workspace"`
	Holder    string    `json:"held_by,omitempty"`
	Place     int       `json:"place"`
	Since     time.Time `json:"since"`
}

// waitingForStepLine is a step that waits for another step of its run.
type waitingForStepLine struct {
	Step  string      `json:"step"`
	Since time.Time   `json:"since"`
	For   workingLine `json:"for"`
}

type runDetail struct {
	Run runLine `json:"run"`
	// Revocation is set while a requested revocation is not carried out yet.
	Revocation *revocationLine `json:"revocation,omitempty"`
	// RollbackRequest is set if an operator has had the run rolled back after its end.
	RollbackRequest *revocationLine `json:"rollback_request,omitempty"`
	Steps           []stepLine      `json:"steps"`
	Artifacts       []artifactLine  `json:"artifacts"`
}

type revocationLine struct {
	By     string    `json:"by,omitempty"`
	Reason string    `json:"reason,omitempty"`
	At     time.Time `json:"at"`
}

type stepLine struct {
	Step    string `json:"step"`
	Attempt int    `json:"attempt"`
	// Status is pending, in_progress, succeeded, failed or skipped.
	Status       string     `json:"status"`
	Message      string     `json:"message,omitempty"`
	StartedAt    *time.Time `json:"started_at"`
	FinishedAt   *time.Time `json:"finished_at"`
	CeleryTaskID string     `json:"celery_task_id,omitempty"`
	// Worker is the last worker of this program that started the step; Starts is
	// how often the attempt was started.
	Worker string `json:"worker,omitempty"`
	Starts int    `json:"starts,omitempty"`
}

type artifactLine struct {
	Type      string    `json:"type"`
	Path      string    `json:"path"`
	SizeBytes int64     `json:"size_bytes"`
	Checksum  string    `json:"checksum"`
	CreatedAt time.Time `json:"created_at"`
}

// runPrinter prints runs. The contents of rows are untrusted: they are redacted,
// and control characters are removed from text output.
type runPrinter struct {
	out      io.Writer
	redactor *artifacts.Redactor
}

func (s runPrinter) line(run store.Run, activity store.Activity) runLine {
	line := runLine{
		ID: run.ID, TargetService: s.redactor.String(run.TargetService), Status: string(run.Status), Priority: run.Priority,
		Instruction: s.redactor.String(run.Instruction), ArtifactRoot: s.redactor.String(run.ArtifactRoot),
		QueuedAt: run.QueuedAt, StartedAt: run.StartedAt, CompletedAt: run.CompletedAt,
	}
	working := func(w store.Working) *workingLine {
		return &workingLine{Step: string(w.Step), Attempt: w.Attempt, Worker: w.Worker, Alive: w.Alive, Since: w.Since, Starts: w.Starts}
	}
	if w := activity.Working; w != nil {
		line.Working = working(*w)
	}
	if w := activity.WaitingForStep; w != nil {
		line.WaitingForStep = &waitingForStepLine{Step: string(w.Step), Since: w.Since, For: *working(w.For)}
	}
	if w := activity.Waiting; w != nil {
		line.Waiting = &waitingLine{Step: string(w.Step), Workspace: w.Workspace, Holder: w.Holder, Place: w.Place, Since: w.Since}
	}
	if w := activity.Paused; w != nil {
		line.Paused = &pausedLine{Step: string(w.Step), Since: w.Since, Queue: w.Queue, Keeps: w.Keeps}
	}
	return line
}

// addApprovals adds what runs that wait for an approval wait for. If the policy file,
// which names the gates of services, cannot be used, it says so and goes on with the
// built-in policy: a worker with that file would not run either, and runs can be looked
// at nevertheless.
func (p *program) addApprovals(ctx context.Context, db *store.Store, lines ...*runLine) error {
	var ids []string
	for _, line := range lines {
		if line.Status == string(store.RunAwaitingApproval) {
			ids = append(ids, line.ID)
		}
	}
	if len(ids) == 0 {
		return nil
	}
	inUse, err := environmentPolicy(p.env)
	if err != nil {
		p.printNote(fmt.Sprintf("%v\nThe approval gates below are those of the built-in policy", err))
	}
	pending, err := db.ListPendingApprovals(ctx, orchestrator.GateService(inUse), ids...)
	if err != nil {
		return err
	}
	for _, line := range lines {
		if w, waits := pending[line.ID]; waits {
			line.Approval = &approvalLine{Roles: w.Roles, Since: w.Since, Until: w.Until, Refused: string(w.Step)}
			if w.Until != nil {
				line.Approval.Refused = ""
			}
		}
	}
	return nil
}

func (s runPrinter) detail(d store.RunDetail) runDetail {
	out := runDetail{Run: s.line(d.Run, d.Activity), Steps: []stepLine{}, Artifacts: []artifactLine{}}
	if r := d.Revocation; r != nil {
		out.Revocation = &revocationLine{By: s.redactor.String(r.By), Reason: s.redactor.String(r.Reason), At: r.At}
	}
	if r := d.RollbackRequest; r != nil {
		out.RollbackRequest = &revocationLine{By: r.By, Reason: s.redactor.String(r.Reason), At: r.At}
	}
	for _, state := range d.States {
		out.Steps = append(out.Steps, stepLine{
			Step: string(state.Step), Attempt: state.Attempt, Status: state.Status, Message: s.redactor.String(state.Message),
			StartedAt: state.StartedAt, FinishedAt: state.FinishedAt, CeleryTaskID: state.CeleryTaskID, Worker: state.Worker, Starts: state.Starts,
		})
	}
	for _, a := range d.Artifacts {
		out.Artifacts = append(out.Artifacts, artifactLine{Type: a.Type, Path: s.redactor.String(a.Path), SizeBytes: a.SizeBytes, Checksum: a.Checksum, CreatedAt: a.CreatedAt})
	}
	return out
}

func (s runPrinter) json(value any) error {
	enc := json.NewEncoder(s.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(value)
}

func (s runPrinter) list(runs []runLine) error {
	if len(runs) == 0 {
		_, err := fmt.Fprintln(s.out, "no runs")
		return err
	}
	// The activity lines stand between the rows, because as columns they would
	// not fit a terminal. A tabwriter cannot align rows around such lines.
	cells := [][]string{{"RUN", "SERVICE", "STATUS", "QUEUED", "TOOK", "INSTRUCTION"}}
	for _, r := range runs {
		cells = append(cells, []string{r.ID, oneLine(r.TargetService, 14), r.Status, r.QueuedAt.UTC().Format("2006-01-02 15:04"), took(r.StartedAt, r.CompletedAt), r.Instruction})
	}
	last := len(cells[0]) - 1
	widths := make([]int, last)
	remaining := terminalWidth
	for i := range widths {
		for _, row := range cells {
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i]))
		}
		remaining -= widths[i] + 2
	}
	for i, row := range cells {
		for j, width := range widths {
			fmt.Fprintf(s.out, "%-*s  ", width, row[j])
		}
		if _, err := fmt.Fprintln(s.out, oneLine(row[last], max(remaining, len("INSTRUCTION")))); err != nil {
			return err
		}
		if i > 0 {
			for _, text := range runs[i-1].activity() {
				fmt.Fprintln(s.out, "    "+text)
			}
		}
	}
	return nil
}

// terminalWidth is the width of the list of runs, in columns.
const terminalWidth = 100

// activity says in lines of less than 100 columns what a run is doing.
func (r runLine) activity() (lines []string) {
	if w := r.Working; w != nil {
		worker := "on " + oneLine(w.Worker, 32)
		if !w.Alive {
			worker += ", which is dead"
		}
		lines = append(lines, fmt.Sprintf("%s running since %s, start %d, %s", w.Step, clock(&w.Since), w.Starts, worker))
	}
	if w := r.WaitingForStep; w != nil {
		text := fmt.Sprintf("%s waiting since %s for the end of %s", w.Step, clock(&w.Since), w.For.Step)
		if !w.For.Alive {
			text += ", not redelivered yet"
		}
		lines = append(lines, text)
	}
	if w := r.Waiting; w != nil {
		holder := "the workspace, which is free"
		if w.Holder != "" {
			holder = "run " + w.Holder
		}
		lines = append(lines, fmt.Sprintf("waiting since %s for %s, %s in line", clock(&w.Since), holder, ordinal(w.Place)))
	}
	if w := r.Paused; w != nil {
		text := fmt.Sprintf("%s waiting since %s: queue %s is paused", w.Step, clock(&w.Since), oneLine(w.Queue, 40))
		if w.Keeps != "" {
			text += ", keeps its workspace"
		}
		lines = append(lines, text)
	}
	if w := r.Approval; w != nil {
		whose := "an approval"
		if len(w.Roles) > 0 {
			whose += " by " + oneLine(strings.Join(w.Roles, " or "), 40)
		}
		text := fmt.Sprintf("waiting since %s for %s", clock(&w.Since), whose)
		if w.Refused != "" {
			text += ": " + w.Refused + " was refused"
		}
		if w.Until != nil {
			text = fmt.Sprintf("deployed, waiting since %s for %s, until %s", clock(&w.Since), whose, clock(w.Until))
		}
		lines = append(lines, text)
	}
	return lines
}

func ordinal(n int) string {
	suffix := "th"
	switch {
	case n%100 >= 11 && n%100 <= 13:
	case n%10 == 1:
		suffix = "st"
	case n%10 == 2:
		suffix = "nd"
	case n%10 == 3:
		suffix = "rd"
	}
	return fmt.Sprintf("%d%s", n, suffix)
}

func (s runPrinter) run(d runDetail) error {
	head := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	revoked := ""
	if r := d.Revocation; r != nil {
		revoked = oneLine(fmt.Sprintf("%s, not carried out yet. %s", clock(&r.At), store.Revocation{Reason: r.Reason, By: r.By}.Text()), 2000)
	}
	requested := ""
	if r := d.RollbackRequest; r != nil {
		requested = oneLine(store.RollbackRequest{Reason: r.Reason, By: r.By, At: r.At}.Text(), 2000)
	}
	for _, line := range [][2]string{
		{"run", d.Run.ID}, {"service", oneLine(d.Run.TargetService, 200)}, {"status", d.Run.Status}, {"now", strings.Join(d.Run.activity(), "; ")}, {"revoked", revoked}, {"rollback", requested}, {"priority", d.Run.Priority},
		{"queued", clock(&d.Run.QueuedAt)}, {"started", clock(d.Run.StartedAt)}, {"completed", clock(d.Run.CompletedAt)},
		{"artifacts", dash(oneLine(d.Run.ArtifactRoot, 4096))}, {"instruction", oneLine(d.Run.Instruction, 2000)},
	} {
		if line[1] != "" {
			fmt.Fprintf(head, "%s\t%s\n", line[0], line[1])
		}
	}
	if w := d.Run.Waiting; w != nil {
		fmt.Fprintf(head, "workspace\t%s\n", oneLine(w.Workspace, 4096))
	} else if w := d.Run.Paused; w != nil && w.Keeps != "" {
		fmt.Fprintf(head, "workspace\t%s\n", oneLine(w.Keeps, 4096))
	}
	if err := head.Flush(); err != nil {
		return err
	}
	table := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\nSTEP\tSTATUS\tATTEMPT\tSTARTED\tTOOK\tMESSAGE")
	for _, step := range d.Steps {
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\t%s\t%s\n", step.Step, step.Status, step.Attempt, clock(step.StartedAt), took(step.StartedAt, step.FinishedAt), dash(oneLine(step.Message, 2000)))
	}
	if err := table.Flush(); err != nil || len(d.Artifacts) == 0 {
		return err
	}
	fmt.Fprintln(table, "\nARTIFACT\tTYPE\tBYTES\tSHA-256")
	for _, a := range d.Artifacts {
		fmt.Fprintf(table, "%s\t%s\t%d\t%s\n", oneLine(a.Path, 200), a.Type, a.SizeBytes, dash(a.Checksum))
	}
	return table.Flush()
}

// counted returns a number with its noun, in the plural unless n is 1.
func counted(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// itOrThem is the pronoun for n things.
func itOrThem(n int) string {
	if n == 1 {
		return "it"
	}
	return "them"
}

// oneLine makes a text safe for a terminal and fit for a table cell: no line
// breaks, no control characters, at most limit characters.
func oneLine(text string, limit int) string {
	text = strings.Join(strings.FieldsFunc(text, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsGraphic(r) }), " ")
	if runes := []rune(text); len(runes) > limit {
		text = string(runes[:limit-1]) + "…"
	}
	return text
}

func clock(t *time.Time) string {
	if t == nil {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05")
}

func took(from, to *time.Time) string {
	if from == nil || to == nil {
		return "-"
	}
	return to.Sub(*from).Round(100 * time.Millisecond).String()
}

func dash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

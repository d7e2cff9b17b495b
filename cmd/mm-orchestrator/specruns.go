package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/client"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit"
)

var specCommand = &command{
	name:     "spec",
	synonyms: []string{"speckit", "specs", "spec-workflow", "codex"},
	summary:  "the Spec workflow: submit, list and retry runs, check the credentials",
	about: "The Spec workflow moves a feature forward by one task: it finds the next open task in the feature's tasks.md, has Codex do it, and opens a pull request. `mm-orchestrator worker` with MM_ORCHESTRATOR_SPEC_QUEUES " +
		"carries it out; MoonMind's API, and `spec submit`, begin it. docs/spec-workflow.md explains the chain.",
	examples: []example{
		{"mm-orchestrator spec preflight --repository octo/widgets", "can a run work, and what is missing?"},
		{"mm-orchestrator spec submit 014-refresh-docs --repository octo/widgets", "do the next open task of a feature"},
		{"mm-orchestrator spec runs 3c5e", "how far is it?"},
		{"mm-orchestrator spec retry 3c5e", "go on where it failed"},
	},
	subcommands: []*command{specSubmitCommand, specRunsCommand, specRetryCommand, specPreflightCommand},
	setup: func(*pflag.FlagSet) runFunc {
		return func(_ context.Context, _ *program, in input) error {
			return &usageError{"give spec submit, spec runs, spec retry or spec preflight; " + seeHelp(in.parsed)}
		}
	},
}

var specSubmitCommand = &command{
	name:     "submit",
	synonyms: []string{"start", "new", "create", "begin"},
	args:     "FEATURE",
	words:    1,
	summary:  "begin a run for the next open task of a feature",
	about: "Begins a run, as MoonMind's API does: it inserts the run and publishes the chain of the three tasks. FEATURE is the name of the feature's directory below the tasks root. The command prints the id of the run and does not wait for it, unless --follow is given. " +
		"It must have the settings of the workers for broker, queues and database.\n\n" +
		"A feature that has a pending or running run gets no second one. If the chain cannot be published, the run is failed again, so that it does not block its feature.\n\n" +
		"Exit code 0: submitted, or with --follow succeeded. 1: the feature has an active run, or with --follow the run has failed. 69: broker or database unreachable.\n\n" +
		"With --json it prints {\"run_id\", \"chain_id\", \"feature_key\", \"repository\", \"artifacts_path\"}; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator spec submit 014-refresh-docs --repository octo/widgets", "do the next open task"},
		{"mm-orchestrator spec submit 014-refresh-docs --follow", "and say how it ended"},
	},
	topics: []topic{topicBroker, topicDatabase, topicFiles, topicSpec},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &specSubmitFlags{}
		fs.StringVar(&f.repository, "repository", "", "The repository, as `owner/name`. Default: that of --github-repository.")
		fs.BoolVar(&f.follow, "follow", false, "Wait for the end of the run, and print it.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

type specSubmitFlags struct {
	repository   string
	follow, json bool
}

// Scripts rely on the JSON forms: fields may be added, none is renamed.

type specSubmitted struct {
	RunID         string `json:"run_id"`
	ChainID       string `json:"chain_id"`
	FeatureKey    string `json:"feature_key"`
	Repository    string `json:"repository,omitempty"`
	ArtifactsPath string `json:"artifacts_path"`
}

func (f *specSubmitFlags) run(ctx context.Context, p *program, in input) (err error) {
	if len(in.words) == 0 {
		return &usageError{"spec submit needs the name of a feature; " + seeHelp(in.parsed)}
	}
	feature := in.words[0]
	if err := checkFeature(feature); err != nil {
		return &usageError{fmt.Sprintf("the feature %q %v", oneLine(maskedWord(feature), 80), err)}
	}
	if f.repository != "" {
		if err := checkRepository(f.repository); err != nil {
			return &usageError{fmt.Sprintf("--repository is %q: %v", oneLine(maskedWord(f.repository), 80), err)}
		}
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	base := c.speckit().Artifacts.WithDefaults().Base
	if f.repository == "" {
		f.repository = c.Spec.Repository
	}
	run := specSubmitted{RunID: protocol.NewID(), ChainID: protocol.NewID(), FeatureKey: feature, Repository: f.repository}
	run.ArtifactsPath = path.Join(filepath.ToSlash(base), run.RunID)
	err = db.CreateSpecRun(ctx, store.NewSpecRun{ID: run.RunID, FeatureKey: feature, Repository: run.Repository, ArtifactsPath: run.ArtifactsPath, ChainID: run.ChainID})
	if err != nil {
		return specProblem(err)
	}
	if err := p.publishSpec(ctx, c, db, run.RunID, c.speckit().NewRun(run.RunID, feature), run.ChainID); err != nil {
		return err
	}
	if f.json && !f.follow {
		return printJSON(p.stdout, run)
	}
	if !f.json {
		fmt.Fprintf(p.stdout, "run %s: submitted, for the next open task of %s\n", run.RunID, feature)
	}
	if f.follow {
		return p.awaitSpec(ctx, db, run.RunID, f.json)
	}
	fmt.Fprintf(p.stdout, "See it with: mm-orchestrator spec runs %s\n", run.RunID[:8])
	return nil
}

// checkFeature refuses names that cannot be a directory below the tasks root.
func checkFeature(feature string) error {
	switch {
	case feature == "" || len([]rune(feature)) > 255:
		return errors.New("must have from 1 to 255 characters")
	case feature == "." || slices.Contains(strings.Split(feature, "/"), "..") || filepath.IsAbs(feature):
		return errors.New("must be a directory below the tasks root")
	case strings.ContainsFunc(feature, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\\' }):
		return errors.New("must not have control characters or backslashes")
	}
	return nil
}

// specProblem says what to do about a run that cannot begin.
func specProblem(err error) error {
	var conflict *store.SpecConflict
	if errors.As(err, &conflict) {
		return &curedError{err, fmt.Sprintf("See what it does with `mm-orchestrator spec runs %s`, and submit the feature again after its end", conflict.RunID)}
	}
	return err
}

// publishSpec publishes a chain. If that fails, the run fails too: it would block its
// feature, and nothing would carry it out.
func (p *program) publishSpec(ctx context.Context, c *configuration, db *store.Store, runID string, start speckit.Start, chainID string) error {
	err := p.sendSpec(ctx, c, start, chainID)
	if err == nil {
		return nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if failErr := db.FailUnpublishedSpecRun(undo, runID); failErr != nil {
		return errors.Join(err, fmt.Errorf("run %s stays active until a worker finds that it is stuck: %w", runID, failErr))
	}
	return fmt.Errorf("run %s has failed, because its chain could not be published: %w", runID, err)
}

func (p *program) sendSpec(ctx context.Context, c *configuration, start speckit.Start, chainID string) error {
	config, err := c.worker(nil, discardLogger())
	if err != nil {
		return err
	}
	if c.Spec.Consume == nil {
		c.Spec.Consume = c.speckit().Queues()
	}
	c.addSpec(&config)
	sender, err := client.New(client.FromWorker(config))
	if err != nil {
		return &configError{err.Error()}
	}
	defer sender.Close()
	_, err = sender.Send(ctx, specChainOf(start), client.TaskID(chainID))
	return c.cureBroker(err)
}

// specChainOf is the chain as package client sends it.
func specChainOf(start speckit.Start) client.Signature {
	args := make([]any, len(start.Args))
	for i, arg := range start.Args {
		args[i] = arg
	}
	first := client.Task(start.Task, args...)
	for _, kwarg := range start.Kwargs {
		first = first.Kwarg(kwarg.Name, kwarg.Value)
	}
	// Celery sends false for a task that the producer knows, as MoonMind's API does.
	first = first.With(client.Queue(start.Queue), client.Header("ignore_result", false))
	for _, name := range slices.Sorted(maps.Keys(start.Headers)) {
		first = first.With(client.Header(name, start.Headers[name]))
	}
	list := []client.Signature{first}
	for _, next := range start.Next {
		list = append(list, client.Task(next))
	}
	return client.Chain(list...)
}

var specRunsCommand = &command{
	name:     "runs",
	synonyms: []string{"run", "list", "ls", "ps", "show", "view", "status", "describe", "logs"},
	args:     "[RUN]",
	words:    1,
	summary:  "list runs of the Spec workflow, or show one with its tasks and files",
	about: "Lists runs of the Spec workflow, newest first, or shows one with its tasks, its files and what was found about its credentials. RUN is the id of a run or its first 4 or more digits, if only one run matches. " +
		"Under each active run, a line says which task is running, since when and on which worker; under each failed one, why it failed. This command only reads.\n\n" +
		"Times are UTC. With --json the output is an array of runs, or one run with the keys run, tasks, artifacts and credentials; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator spec runs", "the newest 20 runs"},
		{"mm-orchestrator spec runs --status failed --feature 014-refresh-docs", "failed runs of a feature"},
		{"mm-orchestrator spec runs 3c5e", "one run"},
	},
	topics: []topic{topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &specRunsFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		fs.StringVarP(&f.status, "status", "s", "", "Only runs of this `status`: "+oneOf(specStatuses)+". Default: any.")
		_ = fs.SetAnnotation("status", choices, specStatuses) // fails for unknown flags only
		fs.StringVar(&f.feature, "feature", "", "Only runs of this `feature`. Default: any.")
		fs.IntVarP(&f.limit, "limit", "L", 20, "How many runs to list, at most 1000.")
		return f.run
	},
}

var specStatuses = []string{"pending", "running", "succeeded", "failed"}

type specRunsFlags struct {
	json            bool
	status, feature string
	limit           int
}

func (f *specRunsFlags) run(ctx context.Context, p *program, in input) (err error) {
	if f.status != "" && !slices.Contains(specStatuses, f.status) {
		return &usageError{fmt.Sprintf("--status is %q; it must be %s", f.status, oneOf(specStatuses))}
	}
	if f.limit < 1 || f.limit > 1000 {
		return &usageError{fmt.Sprintf("--limit is %d; it must be from 1 to 1000", f.limit)}
	}
	var wanted store.IDPrefix
	if len(in.words) == 1 {
		for _, name := range []string{"status", "feature", "limit"} {
			if in.parsed.Flags().Changed(name) {
				return &usageError{fmt.Sprintf("--%s applies only to the list of runs: remove it, or the id %s", name, in.words[0])}
			}
		}
		if wanted, err = parseRun(in); err != nil {
			return err
		}
	}
	_, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	show := specPrinter{out: p.stdout, redact: p.redactor().String}
	if len(in.words) == 1 {
		id, err := findSpecRun(ctx, db, wanted)
		if err != nil {
			return err
		}
		detail, err := db.FindSpecRun(ctx, id)
		if err != nil {
			return err
		}
		if f.json {
			return printJSON(p.stdout, show.detailOf(detail))
		}
		return show.detail(show.detailOf(detail))
	}
	runs, err := db.ListSpecRuns(ctx, store.SpecRunFilter{Status: store.SpecRunStatus(f.status), FeatureKey: f.feature, Limit: f.limit})
	if err != nil {
		return err
	}
	lines := []specRunLine{}
	for _, run := range runs {
		lines = append(lines, show.lineOf(run))
	}
	if f.json {
		return printJSON(p.stdout, lines)
	}
	return show.list(lines)
}

// findSpecRun returns the id of the only run whose id begins with prefix.
func findSpecRun(ctx context.Context, db *store.Store, prefix store.IDPrefix) (string, error) {
	runs, err := db.ListSpecRuns(ctx, store.SpecRunFilter{Prefix: prefix, Limit: maxCandidates + 1})
	switch {
	case err != nil:
		return "", err
	case len(runs) == 0:
		return "", &reworded{fmt.Sprintf("there is no Spec workflow run %s in database %s", prefix, db.Place()), store.ErrNotFound}
	case len(runs) == 1:
		return runs[0].ID, nil
	}
	var text strings.Builder
	fmt.Fprintf(&text, "several runs match %s: give more digits", prefix)
	for _, run := range runs[:min(len(runs), maxCandidates)] {
		fmt.Fprintf(&text, "\n  %s  %s  %s  %s", run.ID, oneLine(run.FeatureKey, 30), run.Status, run.CreatedAt.UTC().Format("2006-01-02 15:04"))
	}
	if len(runs) > maxCandidates {
		text.WriteString("\n  and more")
	}
	return "", errors.New(text.String())
}

type specRunLine struct {
	ID         string     `json:"id"`
	FeatureKey string     `json:"feature_key"`
	Repository string     `json:"repository,omitempty"`
	Status     string     `json:"status"`
	Phase      string     `json:"phase"`
	Branch     string     `json:"branch,omitempty"`
	PRURL      string     `json:"pr_url,omitempty"`
	CreatedAt  time.Time  `json:"created_at"`
	StartedAt  *time.Time `json:"started_at"`
	FinishedAt *time.Time `json:"finished_at"`
	// Working is what an active run does.
	Working *specWorkingLine `json:"working,omitempty"`
	// Failure is why a failed run failed.
	Failure string `json:"failure,omitempty"`
}

type specWorkingLine struct {
	Task    string    `json:"task"`
	Attempt int       `json:"attempt"`
	Worker  string    `json:"worker"`
	Alive   bool      `json:"worker_alive"`
	Since   time.Time `json:"since"`
	Starts  int       `json:"starts"`
}

type specDetail struct {
	Run           specRunLine `json:"run"`
	CodexTaskID   string      `json:"codex_task_id,omitempty"`
	CodexLogs     string      `json:"codex_logs_path,omitempty"`
	CodexPatch    string      `json:"codex_patch_path,omitempty"`
	ArtifactsPath string      `json:"artifacts_path,omitempty"`
	// LoginCheck is what the check of the volume with Codex's login has found.
	LoginCheck  *specFinding       `json:"codex_login_check,omitempty"`
	Tasks       []specTaskLine     `json:"tasks"`
	Artifacts   []specArtifactLine `json:"artifacts"`
	Credentials *specCredentials   `json:"credentials"`
}

type specFinding struct {
	Status  string `json:"status"`
	Message string `json:"message,omitempty"`
}

type specCredentials struct {
	Codex     specFinding `json:"codex"`
	GitHub    specFinding `json:"github"`
	CheckedAt time.Time   `json:"checked_at"`
	Notes     string      `json:"notes,omitempty"`
}

type specTaskLine struct {
	Task       string     `json:"task"`
	Attempt    int        `json:"attempt"`
	Status     string     `json:"status"`
	Message    string     `json:"message,omitempty"`
	StartedAt  *time.Time `json:"started_at"`
	FinishedAt *time.Time `json:"finished_at"`
}

type specArtifactLine struct {
	Type      string `json:"type"`
	Path      string `json:"path"`
	SizeBytes *int64 `json:"size_bytes"`
	Digest    string `json:"digest,omitempty"`
}

// specPrinter prints runs. The contents of rows are untrusted: they are redacted, and
// control characters are removed from text output.
type specPrinter struct {
	out    io.Writer
	redact func(string) string
}

func (s specPrinter) lineOf(r store.SpecRunRow) specRunLine {
	line := specRunLine{
		ID: r.ID, FeatureKey: s.redact(r.FeatureKey), Repository: s.redact(r.Repository), Status: string(r.Status), Phase: string(r.Phase), Branch: s.redact(r.Branch), PRURL: s.redact(r.PRURL),
		CreatedAt: r.CreatedAt, StartedAt: r.StartedAt, FinishedAt: r.FinishedAt, Failure: s.redact(r.Failure),
	}
	if d := r.Doing; d != nil {
		line.Working = &specWorkingLine{Task: string(d.Task), Attempt: d.Attempt, Worker: d.Worker, Alive: d.Alive, Since: d.Since, Starts: d.Starts}
	}
	return line
}

func (s specPrinter) detailOf(d store.SpecRunDetail) specDetail {
	detail := specDetail{
		Run: s.lineOf(d.Run), CodexTaskID: s.redact(d.Run.CodexTaskID), CodexLogs: s.redact(d.Run.CodexLogsPath), CodexPatch: s.redact(d.Run.CodexPatchPath),
		ArtifactsPath: s.redact(d.Run.ArtifactsPath), Tasks: []specTaskLine{}, Artifacts: []specArtifactLine{},
	}
	if d.Run.PreflightStatus != "" {
		detail.LoginCheck = &specFinding{d.Run.PreflightStatus, s.redact(d.Run.PreflightMessage)}
	}
	for _, t := range d.Tasks {
		detail.Tasks = append(detail.Tasks, specTaskLine{string(t.Task), t.Attempt, string(t.Status), s.redact(t.Message), t.StartedAt, t.FinishedAt})
	}
	for _, a := range d.Artifacts {
		detail.Artifacts = append(detail.Artifacts, specArtifactLine{a.Type, s.redact(a.Path), a.SizeBytes, a.Digest})
	}
	if a := d.Audit; a != nil {
		detail.Credentials = &specCredentials{
			Codex: specFinding{a.Codex, s.redact(a.CodexMessage)}, GitHub: specFinding{a.GitHub, s.redact(a.GitHubMessage)}, CheckedAt: a.CheckedAt, Notes: s.redact(a.Notes),
		}
	}
	return detail
}

// activity says in one line what an active run does, or why a run failed.
func (l specRunLine) activity() string {
	switch w := l.Working; {
	case w != nil && w.Alive:
		return fmt.Sprintf("%s running since %s, start %d, on %s", w.Task, clock(&w.Since), w.Starts, oneLine(w.Worker, 40))
	case w != nil:
		return fmt.Sprintf("%s waiting to be delivered again, last started at %s on %s", w.Task, clock(&w.Since), oneLine(w.Worker, 40))
	case l.Status == "pending" || l.Status == "running":
		return "its next task waits in a queue"
	}
	return oneLine(l.Failure, 400)
}

func (s specPrinter) list(lines []specRunLine) error {
	if len(lines) == 0 {
		_, err := fmt.Fprintln(s.out, "no runs")
		return err
	}
	feature := len("FEATURE")
	for _, l := range lines {
		feature = max(feature, len([]rune(oneLine(l.FeatureKey, 30))))
	}
	row := "%-36s  %-*s  %-9s  %-8s  %-16s  %s\n"
	fmt.Fprintf(s.out, row, "RUN", feature, "FEATURE", "STATUS", "PHASE", "SUBMITTED", "PULL REQUEST")
	for _, l := range lines {
		if _, err := fmt.Fprintf(s.out, row, l.ID, feature, oneLine(l.FeatureKey, 30), l.Status, l.Phase, l.CreatedAt.UTC().Format("2006-01-02 15:04"), dash(oneLine(l.PRURL, 200))); err != nil {
			return err
		}
		if text := l.activity(); text != "" {
			fmt.Fprintln(s.out, "    "+oneLine(text, 130))
		}
	}
	return nil
}

func (s specPrinter) detail(d specDetail) error {
	head := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
	for _, line := range [][2]string{
		{"run", d.Run.ID}, {"feature", d.Run.FeatureKey}, {"repository", d.Run.Repository}, {"status", d.Run.Status + ", phase " + d.Run.Phase}, {"now", d.Run.activity()},
		{"submitted", clock(&d.Run.CreatedAt)}, {"started", clock(d.Run.StartedAt)}, {"finished", clock(d.Run.FinishedAt)},
		{"branch", d.Run.Branch}, {"pull request", d.Run.PRURL}, {"codex task", d.CodexTaskID}, {"artifacts", d.ArtifactsPath},
	} {
		if line[1] != "" {
			name := line[0]
			if name == "now" && d.Run.Status == "failed" {
				name = "failed"
			}
			fmt.Fprintf(head, "%s\t%s\n", name, oneLine(line[1], 2000))
		}
	}
	if c := d.Credentials; c != nil {
		fmt.Fprintf(head, "Codex\t%s\n", findingText(c.Codex))
		fmt.Fprintf(head, "GitHub\t%s\n", findingText(c.GitHub))
		fmt.Fprintf(head, "checked\t%s\n", clock(&c.CheckedAt))
	}
	if l := d.LoginCheck; l != nil {
		fmt.Fprintf(head, "login check\t%s\n", findingText(*l))
	}
	if err := head.Flush(); err != nil {
		return err
	}
	if len(d.Tasks) > 0 {
		table := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
		fmt.Fprintf(table, "\nTASK\tATTEMPT\tSTATUS\tSTARTED\tTOOK\tMESSAGE\n")
		for _, t := range d.Tasks {
			fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%s\t%s\n", t.Task, t.Attempt, t.Status, clock(t.StartedAt), took(t.StartedAt, t.FinishedAt), dash(oneLine(t.Message, 200)))
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	if len(d.Artifacts) > 0 {
		table := tabwriter.NewWriter(s.out, 0, 0, 2, ' ', 0)
		fmt.Fprintf(table, "\nARTIFACT\tBYTES\tPATH\n")
		for _, a := range d.Artifacts {
			size := "-"
			if a.SizeBytes != nil {
				size = fmt.Sprint(*a.SizeBytes)
			}
			fmt.Fprintf(table, "%s\t%s\t%s\n", a.Type, size, oneLine(a.Path, 1024))
		}
		return table.Flush()
	}
	return nil
}

func findingText(f specFinding) string {
	if f.Message == "" {
		return f.Status
	}
	return f.Status + ": " + oneLine(f.Message, 2000)
}

// awaitSpec waits for the end of a run and prints it.
func (p *program) awaitSpec(ctx context.Context, db *store.Store, id string, asJSON bool) error {
	show := specPrinter{out: p.stdout, redact: p.redactor().String}
	said := ""
	for {
		detail, err := db.FindSpecRun(ctx, id)
		if err != nil {
			return err
		}
		run := detail.Run
		if run.Status != store.SpecRunPending && run.Status != store.SpecRunRunning {
			if asJSON {
				if err := printJSON(p.stdout, show.detailOf(detail)); err != nil {
					return err
				}
			} else if run.Status == store.SpecRunSucceeded {
				fmt.Fprintln(p.stdout, oneLine(show.redact("run "+id+" has succeeded: "+publishedText(detail)), 1000))
			}
			if run.Status != store.SpecRunSucceeded {
				return &curedError{fmt.Errorf("run %s has %s: %s", id, run.Status, oneLine(show.redact(run.Failure), 2000)), "Correct what it says, then: mm-orchestrator spec retry " + id}
			}
			return nil
		}
		if w := run.Doing; w != nil && w.Alive && string(w.Task) != said && !asJSON {
			said = string(w.Task)
			fmt.Fprintf(p.stdout, "run %s: %s running since %s, on %s\n", id, w.Task, clock(&w.Since), oneLine(w.Worker, 80))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// publishedText says what has come of a run that has succeeded.
func publishedText(d store.SpecRunDetail) string {
	if d.Run.PRURL != "" {
		return d.Run.PRURL
	}
	for _, t := range slices.Backward(d.Tasks) { // the newest attempt of publish comes last
		if t.Task == store.SpecPublish && t.Status == store.SpecSucceeded && t.Message != "" {
			return t.Message // somebody has merged the change already
		}
	}
	return "the feature has no open task"
}

var specRetryCommand = &command{
	name:     "retry",
	synonyms: []string{"resume", "again", "redo", "restart"},
	args:     "RUN",
	words:    1,
	summary:  "let a failed run go on where it failed, or begin again",
	about: "Retries a failed run, as MoonMind's API does: from the task that has failed, with what the earlier ones have stored (Codex's task, log and patch), or with --from-discovery from the beginning. RUN is the id of a run or its beginning. " +
		"It writes retry_context_attempt_<n>.json into the run's directory, so it must run where the workers' artifact directory is, with the same settings.\n\n" +
		"Exit code 0: the retry is published, or with --follow the run has succeeded. 1: the run has not failed, or its feature has another active run. 69: broker or database unreachable.",
	examples: []example{
		{"mm-orchestrator spec retry 3c5e --notes 'GitHub token renewed'", "go on from the failed task"},
		{"mm-orchestrator spec retry 3c5e --from-discovery", "the stored patch no longer fits: let Codex do the task again"},
	},
	topics: []topic{topicBroker, topicDatabase, topicFiles, topicSpec},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &specRetryFlags{}
		fs.BoolVar(&f.fromDiscovery, "from-discovery", false, "Begin again with the next open task, instead of the task that has failed.")
		fs.StringVar(&f.notes, "notes", "", "Why it is retried, as `text`. It becomes part of the credential audit's notes. Default: none.")
		fs.BoolVar(&f.follow, "follow", false, "Wait for the end of the run, and print it.")
		return f.run
	},
}

type specRetryFlags struct {
	fromDiscovery, follow bool
	notes                 string
}

func (f *specRetryFlags) run(ctx context.Context, p *program, in input) (err error) {
	if len(in.words) == 0 {
		return &usageError{"spec retry needs the id of a run; " + seeHelp(in.parsed)}
	}
	wanted, err := parseRun(in)
	if err != nil {
		return err
	}
	c, db, err := p.openCommand(ctx, in)
	if err != nil {
		return err
	}
	defer db.Close()
	defer func() { err = explainSchemaError(ctx, db, err) }()
	id, err := findSpecRun(ctx, db, wanted)
	if err != nil {
		return err
	}
	mode := speckit.ResumeFailedTask
	if f.fromDiscovery {
		mode = speckit.RestartFromDiscovery
	}
	notes := oneLine(p.redactor().String(f.notes), 2000)
	chainID := protocol.NewID()
	var retry speckit.Retry
	err = db.RetrySpecRun(ctx, id, func(d store.SpecRunDetail) (store.SpecRetry, error) {
		place, err := c.speckit().RunDirectory(d.Run.ArtifactsPath, id)
		if err != nil {
			return store.SpecRetry{}, fmt.Errorf("run %s: %w", id, err)
		}
		if retry, err = c.speckit().PlanRetry(d, mode, notes, place.Dir); err != nil {
			return store.SpecRetry{}, err
		}
		dir, err := artifacts.Open(place.Dir, p.redactor())
		if err != nil {
			return store.SpecRetry{}, &curedError{fmt.Errorf("run %s: %w", id, err), "Run the command where the workers' artifact directory is, with their settings (ARTIFACTS_ROOT, REPO_ROOT)"}
		}
		defer dir.Close()
		file, err := dir.Write(retry.File, retry.Token)
		if err != nil {
			return store.SpecRetry{}, err
		}
		return store.SpecRetry{From: retry.From, Attempt: retry.Attempt, ChainID: chainID, Artifact: &store.SpecArtifact{
			SpecFile: store.SpecFile{Type: "retry_context", Path: filepath.Join(place.Dir, file.Path)}, SizeBytes: file.SizeBytes, SHA256: file.Checksum,
		}}, nil
	})
	switch {
	case errors.Is(err, speckit.ErrRetryNotAllowed):
		return &curedError{err, "See how far it is with: mm-orchestrator spec runs " + id}
	case err != nil:
		return specProblem(err)
	}
	if err := p.publishSpec(ctx, c, db, id, retry.Start, chainID); err != nil {
		return err
	}
	fmt.Fprintf(p.stdout, "run %s: goes on from %s, attempt %d\n", id, retry.From, retry.Attempt)
	if f.follow {
		return p.awaitSpec(ctx, db, id, false)
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

package speckit

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A Start is a chain as a producer publishes it: its first task, and the names of those
// that follow.
type Start struct {
	Task    string
	Args    []json.RawMessage
	Kwargs  []Kwarg
	Queue   string
	Headers map[string]string
	Next    []string
}

// Kwarg is a keyword argument.
type Kwarg struct {
	Name  string
	Value any
}

// names are the tasks' names on the wire.
var names = map[store.SpecTask]string{store.SpecDiscover: TaskDiscover, store.SpecSubmit: TaskSubmit, store.SpecPublish: TaskPublish}

// NewRun is the chain of a new run, as MoonMind's API publishes it.
func (c Config) NewRun(runID, feature string) Start {
	return c.fromDiscovery(runID, feature, 1, "")
}

func (c Config) fromDiscovery(runID, feature string, attempt int, notes string) Start {
	start := Start{
		Task: TaskDiscover, Args: []json.RawMessage{rawOf(runID)}, Queue: c.WithDefaults().DefaultQueue, Next: []string{TaskSubmit, TaskPublish},
		Kwargs: []Kwarg{{"feature_key", feature}, {"force_phase", nil}, {"attempt", attempt}},
	}
	if notes != "" {
		start.Kwargs = append(start.Kwargs, Kwarg{"retry_notes", notes})
	}
	return start
}

// RetryMode says from where a failed run goes on.
type RetryMode string

const (
	// ResumeFailedTask: from the task that has failed, with what the earlier ones have
	// stored.
	ResumeFailedTask RetryMode = "resume_failed_task"
	// RestartFromDiscovery: from the beginning.
	RestartFromDiscovery RetryMode = "restart_from_discovery"
)

// ErrRetryNotAllowed: the run has not failed. ErrRetryNotApplicable: all of its tasks
// have succeeded.
var (
	ErrRetryNotAllowed    = errors.New("retry is not allowed")
	ErrRetryNotApplicable = errors.New("there is nothing to retry")
)

// Retry is how a failed run goes on.
type Retry struct {
	Start   Start
	From    store.SpecTask
	Attempt int
	// Token is the token of the retry, as its file has it; File is that file's name.
	Token, File string
}

// PlanRetry decides how a failed run goes on, as MoonMind's API does. dir is the absolute
// path of the run's directory, to which the caller writes the file with the token. Pure.
func (c Config) PlanRetry(d store.SpecRunDetail, mode RetryMode, notes, dir string) (Retry, error) {
	run := d.Run
	if run.Status != store.SpecRunFailed {
		return Retry{}, fmt.Errorf("%w: run %s is %s, and only a failed run can be retried", ErrRetryNotAllowed, run.ID, run.Status)
	}
	newest := map[store.SpecTask]store.SpecTaskRow{}
	for _, task := range d.Tasks { // the oldest attempt first
		newest[task.Task] = task
	}
	from := store.SpecDiscover
	if mode == ResumeFailedTask {
		open := slices.IndexFunc(store.SpecTasks, func(task store.SpecTask) bool { return newest[task].Status != store.SpecSucceeded })
		if open < 0 {
			return Retry{}, fmt.Errorf("%w: every task of run %s has succeeded", ErrRetryNotApplicable, run.ID)
		}
		from = store.SpecTasks[open]
	}
	retry := Retry{From: from, Attempt: newest[from].Attempt + 1}
	token := newObject()
	token.set("runId", run.ID)
	token.set("mode", string(mode))
	token.set("resumeFrom", string(from))
	token.set("attempt", retry.Attempt)
	orNull(token, "notes", notes)
	orNull(token, "codexTaskId", run.CodexTaskID)
	orNull(token, "codexLogsPath", run.CodexLogsPath)
	orNull(token, "codexPatchPath", run.CodexPatchPath)
	orNull(token, "branchName", run.Branch)
	orNull(token, "prUrl", run.PRURL)
	var err error
	if retry.Token, err = token.python(true); err != nil {
		return Retry{}, err
	}
	retry.File = fmt.Sprintf("retry_context_attempt_%d.json", retry.Attempt)
	if from == store.SpecDiscover {
		retry.Start = c.fromDiscovery(run.ID, run.FeatureKey, retry.Attempt, notes)
		return retry, nil
	}
	context := newObject()
	context.set("run_id", run.ID)
	context.set("feature_key", run.FeatureKey)
	context.set("artifacts_path", cmp.Or(run.ArtifactsPath, filepath.Join(c.Artifacts.WithDefaults().Base, run.ID)))
	if repository := cmp.Or(run.Repository, c.Repository); repository != "" {
		context.set("repository", repository)
	}
	context.set("attempt", retry.Attempt)
	context.set("retry", true)
	if notes != "" {
		context.set("retry_notes", notes)
	}
	task, err := taskOf(newest[store.SpecDiscover])
	if err != nil {
		return Retry{}, err
	}
	context.set("task", task)
	for _, field := range []struct{ key, value string }{
		{"codex_task_id", run.CodexTaskID}, {"codex_logs_path", run.CodexLogsPath}, {"codex_patch_path", run.CodexPatchPath}, {"branch_name", run.Branch},
	} {
		if field.value != "" {
			context.set(field.key, field.value)
		}
	}
	context.set("resume_token", token)
	context.set("resume_artifact_path", filepath.Join(dir, retry.File))
	c = c.WithDefaults()
	router := &Speckit{config: c, queues: codexQueues{fixed: c.CodexQueue, shards: c.CodexShards}}
	prepared, err := router.prepare(protocol.NewSignature(names[from], nil, nil), []json.RawMessage{context.compact()})
	if err != nil {
		return Retry{}, err
	}
	retry.Start = Start{Task: names[from], Args: prepared.Args, Queue: prepared.Queue, Headers: prepared.Headers}
	for _, task := range store.SpecTasks[slices.Index(store.SpecTasks, from)+1:] {
		retry.Start.Next = append(retry.Start.Next, names[task])
	}
	return retry, nil
}

// orNull sets a key to a text, or to null for an empty one.
func orNull(o *object, key, text string) {
	if text == "" {
		o.set(key, nil)
		return
	}
	o.set(key, text)
}

// taskOf is the task that discovery has found, as the context has it.
func taskOf(discovered store.SpecTaskRow) (*object, error) {
	payload, err := parseObject(discovered.Payload)
	if err != nil || !payload.truthy("taskId") {
		return nil, fmt.Errorf("%w: the row of %s does not say which task was found: retry from discovery", ErrRetryNotApplicable, store.SpecDiscover)
	}
	task := newObject()
	for _, key := range []string{"taskId", "title", "phase", "lineNumber"} {
		task.setRaw(key, payload.raw(key))
	}
	return task, nil
}

// RunDirectory is the directory of a run whose row has a path, or "".
func (c Config) RunDirectory(path, runID string) (artifacts.Directory, error) {
	_, place, err := runDirectory(c.Artifacts.WithDefaults(), path, runID)
	return place, err
}

// runDirectory returns the path of a run's directory as rows and contexts have it, and
// the directory.
func runDirectory(config artifacts.DirectoryConfig, path, runID string) (string, artifacts.Directory, error) {
	if path == "" {
		path = filepath.Join(config.Base, runID)
	}
	path = filepath.Clean(path)
	if filepath.Base(path) != runID {
		path = filepath.Join(path, runID)
	}
	place, err := config.ForRun(path, runID)
	return path, place, err
}

package speckit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/disklimit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// CodexConfig says how Codex does a task. With neither Exec nor Cloud there is no Codex.
type CodexConfig struct {
	// Exec runs the program in a clone on this machine. It needs Config.Repositories.
	Exec *codex.Exec
	// Cloud gives the task to Codex Cloud.
	Cloud *codex.Cloud
	// Branch is the branch on which work in Codex Cloud begins, "" for main.
	Branch string
	// Instructions are added to what Codex is asked to do.
	Instructions string
	// Secrets knows the credentials that a change must not have, and nothing else. nil
	// means that a change is not looked at.
	Secrets *artifacts.Redactor
	// Login is the login of Codex itself, nil if it has none. Commands of the model can
	// read it, so that it must know Secrets and Config.Redactor.
	Login *codex.Login
}

func (c CodexConfig) configured() bool { return c.Exec != nil || c.Cloud != nil }

// validate returns an error that names what is wrong.
func (c CodexConfig) validate(repositories *Repositories) error {
	switch {
	case c.Exec != nil && c.Cloud != nil:
		return errors.New("speckit: Config.Codex has both Exec and Cloud, want one of them")
	case c.Exec != nil && repositories == nil:
		return errors.New("speckit: Config.Codex.Exec needs Config.Repositories")
	}
	return nil
}

// Outcomes that package codex does not know: it has no clone to look at.
const (
	outcomeNoChange  = "no_change"
	outcomeUncertain = "uncertain"
	outcomeUnusable  = "change_unusable"
	outcomeSecret    = "change_has_secret"
	outcomeTooLarge  = "clone_too_large"
)

// A codexTask is Codex's work for one attempt.
type codexTask struct {
	*attempt
	dir    *artifacts.Run
	prompt prompt
	// progress is what is recorded. Only record changes what the database has.
	progress store.CodexProgress
}

// runCodex has Codex do the task, or finds out what an earlier worker's Codex has done.
// How Codex has ended is recorded before anything follows from it, so that it is not
// asked again (docs/spec-workflow.md#codex).
func (a *attempt) runCodex(ctx context.Context, dir *artifacts.Run) (store.SpecWrite, error) {
	t := &codexTask{attempt: a, dir: dir}
	if found := a.claim.Progress.Codex; found != nil {
		t.progress = *found
		a.log.Info("the task continues where the previous worker has left it", "stage", found.Stage, "runs", found.Runs)
	}
	id, title := a.openTask()
	name, err := a.repository()
	if err != nil {
		return store.SpecWrite{}, err
	}
	t.prompt = prompt{
		run: a.run.ID, attempt: a.attempt, repository: name, feature: a.context.text("feature_key"), id: id, title: title,
		notes: a.context.text("retry_notes"), instructions: a.config.Codex.Instructions,
	}
	if task := a.context.inner("task"); task != nil {
		t.prompt.phase = pythonText(task, "phase")
	}
	if a.claim.Starts > 1 {
		processes.EndOtherWorkersPrograms(a.log, a.run.ID)
	}
	if t.progress.Stage != store.CodexEnded {
		t.config.Codex.Login.Read()
		do := t.exec
		if a.config.Codex.Cloud != nil {
			do = t.cloud
		}
		if err := do(ctx); err != nil {
			return store.SpecWrite{}, err
		}
	}
	return t.conclude()
}

// record writes the progress, with rows that belong to it.
func (t *codexTask) record(ctx context.Context, write store.SpecWrite) error {
	progress := t.progress
	write.Progress = &store.SpecProgress{Codex: &progress}
	write.CodexTaskID = progress.TaskID
	if progress.Log != nil {
		write.CodexLogsPath = progress.Log.Path
		write.Artifacts = append(write.Artifacts, *progress.Log)
	}
	if progress.Patch != nil {
		write.CodexPatchPath = progress.Patch.Path
		write.Artifacts = append(write.Artifacts, *progress.Patch)
	}
	return t.config.Runs.WriteSpec(ctx, t.claim, write)
}

// fileName is the name of a file of this run of Codex. A second run has another one: a
// worker that has lost its claim and still writes must not change what is recorded.
func (t *codexTask) fileName(extension string) string {
	name := "codex_" + strconv.Itoa(t.attempt.attempt)
	if t.progress.Runs > 1 {
		name += "_" + strconv.Itoa(t.progress.Runs)
	}
	return name + extension
}

// exec runs the program in a clone of its own.
func (t *codexTask) exec(ctx context.Context) error {
	clone, err := t.clone(ctx)
	if err != nil {
		return err
	}
	if t.progress.Log != nil { // of a run that was interrupted
		if log, err := t.measureStored(t.progress.Log.Type, t.progress.Log.Path); err == nil {
			t.progress.Log = &log
			if err := t.record(ctx, store.SpecWrite{}); err != nil {
				return err
			}
		}
	}
	t.progress = store.CodexProgress{Stage: store.CodexStarted, Runs: t.progress.Runs + 1, BaseCommit: clone.Commit}
	log, err := t.dir.Log(t.fileName(".jsonl"))
	if err != nil {
		return &failure{class: "OSError", text: err.Error()}
	}
	defer log.Discard()
	empty := t.artifact("codex_logs", artifacts.File{Path: log.Path(), Checksum: hex.EncodeToString(sha256.New().Sum(nil))})
	t.progress.Log = &empty
	if err := t.record(ctx, store.SpecWrite{}); err != nil {
		return err
	}
	faultpoint.Hit(faultpoint.CodexStarting, t.run.ID, string(t.task))
	output := log.Output()
	t.log.Info("codex begins", "run", t.progress.Runs, "base_commit", clone.Commit)
	watched, stop := clone.Watch(ctx)
	over := waitAtMost(ctx, t.config.Codex.Exec.TimeLimit())
	result, err := t.config.Codex.Exec.Run(watched, codex.ExecRequest{Owner: t.owner(), Dir: clone.Tree, TempDir: filepath.Join(clone.Dir, "tmp"), Prompt: t.prompt.String(), Log: t.config.Codex.Login.Writer(t.counted(output.Stdout))})
	over()
	stop()
	t.config.Codex.Login.Read() // Codex renews it
	output.Close()
	var large *disklimit.Error
	switch {
	case err == nil:
		errors.As(clone.CheckSize(), &large)
	case ctx.Err() != nil || !errors.As(err, &large):
		return t.notRun(ctx, err)
	}
	if large != nil {
		result.Outcome = outcomeTooLarge
		result.Message = fmt.Sprintf("The clone in which Codex worked took more than %s of the disk, and Codex was ended. %s is the limit", disklimit.Text(large.Limit), t.config.SettingName("MM_ORCHESTRATOR_CLONE_LIMIT"))
	}
	faultpoint.Hit(faultpoint.CodexExited, t.run.ID, string(t.task))
	t.take(result)
	file, err := log.Finish()
	if err != nil {
		return &failure{class: "OSError", text: err.Error()}
	}
	full := t.artifact("codex_logs", file)
	t.progress.Log = &full
	if result.Outcome == codex.Finished || result.Outcome == codex.Question {
		if err := t.takeChange(ctx, clone); err != nil {
			return err
		}
	}
	return t.ended(ctx)
}

// clone makes the clone, or uses one that an earlier worker has made and not used.
func (t *codexTask) clone(ctx context.Context) (*gitrepo.Clone, error) {
	git, remote, err := t.remote()
	if err != nil {
		return nil, err
	}
	own := filepath.Join(t.cloneDir(), fmt.Sprintf("%d-%d", t.attempt.attempt, t.claim.Token))
	if t.progress.Stage == "" {
		t.adopt(git, own)
	}
	if err := removeOthers(own); err != nil {
		return nil, &failure{class: "OSError", text: err.Error()}
	}
	if clone, err := git.Open(own); err == nil {
		return clone, nil
	}
	faultpoint.Hit(faultpoint.CodexCloneBefore, t.run.ID, string(t.task))
	var clone *gitrepo.Clone
	err = t.retried(ctx, "clone", func() (err error) {
		clone, err = git.Clone(ctx, remote, t.config.Repositories.Base, own)
		return err
	})
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		var refused *gitrepo.RemoteError
		var write store.SpecWrite
		if errors.As(err, &refused) && refused.Refusal == gitrepo.RefusedLogin && t.checksLater() {
			if err := t.checkAgain(ctx, func(r *preflight.Report) *preflight.Finding { return &r.GitHub }, refused.Error(), &write); err != nil {
				return nil, err
			}
			if err := t.config.Runs.WriteSpec(ctx, t.claim, write); err != nil {
				return nil, err
			}
		}
		return nil, &failure{class: "RuntimeError", text: "the repository cannot be cloned: " + t.explain(err), code: "codex_clone_failed"}
	}
	faultpoint.Hit(faultpoint.CodexCloned, t.run.ID, string(t.task))
	return clone, nil
}

// explain is an error of gitrepo, with the setting that is its cure if it has one.
func (a *attempt) explain(err error) string {
	var large *disklimit.Error
	if errors.As(err, &large) {
		return fmt.Sprintf("the repository takes more than %s of the disk: raise %s if it is meant to be so large", disklimit.Text(large.Limit), a.config.SettingName("MM_ORCHESTRATOR_CLONE_LIMIT"))
	}
	var git *gitrepo.Error
	if errors.As(err, &git) && git.IsDiskFull() || errors.Is(err, syscall.ENOSPC) {
		return fmt.Sprintf("the disk with %s is full: free some of it, or set %s to a directory on another one (%v)", a.config.Repositories.Dir, a.config.SettingName("MM_ORCHESTRATOR_CLONE_DIR"), err)
	}
	return err.Error()
}

// adopt gives a clone that an earlier worker of this attempt has made its own name. In
// that clone nobody has worked: the stage would say so.
func (t *codexTask) adopt(git *gitrepo.Git, own string) {
	found, _ := filepath.Glob(filepath.Join(t.cloneDir(), fmt.Sprintf("%d-*", t.attempt.attempt)))
	for _, dir := range found {
		if _, err := git.Open(dir); err == nil && os.Rename(dir, own) == nil {
			return
		}
	}
}

// removeOthers removes what earlier workers have left beside a clone of this run.
func removeOthers(keep string) error {
	dir := filepath.Dir(keep)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, entry := range entries {
		if path := filepath.Join(dir, entry.Name()); path != keep {
			err = errors.Join(err, gitrepo.RemoveAll(path))
		}
	}
	return err
}

// removeClones removes what the task has in the directory for clones.
func (a *attempt) removeClones() {
	if a.config.Repositories == nil {
		return
	}
	dir := a.cloneDir()
	if err := gitrepo.RemoveAll(dir); err != nil {
		a.log.Warn("the clones of the task cannot be removed", "error", err)
	}
	_ = os.Remove(filepath.Dir(dir)) // only if it is empty
}

// counted counts the lines of Codex's output, for tests that interrupt it.
func (t *codexTask) counted(next io.Writer) io.Writer {
	return &countedLines{next: next, hit: func(n int) { faultpoint.Hit(faultpoint.CodexPrinted, t.run.ID, string(t.task), faultpoint.Number(n)) }}
}

// countedLines counts lines and not writes: how many lines a write has is chance.
type countedLines struct {
	next io.Writer
	n    atomic.Int64
	hit  func(n int)
}

func (w *countedLines) Write(p []byte) (int, error) {
	n, err := w.next.Write(p)
	for range bytes.Count(p[:n], []byte("\n")) {
		w.hit(int(w.n.Add(1)))
	}
	return n, err
}

// notRun is an error after which nothing is known about Codex. A program that cannot be
// started, or a key that cannot be read, is a failure of the task.
func (t *codexTask) notRun(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return &failure{class: "RuntimeError", text: "Codex cannot be used: " + err.Error(), code: "codex_not_started"}
}

// maxMessage limits what is recorded of a message of Codex, in bytes.
const maxMessage = 16 << 10

// bounded cuts a text at maxMessage.
func bounded(text string) string {
	if len(text) > maxMessage {
		text = strings.ToValidUTF8(text[:maxMessage], "") + " …"
	}
	return text
}

// take takes over how Codex has ended. Texts are redacted before they are cut.
func (t *codexTask) take(result codex.Result) {
	t.progress.Outcome, t.progress.Message = string(result.Outcome), bounded(t.redact(result.Message))
	if id := bounded(t.redact(result.TaskID)); id != "" {
		t.progress.TaskID = id
	}
	t.progress.InputTokens, t.progress.OutputTokens = result.Usage.Input, result.Usage.Output
}

// takeChange stores what the clone differs by.
func (t *codexTask) takeChange(ctx context.Context, clone *gitrepo.Clone) error {
	change, err := clone.Diff(ctx)
	switch {
	case err != nil && ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, gitrepo.ErrUnusable):
		t.progress.Outcome, t.progress.Message = outcomeUnusable, t.redact(err.Error())
		return nil
	case err != nil:
		return runtimeError("what Codex has changed cannot be read: %s", t.explain(err))
	}
	if name := t.hasSecret(clone, change); name != "" {
		t.progress.Outcome = outcomeSecret
		t.progress.Message = fmt.Sprintf("%s has a credential of this worker", t.redact(name))
		return nil
	}
	return t.storePatch(change.Patch, len(change.Files))
}

// storePatch stores the patch as it is: it must not be redacted, or it could not be
// applied. That it has no credential was looked at before.
func (t *codexTask) storePatch(patch []byte, files int) error {
	if len(patch) == 0 {
		return nil
	}
	name := t.fileName(".patch")
	if err := t.dir.WriteExact(name, func(w io.Writer) error { _, err := w.Write(patch); return err }); err != nil {
		return &failure{class: "OSError", text: err.Error()}
	}
	sum := sha256.Sum256(patch)
	stored := t.artifact("codex_patch", artifacts.File{Path: name, Checksum: hex.EncodeToString(sum[:]), SizeBytes: int64(len(patch))})
	t.progress.Patch, t.progress.ChangedFiles = &stored, files
	return nil
}

// hasSecret returns the name of a changed file with a credential, "" for none. Files are
// looked at and not the patch, in which those that are not text are compressed.
func (t *codexTask) hasSecret(clone *gitrepo.Clone, change gitrepo.Change) string {
	if t.config.Codex.Secrets == nil {
		return ""
	}
	root, err := os.OpenRoot(clone.Tree)
	if err != nil {
		return clone.Tree // removed meanwhile: there is nothing to take
	}
	defer root.Close()
	for _, name := range change.Files {
		if t.isSecret(strings.NewReader(name)) {
			return "the name of a changed file"
		}
		if target, err := root.Readlink(name); err == nil {
			if t.isSecret(strings.NewReader(target)) {
				return name
			}
			continue
		}
		info, err := root.Lstat(name)
		if err != nil || !info.Mode().IsRegular() {
			continue // deleted
		}
		file, err := root.Open(name)
		if err != nil {
			continue
		}
		found := t.isSecret(file)
		file.Close()
		if found {
			return name
		}
	}
	return ""
}

// isSecret reports whether a text has a credential. What any redactor masks, such as a
// login in an address, is not meant: an example in documentation may have that.
func (a *attempt) isSecret(text io.Reader) bool {
	if a.config.Codex.Secrets == nil {
		return false
	}
	masked, plain := sha256.New(), sha256.New()
	with, without := a.config.Codex.Secrets.Writer(masked), artifacts.NewRedactor(nil).Writer(plain)
	_, err := io.Copy(io.MultiWriter(with, without), text)
	err = errors.Join(err, with.Close(), without.Close())
	return err != nil || !bytes.Equal(masked.Sum(nil), plain.Sum(nil))
}

// ended records how Codex has ended. If its login was refused, the credentials are
// checked again: the audit row says what is wrong.
func (t *codexTask) ended(ctx context.Context) error {
	faultpoint.Hit(faultpoint.CodexStored, t.run.ID, string(t.task))
	t.progress.Stage = store.CodexEnded
	var write store.SpecWrite
	if t.progress.Outcome == string(codex.NotLoggedIn) && t.checksLater() {
		if err := t.checkAgain(ctx, func(r *preflight.Report) *preflight.Finding { return &r.Codex }, t.progress.Message, &write); err != nil {
			return err
		}
	}
	if err := t.record(ctx, write); err != nil {
		return err
	}
	t.log.Info("codex has ended", "outcome", t.progress.Outcome, "changed_files", t.progress.ChangedFiles, "input_tokens", t.progress.InputTokens, "output_tokens", t.progress.OutputTokens)
	faultpoint.Hit(faultpoint.CodexRecorded, t.run.ID, string(t.task))
	return nil
}

// checkAgain checks the credentials again after one of them was refused, and adds the row
// of the audit to a write. If the check finds no fault, the row has the refusal.
func (t *codexTask) checkAgain(ctx context.Context, refused func(*preflight.Report) *preflight.Finding, message string, write *store.SpecWrite) error {
	report, err := t.check(ctx, preflight.Request{Repository: t.prompt.repository, Codex: true, Fresh: true})
	if err != nil {
		return err
	}
	if finding := refused(&report); !finding.Status.Fails() {
		*finding = preflight.Finding{Status: preflight.Invalid, Message: message}
	}
	t.credentials = t.credentialsOf(report)
	write.Audit = t.credentials.audit(t.redact(t.context.text("retry_notes")))
	return nil
}

// conclude is what follows from how Codex has ended.
func (t *codexTask) conclude() (store.SpecWrite, error) {
	p := t.progress
	outcome := p.Outcome
	if outcome == string(codex.Finished) && p.Patch == nil {
		outcome = outcomeNoChange
		if codex.Asks(p.Message) {
			outcome = string(codex.Question)
		}
	}
	if outcome != string(codex.Finished) {
		return store.SpecWrite{}, t.failureOf(outcome)
	}
	if _, err := t.storedPatch(p.Patch.Path); err != nil {
		return store.SpecWrite{}, err
	}
	t.context.set("codex_task_id", p.TaskID)
	t.context.set("codex_logs_path", p.Log.Path)
	t.context.set("codex_patch_path", p.Patch.Path)
	t.context.set("codex_base_commit", nil)
	if p.BaseCommit != "" {
		t.context.set("codex_base_commit", p.BaseCommit)
	}
	t.context.set("codex_summary", p.Message)
	payload := statusPayload(store.SpecSucceeded, "Codex job submitted")
	payload.set("codexTaskId", p.TaskID)
	payload.set("summary", firstLine(p.Message))
	payload.set("logsPath", p.Log.Path)
	payload.set("patchPath", p.Patch.Path)
	t.addNumbers(payload)
	t.credentials.addTo(payload)
	return store.SpecWrite{
		CodexTaskID: p.TaskID, CodexLogsPath: p.Log.Path, CodexPatchPath: p.Patch.Path,
		State: t.state(store.SpecSucceeded, payload, p.Log.Path, p.Patch.Path),
	}, nil
}

// addNumbers adds what is known about the size of the work to a payload.
func (t *codexTask) addNumbers(payload *object) {
	p := t.progress
	payload.set("codexRuns", p.Runs)
	if p.ChangedFiles > 0 {
		payload.set("changedFiles", p.ChangedFiles)
	}
	if p.InputTokens+p.OutputTokens > 0 {
		payload.set("inputTokens", p.InputTokens)
		payload.set("outputTokens", p.OutputTokens)
	}
}

// failureOf is the failure of the task for an outcome, with what to do.
func (t *codexTask) failureOf(outcome string) error {
	message := t.progress.Message
	text := ""
	switch outcome {
	case outcomeNoChange:
		text = "Codex has ended without changing anything. It said: " + quoted(message) + ". If the task is done, tick it in tasks.md; otherwise describe it better, or retry with notes"
	case string(codex.Question):
		text = "Codex asks instead of working: " + quoted(message) + ". Retry with the answer as notes"
	case string(codex.ModelError):
		text = "Codex has failed: " + quoted(message) + ". Retry when the model's server works"
	case string(codex.Limited):
		text = "The account of Codex has reached a limit: " + quoted(message) + ". Retry when it is over"
	case string(codex.NotLoggedIn):
		text = "Codex has no valid login or key: " + quoted(message) + ". Run `codex login` for the worker's user, or put a new key where " + t.config.SettingName("MM_ORCHESTRATOR_CODEX_CREDENTIAL") + " points, and retry"
	case outcomeTooLarge:
		text = message + ". Retry with notes that say what not to write, or raise the limit"
	case string(codex.Stalled), string(codex.TimedOut):
		text = message + ". Retry, or divide the task"
	case string(codex.Garbage):
		text = "It is not known how Codex has ended: " + quoted(message) + ". The end of its log may say more"
	case outcomeUncertain:
		text = message + ". Look whether one of them is this task: if so, delete it there. Then retry"
	case outcomeUnusable:
		text = "Codex has changed what cannot be published: " + message + ". Retry with notes that say so"
	case outcomeSecret:
		text = "The change of Codex is not used: " + message + ". Replace that credential, and retry"
	default:
		text = fmt.Sprintf("Codex has ended in a way that this version does not know: %s %s", outcome, message)
	}
	more := newObject()
	more.set("codexOutcome", outcome)
	if t.progress.TaskID != "" {
		more.set("codexTaskId", t.progress.TaskID)
	}
	if t.progress.Log != nil {
		more.set("logsPath", t.progress.Log.Path)
	}
	if t.progress.Patch != nil {
		more.set("patchPath", t.progress.Patch.Path)
	}
	t.addNumbers(more)
	return &failure{class: "RuntimeError", text: text, code: "codex_" + outcome, payload: more}
}

// quoted is a text of Codex in a sentence.
func quoted(text string) string {
	text = strings.TrimRight(oneLine(text), ".")
	if runes := []rune(text); len(runes) > 600 {
		text = string(runes[:600]) + "…"
	}
	if text == "" {
		return "nothing"
	}
	return text
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(text), "\n")
	return quoted(line)
}

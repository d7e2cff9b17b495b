package speckit

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/disklimit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// A publication brings a patch to GitHub. Each stage is recorded, and a worker that takes
// the task over goes on from there (docs/spec-workflow.md#publish).
type publication struct {
	*attempt
	dir    *artifacts.Run
	git    *gitrepo.Git
	remote *gitrepo.Remote
	config PublishConfig
	// patch is the stored patch.
	patch store.SpecArtifact
	// progress is what is recorded. Only record changes what the database has.
	progress store.PublishProgress
}

// publishPatch publishes the patch that Codex has left.
func (a *attempt) publishPatch(ctx context.Context, dir *artifacts.Run) (store.SpecWrite, error) {
	p := &publication{attempt: a, dir: dir, config: a.Speckit.config.Publish.withDefaults()}
	if p.config.PullRequests == nil || a.Speckit.config.Repositories == nil {
		return store.SpecWrite{}, runtimeError("this worker cannot publish: it has no GitHub configured")
	}
	if found := a.claim.Progress.Publish; found != nil {
		p.progress = *found
		a.log.Info("the task continues where the previous worker has left it", "stage", found.Stage)
	}
	var err error
	path := a.context.text("codex_patch_path")
	if path == "" {
		return store.SpecWrite{}, &failure{class: "FileNotFoundError", text: "no patch of Codex is stored for the run" + discoverAgain, code: "patch_missing"}
	}
	if p.patch, err = a.storedPatch(path); err != nil {
		return store.SpecWrite{}, err
	}
	if p.git, p.remote, err = a.remote(); err != nil {
		return store.SpecWrite{}, err
	}
	if p.progress.Stage == "" || p.progress.Stage == store.PublishCommitted {
		if err := p.push(ctx); err != nil {
			return store.SpecWrite{}, err
		}
	}
	if p.progress.Stage == store.PublishNothing {
		return p.nothing()
	}
	if p.progress.Stage == store.PublishPushed {
		if err := p.open(ctx); err != nil {
			return store.SpecWrite{}, err
		}
	}
	return p.conclude()
}

// hit marks a moment for the chaos harness.
func (p *publication) hit(point faultpoint.Point) { faultpoint.Hit(point, p.run.ID, string(p.task)) }

// record writes the progress, with rows that belong to it.
func (p *publication) record(ctx context.Context, write store.SpecWrite) error {
	progress := p.progress
	write.Progress = &store.SpecProgress{Publish: &progress}
	for _, file := range []*store.SpecArtifact{progress.Applied, progress.Pushed, progress.Response} {
		if file != nil {
			write.Artifacts = append(write.Artifacts, *file)
		}
	}
	return p.attempt.config.Runs.WriteSpec(ctx, p.claim, write)
}

// failed makes an error of git or GitHub a failure of the task. After a login that was
// refused the credentials are checked again: the audit row says what is wrong.
func (p *publication) failed(ctx context.Context, err error, code, what string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var known *failure
	if errors.As(err, &known) {
		return err
	}
	var refused *gitrepo.RemoteError
	login := errors.As(err, &refused) && refused.Refusal == gitrepo.RefusedLogin || github.KindOf(err) == github.Login
	if login && p.checksLater() {
		name, _ := p.repository()
		report, checkErr := p.check(ctx, preflight.Request{Repository: name, Fresh: true})
		if checkErr != nil {
			return checkErr
		}
		if !report.GitHub.Status.Fails() {
			report.GitHub = preflight.Finding{Status: preflight.Invalid, Message: err.Error()}
		}
		p.credentials = p.credentialsOf(report)
		if writeErr := p.attempt.config.Runs.WriteSpec(ctx, p.claim, store.SpecWrite{Audit: p.credentials.audit(p.redact(p.context.text("retry_notes")))}); writeErr != nil {
			return writeErr
		}
	}
	return &failure{class: "RuntimeError", text: what + ": " + p.explain(err), code: code}
}

// push makes the commit and pushes it.
func (p *publication) push(ctx context.Context) error {
	// With the claim's token: a worker that has lost its claim has another directory.
	dir := filepath.Join(p.cloneDir(), fmt.Sprintf("%d-%d", p.attempt.attempt, p.claim.Token))
	if err := removeOthers(dir); err != nil { // such a worker may still write there
		p.log.Warn("the clones of an earlier worker cannot be removed", "error", err)
	}
	defer p.removeClones()
	var clone *gitrepo.Clone
	p.hit(faultpoint.PublishFetching)
	err := p.retried(ctx, "clone", func() (err error) {
		clone, err = p.git.Fetch(ctx, p.remote, p.attempt.config.Repositories.Base, dir)
		return err
	})
	if err != nil {
		return p.failed(ctx, err, "clone_failed", "the repository cannot be cloned")
	}
	p.hit(faultpoint.PublishFetched)
	id, _ := p.openTask()
	branch := branchName(p.config.BranchPrefix, p.context.text("feature_key"), id)
	if branch == clone.Branch {
		return valueError("the branch of the task would be %s, which is the base branch: change %s", branch, p.attempt.config.SettingName("MM_ORCHESTRATOR_BRANCH_PREFIX"))
	}
	var tip gitrepo.Tip
	if err := p.retried(ctx, "look at the branch", func() (err error) {
		tip, err = clone.Tip(ctx, p.remote, branch)
		return err
	}); err != nil {
		return p.failed(ctx, err, "push_failed", "the branch "+branch+" cannot be looked at")
	}
	if p.progress.Stage == store.PublishCommitted && p.progress.Branch == branch && tip.ID == p.progress.Commit {
		return p.pushed(ctx, gitrepo.PushUnchanged, "The branch has the commit already: an earlier worker has pushed it.\n")
	}
	if err := p.commit(ctx, clone, branch); err != nil || p.progress.Stage == store.PublishNothing {
		return err
	}
	if d := p.description(); tip.ID != "" && tip.ID != p.progress.Commit && !d.owns(tip) {
		return &failure{class: "RuntimeError", code: "branch_not_ours", text: fmt.Sprintf(
			"the branch %s has commit %.12s of %s, which this program has not made: merge or delete the branch, then retry the run", branch, tip.ID, tip.Committer)}
	}
	p.hit(faultpoint.PublishPushing)
	var outcome gitrepo.PushOutcome
	var log string
	err = p.retried(ctx, "push", func() (err error) {
		outcome, log, err = clone.Push(ctx, p.remote, branch, p.progress.Commit, tip.ID)
		var rejected *gitrepo.PushError
		if errors.As(err, &rejected) && rejected.Stale {
			// The answer to an earlier push may have been lost.
			if now, tipErr := clone.Tip(ctx, p.remote, branch); tipErr == nil && now.ID == p.progress.Commit {
				outcome, err = gitrepo.PushUnchanged, nil
			}
		}
		return err
	})
	p.hit(faultpoint.PublishPushedBranch)
	if err != nil {
		if ctx.Err() == nil && log != "" {
			if writeErr := p.writePushLog(log); writeErr != nil {
				return writeErr
			}
			if writeErr := p.record(ctx, store.SpecWrite{}); writeErr != nil {
				return writeErr
			}
		}
		return p.failed(ctx, err, "push_failed", "the branch cannot be pushed")
	}
	return p.pushed(ctx, outcome, log)
}

func (p *publication) writePushLog(log string) error {
	file, err := p.write(p.dir, "gh_push_log", "gh_push.log", log)
	p.progress.Pushed = &file
	return err
}

// pushed records that the branch has the commit.
func (p *publication) pushed(ctx context.Context, outcome gitrepo.PushOutcome, log string) error {
	err := p.writePushLog(fmt.Sprintf("branch %s\ncommit %s\nbase %s %s\noutcome %s\n\n%s", p.progress.Branch, p.progress.Commit, p.progress.Base, p.progress.BaseCommit, outcome, log))
	if err != nil {
		return err
	}
	p.progress.Stage = store.PublishPushed
	if err := p.record(ctx, store.SpecWrite{Branch: p.progress.Branch}); err != nil {
		return err
	}
	p.log.Info("branch pushed", "branch", p.progress.Branch, "commit", p.progress.Commit, "outcome", outcome)
	p.hit(faultpoint.PublishPushRecorded)
	return nil
}

// maxNames bounds the names of changed files that are recorded and shown.
const maxNames = 50

// commit applies the patch and makes the commit.
func (p *publication) commit(ctx context.Context, clone *gitrepo.Clone, branch string) error {
	patch, err := p.readPatch()
	if err != nil {
		return err
	}
	p.progress = store.PublishProgress{Branch: branch, Base: clone.Branch, BaseCommit: clone.Commit}
	var applied gitrepo.Applied
	err = p.retried(ctx, "look for the patch's base", func() (err error) {
		applied, err = clone.Apply(ctx, p.remote, patch)
		return err
	})
	var conflict *gitrepo.ConflictError
	switch {
	case errors.As(err, &conflict):
		return p.conflict(ctx, conflict)
	case errors.Is(err, gitrepo.ErrUnusable):
		return &failure{class: "ValueError", text: "the stored patch " + p.patch.Path + " is refused: " + err.Error() + discoverAgain, code: "patch_unusable"}
	case err != nil:
		return p.failed(ctx, err, "apply_failed", "the patch cannot be applied")
	}
	p.progress.Files, p.progress.ChangedFiles = applied.Files[:min(len(applied.Files), maxNames)], len(applied.Files)
	output := newObject()
	output.set("description", fmt.Sprintf("Applied the patch of Codex to commit %.12s of %s", clone.Commit, clone.Branch))
	output.set("hasChanges", len(applied.Files) > 0)
	output.set("patchPath", p.patch.Path)
	output.set("baseBranch", clone.Branch)
	output.set("baseCommit", clone.Commit)
	output.set("patchBaseCommit", textOrNull(applied.Base))
	output.set("files", append([]string{}, applied.Files...))
	output.set("output", applied.Log)
	if len(applied.Files) == 0 {
		output.set("description", fmt.Sprintf("Commit %.12s of %s has the change already", clone.Commit, clone.Branch))
		p.progress.Stage = store.PublishNothing
	} else {
		if err := p.noSecrets(ctx, clone, applied); err != nil {
			return err
		}
		d := p.description()
		p.progress.Commit, err = clone.CommitTree(ctx, gitrepo.Commit{Tree: applied.Tree, Message: p.redact(d.message()), Author: p.config.Author, Committer: p.config.Author, At: p.run.CreatedAt})
		if err != nil {
			return p.failed(ctx, err, "commit_failed", "the commit cannot be made")
		}
		output.set("commit", p.progress.Commit)
		p.progress.Stage = store.PublishCommitted
	}
	file, err := p.writeJSON(p.dir, "apply_output", "apply_output.json", output)
	if err != nil {
		return err
	}
	p.progress.Applied = &file
	if err := p.record(ctx, store.SpecWrite{Phase: store.SpecPhasePublish, CodexPatchPath: p.patch.Path, Artifacts: []store.SpecArtifact{p.patch}}); err != nil {
		return err
	}
	p.hit(faultpoint.PublishCommitRecorded)
	return nil
}

func textOrNull(text string) any {
	if text == "" {
		return nil
	}
	return text
}

// readPatch reads the stored patch, whose digest must still be the one that was checked.
func (p *publication) readPatch() ([]byte, error) {
	// Rows may have a patch that this program has not made.
	const header = 4096
	if most := p.attempt.config.Repositories.Git.MaxPatch(); p.patch.SizeBytes > most+header {
		return nil, &failure{class: "ValueError", code: "patch_unusable", text: fmt.Sprintf("the stored patch %s has %s, and a patch may have %s%s", p.patch.Path, disklimit.Text(p.patch.SizeBytes), disklimit.Text(most), discoverAgain)}
	}
	root, err := os.OpenRoot(p.place.Dir)
	if err != nil {
		return nil, &failure{class: "OSError", text: fmt.Sprintf("%s cannot be read: %v", p.place.Dir, cause(err))}
	}
	defer root.Close()
	file, err := root.Open(p.inDirectory(p.patch.Path))
	if err != nil {
		return nil, &failure{class: "OSError", text: fmt.Sprintf("the stored patch %s cannot be read: %v", p.patch.Path, cause(err))}
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, p.patch.SizeBytes+1))
	if err != nil {
		return nil, &failure{class: "OSError", text: fmt.Sprintf("the stored patch %s cannot be read: %v", p.patch.Path, cause(err))}
	}
	if sum := sha256.Sum256(text); hex.EncodeToString(sum[:]) != p.patch.SHA256 {
		return nil, valueError("the stored patch %s changes while it is read%s", p.patch.Path, discoverAgain)
	}
	return text, nil
}

// conflict records the files that the patch does not fit, and says what to do.
func (p *publication) conflict(ctx context.Context, conflict *gitrepo.ConflictError) error {
	output := newObject()
	output.set("description", "The patch of Codex does not fit the base branch any more")
	output.set("hasChanges", true)
	output.set("patchPath", p.patch.Path)
	output.set("baseBranch", p.progress.Base)
	output.set("baseCommit", conflict.Commit)
	output.set("patchBaseCommit", textOrNull(conflict.Base))
	names := []string{}
	merged := newObject()
	for _, file := range conflict.Files {
		names = append(names, file.Name)
		if file.Merged != nil {
			merged.set(file.Name, string(file.Merged))
		}
	}
	output.set("conflicts", names)
	output.set("merged", merged)
	output.set("output", conflict.Output)
	file, err := p.writeJSON(p.dir, "apply_output", "apply_output.json", output)
	if err != nil {
		return err
	}
	p.progress.Applied = &file
	if err := p.record(ctx, store.SpecWrite{CodexPatchPath: p.patch.Path, Artifacts: []store.SpecArtifact{p.patch}}); err != nil {
		return err
	}
	payload := newObject()
	payload.set("conflicts", names)
	payload.set("patchPath", p.patch.Path)
	payload.set("applyOutputPath", file.Path)
	return &failure{class: "RuntimeError", code: "apply_conflict", payload: payload, text: fmt.Sprintf(
		"%v. Others have changed the same lines of %s since Codex began. Retry the run from discovery, so that Codex begins at the branch's new commit; or apply the patch %s by hand, with the files of %s",
		conflict, p.progress.Base, p.patch.Path, file.Path)}
}

// noSecrets refuses a change that has a credential of this worker. Codex's task has looked
// at it before; but the patch may be another worker's, and the credential newer.
func (p *publication) noSecrets(ctx context.Context, clone *gitrepo.Clone, applied gitrepo.Applied) error {
	if p.attempt.config.Codex.Secrets == nil {
		return nil
	}
	has := func(name string, files func(io.Writer) error) (bool, error) {
		read, write := io.Pipe()
		ended := make(chan error, 1)
		go func() {
			err := files(write)
			_ = write.CloseWithError(err)
			ended <- err
		}()
		found := p.isSecret(io.MultiReader(strings.NewReader(name+"\n"), read))
		_ = read.Close()
		return found, <-ended
	}
	// One git for all files: a change may have thousands.
	found, err := has(strings.Join(applied.Files, "\n"), func(w io.Writer) error { return clone.ReadFiles(ctx, applied.Tree, applied.Files, w) })
	if err != nil {
		return p.failed(ctx, err, "apply_failed", "the changed files cannot be read")
	}
	if !found {
		return nil
	}
	names, err := clone.ListFiles(ctx, applied.Tree, applied.Files)
	if err != nil {
		return p.failed(ctx, err, "apply_failed", "the changed files cannot be read")
	}
	for _, name := range names {
		found, err := has(name, func(w io.Writer) error { return clone.ReadFile(ctx, applied.Tree, name, w) })
		if err != nil {
			return p.failed(ctx, err, "apply_failed", "the changed files cannot be read")
		}
		if found {
			return &failure{class: "RuntimeError", code: "change_has_secret", text: fmt.Sprintf(
				"the change is not published, because %s has a credential of this worker: replace the credential, which Codex has seen, and%s", p.redact(name), strings.TrimPrefix(discoverAgain, ":"))}
		}
	}
	// It is in the name of a file that the change removes: the branch has that already.
	return nil
}

// description is what commit and pull request say.
func (p *publication) description() description {
	id, title := p.openTask()
	d := description{
		run: p.run.ID, attempt: p.attempt.attempt, feature: p.context.text("feature_key"), taskID: id, title: title,
		summary: p.redact(cmp.Or(p.context.text("codex_summary"), p.run.CodexSummary)), files: p.progress.Files, changed: p.progress.ChangedFiles, author: p.config.Author, more: p.config.Trailers,
	}
	if task := p.context.inner("task"); task != nil {
		d.phase = pythonText(task, "phase")
	}
	return d
}

// open opens the pull request, or finds the one that exists.
func (p *publication) open(ctx context.Context) error {
	name, err := p.repository()
	if err != nil {
		return err
	}
	d := p.description()
	p.hit(faultpoint.PublishOpening)
	over := waitAtMost(ctx, serversLimit)
	opened, err := p.config.PullRequests.Ensure(ctx, github.Want{
		Repository: name, Head: p.progress.Branch, Base: p.progress.Base, Title: p.redact(d.subject(200)), Body: p.redact(d.body()),
		Draft: p.config.Draft, Labels: p.config.Labels, Reviewers: p.config.Reviewers, Teams: p.config.Teams,
	})
	over()
	if err != nil {
		return p.failed(ctx, err, "pull_request_failed", "the branch "+p.progress.Branch+" is pushed, but the pull request cannot be opened")
	}
	p.hit(faultpoint.PublishOpened)
	p.progress.Stage, p.progress.PullRequest, p.progress.URL = store.PublishOpened, opened.Number, opened.URL
	o := newObject()
	o.set("repository", name)
	o.set("branch", p.progress.Branch)
	o.set("patch", p.patch.Path[strings.LastIndexByte(p.patch.Path, '/')+1:])
	o.set("url", opened.URL)
	o.set("number", opened.Number)
	o.set("base", p.progress.Base)
	o.set("commit", p.progress.Commit)
	o.set("state", string(opened.State))
	o.set("created", opened.Created)
	o.set("notes", append([]string{}, opened.Notes...))
	response, err := json.Marshal(opened.PullRequest)
	if err != nil {
		return runtimeError("the pull request cannot be recorded: %v", err)
	}
	o.setRaw("response", response)
	file, err := p.writeJSON(p.dir, "gh_pr_response", strings.ReplaceAll(p.progress.Branch, "/", "_")+"_pr.json", o)
	if err != nil {
		return err
	}
	p.progress.Response = &file
	if err := p.record(ctx, store.SpecWrite{PRURL: opened.URL}); err != nil {
		return err
	}
	p.log.Info("pull request published", "url", opened.URL, "created", opened.Created, "state", opened.State)
	for _, note := range opened.Notes {
		p.log.Warn("a part of the pull request could not be made", "url", opened.URL, "reason", note)
	}
	p.hit(faultpoint.PublishOpenRecorded)
	return nil
}

// conclude is the end of a task whose pull request exists.
func (p *publication) conclude() (store.SpecWrite, error) {
	applied := p.progress.Applied
	p.context.set("branch_name", p.progress.Branch)
	p.context.set("pr_url", p.progress.URL)
	p.context.set("codex_patch_path", p.patch.Path)
	p.context.set("github_response_path", p.progress.Response.Path)
	p.context.set("apply_output_path", applied.Path)
	summary, err := p.writeSummary(p.dir)
	if err != nil {
		return store.SpecWrite{}, err
	}
	payload := statusPayload(store.SpecSucceeded, "Pull request published")
	payload.set("branch", p.progress.Branch)
	payload.set("prUrl", p.progress.URL)
	payload.set("patchPath", p.patch.Path)
	payload.set("responsePath", p.progress.Response.Path)
	payload.set("applyOutputPath", applied.Path)
	p.credentials.addTo(payload)
	payload.set("resumed", string(p.context.raw("resume_token")) != "null")
	payload.set("commit", p.progress.Commit)
	payload.set("pushLogPath", p.progress.Pushed.Path)
	return store.SpecWrite{
		Status: store.SpecRunSucceeded, Phase: store.SpecPhaseComplete, Ended: true,
		Branch: p.progress.Branch, PRURL: p.progress.URL, CodexPatchPath: p.patch.Path, CodexQueue: p.context.text("codex_queue"),
		Artifacts: []store.SpecArtifact{summary},
		State:     p.state(store.SpecSucceeded, payload, p.patch.Path, p.progress.Response.Path, applied.Path, summary.Path, p.progress.Pushed.Path),
	}, nil
}

// nothing is the end of a task whose change the base branch has already: somebody has
// merged it.
func (p *publication) nothing() (store.SpecWrite, error) {
	p.context.set("apply_output_path", p.progress.Applied.Path)
	summary, err := p.writeSummary(p.dir)
	if err != nil {
		return store.SpecWrite{}, err
	}
	payload := statusPayload(store.SpecSucceeded, fmt.Sprintf("Nothing to publish: %s has the change already", p.progress.Base))
	payload.set("result", "already_applied")
	payload.set("patchPath", p.patch.Path)
	payload.set("applyOutputPath", p.progress.Applied.Path)
	p.credentials.addTo(payload)
	payload.set("resumed", string(p.context.raw("resume_token")) != "null")
	return store.SpecWrite{
		Status: store.SpecRunSucceeded, Phase: store.SpecPhaseComplete, Ended: true, CodexPatchPath: p.patch.Path, CodexQueue: p.context.text("codex_queue"),
		Artifacts: []store.SpecArtifact{summary},
		State:     p.state(store.SpecSucceeded, payload, p.patch.Path, p.progress.Applied.Path, summary.Path),
	}, nil
}

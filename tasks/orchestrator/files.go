package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// Names of a run's refs, see [change.Ref].
const (
	baselineRef   = "baseline"
	changeRef     = "change"
	violationsRef = "violations"
	// asideRef keeps work of somebody else.
	asideRef = "aside"
)

// runFiles is the workspace of a run, compared with its state before the run.
type runFiles struct {
	*stepRun
	repository *change.Repository
	// before is the state before the run; in a step that only looks at its own
	// command, before that.
	before *change.State
	// top and inside are those of the function repository.
	top, inside string
	allowed     *allowlist
	// seen is what look has returned last, nil before.
	seen *change.State
	// sums are the SHA-256 of blobs, as far as they were asked for.
	sums map[string]string
}

// openRepository finds the repository that a folder of the workspace lies in.
func (s *stepRun) openRepository(ctx context.Context, workspace string) (*runFiles, error) {
	f := &runFiles{stepRun: s}
	options := change.Options{Excluded: s.isForeignArtifact(), MaxFile: s.config.BaselineFileLimit, MaxFiles: s.config.BaselineLimit, Answers: s.answers}
	if s.place.Dir != "" {
		options.Include = []string{s.place.Dir}
	}
	repository, err := change.Open(ctx, s.runner.git, workspace, options)
	if err != nil {
		return nil, err
	}
	f.repository, f.top = repository, repository.Top
	workspace = artifacts.Resolve(workspace)
	if f.inside, err = filepath.Rel(f.top, workspace); err != nil {
		return nil, err
	}
	patterns, failure := s.patchPatterns()
	if failure != nil {
		return nil, failure
	}
	f.allowed = s.newAllowlist(workspace, patterns)
	return f, nil
}

// isForeignArtifact returns a function that says whether a path is an artifact of
// any run, as artifactFilter does, for paths without links. The folder of this run
// is to be included again.
func (s *stepRun) isForeignArtifact() func(path string) bool {
	workspace := artifacts.Resolve(s.config.Workspace)
	root, err := s.config.Artifacts.Root()
	if err != nil || change.Below(root, workspace) {
		root = ""
	}
	runs := ""
	if s.place.Dir != "" {
		runs = artifacts.Resolve(filepath.Dir(s.place.Dir))
	}
	return func(path string) bool {
		if root != "" && change.Below(root, path) {
			return true
		}
		relative, err := filepath.Rel(runs, path)
		if runs == "" || err != nil || !filepath.IsLocal(relative) {
			return false
		}
		first, _, _ := strings.Cut(filepath.ToSlash(relative), "/")
		id, err := store.ParseRunID(first)
		return err == nil && id == first
	}
}

// rules say what the commands of this step may alter. own are names of artifacts
// that the worker writes during the step.
func (f *runFiles) rules(own ...string) change.Rules {
	return change.Rules{
		Allowed: func(path string) bool {
			return f.allowed.allowsReal(f.absolute(path)) && !f.inRunDir(path)
		},
		Own: func(path string) bool { return f.isOwn(path, own) },
	}
}

// absolute returns where the entry's path is on disk.
func (f *runFiles) absolute(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(f.top, path)
}

func (f *runFiles) inRunDir(path string) bool {
	return f.place.Dir != "" && change.Below(artifacts.Resolve(f.place.Dir), f.absolute(path))
}

// isOwn says that the worker writes a file of the run's directory itself: an
// artifact, or its temporary name (artifacts.Run).
func (f *runFiles) isOwn(path string, own []string) bool {
	if !f.inRunDir(path) {
		return false
	}
	name, err := filepath.Rel(artifacts.Resolve(f.place.Dir), f.absolute(path))
	if err != nil {
		return false
	}
	dir, base := filepath.Split(name)
	return slices.ContainsFunc(own, func(artifact string) bool {
		artifact = filepath.Clean(artifact)
		if name == artifact || strings.HasPrefix(artifact, name+"/") {
			return true
		}
		itsDir, itsBase := filepath.Split(artifact)
		return dir == itsDir && strings.HasPrefix(base, "."+itsBase+".") && len(base) == len(itsBase)+2+temporaryLength
	}) || strings.HasPrefix(base, ".spool.")
}

// temporaryLength is the length of the random end of an artifact's temporary name.
const temporaryLength = 26

// shownPath is how messages name an entry: relative to the workspace, as git's
// lists are.
func (f *runFiles) shownPath(d change.Difference) string {
	path := d.Path
	if d.Kind == change.RefDiffers {
		path = d.GitDir + "/" + d.Path
	}
	if !filepath.IsAbs(path) && f.inside != "." {
		if relative, err := filepath.Rel(f.inside, path); err == nil {
			path = relative
		}
	}
	return printable(path)
}

// captureBaseline records the state of the workspace before the run alters it.
// After it returns without a failure, either the run can be taken back, or the
// record says why it cannot. It returns nil if there is no baseline.
//
// It is called before the first command of a patch, or of another step in a plan
// without patch. A later start of the step keeps the first baseline.
func (s *stepRun) captureBaseline(ctx context.Context, log *artifacts.Log, workspace string) (*runFiles, *Failure) {
	if known := s.record.Files; known != nil && !known.Restored {
		if known.Missing != "" {
			return nil, nil
		}
		return s.openFiles(ctx)
	}
	ended := func() *Failure {
		return commandError("The state of the workspace was not captured before the step was ended: " + context.Cause(ctx).Error())
	}
	withoutPatch := s.step != store.StepPatch
	f, err := s.openRepository(ctx, workspace)
	if err != nil {
		if context.Cause(ctx) != nil {
			return nil, ended()
		}
		s.log.Warn("workspace cannot be captured: a rollback runs the plan's own commands", "workspace", workspace, "error", err)
		s.record.Files, s.record.Undone = &change.Files{Workspace: workspace, Missing: cut(s.clean(err.Error())), WithoutPatch: withoutPatch}, false
		return nil, s.saveRecord(ctx)
	}
	state, id, err := f.repository.Capture(ctx, s.runID, baselineRef)
	if err != nil {
		if context.Cause(ctx) != nil {
			return nil, ended()
		}
		return nil, commandError(fmt.Sprintf("The state of workspace %s cannot be captured, so that the run could not be taken back: %s. Nothing was changed", workspace, err))
	}
	if unread := state.Unread(); len(unread) > 0 {
		log.Line(fmt.Sprintf("[Of these files size and time are kept, and no content, because they are not in git and too large: %s]", cut(strings.Join(s.shown(unread), ", "))))
	}
	f.before = state
	s.record.Files, s.record.Undone = &change.Files{Workspace: workspace, Top: f.top, Baseline: id, WithoutPatch: withoutPatch}, false
	return f, s.saveRecord(ctx)
}

// openFiles loads the baseline of the run.
func (s *stepRun) openFiles(ctx context.Context) (*runFiles, *Failure) {
	f, err := s.openRepository(ctx, s.record.Files.Workspace)
	if err == nil {
		f.before, err = f.repository.Load(ctx, s.record.Files.Baseline)
	}
	if err == nil {
		return f, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return nil, commandError("The state of the workspace before the run was not read before the step was ended: " + cause.Error())
	}
	return nil, commandError(fmt.Sprintf("The state of workspace %s before the run cannot be read: %s. It is kept under %s", s.record.Files.Workspace, err, change.Ref(s.runID, baselineRef)))
}

// look observes the workspace.
func (f *runFiles) look(ctx context.Context) (*change.State, *Failure) {
	state, err := f.repository.Observe(ctx, f.before)
	if err == nil {
		f.seen = state
		return state, nil
	}
	if cause := context.Cause(ctx); cause != nil {
		return nil, commandError("The workspace was not compared with its state before the run, because the step was ended: " + cause.Error())
	}
	return nil, commandError("The workspace cannot be compared with its state before the run: " + err.Error())
}

func isChange(d change.Difference) bool { return !d.SideEffect }

// settleTime is how long a file must stay as it is to count as written by the
// step's commands, which have ended.
const settleTime = 300 * time.Millisecond

// withoutLive drops what is still being altered although the step's commands and all
// their processes have ended: data and logs of a service, for instance. Only files
// that git does not track can be that. after is the state that the list is about.
func (f *runFiles) withoutLive(ctx context.Context, log *artifacts.Log, after *change.State, list []change.Difference) ([]change.Difference, *Failure) {
	isTracked := f.before.Tracks()
	mayBeLive := func(d change.Difference) bool {
		return d.Kind == change.EntryDiffers && d.GitDir == "" && d.Violation != "" && !isTracked(d.Path)
	}
	if !slices.ContainsFunc(list, mayBeLive) {
		return list, nil
	}
	timer := time.NewTimer(settleTime)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
	now, failure := f.look(ctx)
	if failure != nil {
		return nil, failure
	}
	moving := map[string]bool{}
	for _, d := range change.Compare(after, now) {
		moving[d.Path] = true
	}
	var live []string
	list = slices.DeleteFunc(list, func(d change.Difference) bool {
		drop := mayBeLive(d) && moving[d.Path]
		if drop {
			live = append(live, f.shownPath(d))
		}
		return drop
	})
	if len(live) > 0 {
		log.Line(fmt.Sprintf("[Left alone, because another program still writes them: %s]", cut(strings.Join(f.shown(live), ", "))))
	}
	return list, nil
}

// keepChange stores what the run has altered, and records it. step is the part of it
// that is this step's.
func (f *runFiles) keepChange(ctx context.Context, after *change.State, list, step []change.Difference) *Failure {
	id, err := f.repository.StoreChange(ctx, f.runID, changeRef, after, list)
	if err != nil {
		return commandError("What the step has altered in the workspace cannot be stored: " + err.Error())
	}
	if failure := f.auditChange(ctx, step); failure != nil {
		return failure
	}
	f.auditViolations(change.Violations(step))
	files := f.record.Files
	files.Altered = slices.ContainsFunc(list, isChange)
	files.Change, files.Violated, files.ViolationsUndone = id, len(change.Violations(list)) > 0, false
	return f.saveRecord(ctx)
}

// undoViolations takes back what a run must not alter, and returns the failure that
// names it. The version of the run is kept under a ref, and the log has the
// commands that show it.
func (f *runFiles) undoViolations(ctx context.Context, log *artifacts.Log, list []change.Difference) *Failure {
	violations := change.Violations(list)
	text := f.violationText(violations)
	// A step at its time limit must not leave violations in place.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), f.config.FinishTimeout)
	defer cancel()
	failed := func(err error) *Failure {
		log.Line(fmt.Sprintf("[What the run must not alter cannot be taken back: %s]", err))
		return allowListViolation(cut(text + ". It could not be taken back: " + err.Error()))
	}
	now, failure := f.look(ctx)
	if failure != nil {
		return failed(failure)
	}
	left := change.Remaining(f.before, now, violations)
	var paths []string
	for _, d := range left {
		if d.Kind == change.EntryDiffers {
			paths = append(paths, d.Path)
		}
	}
	aside, err := f.repository.SetAside(ctx, f.runID, violationsRef, now, paths)
	if err != nil {
		return failed(err)
	}
	if aside.Ref != "" {
		f.audit(audit.Record{Kind: audit.SetAside, Text: fmt.Sprintf("the run's version of %s, in %s", cut(strings.Join(f.shownPaths(left), ", ")), aside.Ref)})
	}
	if failure := f.auditBefore(ctx); failure != nil {
		return failed(failure)
	}
	if _, err := f.repository.Restore(ctx, f.before, now, violations); err != nil {
		return failed(err)
	}
	if now, failure = f.look(ctx); failure != nil {
		return failed(failure)
	}
	if left := change.Remaining(f.before, now, violations); len(left) > 0 {
		return failed(errors.New(f.violationText(left)))
	}
	for _, d := range violations {
		log.Line(fmt.Sprintf("[Taken back: %s (%s)]", f.shownPath(d), d.Violation))
	}
	if aside.Ref != "" {
		log.Line(fmt.Sprintf("[These files as they were, also what somebody else may have edited meanwhile, are in %s]", aside.Ref))
		for _, command := range aside.Commands {
			log.Line("[To bring that version back, run: " + command + "]")
		}
	}
	f.auditRestored(ctx, violations)
	f.record.Files.ViolationsUndone = true
	if failure := f.saveRecord(ctx); failure != nil {
		return failure
	}
	return allowListViolation(cut(text))
}

func (f *runFiles) violationText(list []change.Difference) string {
	var texts []string
	for _, d := range list {
		text := f.shownPath(d) + " is not allow-listed"
		if !slices.Contains(texts, text) {
			texts = append(texts, text)
		}
	}
	return strings.Join(texts, "; ")
}

// watchedCommand is a step's command whose effect on the workspace is watched.
type watchedCommand struct {
	files  *runFiles
	before *change.State
}

// beforeDeployment records that a step begins that uses the workspace's files, and
// looks at them, so that afterDeployment can tell what its command has altered.
func (s *stepRun) beforeDeployment(ctx context.Context, log *artifacts.Log, workspace string, command []string) (watchedCommand, *Failure) {
	if failure := s.captureWithoutPatch(ctx, log, workspace, command); failure != nil {
		return watchedCommand{}, failure
	}
	files := s.record.Files
	if files == nil || files.Missing != "" || files.Restored {
		return watchedCommand{}, nil
	}
	if !files.Deployed {
		files.Deployed = true
		if failure := s.saveRecord(ctx); failure != nil {
			return watchedCommand{}, failure
		}
	}
	f, failure := s.openFiles(ctx)
	if failure != nil {
		return watchedCommand{}, failure
	}
	before, failure := f.look(ctx)
	if failure != nil {
		return watchedCommand{}, failure
	}
	// What others have altered since the baseline must not be lost either.
	if _, err := f.repository.StoreChange(ctx, s.runID, "before-"+string(s.step), before, change.Compare(f.before, before)); err != nil {
		return watchedCommand{}, commandError("The state of the workspace before the command cannot be stored: " + err.Error())
	}
	return watchedCommand{f, before}, nil
}

// captureWithoutPatch captures the workspace before a command that may alter it in a
// plan without patch, such as a skill (docs/moonmind.md#skill-plans). What an earlier
// worker without a record has altered cannot be told any more.
func (s *stepRun) captureWithoutPatch(ctx context.Context, log *artifacts.Log, workspace string, command []string) *Failure {
	_, isCompose := compose.ParseTarget(command)
	files := s.record.Files
	switch {
	case isCompose, s.plan.patches(), files != nil && !files.WithoutPatch,
		files == nil && (s.ranElsewhere || s.journal.skipped > 0):
		return nil
	}
	_, failure := s.captureBaseline(ctx, log, workspace)
	return failure
}

// afterDeployment returns a failure if the command has altered something outside of
// the allow-list, after taking that back. What it has altered inside of it becomes
// part of the run's change.
//
// A compose command starts containers, which may write files of their own to the
// workspace: of its effects, only those on files that git tracks, and on the
// repository, count. So do those on what was in a folder that is gone: it comes back
// with all that was in it.
//
// In a plan without patch the allow-list does not count, as in MoonMind. Any command
// may start containers there, and what it has altered is recorded to be taken back.
func (s *stepRun) afterDeployment(ctx context.Context, log *artifacts.Log, w watchedCommand, command []string) *Failure {
	if w.files == nil || context.Cause(ctx) != nil {
		return nil
	}
	f := w.files
	after, failure := f.look(ctx)
	if failure != nil {
		return failure
	}
	_, isCompose := compose.ParseTarget(command)
	withoutPatch, before, isTracked := f.record.Files.WithoutPatch, w.before, w.before.Tracks()
	first := withoutPatch && f.record.Files.Change == ""
	if first {
		// An earlier worker may have run the command.
		before = f.before
	}
	if withoutPatch {
		isTracked = tracksEither(before, after)
	}
	var list, side []change.Difference
	var gone []string                                                    // folders with tracked files that the command has removed
	for _, d := range change.Judge(before, after, f.rules(log.Path())) { // sorted: a folder comes before what is in it
		container := (isCompose || withoutPatch) && d.Kind == change.EntryDiffers && d.GitDir == "" && !isTracked(d.Path) &&
			!slices.ContainsFunc(gone, func(dir string) bool { return change.Below(dir, d.Path) })
		if !container && d.Before != nil && d.Before.Kind == change.Folder && d.After == nil {
			gone = append(gone, d.Path)
		}
		switch {
		case container:
		case isChange(d):
			list = append(list, d)
		default:
			side = append(side, d)
		}
	}
	if list, failure = f.withoutLive(ctx, log, after, list); failure != nil {
		return failure
	}
	if len(list) == 0 && !first {
		return nil
	}
	list = append(list, side...)
	if withoutPatch {
		for i := range list {
			list[i].Violation = ""
		}
	}
	var known []change.Difference
	if f.record.Files.Change != "" {
		var err error
		if known, err = f.repository.LoadChange(ctx, f.record.Files.Change); err != nil {
			return commandError("What the run has altered before cannot be read: " + err.Error())
		}
		if f.record.Files.ViolationsUndone {
			known = slices.DeleteFunc(known, func(d change.Difference) bool { return d.Violation != "" })
		}
	}
	if failure := f.keepChange(ctx, after, mergeChanges(known, list), list); failure != nil {
		return failure
	}
	if len(change.Violations(list)) == 0 {
		return nil
	}
	// Only what this command has altered.
	f.before = w.before
	return f.undoViolations(ctx, log, list)
}

// tracksEither returns a function that says whether git tracks a file in one of two
// states.
func tracksEither(a, b *change.State) func(path string) bool {
	inA, inB := a.Tracks(), b.Tracks()
	return func(path string) bool { return inA(path) || inB(path) }
}

// mergeChanges adds differences that were made later to earlier ones: before stays
// that of the earlier.
func mergeChanges(earlier, later []change.Difference) []change.Difference {
	merged := slices.Clone(earlier)
	for _, d := range later {
		at := slices.IndexFunc(merged, func(e change.Difference) bool { return e.Kind == d.Kind && e.Path == d.Path && e.GitDir == d.GitDir })
		if at < 0 {
			merged = append(merged, d)
			continue
		}
		merged[at].After, merged[at].IndexAfter, merged[at].RefAfter = d.After, d.IndexAfter, d.RefAfter
		merged[at].Violation = d.Violation
	}
	return merged
}

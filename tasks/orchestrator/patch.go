package orchestrator

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// changes are the files that differ from HEAD according to git, relative to the
// workspace.
type changes struct {
	unstaged, staged, untracked []string
}

// all returns the union in the order of docs/moonmind.md#patch, without duplicates.
func (c changes) all() []string {
	seen := map[string]bool{}
	all := []string{}
	for _, path := range slices.Concat(c.unstaged, c.staged, c.untracked) {
		if !seen[path] {
			seen[path] = true
			all = append(all, path)
		}
	}
	return all
}

// patchPayload has the keys of docs/moonmind.md#patch, in its order, and files.
type patchPayload struct {
	Unstaged  []string `json:"unstagedFiles"`
	Staged    []string `json:"stagedFiles"`
	Untracked []string `json:"untrackedFiles"`
	Validated []string `json:"validatedFiles"`
	Log       string   `json:"log"`
	// Files says what the change of the run is, for each file.
	Files []changedFile `json:"files,omitempty"`
}

// A changedFile is a file before the run and after it; nil where there is none.
type changedFile struct {
	Path   string       `json:"path"`
	Before *fileVersion `json:"before"`
	After  *fileVersion `json:"after"`
}

// A fileVersion identifies the content of a file, or the target of a link.
type fileVersion struct {
	SHA256 string `json:"sha256,omitempty"`
	// Mode has the file's type and permissions, as git and stat write them.
	Mode string `json:"mode"`
}

// patch applies the plan's diff, runs its commands, and judges what they have
// altered. If they alter nothing, the change of the run is the edits that somebody
// has left uncommitted in the workspace (docs/moonmind.md#patch).
func (s *stepRun) patch(ctx context.Context) (success, *Failure) {
	workspace, failure := s.workspace()
	if failure != nil {
		return success{}, failure
	}
	listed, failure := s.params.list("commands")
	if failure != nil {
		return success{}, failure
	}
	var commands [][]string
	for _, value := range listed {
		command, failure := parseCommand(value)
		if failure != nil {
			return success{}, failure
		}
		commands = append(commands, command)
	}
	planned, failure := s.params.text("diff", "")
	if failure != nil {
		return success{}, failure
	}
	patterns, failure := s.patchPatterns()
	if failure != nil {
		return success{}, failure
	}
	name, failure := s.params.text("logArtifact", "patch.log")
	if failure != nil {
		return success{}, failure
	}
	diffName, failure := s.params.text("diffArtifact", "patch.diff")
	if failure != nil {
		return success{}, failure
	}

	log, failure := s.startLog(name, workspace, commands)
	if failure != nil {
		return success{}, failure
	}
	defer log.Discard()
	for _, command := range commands {
		if failure := s.runner.check(workspace, command); failure != nil {
			s.auditRefused(workspace, command, failure)
			log.Line(failure.Error())
			return success{}, s.attachLog(log, failure)
		}
	}
	if failure := s.preflight(ctx, log, workspace); failure != nil {
		return success{}, s.attachLog(log, failure)
	}
	files, failure := s.captureBaseline(ctx, log, workspace)
	if failure == nil {
		failure = s.checkApproval(ctx, planned != "" || len(commands) > 0)
	}
	if failure == nil && planned != "" {
		failure = s.applyDiff(ctx, log, files, planned)
	}
	if failure != nil {
		log.Line(failure.Error())
		return success{}, s.attachLog(log, failure)
	}
	for _, command := range commands {
		if failure = s.beforeCommand(ctx, log, command); failure != nil {
			break
		}
		if failure = s.runInLog(ctx, log, workspace, formatCommand(command), command); failure != nil {
			break
		}
	}
	if failure != nil && (files == nil || context.Cause(ctx) != nil) {
		return success{}, s.attachLog(log, failure)
	}
	if files != nil {
		own, failed := files.judgePatch(ctx, log, diffName)
		switch {
		case failed != nil && own.diff.Path != "":
			failed.files = append(failed.files, own.diff)
			return success{}, s.failInLog(log, failed)
		case failed != nil:
			log.Line(failed.Error())
			return success{}, s.attachLog(log, failed)
		case failure != nil:
			if own.diff.Path != "" {
				failure.files = append(failure.files, own.diff)
			}
			return success{}, s.attachLog(log, failure)
		case len(own.list) > 0:
			return s.patched(ctx, log, files, own)
		}
	}
	return s.patchIsEdits(ctx, log, files, workspace, patterns, diffName)
}

// ownChange is what the commands of a patch have altered.
type ownChange struct {
	list []change.Difference
	// diff is the artifact that has the list's files.
	diff artifacts.File
}

// judgePatch finds what the step's commands have altered, records it, and writes
// the diff artifact. If it has violations, it takes them back and fails.
func (f *runFiles) judgePatch(ctx context.Context, log *artifacts.Log, diffName string) (own ownChange, failure *Failure) {
	after, failure := f.look(ctx)
	if failure != nil {
		return own, failure
	}
	if f.record.Files.Violated {
		// An earlier worker has found violations, and was to take them back.
		if own.list, failure = f.loadChange(ctx); failure != nil {
			return own, failure
		}
	} else {
		written := []string{log.Path(), diffName}
		if f.journal.claim.Attempt > 1 {
			written = append(written, f.ownNames()...) // by the steps of the attempt before
		}
		all := change.Judge(f.before, after, f.rules(written...))
		if all, failure = f.withoutLive(ctx, log, after, all); failure != nil {
			return own, failure
		}
		// Also that it has altered nothing: otherwise a rollback would take all that
		// differs for the run's doing.
		if failure = f.keepChange(ctx, after, all, all); failure != nil {
			return own, failure
		}
		if !slices.ContainsFunc(all, isChange) {
			return own, nil
		}
		own.list = all
	}
	if own.diff, failure = f.writeChange(ctx, after, own.list, diffName); failure != nil {
		return own, failure
	}
	if len(change.Violations(own.list)) > 0 {
		return own, f.undoViolations(ctx, log, own.list)
	}
	return own, nil
}

// loadChange returns what is recorded as the run's change.
func (f *runFiles) loadChange(ctx context.Context) ([]change.Difference, *Failure) {
	list, err := f.repository.LoadChange(ctx, f.record.Files.Change)
	if err != nil {
		return nil, commandError("What the run has altered cannot be read: " + err.Error())
	}
	return list, nil
}

// writeChange makes the diff artifact from what the run has altered.
func (f *runFiles) writeChange(ctx context.Context, after *change.State, list []change.Difference, name string) (artifacts.File, *Failure) {
	from, to, err := f.repository.Trees(ctx, after, list)
	if err != nil {
		return artifacts.File{}, commandError("The diff of the run's change cannot be made: " + err.Error())
	}
	document, err := f.dir.Document(name)
	if err != nil {
		return artifacts.File{}, artifactError(err)
	}
	defer document.Discard()
	if err := f.repository.Diff(ctx, from, to, document); err != nil {
		return artifacts.File{}, commandError("The diff of the run's change cannot be made: " + err.Error())
	}
	return f.finishDiff(document, name)
}

// finishDiff ends a diff artifact. An empty one gets the text noChanges.
func (s *stepRun) finishDiff(document *artifacts.Document, name string) (artifacts.File, *Failure) {
	file, err := document.Finish()
	if err == nil && file.SizeBytes == 0 {
		file, err = s.dir.Write(name, noChanges)
	}
	if err != nil {
		return artifacts.File{}, artifactError(err)
	}
	return file, nil
}

// patched is the success of a patch whose commands have altered allowed files.
func (s *stepRun) patched(ctx context.Context, log *artifacts.Log, files *runFiles, own ownChange) (success, *Failure) {
	listed, failure := s.listChanges(ctx, s.record.Files.Workspace, change.Cleanness{})
	if failure != nil {
		return success{}, failure
	}
	var validated []string
	for _, d := range own.list {
		if path := files.shownPath(d); isChange(d) && (d.Kind == change.IndexDiffers || !isFolder(d)) && !slices.Contains(validated, path) {
			validated = append(validated, path)
		}
	}
	slices.Sort(validated)
	s.logOverrides(log, files.allowed, validated)
	only := func(paths []string) []string {
		return slices.DeleteFunc(paths, func(path string) bool { return !slices.Contains(validated, printable(path)) })
	}
	listed.unstaged, listed.staged, listed.untracked = only(listed.unstaged), only(listed.staged), only(listed.untracked)
	described, failure := files.describe(ctx, own.list)
	if failure != nil {
		return success{}, failure
	}
	return s.patchSuccess(log, own.diff, listed, validated, described)
}

func isFolder(d change.Difference) bool {
	return (d.Before == nil || d.Before.Kind == change.Folder) && (d.After == nil || d.After.Kind == change.Folder)
}

// describe returns the files of a change with their checksums.
func (f *runFiles) describe(ctx context.Context, list []change.Difference) ([]changedFile, *Failure) {
	var blobs []string
	for _, d := range list {
		for _, e := range []*change.Entry{d.Before, d.After} {
			if e != nil && e.Blob != "" && !d.SideEffect {
				blobs = append(blobs, e.Blob)
			}
		}
	}
	blobs = slices.DeleteFunc(blobs, func(blob string) bool { return f.sums[blob] != "" })
	found, err := f.repository.SHA256(ctx, blobs)
	if err != nil {
		return nil, commandError("The checksums of the changed files cannot be computed: " + err.Error())
	}
	if f.sums == nil {
		f.sums = map[string]string{}
	}
	maps.Copy(f.sums, found)
	version := func(e *change.Entry) *fileVersion {
		if e == nil {
			return nil
		}
		mode := fmt.Sprintf("10%04o", e.Mode)
		if e.Kind == change.Link {
			mode = "120000"
		}
		return &fileVersion{SHA256: f.sums[e.Blob], Mode: mode}
	}
	var all []changedFile
	for _, d := range list {
		if d.Kind == change.EntryDiffers && isChange(d) && !isFolder(d) {
			all = append(all, changedFile{f.clean(f.shownPath(d)), version(d.Before), version(d.After)})
		}
	}
	return all, nil
}

// patchIsEdits judges the edits that the workspace had before the run, which are
// what a run deploys whose commands alter nothing. Their texts are those of the
// Python worker.
func (s *stepRun) patchIsEdits(ctx context.Context, log *artifacts.Log, files *runFiles, workspace string, patterns []string, diffName string) (success, *Failure) {
	changed, diff, failure := s.listEdits(ctx, files, workspace, diffName)
	if failure != nil {
		return success{}, failure
	}
	validated := changed.all()
	allowed := s.newAllowlist(workspace, patterns)
	var violations []string
	for _, path := range validated {
		if !allowed.allows(path) || files != nil && files.isRepository(path) {
			violations = append(violations, printable(path)+" is not allow-listed")
		}
	}
	if len(violations) > 0 {
		failure := allowListViolation(cut(strings.Join(violations, "; ")))
		s.audit(refusedRecord(audit.Refused, "allow-list", failure))
		s.fallbackLog(failure)
		failure.files = append([]artifacts.File{diff}, failure.files...)
		return success{}, failure
	}
	s.logOverrides(log, allowed, validated)
	var described []changedFile
	if files != nil && len(validated) > 0 {
		if described, failure = files.keepEdits(ctx, validated); failure != nil {
			log.Line(failure.Error())
			return success{}, s.attachLog(log, failure)
		}
	}
	return s.patchSuccess(log, diff, changed, validated, described)
}

// listEdits returns the edits in the workspace, and the diff artifact that has them. A
// workspace without edits is the most frequent one, and needs no question to git.
func (s *stepRun) listEdits(ctx context.Context, files *runFiles, workspace, diffName string) (changed changes, diff artifacts.File, failure *Failure) {
	var clean change.Cleanness
	if files != nil && files.seen != nil {
		clean = files.repository.Clean(ctx, files.seen, s.artifactFilter())
	}
	if clean.Tracked && clean.Untracked {
		diff, err := s.dir.Write(diffName, noChanges)
		if err != nil {
			return changes{}, diff, artifactError(err)
		}
		return changes{}, diff, nil
	}
	var document *artifacts.Document
	if clean.Tracked {
		var err error
		if document, err = s.dir.Document(diffName); err != nil {
			return changes{}, diff, artifactError(err)
		}
	} else if document, failure = s.diffHead(ctx, workspace, diffName); failure != nil {
		return changes{}, diff, failure
	}
	defer document.Discard()
	if changed, failure = s.listChanges(ctx, workspace, clean); failure != nil {
		return changes{}, diff, failure
	}
	if files != nil && len(changed.untracked) > 0 {
		if err := files.addUntracked(ctx, document, changed.untracked); err != nil {
			return changes{}, diff, commandError("The diff of untracked files cannot be made: " + err.Error())
		}
	}
	diff, failure = s.finishDiff(document, diffName)
	return changed, diff, failure
}

// noChanges is the text of the Python worker for an empty diff.
const noChanges = "# No changes generated"

// isRepository says that a path of git's lists is a submodule or another
// repository, whose files no diff of this one has.
func (f *runFiles) isRepository(path string) bool {
	return f.before.IsRepository(filepath.Join(f.inside, path))
}

// keepEdits records that the edits at these paths, which are relative to the
// workspace, are the change of the run.
func (f *runFiles) keepEdits(ctx context.Context, paths []string) ([]changedFile, *Failure) {
	now, failure := f.look(ctx)
	if failure != nil {
		return nil, failure
	}
	var names []string
	for _, path := range paths {
		names = append(names, filepath.Join(f.inside, path))
	}
	list, err := f.repository.Edits(ctx, now, names)
	if err != nil {
		return nil, commandError("The edits that the run deploys cannot be compared with HEAD: " + err.Error())
	}
	f.record.Files.Edits = true
	if failure := f.keepChange(ctx, now, list, list); failure != nil {
		return nil, failure
	}
	return f.describe(ctx, list)
}

// patchSuccess ends a patch.
func (s *stepRun) patchSuccess(log *artifacts.Log, diff artifacts.File, changed changes, validated []string, described []changedFile) (success, *Failure) {
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := log.Finish()
	if err != nil {
		return success{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	message := "Patched files: none"
	if len(validated) > 0 {
		message = cut("Patched files: " + strings.Join(s.shown(validated), ", "))
	}
	return success{message: message, files: []artifacts.File{diff, file}, payload: patchPayload{
		Unstaged: s.shown(changed.unstaged), Staged: s.shown(changed.staged), Untracked: s.shown(changed.untracked),
		Validated: s.shown(validated), Log: file.Path, Files: described,
	}}, nil
}

// logOverrides says in the step's log which overrides of the policy allow files of
// the change, and why they are there.
func (s *stepRun) logOverrides(log *artifacts.Log, allowed *allowlist, paths []string) {
	files := map[policy.Origin][]string{}
	for _, path := range paths {
		if o := allowed.override(path); o != nil {
			files[o.Origin] = append(files[o.Origin], printable(path))
		}
	}
	for _, o := range s.profile.Overrides {
		if by := files[o.Origin]; len(by) > 0 {
			log.Line("[" + s.clean(cut("Allowed by an override of the policy, "+o.String()+": "+strings.Join(by, ", "))) + "]")
			s.log.Warn("override of the policy used", "files", len(by), "reason", o.Reason, "at", o.Origin.String())
		}
	}
}

// patchPatterns returns the allow-list of the plan's patch step, or the policy's if
// the plan has none, without what overrides add.
func (s *stepRun) patchPatterns() ([]string, *Failure) {
	params := s.params
	if s.step != store.StepPatch {
		var failure *Failure
		if params, failure = s.plan.find(store.StepPatch); failure != nil {
			return s.profile.Listed(), nil
		}
	}
	listed, failure := params.list("allowlist")
	if failure != nil || len(listed) == 0 {
		return s.profile.Listed(), failure
	}
	var patterns []string
	for _, value := range listed {
		pattern, isText := value.(string)
		if !isText {
			return nil, typeError("Plan parameter allowlist must contain only texts")
		}
		patterns = append(patterns, pattern)
	}
	return patterns, nil
}

// shown makes paths fit for a row, see clean.
func (s *stepRun) shown(paths []string) []string {
	shown := make([]string, 0, len(paths))
	for _, path := range paths {
		shown = append(shown, s.clean(path))
	}
	return shown
}

func printable(path string) string { return strings.ToValidUTF8(path, "\uFFFD") }

// diffHead begins the diff artifact with all changes of tracked files since HEAD, or
// since the index if there is no commit yet.
func (s *stepRun) diffHead(ctx context.Context, workspace, name string) (*artifacts.Document, *Failure) {
	document, failure := s.diffInto(ctx, workspace, name, []string{"git", "diff", "HEAD"})
	if failure != nil && (strings.Contains(failure.output, "unknown revision") || strings.Contains(failure.output, "ambiguous argument 'HEAD'")) {
		document, failure = s.diffInto(ctx, workspace, name, []string{"git", "diff"})
	}
	return document, failure
}

// addUntracked appends a diff that adds these files.
func (f *runFiles) addUntracked(ctx context.Context, document *artifacts.Document, paths []string) error {
	var list []change.Difference
	for _, path := range paths {
		list = append(list, change.Difference{Kind: change.EntryDiffers, Path: filepath.Join(f.inside, path)})
	}
	from, to, err := f.repository.Trees(ctx, f.before, list)
	if err != nil {
		return err
	}
	return f.repository.Diff(ctx, from, to, document)
}

func (s *stepRun) diffInto(ctx context.Context, workspace, name string, command []string) (*artifacts.Document, *Failure) {
	document, err := s.dir.Document(name)
	if err != nil {
		return nil, artifactError(err)
	}
	errors := artifacts.NewCapture(s.config.Redactor)
	code, failure := s.runner.runOwnGit(ctx, workspace, command, document, errors.Stderr)
	text := errors.Close().Text("")
	if failure == nil && code != 0 {
		failure = exitFailure(command, code, text)
	}
	if failure != nil {
		document.Discard()
		return nil, failure
	}
	return document, nil
}

// listLimit bounds git's list of changed files, in bytes.
const listLimit = 16 << 20

// listChanges asks git which files differ from HEAD. It returns unquoted names
// (docs/moonmind.md#c5) relative to the workspace, even if that lies below the
// top of the repository. It leaves out the runs' artifacts
// (docs/moonmind.md#f6). It does not ask about what is clean.
func (s *stepRun) listChanges(ctx context.Context, workspace string, clean change.Cleanness) (changes, *Failure) {
	_, inside := repository(workspace)
	isArtifact := s.artifactFilter()
	var found changes
	for _, query := range []struct {
		into    *[]string
		command []string
		// fromTop says that names are relative to the top of the repository.
		fromTop, isClean bool
	}{
		{&found.unstaged, []string{"git", "diff", "--name-only", "-z"}, true, clean.Tracked},
		{&found.staged, []string{"git", "diff", "--cached", "--name-only", "-z"}, true, clean.Tracked},
		{&found.untracked, []string{"git", "ls-files", "--others", "--exclude-standard", "-z"}, false, clean.Untracked},
	} {
		if query.isClean {
			continue
		}
		names, failure := s.listFiles(ctx, workspace, query.command)
		if failure != nil {
			return changes{}, failure
		}
		for _, name := range names {
			if query.fromTop && inside != "." {
				relative, err := filepath.Rel(inside, name)
				if err != nil {
					return changes{}, unexpected(err)
				}
				name = relative
			}
			if !isArtifact(filepath.Join(workspace, name)) {
				*query.into = append(*query.into, name)
			}
		}
	}
	return found, nil
}

func (s *stepRun) listFiles(ctx context.Context, workspace string, command []string) ([]string, *Failure) {
	list := excerpt.Head{Limit: listLimit}
	errors := artifacts.NewCapture(s.config.Redactor)
	code, failure := s.runner.runOwnGit(ctx, workspace, command, &list, errors.Stderr)
	text := errors.Close().Text("")
	switch {
	case failure != nil:
		return nil, failure
	case code != 0:
		return nil, exitFailure(command, code, text)
	case list.Full:
		return nil, commandError("Command " + formatCommand(command) + " lists more changed files than can be checked")
	}
	var names []string
	for name := range strings.SplitSeq(string(list.Kept), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	return names, nil
}

// artifactFilter returns a function that says whether a file is an artifact: it
// lies in the configured artifact root, or in a run's directory beside this
// run's. The artifact root of a database row is not enough for that: otherwise a
// row could hide any file of the workspace from the allow-list.
func (s *stepRun) artifactFilter() func(path string) bool {
	workspace := artifacts.Resolve(s.config.Workspace)
	runs := filepath.Dir(s.place.Dir)
	root, err := s.config.Artifacts.Root()
	if err != nil || change.Below(root, workspace) {
		root = ""
	}
	return func(path string) bool {
		path = artifacts.Resolve(filepath.Dir(path))
		if root != "" && change.Below(root, path) {
			return true
		}
		relative, err := filepath.Rel(runs, path)
		if err != nil || !filepath.IsLocal(relative) {
			return false
		}
		first, _, _ := strings.Cut(filepath.ToSlash(relative), "/")
		id, err := store.ParseRunID(first)
		return err == nil && id == first
	}
}

package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
)

// A filesOutcome is what a rollback has done in the workspace.
type filesOutcome struct {
	// Untouched says that the run has altered no file.
	Untouched bool
	// Restored is how many files of the run's change are as before the run, SetAside
	// how many versions of somebody else were set aside.
	Restored, SetAside int
	// files are those that went to artifacts.
	files []artifacts.File
}

// Tree is the line about the workspace at the end of the log.
func (o filesOutcome) Tree() string {
	return fmt.Sprintf("tree: as before the run (%s restored, %d set aside)", counted(o.Restored, "file"), o.SetAside)
}

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// restoreFiles brings back what the run has altered in the workspace, and nothing
// else. It returns a failure if something is not as before in the end.
//
//   - It can be repeated after a kill at any point: it looks, decides and acts.
//   - What somebody else has made of the same files since is set aside first, and
//     the log has the commands that bring it back.
func (s *stepRun) restoreFiles(ctx context.Context, log *artifacts.Log) (filesOutcome, *Failure) {
	files := s.record.Files
	switch {
	case files == nil, files.Restored && s.journal.claim.Starts == 1:
		return filesOutcome{Untouched: true}, nil // nothing since the last rollback, see nothingToTakeBack
	case files.Edits && !files.Deployed:
		log.Line("[The run has altered no file. The uncommitted edits that it was to deploy stay in place, because nothing was deployed.]")
		return filesOutcome{Untouched: true}, nil
	}
	f, failure := s.openFiles(ctx)
	if failure != nil {
		return filesOutcome{}, failure
	}
	now, failure := f.look(ctx)
	if failure != nil {
		return filesOutcome{}, failure
	}
	if failure := s.auditBefore(ctx, audit.Record{Kind: audit.FilesChanging, Text: "bring back what the run has altered in " + f.top}); failure != nil {
		return filesOutcome{}, failure
	}
	if files.Edits {
		return f.takeEditsBack(ctx, log, now)
	}
	var list, foreign []change.Difference
	if files.Change == "" {
		// The worker was killed, or the step ended, while the run's commands ran.
		list = change.Judge(f.before, now, f.rules(f.ownNames()...))
		if files.WithoutPatch {
			// The command may have started containers, whose files are theirs.
			isTracked := tracksEither(f.before, now)
			list = slices.DeleteFunc(list, func(d change.Difference) bool {
				return d.Kind == change.EntryDiffers && d.GitDir == "" && !isTracked(d.Path)
			})
		}
		if list, failure = f.withoutLive(ctx, log, now, list); failure != nil {
			return filesOutcome{}, failure
		}
		foreign = slices.DeleteFunc(slices.Clone(list), func(d change.Difference) bool { return d.SideEffect })
	} else {
		if list, failure = f.loadChange(ctx); failure != nil {
			return filesOutcome{}, failure
		}
		if files.ViolationsUndone {
			list = slices.DeleteFunc(list, func(d change.Difference) bool { return d.Violation != "" })
		}
		foreign = change.Foreign(now, list)
	}
	outcome := filesOutcome{Untouched: len(list) == 0}
	for _, d := range list {
		if isChange(d) && (d.Kind != change.EntryDiffers || !isFolder(d)) {
			outcome.Restored++
		}
	}
	if outcome.SetAside, failure = f.setAside(ctx, log, now, foreign); failure != nil {
		return filesOutcome{}, failure
	}
	if files.Change == "" {
		// Nothing has recorded what the run has altered, and nothing shows it any more
		// once it is brought back. What was set aside can be described.
		f.auditFiles(ctx, audit.FileChanged, list)
	}
	if failure := f.auditBefore(ctx); failure != nil {
		return filesOutcome{}, failure
	}
	if _, err := f.repository.Restore(ctx, f.before, now, list); err != nil {
		return filesOutcome{}, f.notRestored(ctx, err, list)
	}
	if now, failure = f.look(ctx); failure != nil {
		return filesOutcome{}, failure
	}
	if left := change.Remaining(f.before, now, list); len(left) > 0 {
		var names []string
		for _, d := range left {
			names = append(names, f.shownPath(d))
		}
		return filesOutcome{}, f.notRestored(ctx, errors.New("not as before the run: "+cut(strings.Join(s.shown(names), ", "))), list)
	}
	f.auditRestored(ctx, list)
	return outcome, nil
}

// ownNames are the names of artifacts that the worker writes in any step.
func (s *stepRun) ownNames() []string {
	names := []string{"analyze.log", "patch.log", "patch.diff", "build.log", "restart.log", "verify.log", "rollback.log", asideDiff}
	for _, entry := range s.plan {
		object, _ := entry.(map[string]any)
		params, _ := object["parameters"].(map[string]any)
		for _, key := range []string{"logArtifact", "diffArtifact"} {
			if name, isText := params[key].(string); isText && name != "" {
				names = append(names, name)
			}
		}
	}
	return names
}

// notRestored is the failure of a rollback that cannot bring the files back.
func (f *runFiles) notRestored(ctx context.Context, err error, list []change.Difference) *Failure {
	if cause := context.Cause(ctx); cause != nil {
		return commandError("Bringing back the workspace's files was ended: " + cause.Error())
	}
	return commandError(fmt.Sprintf("The workspace is not as before the run: %s. Its files of before the run are in %s: git -C %s restore --source=%s --worktree -- FILE",
		err, change.Ref(f.runID, baselineRef), f.top, change.Ref(f.runID, baselineRef)))
}

// setAside keeps versions of files that a restore is about to replace, and returns
// how many. The log names them, with the commands that bring them back.
func (f *runFiles) setAside(ctx context.Context, log *artifacts.Log, now *change.State, foreign []change.Difference) (int, *Failure) {
	var names, gone []string
	for _, d := range foreign {
		switch current := now.Find(d.Path); {
		case d.Kind != change.EntryDiffers:
		case current == nil && d.Before != nil && d.Before.Kind != change.Folder:
			gone = append(gone, f.shownPath(d))
		case current != nil && current.Blob != "":
			names = append(names, d.Path)
		}
	}
	if len(gone) > 0 && f.record.Files.Change != "" {
		log.Line(fmt.Sprintf("[Removed by somebody since the run altered them, and brought back: %s]", cut(strings.Join(f.shown(gone), ", "))))
	}
	if len(names) == 0 {
		return 0, nil
	}
	aside, err := f.repository.SetAside(ctx, f.runID, asideRef, now, names)
	if err != nil {
		return 0, commandError("Files that were edited since the run altered them cannot be set aside, so that nothing is restored: " + err.Error())
	}
	why := "Edited by somebody since the run altered them"
	if f.record.Files.Change == "" {
		why = "Altered while the run's commands were interrupted"
	}
	for i, name := range names {
		names[i] = f.shownPath(change.Difference{Path: name})
	}
	f.audit(audit.Record{Kind: audit.SetAside, Text: fmt.Sprintf("%s, in %s: %s", why, aside.Ref, cut(strings.Join(names, ", ")))})
	log.Line(fmt.Sprintf("[%s, and set aside: %s]", why, cut(strings.Join(f.shown(names), ", "))))
	for _, command := range aside.Commands {
		log.Line("[To bring that version back, run: " + command + "]")
	}
	return len(aside.Paths), nil
}

// asideDiff is the artifact with edits that were set aside.
const asideDiff = "aside.diff"

// takeEditsBack sets the uncommitted edits aside that the run has deployed, and
// brings their files back to HEAD.
func (f *runFiles) takeEditsBack(ctx context.Context, log *artifacts.Log, now *change.State) (filesOutcome, *Failure) {
	recorded, failure := f.loadChange(ctx)
	if failure != nil {
		return filesOutcome{}, failure
	}
	// A later step may have altered what is no edit: that is brought back as it was.
	var paths []string
	var others []change.Difference
	for _, d := range recorded {
		switch {
		case d.Violation != "" && f.record.Files.ViolationsUndone:
		case d.Violation != "", d.Kind == change.EntryDiffers && d.GitDir != "":
			others = append(others, d)
		case d.Kind == change.EntryDiffers:
			paths = append(paths, d.Path)
		}
	}
	if len(others) > 0 {
		if _, err := f.repository.Restore(ctx, f.before, now, others); err != nil {
			return filesOutcome{}, f.notRestored(ctx, err, others)
		}
		if now, failure = f.look(ctx); failure != nil {
			return filesOutcome{}, failure
		}
	}
	failed := func(what string, err error) (filesOutcome, *Failure) {
		if cause := context.Cause(ctx); cause != nil {
			return filesOutcome{}, commandError(what + ": " + cause.Error())
		}
		return filesOutcome{}, commandError(what + ": " + err.Error())
	}
	edits, err := f.repository.Edits(ctx, now, paths)
	if err != nil {
		return failed("The deployed edits cannot be compared with HEAD", err)
	}
	edits = change.Edited(edits)
	outcome := filesOutcome{Restored: len(paths), SetAside: len(paths)}
	aside, err := f.repository.SetAsideEdits(ctx, f.runID, asideRef, now, edits, paths)
	if err != nil {
		return failed("The deployed edits cannot be set aside, so that they stay in place", err)
	}
	if document, err := f.dir.Document(asideDiff); err == nil {
		if err := f.repository.DiffToHead(ctx, aside.Tree, paths, document); err != nil {
			document.Discard()
			f.log.Warn("artifact of the edits that were set aside cannot be written", "error", err)
		} else if file, err := document.Finish(); err == nil {
			outcome.files = append(outcome.files, file)
		}
	}
	var names []string
	for _, path := range paths {
		names = append(names, f.shownPath(change.Difference{Path: path}))
	}
	log.Line(fmt.Sprintf("[The uncommitted edits that the run has deployed are set aside: %s]", cut(strings.Join(f.shown(names), ", "))))
	f.audit(audit.Record{Kind: audit.SetAside, Text: fmt.Sprintf("the uncommitted edits that the run has deployed, in %s: %s", aside.Ref, cut(strings.Join(names, ", ")))})
	for _, command := range aside.Commands {
		log.Line("[To bring them back, run: " + command + "]")
	}
	if failure := f.auditBefore(ctx); failure != nil {
		return filesOutcome{}, failure
	}
	if err := f.repository.ResetEdits(ctx, now, edits); err != nil {
		return failed("The deployed edits are set aside, but their files cannot be brought back to HEAD", err)
	}
	if now, failure = f.look(ctx); failure != nil {
		return filesOutcome{}, failure
	}
	if edits, err = f.repository.Edits(ctx, now, paths); err != nil {
		return failed("The workspace cannot be compared with HEAD", err)
	}
	if left := change.Edited(edits); len(left) > 0 && !f.sameToGit(ctx, paths) {
		return failed("The workspace is not as HEAD has it", errors.New(left[0].Path))
	}
	f.auditRestored(ctx, recorded)
	return outcome, nil
}

// sameToGit says that git sees no difference between HEAD and these files: filters
// may make a file on disk differ from its content in HEAD.
func (f *runFiles) sameToGit(ctx context.Context, paths []string) bool {
	var out excerpt.Head
	out.Limit = listLimit
	args := append([]string{"--literal-pathspecs", "diff", "--name-only", "--no-ext-diff", "HEAD", "--"}, paths...)
	code, err := f.runner.git(ctx, change.GitCommand{Dir: f.top, Args: args, Stdout: &out})
	return err == nil && code == 0 && len(out.Kept) == 0
}

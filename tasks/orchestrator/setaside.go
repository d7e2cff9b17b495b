package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// setAsideFiles is the workspace of a run in which something may have been set aside.
type setAsideFiles struct {
	repository *change.Repository
	now        *change.State
	trees      []change.SetAsideTree
	top        string
}

// openSetAside looks at the workspace of a change. It returns nil if nothing was set
// aside.
func (o *Orchestrator) openSetAside(ctx context.Context, c store.Change) (*setAsideFiles, error) {
	record, err := change.Decode(c.Record)
	if err != nil {
		return nil, err
	}
	if record.Files == nil {
		return nil, nil
	}
	dir := cmp.Or(record.Files.Top, workspacePath(c))
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("workspace %s of run %s cannot be used: %s. Run this where the worker runs", dir, c.RunID, preflight.Reason(err))
	}
	git := o.runner.of(processes.Owner{}).git
	refs, err := change.ListRefs(ctx, git, dir, c.RunID)
	if errors.Is(err, change.ErrNotInRepository) || err == nil && !slices.ContainsFunc(refs, change.RunRef.SetAside) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	// Files that git does not track are compared too, however large they are.
	f := &setAsideFiles{}
	if f.repository, err = change.Open(ctx, git, dir, change.Options{MaxFile: o.config.BaselineFileLimit, MaxFiles: o.config.BaselineLimit}); err != nil {
		return nil, err
	}
	f.top = f.repository.Top
	if f.now, err = f.repository.Observe(ctx, nil); err != nil {
		return nil, fmt.Errorf("workspace %s cannot be looked at: %w", f.top, err)
	}
	var edits []string
	if record.Files.Edits && record.Files.Change != "" {
		// The change may be removed by now. Then a file that had been removed is not
		// known any more.
		list, _ := f.repository.LoadChange(ctx, record.Files.Change)
		for _, d := range list {
			if d.Kind == change.EntryDiffers && d.Violation == "" && d.GitDir == "" {
				edits = append(edits, d.Path)
			}
		}
	}
	f.trees, err = f.repository.ListSetAside(ctx, c.RunID, f.now, edits)
	return f, err
}

// ListSetAside returns what was set aside in a run, and how it compares with the
// workspace now. It only looks.
func (o *Orchestrator) ListSetAside(ctx context.Context, c store.Change) ([]change.SetAsideTree, error) {
	f, err := o.openSetAside(ctx, c)
	if err != nil || f == nil {
		return nil, err
	}
	return f.trees, nil
}

// BroughtBack is what RestoreSetAside has done.
type BroughtBack struct {
	// Restored are the paths that are in the work tree again, or removed again.
	Restored []string
	// Present are those that were there already.
	Present []string
	// Edited are those that somebody has edited since. Unless they were to be
	// overwritten, nothing was changed.
	Edited []string
	// SetAside is the name under which the edited ones were set aside, "" for none.
	SetAside string
	// OfGit are files of git directories, which are not brought back.
	OfGit []change.SetAsideFile
	// NotStaged are paths whose entry in the index was left as it is.
	NotStaged []string
	// Top is the top of the work tree.
	Top string
}

// RestoreOptions say what RestoreSetAside brings back.
type RestoreOptions struct {
	// Name is that of the tree. Files are the only paths to bring back; nil for all.
	Name  string
	Files []string
	// Begin is called before the first file is written, with the paths. After an error
	// of it nothing is changed. May be nil.
	Begin func(paths []string) error
	// Overwrite sets aside what was edited since, instead of refusing.
	Overwrite bool
}

// RestoreSetAside brings back what was set aside in a run. What was set aside stays
// under its ref. It can be repeated.
func (o *Orchestrator) RestoreSetAside(ctx context.Context, c store.Change, options RestoreOptions) (BroughtBack, error) {
	var back BroughtBack
	f, err := o.openSetAside(ctx, c)
	if err != nil {
		return back, err
	}
	if f == nil {
		return back, fmt.Errorf("nothing was set aside in run %s", c.RunID)
	}
	back.Top = f.top
	i := slices.IndexFunc(f.trees, func(tree change.SetAsideTree) bool { return tree.Name == options.Name })
	if i < 0 {
		return back, fmt.Errorf("nothing was set aside in run %s under the name %s", c.RunID, options.Name)
	}
	files := f.trees[i].Files
	if options.Files != nil {
		var chosen []change.SetAsideFile
		for _, path := range options.Files {
			at := slices.IndexFunc(files, func(file change.SetAsideFile) bool { return file.Path == path })
			if at < 0 {
				return back, fmt.Errorf("file %s was not set aside in run %s under the name %s", path, c.RunID, options.Name)
			}
			chosen = append(chosen, files[at])
		}
		files = chosen
	}
	var paths []string
	for _, file := range files {
		switch file.State {
		case change.AsideOfGit:
			back.OfGit = append(back.OfGit, file)
			continue
		case change.AsidePresent:
			back.Present = append(back.Present, file.Path)
		case change.AsideEdited:
			back.Edited = append(back.Edited, file.Path)
		}
		paths = append(paths, file.Path)
	}
	if len(back.Edited) > 0 && !options.Overwrite {
		return back, nil
	}
	if options.Begin != nil && len(paths) > len(back.Present) {
		if err := options.Begin(slices.DeleteFunc(slices.Clone(paths), func(path string) bool { return slices.Contains(back.Present, path) })); err != nil {
			return back, err
		}
	}
	if len(back.Edited) > 0 {
		if back.SetAside, err = f.repository.SetAsideAgain(ctx, c.RunID, f.now, back.Edited); err != nil {
			return back, fmt.Errorf("what was edited since cannot be set aside, so that nothing was changed: %w", err)
		}
	}
	if back.Restored, err = f.repository.BringBack(ctx, f.now, files); err != nil {
		return back, err
	}
	back.NotStaged, err = f.repository.StageSetAside(ctx, c.RunID, options.Name, f.now, paths)
	return back, err
}

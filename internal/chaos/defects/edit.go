package defects

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// An Editor makes and refreshes patches. It works on copies and never changes the
// module's own files.
type Editor struct {
	// Module is the module's root, Patches the folder of the patches.
	Module, Patches string
	// Work has one folder for each defect that is being edited: in it, a has
	// the module's files, and b the same files with the defect.
	Work string
	// Output gets a line for each patch that changes or needs an edit.
	Output io.Writer
}

// Open copies the files of a defect below Work, to be edited there. files are added
// to those that the patch changes; breaks, unless "", replaces its sentence. A new
// defect, one without a patch, needs both.
func (e Editor) Open(ctx context.Context, name, breaks string, files []string) error {
	d, err := e.read(name)
	isNew := errors.Is(err, fs.ErrNotExist)
	switch {
	case isNew && (breaks == "" || len(files) == 0):
		return fmt.Errorf("there is no defect %s: for a new one say FILES=\"…\" (what it changes or adds) and BREAKS=\"…\" (one sentence)", name)
	case isNew:
		d = Defect{Name: name}
	case err != nil:
		return err
	}
	if breaks != "" {
		d.Breaks = breaks
	}
	for _, file := range files {
		d.Files = append(d.Files, filepath.ToSlash(filepath.Clean(file)))
	}
	folder := filepath.Join(e.Work, name)
	if _, err := os.Stat(folder); err == nil {
		return fmt.Errorf("%s is being edited in %s: run `make defects` when it is done, or remove that folder", name, folder)
	}
	for _, side := range []string{"a", "b"} {
		if err := d.copyFiles(e.Module, filepath.Join(folder, side)); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(folder, "header"), []byte(d.header()), 0o644); err != nil {
		return err
	}
	if !isNew {
		// Git writes hunks that do not apply to files that end in .rej.
		_ = d.apply(ctx, filepath.Join(folder, "b"), atLeastOneLine, "--reject")
	}
	fmt.Fprintf(e.Output, "%s: edit %s (%s), then run `make defects` again\n", name, filepath.Join(folder, "b"), strings.Join(d.Files, ", "))
	return nil
}

// Refresh saves the opened patches, and refreshes each patch whose context has
// changed. It opens a patch that does not apply, or whose result does not compile;
// the error says how many.
func (e Editor) Refresh(ctx context.Context) error {
	opened, err := filepath.Glob(filepath.Join(e.Work, "*", "header"))
	if err != nil {
		return err
	}
	for _, header := range opened {
		if err := e.save(ctx, filepath.Base(filepath.Dir(header))); err != nil {
			return err
		}
	}
	paths, err := filepath.Glob(filepath.Join(e.Patches, "*.patch"))
	if err != nil {
		return err
	}
	stale := 0
	for _, path := range paths {
		d, err := e.read(strings.TrimSuffix(filepath.Base(path), ".patch"))
		if err != nil {
			return err
		}
		if err := e.refresh(ctx, d); err != nil {
			stale++
			fmt.Fprintln(e.Output, err)
			if err := e.Open(ctx, d.Name, "", nil); err != nil {
				return err
			}
		}
	}
	if stale > 0 {
		return fmt.Errorf("%d of %d patches need an edit", stale, len(paths))
	}
	fmt.Fprintf(e.Output, "%d patches apply, and what they make compiles\n", len(paths))
	return nil
}

// save writes the patch of an opened defect.
func (e Editor) save(ctx context.Context, name string) error {
	folder := filepath.Join(e.Work, name)
	err := filepath.WalkDir(filepath.Join(folder, "b"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".rej") {
			err = fmt.Errorf("%s: %s has a change that could not be applied: make it in %s and remove that file", name, path, strings.TrimSuffix(path, ".rej"))
		}
		return err
	})
	if err != nil {
		return err
	}
	header, err := os.ReadFile(filepath.Join(folder, "header"))
	if err != nil {
		return err
	}
	if err := e.write(ctx, name, string(header), folder); err != nil {
		return err
	}
	return os.RemoveAll(folder)
}

// refresh rewrites the patch if its context has changed.
func (e Editor) refresh(ctx context.Context, d Defect) error {
	folder, err := os.MkdirTemp("", "defect-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	overlay, err := d.Overlay(ctx, e.Module, folder)
	if err != nil {
		return err
	}
	if err := d.Compile(ctx, e.Module, overlay); err != nil {
		return err
	}
	before := filepath.Join(folder, "a")
	if err := d.copyFiles(e.Module, before); err != nil {
		return err
	}
	if d.apply(ctx, before, "--check") == nil {
		return nil // applies with all its context; changed line numbers alone are no reason
	}
	if err := os.Rename(filepath.Join(folder, "tree"), filepath.Join(folder, "b")); err != nil {
		return err
	}
	return e.write(ctx, d.Name, d.header(), folder)
}

// write writes a patch from the folders a and b in folder.
func (e Editor) write(ctx context.Context, name, header, folder string) error {
	diff, err := git(ctx, folder, nil, "diff", "--no-index", "--no-prefix", "--no-color", "a", "b")
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) { // 1: they differ
		return err
	}
	text := bytes.NewBufferString(header)
	for line := range strings.Lines(string(diff)) {
		switch {
		case strings.HasPrefix(line, "index "):
			continue // it would change with every edit of the file
		case strings.HasPrefix(line, "diff --git "):
			// Both sides have one prefix where a file is on one side only.
			_, file, _ := strings.Cut(strings.Fields(line)[3], "/")
			line = fmt.Sprintf("diff --git a/%s b/%s\n", file, file)
		}
		text.WriteString(line)
	}
	if _, err := parse(name, text.Bytes()); err != nil {
		return err
	}
	path := filepath.Join(e.Patches, name+".patch")
	fmt.Fprintf(e.Output, "%s: written\n", path)
	return os.WriteFile(path, text.Bytes(), 0o644)
}

func (e Editor) read(name string) (Defect, error) {
	text, err := os.ReadFile(filepath.Join(e.Patches, name+".patch"))
	if err != nil {
		return Defect{}, err
	}
	return parse(name, text)
}

// header is the text above a patch's diff.
func (d Defect) header() string { return d.Name + ": " + d.Breaks + "\n\n" }

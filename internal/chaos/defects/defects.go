// Package defects keeps known defects of the worker as patches, one file each.
// The chaos proof (internal/chaos) builds a worker with each of them and checks
// that its trials find the defect.
//
// The shipped code has no trace of the defects. So a change of that code can make
// a patch stale. The test of this package says which one; README.md says how to
// renew it.
package defects

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

//go:embed *.patch
var patches embed.FS

// A Defect is one patch.
type Defect struct {
	// Name is the name of its file without ".patch".
	Name string
	// Breaks is one sentence: what is wrong in a worker that has the defect.
	Breaks string
	// Files are the paths that it changes, adds or removes, relative to the
	// module's root.
	Files []string

	patch []byte
}

// All returns the defects, by name.
func All() ([]Defect, error) {
	names, err := fs.Glob(patches, "*.patch")
	if err != nil {
		return nil, err
	}
	var all []Defect
	for _, name := range names {
		text, err := patches.ReadFile(name)
		if err != nil {
			return nil, err
		}
		d, err := parse(strings.TrimSuffix(name, ".patch"), text)
		if err != nil {
			return nil, err
		}
		all = append(all, d)
	}
	return all, nil
}

// parse reads a patch: the line "name: what it breaks", an empty one, and a
// unified diff with the prefixes a/ and b/.
func parse(name string, text []byte) (Defect, error) {
	d := Defect{Name: name, patch: text}
	header, diff, _ := strings.Cut(string(text), "\n\n")
	named, breaks, ok := strings.Cut(header, ": ")
	if !ok || named != name || !strings.HasSuffix(breaks, ".") {
		return d, fmt.Errorf("%s.patch begins with %q: say %q and in a sentence what the defect breaks", name, header, name+": ")
	}
	d.Breaks = strings.Join(strings.Fields(breaks), " ")
	for line := range strings.Lines(diff) {
		line = strings.TrimSpace(line)
		for _, prefix := range []string{"--- a/", "+++ b/"} {
			if file, ok := strings.CutPrefix(line, prefix); ok && !slices.Contains(d.Files, file) {
				d.Files = append(d.Files, file)
			}
		}
	}
	if len(d.Files) == 0 {
		return d, fmt.Errorf("%s.patch names no file: its diff needs lines such as \"+++ b/store/decide.go\"", name)
	}
	return d, nil
}

// Packages are the patterns of the packages that the defect changes, for
// `go build` in the module's root.
func (d Defect) Packages() []string {
	var packages []string
	for _, file := range d.Files {
		packages = append(packages, "./"+filepath.ToSlash(filepath.Dir(file)))
	}
	slices.Sort(packages)
	return slices.Compact(packages)
}

// Overlay writes the changed files below folder, and beside them the file to
// give to `go build -overlay`, whose path it returns. The module's own files
// stay as they are.
func (d Defect) Overlay(ctx context.Context, module, folder string) (string, error) {
	module, err := filepath.Abs(module)
	if err != nil {
		return "", err
	}
	tree := filepath.Join(folder, "tree")
	if err := d.copyFiles(module, tree); err != nil {
		return "", err
	}
	if err := d.apply(ctx, tree, atLeastOneLine); err != nil {
		return "", err
	}
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for _, file := range d.Files {
		changed := filepath.Join(tree, file)
		if _, err := os.Stat(changed); err != nil {
			changed = "" // removed
		}
		overlay.Replace[filepath.Join(module, file)] = changed
	}
	text, err := json.MarshalIndent(overlay, "", "\t")
	if err != nil {
		return "", err
	}
	path := filepath.Join(folder, "overlay.json")
	return path, os.WriteFile(path, text, 0o644)
}

// copyFiles copies those of the defect's files that exist.
func (d Defect) copyFiles(module, tree string) error {
	for _, file := range d.Files {
		text, err := os.ReadFile(filepath.Join(module, file))
		missing := errors.Is(err, fs.ErrNotExist)
		if err != nil && !missing {
			return err
		}
		to := filepath.Join(tree, file)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		if missing {
			continue
		}
		if err := os.WriteFile(to, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Compile builds the packages that the defect changes, with the overlay that
// Overlay has written.
func (d Defect) Compile(ctx context.Context, module, overlay string) error {
	command := exec.CommandContext(ctx, "go", append([]string{"build", "-tags", "chaos", "-o", os.DevNull, "-overlay", overlay}, d.Packages()...)...)
	command.Dir = module
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("%s.patch applies, but the result does not compile: %w: %s", d.Name, err, bytes.TrimSpace(text))
	}
	return nil
}

// atLeastOneLine is the option of git apply with which one line of context on
// each side is enough, so that an edit near by does not make a patch stale.
const atLeastOneLine = "-C1"

// apply patches the files in tree.
func (d Defect) apply(ctx context.Context, tree string, options ...string) error {
	if _, err := git(ctx, tree, d.patch, append([]string{"apply"}, options...)...); err != nil {
		return fmt.Errorf("%s.patch does not apply: %w", d.Name, err)
	}
	return nil
}

// git runs git on files that are in no repository.
func git(ctx context.Context, folder string, input []byte, args ...string) ([]byte, error) {
	folder, err := filepath.Abs(folder)
	if err != nil {
		return nil, err
	}
	command := exec.CommandContext(ctx, "git", args...)
	command.Dir = folder
	command.Stdin = bytes.NewReader(input)
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	// In a work tree, git would silently skip files outside of its folder. So it
	// must not find the work tree; the ceiling has to be absolute. The user's
	// settings must not change the result.
	command.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(folder), "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL="+os.DevNull, "LC_ALL=C")
	if err := command.Run(); err != nil {
		return stdout.Bytes(), fmt.Errorf("git %s: %w: %s", args[0], err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.Bytes(), nil
}

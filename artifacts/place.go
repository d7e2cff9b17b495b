package artifacts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// PathError is a path that the rules of docs/moonmind.md#artifacts refuse; its
// text is MoonMind's.
type PathError struct{ Text string }

func (e *PathError) Error() string { return e.Text }

// PrefixMapping says that what the API calls From is To in our file system:
// both mount one directory, at different places.
type PrefixMapping struct{ From, To string }

// ParsePrefixMappings reads "/app/var=/srv/var,/x=/y". Both sides are
// absolute paths.
func ParsePrefixMappings(text string) ([]PrefixMapping, error) {
	var mappings []PrefixMapping
	for entry := range strings.SplitSeq(text, ",") {
		entry = strings.TrimSpace(entry)
		if entry == "" {
			continue
		}
		from, to, found := strings.Cut(entry, "=")
		from, to = strings.TrimSpace(from), strings.TrimSpace(to)
		if !found || !filepath.IsAbs(from) || !filepath.IsAbs(to) {
			return nil, fmt.Errorf("artifact path mapping %q: write /path/in/api=/path/here, both absolute", entry)
		}
		mappings = append(mappings, PrefixMapping{From: filepath.Clean(from), To: filepath.Clean(to)})
	}
	return mappings, nil
}

// PlaceConfig says where runs have their directories.
type PlaceConfig struct {
	// WorkingDir is absolute; relative paths start there.
	WorkingDir string
	// Base is upstream's ARTIFACTS_ROOT. Defaults to
	// var/artifacts/spec_workflows.
	Base string
	// SubPath is upstream's ORCHESTRATOR_ARTIFACT_ROOT: empty is the base,
	// relative is below it, absolute must lie in it.
	SubPath string
	// Mappings lead from paths of the API's file system to ours
	// (docs/moonmind.md#f7). The longest From that fits is taken.
	Mappings []PrefixMapping
}

// DefaultBase is where MoonMind keeps artifacts, below its working directory.
const DefaultBase = "var/artifacts/spec_workflows"

// WithDefaults returns a copy in which empty fields have their defaults.
func (c PlaceConfig) WithDefaults() PlaceConfig {
	if c.Base == "" {
		c.Base = DefaultBase
	}
	return c
}

// Validate tells what is wrong with the configuration. Whether SubPath stays
// in the base is asked when it is used, since that is a failure of the run,
// as in MoonMind.
func (c PlaceConfig) Validate() error {
	if !filepath.IsAbs(c.WorkingDir) {
		return fmt.Errorf("artifact working directory %q: must be absolute", c.WorkingDir)
	}
	for _, m := range c.Mappings {
		if !filepath.IsAbs(m.From) || !filepath.IsAbs(m.To) {
			return fmt.Errorf("artifact path mapping %s=%s: both paths must be absolute", m.From, m.To)
		}
	}
	return nil
}

// Place is a run's directory under its two names.
type Place struct {
	// Row is the name that orchestrator_runs.artifact_root keeps: a path of
	// the API's file system.
	Row string
	// Dir is the same directory in ours.
	Dir string
}

// Root returns the configured artifact root in our file system, which may
// not exist yet.
func (c PlaceConfig) Root() (string, error) {
	base := c.Base
	if !filepath.IsAbs(base) {
		base = filepath.Join(c.WorkingDir, base)
	}
	base = Resolve(base)
	root := base
	if filepath.IsAbs(c.SubPath) {
		root = Resolve(c.SubPath)
	} else if c.SubPath != "" {
		root = Resolve(filepath.Join(base, c.SubPath))
	}
	if !inside(base, root) {
		return "", &PathError{"Configured artifact root escapes the allowed base directory"}
	}
	return root, nil
}

// Of returns the directory of a run. The row wins: what
// orchestrator_runs.artifact_root says is kept, and the configuration is used
// only when it says nothing (docs/moonmind.md#artifact-root).
func (c PlaceConfig) Of(rowRoot, runID string) (Place, error) {
	if runID == "" || runID == "." || runID == ".." || strings.ContainsAny(runID, `/\`) {
		return Place{}, &PathError{"Artifact path escapes the run directory"}
	}
	if rowRoot == "" {
		root, err := c.Root()
		if err != nil {
			return Place{}, err
		}
		dir := filepath.Join(root, runID)
		return Place{Row: c.theirs(dir), Dir: dir}, nil
	}
	row := rowRoot
	if !filepath.IsAbs(row) {
		row = filepath.Join(c.WorkingDir, row)
	}
	row = filepath.Clean(row)
	if filepath.Base(row) == runID {
		row = filepath.Dir(row)
	}
	if here, mapped := c.ours(row); mapped {
		return Place{Row: filepath.Join(row, runID), Dir: filepath.Join(Resolve(here), runID)}, nil
	}
	dir := filepath.Join(Resolve(row), runID)
	return Place{Row: dir, Dir: dir}, nil
}

// ours translates a path of the API's file system.
func (c PlaceConfig) ours(path string) (string, bool) {
	best := -1
	for i, m := range c.Mappings {
		if inside(m.From, path) && (best < 0 || len(m.From) > len(c.Mappings[best].From)) {
			best = i
		}
	}
	if best < 0 {
		return path, false
	}
	m := c.Mappings[best]
	return filepath.Join(m.To, strings.TrimPrefix(path, m.From)), true
}

// theirs is the way back, for a directory that we have named.
func (c PlaceConfig) theirs(path string) string {
	for _, m := range slices.SortedFunc(slices.Values(c.Mappings), func(a, b PrefixMapping) int { return len(b.To) - len(a.To) }) {
		if to := Resolve(m.To); inside(to, path) {
			return filepath.Join(m.From, strings.TrimPrefix(path, to))
		}
	}
	return path
}

// inside says whether path is dir or below it. Both are clean.
func inside(dir, path string) bool {
	relative, err := filepath.Rel(dir, path)
	return err == nil && (relative == "." || filepath.IsLocal(relative))
}

// maxLinks is how many dangling symbolic links [Resolve] follows.
const maxLinks = 40

// Resolve follows the symbolic links of an absolute path as far as it exists,
// as Python's Path.resolve does. A link that points at nothing is followed
// too.
func Resolve(path string) string {
	rest := ""
	for links := 0; ; {
		path = filepath.Clean(path)
		if real, err := filepath.EvalSymlinks(path); err == nil {
			return filepath.Join(real, rest)
		}
		parent := filepath.Dir(path)
		if parent == path {
			return filepath.Join(path, rest)
		}
		if target, err := os.Readlink(path); err == nil && links < maxLinks {
			if !filepath.IsAbs(target) {
				target = filepath.Join(Resolve(parent), target)
			}
			path = target
			links++
			continue
		}
		rest = filepath.Join(filepath.Base(path), rest)
		path = parent
	}
}

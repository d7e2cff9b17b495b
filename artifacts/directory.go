package artifacts

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// PathError says that the rules of docs/moonmind.md#artifacts do not allow a
// path.
type PathError struct {
	// Text is the message that MoonMind's Python worker writes in this case.
	Text string
}

// Error returns the text.
func (e *PathError) Error() string { return e.Text }

// PrefixMapping translates paths of the API's file system to paths of the
// worker's: the directory From there is the directory To here. It is needed
// where the two containers mount one volume at different places.
type PrefixMapping struct{ From, To string }

// ParsePrefixMappings parses mappings such as "/app/var=/srv/var,/x=/y". Both
// sides must be absolute paths.
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

// DirectoryConfig says where the directories of runs are.
type DirectoryConfig struct {
	// WorkingDir is the directory that relative paths start from. It must be
	// absolute.
	WorkingDir string
	// Base is MoonMind's setting ARTIFACTS_ROOT. Defaults to
	// var/artifacts/spec_workflows.
	Base string
	// SubPath is MoonMind's setting ORCHESTRATOR_ARTIFACT_ROOT. Empty means
	// Base; a relative path is relative to Base; an absolute path must be
	// inside of Base.
	SubPath string
	// Mappings translate paths of the API's file system
	// (docs/moonmind.md#f7). The longest From that matches is used.
	Mappings []PrefixMapping
}

// DefaultBase is the default of [DirectoryConfig.Base], which is MoonMind's too.
const DefaultBase = "var/artifacts/spec_workflows"

// WithDefaults returns a copy in which empty fields are set to their defaults.
func (c DirectoryConfig) WithDefaults() DirectoryConfig {
	if c.Base == "" {
		c.Base = DefaultBase
	}
	return c
}

// Validate returns an error that names the field and value that are wrong. It
// does not check whether SubPath is inside of Base: [DirectoryConfig.ForRun] does, so
// that a wrong SubPath fails the run, as in MoonMind.
func (c DirectoryConfig) Validate() error {
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

// Directory is a run's directory.
type Directory struct {
	// RowPath is its path in the API's file system, the value of
	// orchestrator_runs.artifact_root.
	RowPath string
	// Dir is its path in the worker's file system.
	Dir string
}

// Root returns the configured artifact root in the worker's file system. The
// directory need not exist.
func (c DirectoryConfig) Root() (string, error) {
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

// ForRun returns the directory of a run. rowRoot is the value of
// orchestrator_runs.artifact_root; the configuration is used only if that is
// empty (docs/moonmind.md#artifact-root).
func (c DirectoryConfig) ForRun(rowRoot, runID string) (Directory, error) {
	if runID == "" || runID == "." || runID == ".." || strings.ContainsAny(runID, `/\`) {
		return Directory{}, &PathError{"Artifact path escapes the run directory"}
	}
	if rowRoot == "" {
		root, err := c.Root()
		if err != nil {
			return Directory{}, err
		}
		dir := filepath.Join(root, runID)
		return Directory{RowPath: c.theirs(dir), Dir: dir}, nil
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
		return Directory{RowPath: filepath.Join(row, runID), Dir: filepath.Join(Resolve(here), runID)}, nil
	}
	dir := filepath.Join(Resolve(row), runID)
	return Directory{RowPath: dir, Dir: dir}, nil
}

// ours translates a path of the API's file system to the worker's.
func (c DirectoryConfig) ours(path string) (string, bool) {
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

// theirs translates a path of the worker's file system to the API's, for a
// directory that the worker has chosen.
func (c DirectoryConfig) theirs(path string) string {
	for _, m := range slices.SortedFunc(slices.Values(c.Mappings), func(a, b PrefixMapping) int { return len(b.To) - len(a.To) }) {
		if to := Resolve(m.To); inside(to, path) {
			return filepath.Join(m.From, strings.TrimPrefix(path, to))
		}
	}
	return path
}

// inside reports whether path is dir or below it. Both must be clean.
func inside(dir, path string) bool {
	relative, err := filepath.Rel(dir, path)
	return err == nil && (relative == "." || filepath.IsLocal(relative))
}

// maxLinks is the number of dangling symbolic links that [Resolve] follows.
const maxLinks = 40

// Resolve follows the symbolic links in an absolute path, as Python's
// Path.resolve does. The end of the path need not exist. A dangling link is
// followed too.
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

package change

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Options say which part of a repository is captured.
type Options struct {
	// Excluded says that a file or folder is no part of the state. It gets absolute
	// paths without links. May be nil for nothing.
	Excluded func(path string) bool
	// Include has absolute paths of folders that are part of the state although they
	// are excluded, or lie outside of the work tree.
	Include []string
	// MaxFile and MaxFiles bound the content that is kept of files that git does not
	// track, in bytes: of one file, and of all. Zero means 64 MiB and 512 MiB, negative none.
	MaxFile, MaxFiles int64
	// Answers may be nil. With it, git is not asked again where a repository is.
	Answers *Answers
}

// A Repository is a git repository with a work tree.
//
//   - It never alters the user's index, stash, HEAD or configuration, but for
//     Restore, which takes a run's change back.
//   - No setting of the repository decides anything: files are read and written as
//     they are, without filters.
type Repository struct {
	// Top is the absolute path of the work tree, without links.
	Top string
	// gitDir and commonDir are absolute paths; they differ in a linked work tree.
	gitDir, commonDir string
	format            string
	git               Git
	options           Options
}

// Open finds the repository that a folder lies in. It returns ErrNotInRepository if
// git says that there is none, and another error if git gives no usable answer.
func Open(ctx context.Context, git Git, dir string, options Options) (*Repository, error) {
	r := &Repository{git: git, options: options}
	r.options.MaxFile = cmp.Or(options.MaxFile, 64<<20)
	r.options.MaxFiles = cmp.Or(options.MaxFiles, 512<<20)
	out, err := options.Answers.Place("open", dir, "", func() (string, error) {
		return r.output(ctx, dir, "rev-parse", "--show-toplevel", "--absolute-git-dir", "--git-common-dir", "--show-object-format")
	})
	if err != nil {
		return nil, err
	}
	lines := strings.Split(out, "\n")
	if len(lines) != 4 {
		return nil, fmt.Errorf("git rev-parse answers %q, which are not four lines", out)
	}
	if !filepath.IsAbs(lines[2]) {
		lines[2] = filepath.Join(dir, lines[2])
	}
	for i, into := range []*string{&r.Top, &r.gitDir, &r.commonDir} {
		if !filepath.IsAbs(lines[i]) {
			return nil, fmt.Errorf("git rev-parse answers %q, where a path is expected", lines[i])
		}
		path, err := filepath.EvalSymlinks(lines[i])
		if err != nil {
			return nil, fmt.Errorf("git names the folder %s, which cannot be used: %w", lines[i], err)
		}
		*into = path
	}
	if r.format = lines[3]; r.format != "sha1" && r.format != "sha256" {
		return nil, fmt.Errorf("git rev-parse answers %q, where the object format is expected", r.format)
	}
	r.options.Include = slices.Clone(options.Include)
	for i, path := range r.options.Include {
		if path, err := filepath.EvalSymlinks(path); err == nil {
			r.options.Include[i] = path
		}
	}
	return r, nil
}

// output runs a git command and returns its output without the final newline.
func (r *Repository) output(ctx context.Context, dir string, args ...string) (string, error) {
	var out bytes.Buffer
	if err := r.run(ctx, GitCommand{Dir: dir, Args: args, Stdout: &out}); err != nil {
		return "", err
	}
	return strings.TrimSuffix(out.String(), "\n"), nil
}

// messageLimit bounds what is kept of git's messages.
const messageLimit = 8 << 10

// run runs a git command that must succeed.
func (r *Repository) run(ctx context.Context, command GitCommand) error {
	var message limited
	if command.Stderr == nil {
		command.Stderr = &message
	}
	if command.Stdout == nil {
		command.Stdout = io.Discard
	}
	// No object is fetched from a server, and no ref gets a log.
	command.Env = append(command.Env, "GIT_NO_LAZY_FETCH=1", "GIT_TERMINAL_PROMPT=0")
	code, err := r.git(ctx, command)
	if err != nil {
		return err
	}
	if code != 0 {
		text := strings.TrimSpace(string(message.kept))
		if strings.Contains(text, "not a git repository") {
			return fmt.Errorf("%w: %s", ErrNotInRepository, text)
		}
		return fmt.Errorf("git %s failed with code %d: %s", subcommand(command.Args), code, text)
	}
	return nil
}

// subcommand returns the first argument that is no global option of git.
func subcommand(args []string) string {
	for len(args) > 1 && strings.HasPrefix(args[0], "-") {
		if args[0] == "-c" && len(args) > 2 {
			args = args[1:]
		}
		args = args[1:]
	}
	return args[0]
}

// limited keeps the beginning of what is written to it.
type limited struct{ kept []byte }

func (l *limited) Write(p []byte) (int, error) {
	l.kept = append(l.kept, p[:min(len(p), messageLimit-len(l.kept))]...)
	return len(p), nil
}

// absolute returns where an entry's path is on disk.
func (r *Repository) absolute(path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(r.Top, path)
}

// entryPath returns the path that an entry for a file on disk has.
func (r *Repository) entryPath(absolute string) string {
	if relative, err := filepath.Rel(r.Top, absolute); err == nil && filepath.IsLocal(relative) {
		return relative
	}
	return absolute
}

// roots are the folders that a state consists of, as absolute paths. No root lies
// in another.
func (r *Repository) roots() []string {
	candidates := append([]string{r.Top, r.commonDir, r.gitDir}, r.options.Include...)
	var roots []string
	for _, dir := range candidates {
		inOther := slices.ContainsFunc(roots, func(root string) bool { return Below(root, dir) })
		if info, err := os.Stat(dir); !inOther && err == nil && info.IsDir() {
			roots = append(roots, dir)
		}
	}
	return roots
}

// folders opens the roots of entries' paths. Files are opened, written and removed
// through them, so that no link leads out of a root.
type folders struct {
	repository *Repository
	open       map[string]*os.Root
	// roots are those of the repository, if they are known; otherwise each path asks.
	roots []string
}

func (r *Repository) folders() *folders { return &folders{repository: r, open: map[string]*os.Root{}} }

func (f *folders) close() {
	for _, root := range f.open {
		_ = root.Close()
	}
}

// at returns the root that a path lies in, and the path below it.
func (f *folders) at(path string) (*os.Root, string, error) {
	path = f.repository.absolute(path)
	roots := f.roots
	if roots == nil {
		roots = f.repository.roots()
	}
	for _, dir := range roots {
		if !Below(dir, path) {
			continue
		}
		if f.open[dir] == nil {
			root, err := os.OpenRoot(dir)
			if err != nil {
				return nil, "", err
			}
			f.open[dir] = root
		}
		name, err := filepath.Rel(dir, path)
		return f.open[dir], name, err
	}
	return nil, "", &fs.PathError{Op: "open", Path: path, Err: errors.New("the path is in no folder of the repository")}
}

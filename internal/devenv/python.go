package devenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// celeryRelease names a Python environment. kombu decides the bytes on the wire,
// so it is pinned to the release of the same time.
type celeryRelease struct{ celery, kombu string }

// celeries are the environments that tests use.
var celeries = []celeryRelease{
	{"5.4.0", "5.3.7"},
	{"5.5.3", "5.5.4"},
	{"5.6.3", "5.6.2"},
	{"5.7.0", "5.7.0"},
}

// pythonDrivers are the packages for database access. SQLAlchemy 2.1 uses
// psycopg 3 for a plain postgresql:// URL, older releases use psycopg2.
const pythonDrivers = "sqlalchemy\npsycopg2-binary\npsycopg[binary]\nsetuptools<81\n"

func requirements(celery, kombu string) string {
	return fmt.Sprintf("celery==%s\nkombu==%s\n%s", celery, kombu, pythonDrivers)
}

// requirementsFile is a file in a complete environment with the requirements
// that it was made from.
const requirementsFile = "mm-requirements.txt"

// findPython returns a python3 that can create virtual environments, or "".
func findPython(ctx context.Context) string {
	for _, name := range []string{"python3", "/usr/bin/python3"} {
		if _, err := output(ctx, name, "-c", "import venv, ensurepip, sys; assert sys.version_info >= (3, 9)"); err == nil {
			return name
		}
	}
	return ""
}

// python provides an environment in the cache for each Celery release.
func (b *startup) python(ctx context.Context) error {
	if b.given(EnvPythonRoot) {
		return nil
	}
	unlock, err := b.cache.lock(ctx, "python")
	if err != nil {
		return err
	}
	defer unlock()
	w := b.progress.start("checking", "python environments")
	root := b.cache.path("python")
	wanted := slices.Clone(celeries)
	if len(b.Celeries) > 0 {
		wanted = slices.DeleteFunc(wanted, func(c celeryRelease) bool { return !slices.Contains(b.Celeries, c.celery) })
	}
	var missing []celeryRelease
	for _, c := range wanted {
		if err := checkPython(ctx, filepath.Join(root, "celery-"+c.celery), c.celery, c.kombu); err != nil {
			if ctx.Err() != nil {
				w.failed()
				return ctx.Err()
			}
			missing = append(missing, c)
		}
	}
	w.done(fmt.Sprintf("python: celery %s", enumerate(wanted, missing)))
	if len(missing) > 0 {
		if err := b.makePythons(ctx, root, missing); err != nil {
			return err
		}
	}
	b.export(EnvPythonRoot, root)
	return nil
}

// enumerate lists Celery releases, and marks those that are missing.
func enumerate(releases, missing []celeryRelease) string {
	var names []string
	for _, c := range releases {
		name := c.celery
		if slices.Contains(missing, c) {
			name += " (to be made)"
		}
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}

// checkPython accepts an environment if it was made from the current
// requirements and its modules can be imported.
func checkPython(ctx context.Context, dir, celery, kombu string) error {
	made, err := os.ReadFile(filepath.Join(dir, requirementsFile))
	if err != nil {
		return err
	}
	if string(made) != requirements(celery, kombu) {
		return errors.New("made from other requirements")
	}
	return importPython(ctx, dir, celery, kombu)
}

func importPython(ctx context.Context, dir, celery, kombu string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	script := fmt.Sprintf("import celery, kombu, amqp, sqlalchemy, psycopg2, psycopg, celery.backends.database as _\n"+
		"assert (celery.__version__, kombu.__version__) == (%q, %q), (celery.__version__, kombu.__version__)", celery, kombu)
	_, err := output(ctx, filepath.Join(dir, "bin", "python"), "-c", script)
	return err
}

func (b *startup) makePythons(ctx context.Context, root string, missing []celeryRelease) error {
	if err := b.debian.wait(ctx, "python3-venv"); err != nil {
		return err
	}
	base := findPython(ctx)
	if base == "" {
		return errors.New("no python3 (3.9 or later) with the modules venv and ensurepip; on Debian as root: apt-get install python3-venv")
	}
	for _, c := range missing {
		w := b.progress.start("installing", "python environment: celery "+c.celery)
		err := b.makePython(ctx, w, base, filepath.Join(root, "celery-"+c.celery), c.celery, c.kombu)
		if err != nil {
			w.failed()
			return fmt.Errorf("celery %s: %w; PyPI, or the index that pip is set up for, must be reachable", c.celery, err)
		}
		w.done("python environment: celery " + c.celery)
	}
	return nil
}

// makePython creates an environment next to target and renames it to target
// once it works.
func (b *startup) makePython(ctx context.Context, w *work, base, target, celery, kombu string) error {
	temporary, err := os.MkdirTemp(filepath.Dir(target), ".new-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(temporary)
	venv := exec.Command(base, "-m", "venv", temporary)
	if err := b.run(ctx, w, venv); err != nil {
		return err
	}
	wanted := requirements(celery, kombu)
	list := filepath.Join(temporary, "requirements.new")
	if err := os.WriteFile(list, []byte(wanted), 0o644); err != nil {
		return err
	}
	pip := exec.Command(filepath.Join(temporary, "bin", "python"), "-m", "pip", "install",
		"--disable-pip-version-check", "--progress-bar", "off", "--prefer-binary", "-r", list)
	if err := b.run(ctx, w, pip); err != nil {
		return err
	}
	if err := importPython(ctx, temporary, celery, kombu); err != nil {
		return err
	}
	if err := moveScripts(temporary, target); err != nil {
		return err
	}
	if err := os.Rename(list, filepath.Join(temporary, requirementsFile)); err != nil {
		return err
	}
	if err := os.Chmod(temporary, 0o755); err != nil {
		return err
	}
	return replace(temporary, target)
}

// moveScripts replaces the folder's path in an environment's own scripts, so
// that they work after the folder is renamed.
func moveScripts(from, to string) error {
	entries, err := os.ReadDir(filepath.Join(from, "bin"))
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if entry.Type()&fs.ModeType != 0 {
			continue // a link to the interpreter
		}
		path := filepath.Join(from, "bin", entry.Name())
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, bytes.ReplaceAll(content, []byte(from), []byte(to)), info.Mode()); err != nil {
			return err
		}
	}
	return nil
}

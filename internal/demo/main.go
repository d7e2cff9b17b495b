// Command demo demonstrates the worker. An unmodified Python Celery producer
// submits the repair of a compose service with a missing dependency, and the
// worker completes it. A second run breaks the service and is rolled back. All
// output is read from the tables, the artifacts and the docker engine.
//
// `devenv run` provides the servers (`make demo`). The demo removes what it has
// started: the worker, the containers with their images, the virtual host and
// the database. Its files stay in var/demo until the next demo.
//
// demo -spec demonstrates the Spec workflow instead (`make demo-spec`): two runs from
// tasks.md to a pull request, of which one has its workers killed. Codex, git and the
// worker are real, GitHub's API and Codex's model are stand-ins on loopback. It ends by
// itself, and its files are in var/demo-spec.
//
//	demo        run the demo; on a terminal, wait at the end for Ctrl-C
//	demo -spec  run the demo of the Spec workflow
//	demo -stop  end demos that run
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// cleanupTimeout is the limit on removing everything at the end.
const cleanupTimeout = 30 * time.Second

func main() {
	stop := flag.Bool("stop", false, "end demos that run")
	spec := flag.Bool("spec", false, "demonstrate the Spec workflow")
	folder := flag.String("folder", "", "folder for the demo's files (default var/demo of the clone, or var/demo-spec)")
	flag.Parse()
	if err := run(*stop, *spec, *folder); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(stop, spec bool, folder string) error {
	module, err := moduleRoot()
	if err != nil {
		return err
	}
	folders := []string{folder}
	if folder == "" {
		folders = []string{filepath.Join(module, "var", "demo"), filepath.Join(module, "var", "demo-spec")}
	}
	if stop {
		return stopOthers(folders)
	}
	if folder = folders[0]; spec {
		folder = folders[len(folders)-1]
	}
	if folder, err = filepath.Abs(folder); err != nil {
		return err
	}
	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer release()
	// A second signal ends the program at once.
	context.AfterFunc(ctx, release)

	lock, err := lockFolder(folder)
	if err != nil {
		return err
	}
	defer lock.Close()

	d := &demo{module: module, folder: folder, screen: newScreen(os.Stdout)}
	if spec {
		err = (&specDemo{demo: d}).run(ctx)
		d.screen.line("ending", "worker, stand-ins, database and virtual host", "")
	} else {
		err = d.run(ctx)
		d.screen.line("ending", "worker, containers, database and virtual host", "")
	}
	cleanUp, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
	defer cancel()
	err = errors.Join(err, d.cleanUp(cleanUp))
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // the user has ended the demo
	}
	return err
}

// moduleRoot returns the root folder of the clone that this program was built
// from.
func moduleRoot() (string, error) {
	_, file, _, ok := runtime.Caller(0)
	if !ok {
		return "", errors.New("cannot tell where the sources are")
	}
	root := filepath.Dir(filepath.Dir(filepath.Dir(file)))
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		return "", fmt.Errorf("the sources are not where this program was built (build it without -trimpath): %w", err)
	}
	return root, nil
}

// lockFolder creates the demo's folder and locks it. The lock file contains the
// process id, for -stop. The lock, not the file's existence, says that a demo is
// running.
func lockFolder(folder string) (*os.File, error) {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(folder, "pid"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		return nil, errors.New("a demo is running in this folder: end it with Ctrl-C in its terminal, or with `make demo-stop`")
	}
	if err := lock.Truncate(0); err != nil {
		lock.Close()
		return nil, err
	}
	if _, err := fmt.Fprintln(lock, os.Getpid()); err != nil {
		lock.Close()
		return nil, err
	}
	return lock, nil
}

// stopOthers ends the demos that run in the folders.
func stopOthers(folders []string) error {
	found := false
	for _, folder := range folders {
		stopped, err := stopOther(folder)
		if err != nil {
			return err
		}
		found = found || stopped
	}
	if found {
		fmt.Println("the demo has ended")
	} else {
		fmt.Println("no demo is running")
	}
	return nil
}

// stopOther ends the demo that has locked the folder, and waits for its end. It returns
// false if there is none.
func stopOther(folder string) (bool, error) {
	lock, err := os.Open(filepath.Join(folder, "pid"))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer lock.Close()
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil {
		return false, nil
	}
	var pid int
	if _, err := fmt.Fscan(lock, &pid); err != nil || pid <= 1 {
		return false, fmt.Errorf("%s does not name the running demo: %w", lock.Name(), err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return false, fmt.Errorf("ending process %d: %w", pid, err)
	}
	return true, syscall.Flock(int(lock.Fd()), syscall.LOCK_SH)
}

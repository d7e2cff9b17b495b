// Command demo shows the worker at work: an unmodified Python Celery producer
// submits the repair of a compose service with a missing dependency, the
// worker carries it through, and then a repair that breaks the service and is
// rolled back. Nothing is faked: what it prints it has read from the tables,
// the artifacts and the docker engine.
//
// The servers come from the environment that `devenv run` makes (`make demo`).
// The demo ends what it starts: the worker, the containers with their images,
// the virtual host and the database. Its files stay in var/demo until the
// next run.
//
//	demo        run it; on a terminal, wait at the end for Ctrl-C
//	demo -stop  end a demo that waits
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

// tidyLimit bounds the removal of everything at the end.
const tidyLimit = 30 * time.Second

func main() {
	stop := flag.Bool("stop", false, "end a demo that waits for it")
	folder := flag.String("folder", "", "where its files go; var/demo of the clone by default")
	flag.Parse()
	if err := run(*stop, *folder); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(stop bool, folder string) error {
	module, err := moduleRoot()
	if err != nil {
		return err
	}
	if folder == "" {
		folder = filepath.Join(module, "var", "demo")
	}
	if folder, err = filepath.Abs(folder); err != nil {
		return err
	}
	if stop {
		return stopOther(folder)
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
	err = d.play(ctx)
	d.screen.line("ending", "worker, containers, database and virtual host", "")
	tidy, cancel := context.WithTimeout(context.Background(), tidyLimit)
	defer cancel()
	err = errors.Join(err, d.tidy(tidy))
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil // asked to end, and ended
	}
	return err
}

// moduleRoot is the clone that this program was built from or is run in.
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

// lockFolder makes the demo's folder and holds it. The file has our process
// id for -stop; the lock, not the file, says that the demo runs.
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

// stopOther ends the demo that holds the folder and returns when it has ended.
func stopOther(folder string) error {
	lock, err := os.Open(filepath.Join(folder, "pid"))
	if errors.Is(err, os.ErrNotExist) {
		fmt.Println("no demo is running")
		return nil
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) == nil {
		fmt.Println("no demo is running")
		return nil
	}
	var pid int
	if _, err := fmt.Fscan(lock, &pid); err != nil || pid <= 1 {
		return fmt.Errorf("%s does not name the running demo: %w", lock.Name(), err)
	}
	if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
		return fmt.Errorf("ending process %d: %w", pid, err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_SH); err != nil {
		return err
	}
	fmt.Println("the demo has ended")
	return nil
}

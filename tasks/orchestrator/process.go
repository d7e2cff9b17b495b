//go:build unix

package orchestrator

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/planted"
)

// strayTime is how long the output of a program's stray children is waited
// for after the program has ended.
const strayTime = 5 * time.Second

// A killer runs programs so that they end with everything they have started.
type killer struct{ grace time.Duration }

// run starts the program in a process group of its own and waits for it.
// When ctx ends, the group gets SIGTERM and, after the grace, SIGKILL. On
// return nothing of the group is alive.
//
// Should this process die, the kernel kills the program, on Linux. It ties
// that to the thread that started the program, so that thread does nothing
// else meanwhile.
func (k killer) run(ctx context.Context, cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if !planted.Bug(planted.CommandsSurvive) {
		dieWithUs(cmd.SysProcAttr)
	}
	cmd.WaitDelay = strayTime
	started, done := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			done <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	group := -cmd.Process.Pid
	defer syscall.Kill(group, syscall.SIGKILL)
	select {
	case err := <-done:
		return waited(err)
	case <-ctx.Done():
	}
	_ = syscall.Kill(group, syscall.SIGTERM)
	grace := time.NewTimer(k.grace)
	defer grace.Stop()
	select {
	case err := <-done:
		return waited(err)
	case <-grace.C:
	}
	_ = syscall.Kill(group, syscall.SIGKILL)
	return waited(<-done)
}

// waited forgives a program whose children hold its output open: it has
// ended well.
func waited(err error) error {
	if errors.Is(err, exec.ErrWaitDelay) {
		return nil
	}
	return err
}

// exitCode is Python's returncode.
func exitCode(state *os.ProcessState) int {
	if status, isUnix := state.Sys().(syscall.WaitStatus); isUnix && status.Signaled() {
		return -int(status.Signal())
	}
	return state.ExitCode()
}

//go:build unix

package processes

import (
	"errors"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// EndLeftovers kills the programs of dead workers: processes of this user and
// pid namespace whose [Variable] names a worker process that does not exist any
// more. It touches nothing else. It waits up to 5 s for the processes to end,
// logs one line for each and returns their number.
//
// Call it when a worker starts, before it takes any work.
func EndLeftovers(log *slog.Logger) int {
	return endMarked(log, func(m mark) bool { return m.worker.dead() })
}

// EndOtherWorkersPrograms kills what EndLeftovers kills, and in addition the
// programs of any step of this run that another worker has started, even if
// that worker is alive: it was isolated and has lost its claim without knowing.
// It does not touch programs of this process.
//
// Call it before the first command of a step that was taken over, or that
// follows one that was: leftover programs may still write to the workspace.
// That it ends those of every step is safe, as only one step of a run works at
// a time.
func EndOtherWorkersPrograms(log *slog.Logger, run string) int {
	run = noSlash(run)
	return endMarked(log, func(m mark) bool {
		otherWorkers := m.run == run && m.worker != self()
		return otherWorkers || m.worker.dead()
	})
}

func endMarked(log *slog.Logger, wanted func(mark) bool) int {
	signalled := map[identity]bool{}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		alive := false
		for _, p := range list() {
			if p.zombie || p.pid == os.Getpid() {
				continue
			}
			if signalled[p.identity()] {
				// A dying process loses its environment, and so its mark, before
				// it ends.
				alive = true
				_ = p.send(syscall.SIGKILL)
				continue
			}
			left, marked := parseMark(markOf(p.pid))
			if !marked || !wanted(left) {
				continue
			}
			alive = true
			err := p.send(syscall.SIGKILL)
			if errors.Is(err, os.ErrProcessDone) {
				continue
			}
			signalled[p.identity()] = true
			log := log.With("pid", p.pid, "name", p.name, "run_id", left.run, "step", left.step, "worker_pid", left.worker.pid)
			switch {
			case err != nil:
				log.Error("leftover process of a step cannot be ended", "error", err)
			case left.worker.dead():
				log.Warn("ended a process of a dead worker")
			default:
				log.Warn("ended a process of a worker that has lost its claim on the step")
			}
		}
		if !alive || time.Since(begin) > killTimeout {
			return len(signalled)
		}
	}
}

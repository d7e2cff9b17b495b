//go:build unix

package processes

import (
	"errors"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// EndLeftovers kills what workers have left that are no more: processes of
// this user and pid namespace whose environment has a [Variable] that names a
// process that does not exist. Nothing else is touched. It logs one line for
// each and returns how many there were; it waits for their end, for some
// seconds at the most.
//
// It is for the start of a worker, before it takes any work.
func EndLeftovers(log *slog.Logger) int {
	return endMarked(log, func(m mark) bool { return m.holder.dead() })
}

// EndRivals kills what EndLeftovers kills, and besides the programs of any step
// of this run that another worker has started, though that one lives: it was
// cut off and has lost the step without knowing. It is for a step that is
// taken over or follows one that was, before it does anything: what is left may
// still write to the workspace. One step of a run is run at a time. Programs of
// this process are not touched.
func EndRivals(log *slog.Logger, run string) int {
	run = noSlash(run)
	return endMarked(log, func(m mark) bool {
		rival := m.run == run && m.holder != self()
		return rival || m.holder.dead()
	})
}

func endMarked(log *slog.Logger, wanted func(mark) bool) int {
	told := map[identity]bool{}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		alive := false
		for _, p := range list() {
			if p.zombie || p.pid == os.Getpid() {
				continue
			}
			if told[p.identity()] {
				// It loses its environment before it is gone.
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
			told[p.identity()] = true
			log := log.With("pid", p.pid, "name", p.name, "run_id", left.run, "step", left.step, "worker_pid", left.holder.pid)
			switch {
			case err != nil:
				log.Error("process of a step that is over cannot be ended", "error", err)
			case left.holder.dead():
				log.Warn("ended a process that a dead worker has left")
			default:
				log.Warn("ended a process of a worker that has lost the step")
			}
		}
		if !alive || time.Since(begin) > killTime {
			return len(told)
		}
	}
}

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
// It is for the start of a worker, before it takes any work, and for a step
// that is taken over: what is left of it may still write to the workspace.
func EndLeftovers(log *slog.Logger) int {
	told := map[identity]bool{}
	for begin := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		alive := false
		for _, p := range list() {
			if p.zombie || p.pid == os.Getpid() {
				continue
			}
			left, marked := parseMark(markOf(p.pid))
			if !marked || !left.holder.dead() {
				continue
			}
			alive = true
			err := p.send(syscall.SIGKILL)
			if told[p.identity()] || errors.Is(err, os.ErrProcessDone) {
				continue
			}
			told[p.identity()] = true
			log := log.With("pid", p.pid, "name", p.name, "run_id", left.run, "step", left.step, "worker_pid", left.holder.pid)
			if err != nil {
				log.Error("process that a dead worker has left cannot be ended", "error", err)
				continue
			}
			log.Warn("ended a process that a dead worker has left")
		}
		if !alive || time.Since(begin) > killTime {
			return len(told)
		}
	}
}

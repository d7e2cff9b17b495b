//go:build unix

package processes

import (
	"context"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"
)

// adopts says that orphans come to this process.
var adopts atomic.Bool

// zombieTime is how long a child must have been dead before it counts as one
// that nobody waits for. Whoever starts a program waits for it at once.
const zombieTime = time.Second

// Adopt makes this process the parent of its descendants' orphans, for the
// rest of its life, and buries those that die, until ctx ends. It is for
// programs that start others by a [Runner] and in no other way.
//
// As pid 1 of a container the process is given orphans anyway, and would have
// to bury them.
func Adopt(ctx context.Context) (stop func(), err error) {
	if err := takeOrphans(); err != nil {
		return nil, err
	}
	adopts.Store(true)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	deaths := make(chan os.Signal, 1)
	signal.Notify(deaths, syscall.SIGCHLD)
	go func() {
		defer close(done)
		defer signal.Stop(deaths)
		bury(ctx, deaths)
	}()
	return func() {
		cancel()
		<-done
	}, nil
}

// bury waits for orphans that have died. Those that others wait for are left
// alone: taking the end of a program from package exec would make a failure
// of it.
func bury(ctx context.Context, deaths <-chan os.Signal) {
	seen := map[identity]time.Time{}
	var look <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-deaths:
			if look == nil {
				look = time.After(zombieTime / 2)
			}
			continue
		case <-look:
		}
		look = nil
		now, still := time.Now(), map[identity]time.Time{}
		for _, p := range list() {
			if p.parent != os.Getpid() || !p.zombie || isStarted(p.pid) {
				continue
			}
			since, known := seen[p.identity()]
			if !known {
				since = now
			}
			if now.Sub(since) < zombieTime {
				still[p.identity()] = since
				continue
			}
			_, _ = syscall.Wait4(p.pid, nil, syscall.WNOHANG, nil)
		}
		if seen = still; len(seen) > 0 {
			look = time.After(zombieTime)
		}
	}
}

func isStarted(pid int) bool {
	started.mu.Lock()
	defer started.mu.Unlock()
	_, ours := started.pids[pid]
	return ours
}

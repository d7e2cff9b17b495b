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

// adopting says that this process is the parent of its descendants' orphans.
var adopting atomic.Bool

// reapDelay is how long a child must have been a zombie before reap takes it.
// The goroutine that has started a program waits for it at once, so that older
// zombies are orphans.
const reapDelay = time.Second

// Adopt makes this process the parent of its descendants' orphans until it
// exits, and reaps those that have died until ctx ends or stop is called; stop
// returns when reaping has ended. Use it only in programs that start others by a
// [Runner] and in no other way.
//
// As pid 1 of a container a process gets orphans without asking, and has to
// reap them just so.
func Adopt(ctx context.Context) (stop func(), err error) {
	if err := becomeSubreaper(); err != nil {
		return nil, err
	}
	adopting.Store(true)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	deaths := make(chan os.Signal, 1)
	signal.Notify(deaths, syscall.SIGCHLD)
	go func() {
		defer close(done)
		defer signal.Stop(deaths)
		reap(ctx, deaths)
	}()
	return func() {
		cancel()
		<-done
	}, nil
}

// hasNoDescendants says that this process certainly has no descendant, dead or alive.
// Only a process that adopts can know: its children are all that there is, since the
// kernel gives it the children of a process before it reports the end of that process.
func hasNoDescendants() bool { return adopting.Load() && hasNoChild() }

// reap waits for orphans that have died. It leaves programs that a Runner has
// started alone: package exec would report an error for a program whose exit
// status somebody else has taken.
func reap(ctx context.Context, deaths <-chan os.Signal) {
	seen := map[identity]time.Time{}
	var scan <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-deaths:
			if scan == nil {
				scan = time.After(reapDelay / 2)
			}
			continue
		case <-scan:
		}
		scan = nil
		now, still := time.Now(), map[identity]time.Time{}
		for _, p := range list() {
			if p.parent != os.Getpid() || !p.zombie || isProgram(p.pid) {
				continue
			}
			since, known := seen[p.identity()]
			if !known {
				since = now
			}
			if now.Sub(since) < reapDelay {
				still[p.identity()] = since
				continue
			}
			_, _ = syscall.Wait4(p.pid, nil, syscall.WNOHANG, nil)
		}
		if seen = still; len(seen) > 0 {
			scan = time.After(reapDelay)
		}
	}
}

func isProgram(pid int) bool {
	programs.mu.Lock()
	defer programs.mu.Unlock()
	_, found := programs.marks[pid]
	return found
}

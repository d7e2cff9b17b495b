//go:build unix

package processes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// strayOutput is how long the output of a program's stray children is
	// waited for after the program has ended.
	strayOutput = time.Second
	// strayGrace is what is left to processes that a program has left behind:
	// enough for git to remove its lock files.
	strayGrace = time.Second
	// killTime is how long processes may take to be gone after SIGKILL; only
	// one that hangs in the kernel takes longer.
	killTime = 5 * time.Second
)

// Runner runs programs. Its zero value is ready for use.
type Runner struct {
	// Grace is the time between SIGTERM and SIGKILL for a program that is
	// ended. Defaults to 10 s.
	Grace time.Duration
	// Logger hears of processes that cannot be ended. Defaults to
	// slog.Default().
	Logger *slog.Logger
}

// started are the programs that run, of all Runners: who the children of this
// process are is not a matter of one of them. An entry is made while lock is
// held for reading, so that a look around under the full lock never mistakes
// a program for an orphan.
var started = struct {
	lock    sync.RWMutex
	mu      sync.Mutex
	pids    map[int]string // pid to mark
	running int            // programs that run or leave processes to be ended
}{pids: map[int]string{}}

var programs atomic.Int64

type killKey struct{}

// KillWhen returns a context whose programs get SIGKILL when now is closed: at
// once, and also in the middle of a grace. Who closes it ends the context too.
// What kills the programs of the given context kills these as well.
func KillWhen(ctx context.Context, now <-chan struct{}) context.Context {
	return context.WithValue(ctx, killKey{}, append(slices.Clip(killers(ctx)), now))
}

func killers(ctx context.Context) []<-chan struct{} {
	all, _ := ctx.Value(killKey{}).([]<-chan struct{})
	return all
}

// Owner names what a program is run for.
type Owner struct{ Run, Step string }

// Run starts the program in a process group of its own and waits for it. When
// ctx ends, the program and all that it has started get SIGTERM and, after
// the grace or when [KillWhen] says so, SIGKILL. On return nothing of it is
// alive; what the program left behind got SIGTERM and a second.
//
// exited, unless nil, is called the moment that a program has ended by itself,
// with its exit code as [ExitCode] has it: before its output is complete, and
// before what it left behind is looked for. It is not called for a program
// that was ended because of ctx, or killed by whatever signal.
//
// The error is that of [exec.Cmd.Wait], except that children that hold the
// output open are no error, and that a program that was ended has not
// succeeded, whatever its exit code says: its error is then the cause of ctx.
func (r Runner) Run(ctx context.Context, owner Owner, cmd *exec.Cmd, exited func(code int)) error {
	p := &program{
		mark:  fmt.Sprintf("%s/%s/%s/%d", self(), noSlash(owner.Run), noSlash(owner.Step), programs.Add(1)),
		log:   r.Logger,
		known: map[identity]bool{},
		dead:  map[identity]bool{},
	}
	p.now = killers(ctx)
	if p.log == nil {
		p.log = slog.Default()
	}
	p.log = p.log.With("run_id", owner.Run, "step", owner.Step)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(cmd.Environ(), Variable+"="+p.mark)
	dieWithUs(cmd.SysProcAttr)
	if ctx.Err() != nil {
		return context.Cause(ctx) // not begun, rather than begun and ended
	}
	streams, err := pipe(cmd)
	if err != nil {
		return err
	}
	done, err := p.start(cmd)
	streams.begin()
	if err != nil {
		_ = streams.end(0)
		return err
	}
	defer p.forget()
	byItself := false
	select {
	case err = <-done:
		byItself = true
	case <-ctx.Done():
		select { // it may have ended at the same moment
		case err = <-done:
			byItself = true
		default:
		}
	}
	var incomplete error
	if byItself {
		if code := ExitCode(cmd.ProcessState); code >= 0 && exited != nil {
			exited(code)
		}
		incomplete = streams.end(strayOutput)
		p.end(nil, strayGrace)
	} else {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			err = <-done
		}()
		p.end(ended, cmp.Or(r.Grace, 10*time.Second))
		<-ended
		incomplete = streams.end(strayOutput)
		if err == nil {
			// Asked to end, or robbed of a child, it calls that a success.
			// Nobody knows whether it had done its work.
			err = context.Cause(ctx)
		}
	}
	return cmp.Or(err, incomplete)
}

func noSlash(text string) string { return strings.ReplaceAll(text, "/", "_") }

// program is one that was started, with all that came of it.
type program struct {
	mark string
	log  *slog.Logger
	pid  int
	// group are the members of the process group that were alive when the
	// program had ended. Later its number may be another group's.
	group map[identity]bool
	// known are processes that were found before. One that is about to end has
	// no environment any more and is not yet gone.
	known map[identity]bool
	// dead are processes that no signal reaches.
	dead map[identity]bool
	// now are of whom one is closed when there is no time for a grace.
	now []<-chan struct{}
}

// start starts the program on a thread that lives as long as it does: the
// kernel ties the parent-death signal to the thread that forked, and Go ends
// threads as it likes.
func (p *program) start(cmd *exec.Cmd) (<-chan error, error) {
	begun, done := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		started.lock.RLock()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
			started.mu.Lock()
			started.pids[p.pid] = p.mark
			started.running++
			started.mu.Unlock()
		}
		started.lock.RUnlock()
		begun <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		// From here on the pid is free for others.
		started.mu.Lock()
		delete(started.pids, p.pid)
		started.mu.Unlock()
		done <- err
	}()
	return done, <-begun
}

func (p *program) forget() {
	started.mu.Lock()
	started.running--
	started.mu.Unlock()
}

// end ends what there is of the program: SIGTERM, and SIGKILL after the
// grace. With ended it still runs, and is waited for as well.
func (p *program) end(ended <-chan struct{}, grace time.Duration) {
	if ended == nil {
		p.takeGroup()
	}
	begin, pause := time.Now(), 2*time.Millisecond
	told := map[identity]bool{}
	// A look is not a picture of one moment: once there was something, it
	// takes two that find nothing.
	for nothing := 0; ; {
		signal := syscall.SIGTERM
		if time.Since(begin) >= grace || slices.ContainsFunc(p.now, over) {
			signal = syscall.SIGKILL
		}
		if p.signal(signal, told) {
			nothing = 0
		} else if nothing++; over(ended) && (nothing > 1 || len(told) == 0) {
			return
		}
		if time.Since(begin) > grace+killTime {
			p.log.Error("processes of a step cannot be ended", "processes", describe(p.find()))
			return
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ended: // nil blocks
			timer.Stop()
			p.takeGroup()
			ended = nil
		}
		pause = min(2*pause, 50*time.Millisecond)
	}
}

func over(ended <-chan struct{}) bool {
	if ended == nil {
		return true
	}
	select {
	case <-ended:
		return true
	default:
		return false
	}
}

// takeGroup remembers who is left of the group at the program's end.
func (p *program) takeGroup() {
	if p.group != nil {
		return
	}
	p.group = map[identity]bool{}
	if runtime.GOOS != "linux" {
		// There is no /proc to find its members one by one.
		_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	}
	for _, other := range list() {
		if other.group == p.pid {
			p.group[other.identity()] = true
		}
	}
}

// signal gives every live process of the program the signal, SIGTERM once
// each, and says whether there was any.
func (p *program) signal(signal syscall.Signal, told map[identity]bool) bool {
	// No program may start between the look and the signal: before it has
	// become itself, it would look like an orphan without a mark.
	started.lock.Lock()
	defer started.lock.Unlock()
	if runtime.GOOS != "linux" && p.group == nil {
		_ = syscall.Kill(-p.pid, signal)
	}
	found := p.find()
	// The oldest first: a program that sees its child killed may act on it, and
	// a shell says so in the log.
	oldest := func(a, b process) int { return cmp.Or(cmp.Compare(a.started, b.started), cmp.Compare(a.pid, b.pid)) }
	for _, other := range slices.SortedFunc(maps.Values(found), oldest) {
		id := other.identity()
		if signal == syscall.SIGTERM && told[id] {
			continue
		}
		told[id] = true
		if err := other.send(signal); err != nil && !errors.Is(err, os.ErrProcessDone) && signal == syscall.SIGKILL {
			p.log.Error("process of a step cannot be ended", "pid", other.pid, "name", other.name, "error", err)
			p.dead[id] = true
		}
	}
	return len(found) > 0
}

// find returns the live processes that came of the program.
func (p *program) find() map[identity]process {
	all := list()
	me := os.Getpid()
	started.mu.Lock()
	running, alone := started.pids[p.pid] == p.mark, started.running == 1
	ours := make(map[int]bool, len(started.pids))
	for pid := range started.pids {
		ours[pid] = true
	}
	started.mu.Unlock()

	candidates := map[identity]process{}
	adopting := adopts.Load()
	if adopting {
		// All that came of programs is below us, so that nobody else's
		// environment needs to be read.
		candidates = below(all, func(other process) bool { return other.parent == me })
	}
	found := below(all, func(other process) bool {
		if other.pid == me {
			return false
		}
		if running && (other.pid == p.pid || other.group == p.pid) || p.group[other.identity()] || p.known[other.identity()] {
			return true
		}
		if ours[other.pid] {
			return false // another program
		}
		if _, candidate := candidates[other.identity()]; adopting && !candidate {
			return false
		}
		switch markOf(other.pid) {
		case p.mark:
			return true
		case "":
			// An orphan that has emptied its environment. With several
			// programs it could be anybody's: the last one ends it.
			return adopting && alone && other.parent == me && other.pid != p.pid
		}
		return false
	})
	for id, other := range found {
		if other.zombie || p.dead[id] || other.pid == me {
			delete(found, id)
			continue
		}
		p.known[id] = true
	}
	return found
}

func describe(found map[identity]process) string {
	var words []string
	for _, p := range found {
		words = append(words, fmt.Sprintf("%s (pid %d)", p.name, p.pid))
	}
	return strings.Join(words, ", ")
}

// ExitCode is Python's returncode: negative for the signal that ended the
// program.
func ExitCode(state *os.ProcessState) int {
	if status, isUnix := state.Sys().(syscall.WaitStatus); isUnix && status.Signaled() {
		return -int(status.Signal())
	}
	return state.ExitCode()
}

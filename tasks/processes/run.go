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
	// outputTimeout is how long Run waits, after the end of a program, for the
	// output that its remaining children may still write.
	outputTimeout = time.Second
	// leftoverGrace is the time between SIGTERM and SIGKILL for processes that
	// have survived their program: enough for git to remove its lock files.
	leftoverGrace = time.Second
	// killTimeout is how long processes may take to end after SIGKILL. Only one
	// that hangs in the kernel takes longer.
	killTimeout = 5 * time.Second
)

// Runner runs programs. Its zero value is ready for use.
type Runner struct {
	// Grace is the time between SIGTERM and SIGKILL when ctx ends a program.
	// Defaults to 10 s.
	Grace time.Duration
	// Logger gets an error for each process that cannot be ended. Defaults to
	// slog.Default().
	Logger *slog.Logger
}

// programs are those that run now, of all Runners: every Runner's programs are
// children of this process, and each has to know the others' from orphans.
var programs = struct {
	// starting is read-locked while a program is started and entered. Under the
	// write lock each program is entered, so none is mistaken for an orphan.
	starting sync.RWMutex
	mu       sync.Mutex
	marks    map[int]string // by pid
	running  int            // programs that run, or whose leftovers are being ended
}{marks: map[int]string{}}

// lastProgram numbers programs for their marks.
var lastProgram atomic.Int64

type killKey struct{}

// KillWhen returns a context whose programs get SIGKILL when now is closed: at
// once, and also during the grace after a SIGTERM. The caller must end the
// context too when it closes now. Channels of earlier calls stay in effect.
func KillWhen(ctx context.Context, now <-chan struct{}) context.Context {
	return context.WithValue(ctx, killKey{}, append(slices.Clip(killChannels(ctx)), now))
}

func killChannels(ctx context.Context) []<-chan struct{} {
	all, _ := ctx.Value(killKey{}).([]<-chan struct{})
	return all
}

// Owner names the step that a program belongs to.
type Owner struct{ Run, Step string }

// Run starts the program in a process group of its own and waits for it.
//
//   - When ctx ends, the program and all its descendants get SIGTERM. They get
//     SIGKILL after the grace, or when a channel of [KillWhen] is closed.
//   - When the program ends by itself, its remaining descendants get SIGTERM,
//     and SIGKILL a second later.
//   - On return no process of the program is alive, unless the log has an error
//     about it.
//   - Run calls exited, unless nil, as soon as the program has ended by itself,
//     with its exit code as in [ExitCode]. At that time its output may be
//     incomplete and its descendants alive. Run does not call it for a program
//     that ctx or any signal has ended.
//   - The error is that of [exec.Cmd.Wait], with two differences: it is no error
//     that a child keeps the output open; and if ctx has ended the program and
//     that exits with 0, the error is the cause of ctx.
func (r Runner) Run(ctx context.Context, owner Owner, cmd *exec.Cmd, exited func(code int)) error {
	p := &program{
		mark:  fmt.Sprintf("%s/%s/%s/%d", self(), noSlash(owner.Run), noSlash(owner.Step), lastProgram.Add(1)),
		log:   r.Logger,
		known: map[identity]bool{}, unkillable: map[identity]bool{},
	}
	p.killNow = killChannels(ctx)
	if p.log == nil {
		p.log = slog.Default()
	}
	p.log = p.log.With("run_id", owner.Run, "step", owner.Step)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = append(cmd.Environ(), Variable+"="+p.mark)
	setParentDeathSignal(cmd.SysProcAttr)
	if ctx.Err() != nil {
		return context.Cause(ctx) // do not start it only to end it
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
		select { // it may have ended at the same time
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
		incomplete = streams.end(outputTimeout)
		// Usually a program leaves nothing behind, and one question shows that; the
		// search reads a file of each process of the machine, more than once.
		if !hasNoDescendants() {
			p.end(nil, leftoverGrace)
		}
	} else {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			err = <-done
		}()
		p.end(ended, cmp.Or(r.Grace, 10*time.Second))
		<-ended
		incomplete = streams.end(outputTimeout)
		if err == nil {
			// Some programs exit with 0 on SIGTERM, or when a child of theirs
			// was killed. That does not say that they have done their work.
			err = context.Cause(ctx)
		}
	}
	return cmp.Or(err, incomplete)
}

func noSlash(text string) string { return strings.ReplaceAll(text, "/", "_") }

// program is one that Run has started, with all its descendants.
type program struct {
	mark string
	log  *slog.Logger
	pid  int
	// group are the members of the process group that were alive when the
	// program had ended. Later the kernel may give the number to another group.
	group map[identity]bool
	// known are processes that were found before. They are remembered because a
	// dying process loses its environment, and so its mark, before it ends.
	known map[identity]bool
	// unkillable are processes that could not be sent SIGKILL.
	unkillable map[identity]bool
	// killNow has the channels of KillWhen.
	killNow []<-chan struct{}
}

// start starts the program on a thread that lives until the program ends: the
// kernel sends the parent-death signal when the thread that forked ends, and Go
// may end any other thread at any time.
func (p *program) start(cmd *exec.Cmd) (<-chan error, error) {
	begun, done := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		programs.starting.RLock()
		err := cmd.Start()
		if err == nil {
			p.pid = cmd.Process.Pid
			programs.mu.Lock()
			programs.marks[p.pid] = p.mark
			programs.running++
			programs.mu.Unlock()
		}
		programs.starting.RUnlock()
		begun <- err
		if err != nil {
			return
		}
		err = cmd.Wait()
		// From now on the kernel may give the pid to another process.
		programs.mu.Lock()
		delete(programs.marks, p.pid)
		programs.mu.Unlock()
		done <- err
	}()
	return done, <-begun
}

func (p *program) forget() {
	programs.mu.Lock()
	programs.running--
	programs.mu.Unlock()
}

// end ends all processes of the program: SIGTERM, and SIGKILL after the grace.
// ended is nil if the program itself has ended; otherwise it is closed when that
// has, and end waits for it too.
func (p *program) end(ended <-chan struct{}, grace time.Duration) {
	if ended == nil {
		p.recordGroup()
	}
	begin, pause := time.Now(), 2*time.Millisecond
	signalled := map[identity]bool{}
	// /proc is not read in one moment, so that a scan can miss a process. After
	// any was found, two scans in a row must find none.
	for nothing := 0; ; {
		signal := syscall.SIGTERM
		if time.Since(begin) >= grace || slices.ContainsFunc(p.killNow, isClosed) {
			signal = syscall.SIGKILL
		}
		if p.signal(signal, signalled) {
			nothing = 0
		} else if nothing++; (ended == nil || isClosed(ended)) && (nothing > 1 || len(signalled) == 0) {
			return
		}
		if time.Since(begin) > grace+killTimeout {
			p.log.Error("processes of a step cannot be ended", "processes", describe(p.find()))
			return
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ended: // nil blocks
			timer.Stop()
			p.recordGroup()
			ended = nil
		}
		pause = min(2*pause, 50*time.Millisecond)
	}
}

func isClosed(channel <-chan struct{}) bool {
	select {
	case <-channel:
		return true
	default:
		return false
	}
}

// recordGroup records the members of the group that are alive when the program
// has ended.
func (p *program) recordGroup() {
	if p.group != nil {
		return
	}
	p.group = map[identity]bool{}
	if runtime.GOOS != "linux" {
		// Without /proc the members cannot be found one by one.
		_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	}
	for _, other := range list() {
		if other.group == p.pid {
			p.group[other.identity()] = true
		}
	}
}

// signal sends the signal to every live process of the program, SIGTERM only
// once to each, and returns whether it found any.
func (p *program) signal(signal syscall.Signal, signalled map[identity]bool) bool {
	// No program may start between the scan and the signal: between fork and
	// exec it looks like an orphan without a mark.
	programs.starting.Lock()
	defer programs.starting.Unlock()
	if runtime.GOOS != "linux" && p.group == nil {
		_ = syscall.Kill(-p.pid, signal)
	}
	found := p.find()
	// The oldest first: a parent that sees its child killed may react to it, and
	// a shell writes about it to the log.
	oldest := func(a, b process) int { return cmp.Or(cmp.Compare(a.started, b.started), cmp.Compare(a.pid, b.pid)) }
	for _, other := range slices.SortedFunc(maps.Values(found), oldest) {
		id := other.identity()
		if signal == syscall.SIGTERM && signalled[id] {
			continue
		}
		signalled[id] = true
		if err := other.send(signal); err != nil && !errors.Is(err, os.ErrProcessDone) && signal == syscall.SIGKILL {
			p.log.Error("process of a step cannot be ended", "pid", other.pid, "name", other.name, "error", err)
			p.unkillable[id] = true
		}
	}
	return len(found) > 0
}

// find returns the program, if it runs, and its live descendants.
func (p *program) find() map[identity]process {
	all := list()
	me := os.Getpid()
	programs.mu.Lock()
	running, alone := programs.marks[p.pid] == p.mark, programs.running == 1
	started := make(map[int]bool, len(programs.marks))
	for pid := range programs.marks {
		started[pid] = true
	}
	programs.mu.Unlock()

	candidates := map[identity]process{}
	adopting := adopting.Load()
	if adopting {
		// Every descendant of a program is a descendant of this process too. So
		// the environments of other processes need not be read.
		candidates = withDescendants(all, func(other process) bool { return other.parent == me })
	}
	found := withDescendants(all, func(other process) bool {
		if other.pid == me {
			return false
		}
		if running && (other.pid == p.pid || other.group == p.pid) || p.group[other.identity()] || p.known[other.identity()] {
			return true
		}
		if started[other.pid] {
			return false // another program
		}
		if _, candidate := candidates[other.identity()]; adopting && !candidate {
			return false
		}
		switch markOf(other.pid) {
		case p.mark:
			return true
		case "":
			// An orphan that has emptied its environment. While several programs
			// run, it could belong to any of them: the last one ends it.
			return adopting && alone && other.parent == me && other.pid != p.pid
		}
		return false
	})
	for id, other := range found {
		if other.zombie || p.unkillable[id] || other.pid == me {
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

// ExitCode returns the exit code as Python's returncode has it: the negative
// number of the signal for a program that a signal has ended.
func ExitCode(state *os.ProcessState) int {
	if status, isUnix := state.Sys().(syscall.WaitStatus); isUnix && status.Signaled() {
		return -int(status.Signal())
	}
	return state.ExitCode()
}

package bench

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// markTimeout bounds the wait for a contender's next mark. A sample takes a few
// seconds.
const markTimeout = 2 * time.Minute

// process is a contender's process.
type process struct {
	name    string
	command *exec.Cmd
	stdin   io.Closer
	pipe    *os.File
	exited  chan struct{}
	marks   chan time.Time
	output  *tail
	// deadline is the end of a pilot, after which mark returns errTooSlow. Zero in
	// samples that count.
	deadline time.Time

	// seen, if set, is called for each task bench.timed.
	seen func(time.Time)

	mu     sync.Mutex
	ages   []time.Duration
	values []float64
}

func newProcess(name string) *process {
	return &process{name: name, exited: make(chan struct{}), marks: make(chan time.Time, 100), output: &tail{}}
}

// start starts a contender.
func (h *harness) start(name string, spec contender.Spec) (p *process, err error) {
	spec.Pipe = filepath.Join(h.folder, fmt.Sprintf("pipe-%d", h.sequence))
	if err := syscall.Mkfifo(spec.Pipe, 0o600); err != nil {
		return nil, err
	}
	p = newProcess(name)
	p.deadline, p.seen = h.deadline, h.seen
	// Opened for reading and writing, it neither waits for a writer nor ends with
	// the first one.
	if p.pipe, err = os.OpenFile(spec.Pipe, os.O_RDWR, 0); err != nil {
		return nil, err
	}
	command := exec.Command(h.program, ContenderVerb, name)
	if name == celery {
		command = exec.Command(h.python, h.celery)
	}
	if command.Env, err = spec.Environ(); err != nil {
		return nil, err
	}
	go p.read()
	return p, p.begin(command, h.folder)
}

// begin starts the process of a command.
func (p *process) begin(command *exec.Cmd, folder string) (err error) {
	command.Dir = folder
	command.Stdout, command.Stderr = p.output, p.output
	command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	command.WaitDelay = time.Second
	if p.stdin, err = command.StdinPipe(); err != nil {
		return err
	}
	if err := command.Start(); err != nil {
		return err
	}
	p.command = command
	go func() {
		_ = command.Wait() // stop looks at the state
		close(p.exited)
	}()
	return nil
}

// read reads what the contender writes until stop closes the pipe.
func (p *process) read() {
	lines := bufio.NewScanner(p.pipe)
	for lines.Scan() {
		what, number, _ := strings.Cut(lines.Text(), " ")
		nanoseconds, _ := strconv.ParseInt(number, 10, 64)
		switch what {
		case "mark":
			p.marks <- time.Unix(0, nanoseconds)
		case "age":
			p.mu.Lock()
			p.ages = append(p.ages, time.Duration(nanoseconds))
			p.mu.Unlock()
			if p.seen != nil {
				p.seen(time.Now())
			}
		case "value":
			p.mu.Lock()
			p.values = append(p.values, float64(nanoseconds))
			p.mu.Unlock()
		}
	}
}

// mark waits for the next mark.
func (p *process) mark(ctx context.Context) (time.Time, error) { return p.markWithin(ctx, markTimeout) }

func (p *process) markWithin(ctx context.Context, limit time.Duration) (time.Time, error) {
	if !p.deadline.IsZero() {
		limit = time.Until(p.deadline)
	}
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case at := <-p.marks:
		return at, nil
	case <-p.exited:
		return time.Time{}, fmt.Errorf("the process has ended (%s): %s", p.command.ProcessState, p.output)
	case <-timeout.C:
		if !p.deadline.IsZero() {
			return time.Time{}, errTooSlow
		}
		return time.Time{}, fmt.Errorf("no mark within %s: %s", limit, p.output)
	case <-ctx.Done():
		return time.Time{}, context.Cause(ctx)
	}
}

func (p *process) pid() int { return p.command.Process.Pid }

// stop ends the process in an orderly way, so that it acknowledges what it has done.
func (p *process) stop() error {
	if p.pipe != nil {
		defer p.pipe.Close()
	}
	defer p.stdin.Close()
	defer func() { _ = syscall.Kill(-p.pid(), syscall.SIGKILL) }() // child processes
	_ = p.command.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(30 * time.Second):
		_ = syscall.Kill(-p.pid(), syscall.SIGKILL)
		<-p.exited
		return fmt.Errorf("did not end within 30 s of SIGTERM: %s", p.output)
	}
	if state := p.command.ProcessState; !state.Success() {
		return fmt.Errorf("ended with %s: %s", state, p.output)
	}
	return nil
}

// end kills the process after an error.
func (p *process) end(err *error) {
	if *err == nil {
		return
	}
	if p.pipe != nil {
		defer p.pipe.Close()
	}
	defer p.stdin.Close()
	_ = syscall.Kill(-p.pid(), syscall.SIGKILL)
	<-p.exited
}

// tail is the end of a process's output.
type tail struct {
	mu    sync.Mutex
	bytes []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.bytes = append(t.bytes, b...)
	if n := len(t.bytes); n > 4000 {
		t.bytes = t.bytes[n-4000:]
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.bytes))
}

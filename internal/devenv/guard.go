package devenv

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// GuardVerb is the argument with which this program starts itself as the guard.
const GuardVerb = "guard"

// endLimit is the time between the signal that asks a process group to end and
// SIGKILL.
const endLimit = 10 * time.Second

// remains is what a run has started and something must end.
type remains struct {
	Groups     []group  `json:"groups,omitempty"`
	Containers []string `json:"containers,omitempty"` // names
	Folders    []string `json:"folders,omitempty"`
	Engine     bool     `json:"engine,omitempty"` // uses the dockerd that devenv has started
}

// group is a process group with its leader's start time, which distinguishes it
// from a later process of the same number.
type group struct {
	ID      int    `json:"id"`
	Started string `json:"started,omitempty"`
	// Throwaway means that SIGKILL ends the group at once: RabbitMQ would take
	// five seconds to save data that is deleted right after.
	Throwaway bool `json:"throwaway,omitempty"`
}

// change is one line of the messages from a run to its guard.
type change struct {
	Group     *group `json:"group,omitempty"`
	Forget    int    `json:"forget,omitempty"`
	Container string `json:"container,omitempty"`
	Folder    string `json:"folder,omitempty"`
	Engine    bool   `json:"engine,omitempty"`
	Keep      bool   `json:"keep,omitempty"` // end nothing: services-down will
}

func (r *remains) apply(c change) {
	switch {
	case c.Group != nil:
		r.Groups = append(r.Groups, *c.Group)
	case c.Forget != 0:
		r.Groups = slices.DeleteFunc(r.Groups, func(g group) bool { return g.ID == c.Forget })
	case c.Container != "":
		r.Containers = append(r.Containers, c.Container)
	case c.Folder != "":
		r.Folders = append(r.Folders, c.Folder)
	case c.Engine:
		r.Engine = true
	case c.Keep:
		*r = remains{}
	}
}

// end ends everything and waits for the end.
func (r *remains) end() error {
	// In reverse order: RabbitMQ starts another epmd if its own ends first.
	for _, g := range slices.Backward(r.Groups) {
		if g.alive() {
			g.end()
		}
	}
	var failures []error
	if len(r.Containers) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		args := append([]string{"rm", "--force", "--volumes"}, r.Containers...)
		if _, err := output(ctx, "docker", args...); err != nil && !strings.Contains(err.Error(), "No such container") {
			failures = append(failures, err)
		}
	}
	for _, folder := range r.Folders {
		failures = append(failures, os.RemoveAll(folder))
	}
	if r.Engine {
		failures = append(failures, leaveEngine())
	}
	return errors.Join(failures...)
}

func (g group) alive() bool {
	if started := startTime(g.ID); started != "" && started != g.Started {
		return false // another process has the number by now
	}
	return syscall.Kill(-g.ID, 0) == nil
}

func (g group) end() {
	if g.Throwaway {
		syscall.Kill(-g.ID, syscall.SIGKILL)
	}
	endGroup(g.ID)
}

// endGroup asks a process group to end, and kills what is left after endLimit.
func endGroup(id int) {
	syscall.Kill(-id, syscall.SIGTERM)
	exited := func(context.Context) error {
		if syscall.Kill(-id, 0) == nil && !onlyZombies(id) {
			return errors.New("the process group still exists")
		}
		return nil
	}
	if until(context.Background(), endLimit, nil, exited) != nil {
		syscall.Kill(-id, syscall.SIGKILL)
		until(context.Background(), endLimit, nil, exited) // nothing stronger than SIGKILL exists: an error is ignored
	}
}

// startTime returns field 22 of /proc/PID/stat, or "" if there is no /proc or
// no such process.
func startTime(pid int) string {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The program's name may contain blanks and parentheses, so the fields are
	// counted from its end.
	_, rest, _ := strings.Cut(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}

// guard is the run's side of the connection to the guard process.
type guard struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser

	mu      sync.Mutex
	remains remains
	closed  bool
}

func startGuard() (*guard, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find the running program's file: %w", err)
	}
	cmd := exec.Command(self, GuardVerb)
	cmd.Stderr = os.Stderr
	// Ctrl-C signals the whole foreground group; the guard must outlive it.
	ownGroup(cmd)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the guard: %w", err)
	}
	return &guard{cmd: cmd, stdin: stdin}, nil
}

func (g *guard) tell(c change) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	line, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if _, err := g.stdin.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("the guard process does not read its input: %w", err)
	}
	g.remains.apply(c)
	return nil
}

func (g *guard) watchGroup(pid int) error {
	return g.tell(change{Group: &group{ID: pid, Started: startTime(pid)}})
}
func (g *guard) watchThrowaway(pid int) error {
	return g.tell(change{Group: &group{ID: pid, Started: startTime(pid), Throwaway: true}})
}
func (g *guard) forgetGroup(pid int) error        { return g.tell(change{Forget: pid}) }
func (g *guard) watchFolder(path string) error    { return g.tell(change{Folder: path}) }
func (g *guard) watchContainer(name string) error { return g.tell(change{Container: name}) }
func (g *guard) watchEngine() error               { return g.tell(change{Engine: true}) }

// close lets the guard end everything and waits for it.
func (g *guard) close() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil
	}
	g.closed = true
	g.stdin.Close()
	if err := g.cmd.Wait(); err != nil {
		return fmt.Errorf("not everything has ended: guard: %w", err)
	}
	return nil
}

// Guard is the main function of the guard process. It reads from input what the
// run starts and, at the end of input, ends all of it.
func Guard(input io.Reader) error {
	var left remains
	lines := bufio.NewScanner(input)
	for lines.Scan() {
		var c change
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			return errors.Join(fmt.Errorf("guard: %w", err), left.end())
		}
		if c.Engine {
			if err := joinEngine(); err != nil {
				return errors.Join(err, left.end())
			}
		}
		left.apply(c)
	}
	return left.end()
}

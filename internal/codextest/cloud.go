package codextest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// A CloudScript says what the stand-in of `codex cloud` does.
type CloudScript struct {
	// Polls is how often a task is PENDING before it ends, and State how it ends: READY or
	// ERROR.
	Polls int
	State string
	// Title is that of every new task. Empty means the first line of the prompt.
	Title string
	// Diff is the diff of every task, "" for none.
	Diff string
	// Fail has, by subcommand, what is printed to stderr by a call that fails before it
	// does anything. FailAfter is that of exec after the task was made.
	Fail      map[string]string
	FailAfter string
	// Hang makes exec never end after the task was made.
	Hang bool
}

// A CloudTask is a task that the stand-in was given.
type CloudTask struct {
	ID, Title, Prompt, Environment, Branch string
	Polled                                 int
}

// CloudState is the content of the stand-in's file.
type CloudState struct {
	Script CloudScript
	Tasks  []CloudTask
	// Calls are the arguments of all calls.
	Calls [][]string
}

// A Cloud is a stand-in of the program codex, of which it has `codex cloud exec`, list,
// status and diff, and of Codex Cloud. All is in one directory.
type Cloud struct{ dir string }

// NewCloud makes the stand-in in a directory.
func NewCloud(dir string, script CloudScript) (*Cloud, error) {
	c := &Cloud{dir}
	program, err := cloudProgram()
	if err != nil {
		return nil, err
	}
	// A program that another goroutine starts meanwhile would keep the file open for
	// writing, and it could not be executed.
	syscall.ForkLock.RLock()
	err = os.WriteFile(c.Program(), program, 0o700)
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, err
	}
	return c, c.Change(func(s *CloudState) { s.Script = script })
}

// cloudProgram is the program of the stand-in, which is built once.
var cloudProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "codextest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	program := filepath.Join(dir, "codex")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "github.com/moonladderstudios/mm-orchestrator/internal/codextest/cloudprogram")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the stand-in of codex cloud: %w: %s", err, out)
	}
	return os.ReadFile(program)
})

// Program is its path.
func (c *Cloud) Program() string { return filepath.Join(c.dir, "codex") }

// State is what it has now.
func (c *Cloud) State() (CloudState, error) {
	var now CloudState
	err := c.Change(func(s *CloudState) { now = *s })
	return now, err
}

// Change changes the state, alone.
func (c *Cloud) Change(change func(*CloudState)) error {
	return ChangeCloud(c.dir, change)
}

// ChangeCloud is [Cloud.Change] for the stand-in in a directory.
func ChangeCloud(dir string, change func(*CloudState)) error {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	var state CloudState
	name := filepath.Join(dir, "state.json")
	text, err := os.ReadFile(name)
	if err == nil {
		err = json.Unmarshal(text, &state)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	change(&state)
	if text, err = json.Marshal(state); err != nil {
		return err
	}
	if err := os.WriteFile(name+".new", text, 0o600); err != nil {
		return err
	}
	return os.Rename(name+".new", name)
}

// firstLine is the title that a prompt gives.
func firstLine(prompt string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(prompt), "\n")
	return line
}

// NewTask adds a task to a state and returns it.
func (s *CloudState) NewTask(environment, branch, prompt string) CloudTask {
	task := CloudTask{ID: fmt.Sprintf("task_e_%04d", len(s.Tasks)+1), Title: s.Script.Title, Prompt: prompt, Environment: environment, Branch: branch}
	if task.Title == "" {
		task.Title = firstLine(prompt)
	}
	s.Tasks = append(s.Tasks, task)
	return task
}

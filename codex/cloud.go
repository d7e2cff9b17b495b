package codex

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// CloudConfig is the configuration of a [Cloud].
type CloudConfig struct {
	// Program is the codex program: a path, or a name that is looked up in PATH. Defaults
	// to codex.
	Program string
	// Environ are the variables of the program; see [Environment].
	Environ []string
	// Home is the directory with Codex's login, CODEX_HOME. Empty means that Codex finds
	// it itself. Codex Cloud needs a login, not a key.
	Home string
	// Environment is the id or the name of the environment of Codex Cloud, which has the
	// repository. Required.
	Environment string

	// TimeLimit is how long a task may take. Defaults to 2 h.
	TimeLimit time.Duration
	// CallLimit is how long one call of the program may take. Defaults to 2 min.
	CallLimit time.Duration
	// FirstPoll and MaxPoll are the first and the longest pause between two looks at a
	// task. Default to 5 s and 2 min.
	FirstPoll, MaxPoll time.Duration
	// MaxDiff is the size of the largest diff, in bytes. Defaults to 64 MiB.
	MaxDiff int64

	// Logger defaults to slog.Default().
	Logger *slog.Logger
	// SettingName returns the name of a setting for error texts. Defaults to the variable
	// itself.
	SettingName func(variable string) string
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c CloudConfig) WithDefaults() CloudConfig {
	c.Program = cmp.Or(c.Program, "codex")
	c.TimeLimit = cmp.Or(c.TimeLimit, 2*time.Hour)
	c.CallLimit = cmp.Or(c.CallLimit, 2*time.Minute)
	c.FirstPoll = cmp.Or(c.FirstPoll, 5*time.Second)
	c.MaxPoll = cmp.Or(c.MaxPoll, 2*time.Minute)
	c.MaxDiff = cmp.Or(c.MaxDiff, 64<<20)
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.SettingName == nil {
		c.SettingName = func(variable string) string { return variable }
	}
	return c
}

// Validate returns an error that names what is wrong.
func (c CloudConfig) Validate() error {
	switch {
	case c.Environment == "" || strings.HasPrefix(c.Environment, "-"):
		return fmt.Errorf("codex: CloudConfig.Environment is %q, want the id of an environment of Codex Cloud", c.Environment)
	case c.Home != "" && !filepath.IsAbs(c.Home):
		return fmt.Errorf("codex: CloudConfig.Home is %q, want an absolute path", c.Home)
	}
	return nil
}

// A Cloud gives work to Codex Cloud by its client program. It may be used by several
// goroutines.
//
// Codex Cloud has no way to submit a task twice and get one: whoever has not seen the
// answer to a submission looks with Find for what came of it.
type Cloud struct {
	config CloudConfig
	runner processes.Runner
}

// NewCloud returns a Cloud, or an error of Validate. It starts nothing.
func NewCloud(config CloudConfig) (*Cloud, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	return &Cloud{config, processes.Runner{Grace: time.Second, Logger: config.Logger}}, nil
}

// A CloudTask is a task in the list of Codex Cloud.
type CloudTask struct {
	ID    string `json:"id"`
	URL   string `json:"url"`
	Title string `json:"title"`
}

// taskID is what an id of a task looks like. It becomes an argument of the program.
var taskID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,199}$`)

// A Failure is a call of the client program that has failed.
type Failure struct {
	Result
	// Refused says that the server has refused the call, or that it was not reached: it
	// has changed nothing.
	Refused bool
}

func (f *Failure) Error() string { return f.Message }

// pages is how many pages of tasks are read to find one.
const pages = 5

// Tasks returns the newest tasks of the environment, up to one of those known, or up to
// a limit. The error may be a *Failure.
func (c *Cloud) Tasks(ctx context.Context, owner processes.Owner, known ...string) ([]CloudTask, error) {
	var all []CloudTask
	cursor := ""
	for range pages {
		args := []string{"cloud", "list", "--json", "--limit", "20", "--env", c.config.Environment}
		if cursor != "" {
			args = append(args, "--cursor", cursor)
		}
		out := &excerpt.Head{Limit: 1 << 20}
		if err := c.call(ctx, owner, args, "", out); err != nil {
			return nil, err
		}
		var page struct {
			Tasks  []CloudTask `json:"tasks"`
			Cursor string      `json:"cursor"`
		}
		if err := json.Unmarshal(out.Kept, &page); err != nil {
			return nil, &Failure{Result: Result{Outcome: Garbage, Message: fmt.Sprintf("the list of tasks of Codex Cloud cannot be read: %v", err)}}
		}
		for _, task := range page.Tasks {
			if slices.Contains(known, task.ID) {
				return all, nil
			}
			all = append(all, task)
		}
		if cursor = page.Cursor; cursor == "" || len(known) == 0 {
			break
		}
	}
	return all, nil
}

// ErrUncertain: it is not known whether a task was submitted.
var ErrUncertain = errors.New("it is not known whether Codex Cloud has the task")

// Find looks for a task that may have been submitted: one whose title has the mark, and
// that is not known from before. It returns "" if nothing was submitted.
//
//   - The error wraps ErrUncertain if there are new tasks of which none has the mark: the
//     service makes titles of prompts as it likes.
//   - It may also be a *Failure.
func (c *Cloud) Find(ctx context.Context, owner processes.Owner, mark string, known []string) (string, error) {
	tasks, err := c.Tasks(ctx, owner, append([]string{""}, known...)...)
	if err != nil {
		return "", err
	}
	var others []string
	for _, task := range tasks {
		if strings.Contains(task.Title, mark) && taskID.MatchString(task.ID) {
			return task.ID, nil
		}
		others = append(others, cmp.Or(task.URL, task.ID))
	}
	if len(others) > 0 {
		return "", fmt.Errorf("%w: it may be one of these: %s", ErrUncertain, strings.Join(others[:min(len(others), 10)], ", "))
	}
	return "", nil
}

// CloudRequest is a task for Codex Cloud.
type CloudRequest struct {
	Owner processes.Owner
	// Prompt says what is to be done. It goes to the program's standard input.
	Prompt string
	// Branch is the branch on which the work starts, "" for the environment's default.
	Branch string
}

// Submit submits a task and returns its id. The error may be a *Failure; unless that is
// Refused, it is not known whether the task was submitted.
func (c *Cloud) Submit(ctx context.Context, request CloudRequest) (string, error) {
	args := []string{"cloud", "exec", "--env", c.config.Environment}
	if request.Branch != "" {
		args = append(args, "--branch", request.Branch)
	}
	out := &excerpt.Head{Limit: 64 << 10}
	if err := c.call(ctx, request.Owner, append(args, "-"), request.Prompt, out); err != nil {
		return "", err
	}
	// The last line is the address of the task.
	lines := strings.Split(strings.TrimSpace(string(out.Kept)), "\n")
	id := path.Base(strings.TrimSpace(lines[len(lines)-1]))
	if !taskID.MatchString(id) {
		return "", &Failure{Result: Result{Outcome: Garbage, Message: fmt.Sprintf("codex cloud exec has printed no address of a task but %.200q", strings.TrimSpace(string(out.Kept)))}}
	}
	return id, nil
}

// Wait waits until a task has ended. It looks at it after pauses that become longer, with
// chance in them, so that many workers do not ask at once.
//
//   - After Finished the task may have a diff; see Diff.
//   - A call that fails is repeated until the limit, unless the login was refused.
//   - log gets a line of JSON for each state. It must not fail.
//   - The error is that of ctx, or says why the program could not be started.
func (c *Cloud) Wait(ctx context.Context, owner processes.Owner, id string, log io.Writer) (Result, error) {
	deadline := time.Now().Add(c.config.TimeLimit)
	last, said := "", ""
	for n := 0; ; n++ {
		status, err := c.status(ctx, owner, id)
		var failed *Failure
		switch {
		case errors.As(err, &failed):
			if failed.Outcome == NotLoggedIn {
				return Result{Outcome: NotLoggedIn, TaskID: id, Message: failed.Message}, nil
			}
			if said != failed.Message {
				c.config.Logger.Warn("the state of the task of Codex Cloud could not be read", "codex_task_id", id, "error", failed.Message)
			}
			said = failed.Message
		case err != nil:
			return Result{}, err
		}
		if status.state != last && status.state != "" {
			last = status.state
			line, _ := json.Marshal(map[string]string{"type": "cloud.status", "task_id": id, "status": status.state, "title": status.title})
			_, _ = log.Write(append(line, '\n'))
		}
		switch status.state {
		case "READY", "APPLIED":
			return Result{Outcome: Finished, TaskID: id, Message: trimmed(status.title)}, nil
		case "ERROR":
			return Result{Outcome: ModelError, TaskID: id, Message: trimmed("Codex Cloud has ended the task with an error: " + status.title)}, nil
		}
		pause := pollPause(n, c.config.FirstPoll, c.config.MaxPoll, rand.Float64())
		if time.Now().Add(pause).After(deadline) {
			text := fmt.Sprintf("the task %s of Codex Cloud had not ended after %s. %s is the limit", id, c.config.TimeLimit, c.config.SettingName("MM_ORCHESTRATOR_CODEX_TIME_LIMIT"))
			if last == "" && said != "" {
				text += ". Its state could not be read: " + said
			}
			return Result{Outcome: TimedOut, TaskID: id, Message: trimmed(text)}, nil
		}
		select {
		case <-ctx.Done():
			return Result{}, context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// pollPause is the pause after the look with the number n. chance is between 0 and 1.
func pollPause(n int, first, longest time.Duration, chance float64) time.Duration {
	pause := longest
	if n < 30 && first<<n < longest {
		pause = first << n
	}
	return pause/2 + time.Duration(chance*float64(pause/2))
}

// cloudStatus is what codex cloud status prints: "[READY] title", and more lines.
type cloudStatus struct{ state, title string }

var statusLine = regexp.MustCompile(`^\[([A-Z]+)\] ?(.*)$`)

func (c *Cloud) status(ctx context.Context, owner processes.Owner, id string) (cloudStatus, error) {
	out := &excerpt.Head{Limit: 64 << 10}
	// The program exits with 1 for every state but READY.
	err := c.call(ctx, owner, []string{"cloud", "status", id}, "", out)
	first, _, _ := strings.Cut(string(out.Kept), "\n")
	if match := statusLine.FindStringSubmatch(strings.TrimSpace(first)); match != nil {
		return cloudStatus{match[1], match[2]}, nil
	}
	if err == nil {
		err = &Failure{Result: Result{Outcome: Garbage, Message: fmt.Sprintf("codex cloud status has printed %.200q", strings.TrimSpace(first))}}
	}
	return cloudStatus{}, err
}

// ErrDiffTooLarge: the diff of a task has more bytes than CloudConfig.MaxDiff.
var ErrDiffTooLarge = errors.New("the diff of the task is too large")

// Diff returns the diff of a task that has ended, nil if it has none. The error may be a
// *Failure.
func (c *Cloud) Diff(ctx context.Context, owner processes.Owner, id string) ([]byte, error) {
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	large := fmt.Errorf("%w: more than %d bytes", ErrDiffTooLarge, c.config.MaxDiff)
	out := &excerpt.Head{Limit: int(c.config.MaxDiff), OnFull: func() { cancel(large) }}
	err := c.call(limited, owner, []string{"cloud", "diff", id}, "", out)
	var failed *Failure
	switch {
	case errors.As(err, &failed) && strings.Contains(failed.Message, "No diff available"):
		return nil, nil
	case err != nil:
		return nil, err
	case out.Full:
		return nil, large // the program has ended before it was told to
	case len(bytes.TrimSpace(out.Kept)) == 0:
		return nil, nil
	}
	return out.Kept, nil
}

// call runs the program in an empty directory, as it writes a log there, and copies what
// it prints to stdout. A *Failure says that it has failed.
func (c *Cloud) call(ctx context.Context, owner processes.Owner, args []string, stdin string, stdout io.Writer) error {
	program, err := exec.LookPath(c.config.Program)
	if err != nil {
		return notStarted(c.config.Program, c.config.SettingName, err)
	}
	dir, err := os.MkdirTemp("", "codex-cloud-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	stderr := &excerpt.Tail{Limit: 8 << 10}
	cmd := &exec.Cmd{
		Path: program, Args: append([]string{c.config.Program}, args...), Dir: dir, Env: append([]string{}, c.config.Environ...),
		Stdin: strings.NewReader(stdin), Stdout: stdout, Stderr: stderr,
	}
	if c.config.Home != "" {
		cmd.Env = append(cmd.Env, "CODEX_HOME="+c.config.Home)
	}
	limited, cancel := context.WithTimeout(ctx, c.config.CallLimit)
	defer cancel()
	err = c.runner.Run(limited, owner, cmd, nil)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case limited.Err() != nil:
		return &Failure{Result: Result{Outcome: ModelError, Message: fmt.Sprintf("codex %s did not end within %s", strings.Join(args[:2], " "), c.config.CallLimit)}}
	case !errors.As(err, &exit):
		return notStarted(c.config.Program, c.config.SettingName, err)
	}
	return failureOf(args[1], cmd.ProcessState, printed(stderr))
}

// failureOf reads what the program says on its standard error.
func failureOf(what string, state *os.ProcessState, stderr string) *Failure {
	var lines []string
	for line := range strings.SplitSeq(stderr, "\n") {
		line = strings.TrimSpace(line)
		if line == "Stack backtrace:" {
			break
		}
		if line != "" && !strings.HasPrefix(line, "WARNING:") {
			lines = append(lines, strings.TrimPrefix(line, "Error: "))
		}
	}
	text := strings.Join(lines, " ")
	f := &Failure{Result: Result{Outcome: classify(text), Message: trimmed(fmt.Sprintf("codex cloud %s has failed (%s): %s", what, state, text))}}
	f.Refused = f.Outcome == NotLoggedIn || f.Outcome == Limited || refusal.MatchString(text)
	return f
}

// refusal is what the program prints about calls that have changed nothing: the server
// has answered with a 4xx, could not be found or reached, or the arguments are wrong.
var refusal = regexp.MustCompile(`failed: 4[0-9][0-9] |dns error|\(Connect\)|[Ee]nvironment .*(not found|ambiguous|must not be empty)|no cloud environments|unexpected argument|unrecognized subcommand`)

// notStarted says why the program could not be started, and what to do.
func notStarted(program string, setting func(string) string, err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("there is no program %s: install Codex where the worker runs (npm install -g @openai/codex), or set %s to its path",
			program, setting("MM_ORCHESTRATOR_CODEX_PROGRAM"))
	}
	return fmt.Errorf("%s cannot be started: %w", program, err)
}

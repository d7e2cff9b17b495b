package codex

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// Sandboxes are the values of ExecConfig.Sandbox.
var Sandboxes = []string{"read-only", "workspace-write", "danger-full-access"}

// KeyVariable is the variable from which Codex takes a key.
const KeyVariable = "CODEX_API_KEY"

// ExecConfig is the configuration of an [Exec].
type ExecConfig struct {
	// Program is the codex program: a path, or a name that is looked up in PATH. Defaults
	// to codex.
	Program string
	// Environ are the variables of the program, without its key; see [Environment].
	Environ []string
	// Home is the directory with Codex's login and configuration, CODEX_HOME. Empty means
	// that Codex finds it itself.
	Home string
	// Key is the key of the model's API, nil if Codex uses its login, as it does if the
	// key's variable is not set (credential.ErrNotSet). It is put into CODEX_API_KEY of the
	// program's environment, and of no other one's.
	Key Key
	// Model is the model, "" for that of Codex's configuration.
	Model string
	// Profile is the name of a profile, whose file Codex lays over config.toml; see
	// [ProfileFile]. Empty means none.
	Profile string
	// Sandbox is one of [Sandboxes]. Defaults to workspace-write.
	Sandbox string
	// Overrides are further settings of Codex, as name=value in TOML.
	Overrides []string

	// TimeLimit is how long one run may take. Defaults to 1 h.
	TimeLimit time.Duration
	// StallLimit is how long Codex may print nothing. Defaults to 20 min.
	StallLimit time.Duration
	// KillGrace is the time between SIGTERM and SIGKILL. Defaults to 10 s.
	KillGrace time.Duration
	// MaxLog is how much of its output goes to the log, in bytes. Defaults to 64 MiB.
	MaxLog int64

	// Logger defaults to slog.Default().
	Logger *slog.Logger
	// SettingName returns the name of a setting for error texts. Defaults to the variable
	// itself.
	SettingName func(variable string) string
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c ExecConfig) WithDefaults() ExecConfig {
	c.Program = cmp.Or(c.Program, "codex")
	c.Sandbox = cmp.Or(c.Sandbox, "workspace-write")
	c.TimeLimit = cmp.Or(c.TimeLimit, time.Hour)
	c.StallLimit = cmp.Or(c.StallLimit, 20*time.Minute)
	c.MaxLog = cmp.Or(c.MaxLog, 64<<20)
	if c.SettingName == nil {
		c.SettingName = func(variable string) string { return variable }
	}
	return c
}

// Validate returns an error that names what is wrong.
func (c ExecConfig) Validate() error {
	if !slices.Contains(Sandboxes, c.Sandbox) {
		return fmt.Errorf("codex: ExecConfig.Sandbox is %q, want one of %s", c.Sandbox, strings.Join(Sandboxes, ", "))
	}
	if c.Home != "" && !filepath.IsAbs(c.Home) {
		return fmt.Errorf("codex: ExecConfig.Home is %q, want an absolute path", c.Home)
	}
	if c.Profile != "" {
		if err := CheckProfile(c.Profile); err != nil {
			return fmt.Errorf("codex: ExecConfig.Profile is %q: %w", c.Profile, err)
		}
	}
	for _, override := range c.Overrides {
		if name, _, found := strings.Cut(override, "="); !found || strings.TrimSpace(name) == "" {
			return fmt.Errorf("codex: ExecConfig.Overrides has %q, want name=value", override)
		}
	}
	return nil
}

// ProfileFile is the name of the file of a profile, in Codex's home.
func ProfileFile(profile string) string { return profile + ".config.toml" }

var profileName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_-]*$`)

// CheckProfile returns an error if Codex does not accept the name of a profile.
func CheckProfile(name string) error {
	if !profileName.MatchString(name) {
		return errors.New("it must be a plain name such as work: letters, digits, - and _")
	}
	return nil
}

// An Exec runs codex on this machine. It may be used by several goroutines.
type Exec struct {
	config ExecConfig
	runner processes.Runner
}

// NewExec returns an Exec, or an error of Validate. It starts nothing.
func NewExec(config ExecConfig) (*Exec, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	return &Exec{config, processes.Runner{Grace: config.KillGrace, Logger: config.Logger}}, nil
}

// TimeLimit is how long one run may take.
func (e *Exec) TimeLimit() time.Duration { return e.config.TimeLimit }

// ExecRequest is one run of codex.
type ExecRequest struct {
	// Owner is the run and the task that the program belongs to.
	Owner processes.Owner
	// Dir is the clone in which Codex works.
	Dir string
	// TempDir is an absolute path of a directory for temporary files, which need not
	// exist. The sandbox workspace-write lets commands of the model write there and in Dir,
	// and not in /tmp, where other clones may be.
	TempDir string
	// Prompt says what it has to do. It goes to the program's standard input, which no
	// list of processes shows.
	Prompt string
	// Log gets the JSON lines as Codex prints them, not redacted, whole lines or not. It
	// must not fail.
	Log io.Writer
}

// Causes with which a run is ended.
var (
	errTimeLimit = errors.New("the time limit has passed")
	errStalled   = errors.New("codex has printed nothing for too long")
)

// Run runs codex once, and waits for its end.
//
//   - On return no process of it is alive (processes.Runner.Run). It was ended by SIGTERM,
//     and by SIGKILL after the grace, if ctx has ended or a limit has passed.
//   - The key is in the environment of the program only. Codex keeps it from the commands
//     of its model.
//   - Memory does not grow with the output.
//   - The error is that of ctx, or says why codex could not be started. Then there is no
//     result.
func (e *Exec) Run(ctx context.Context, request ExecRequest) (Result, error) {
	cmd, err := e.command(ctx, request)
	if err != nil {
		return Result{}, err
	}
	events := &eventReader{}
	log := &limitedLog{next: request.Log, left: e.config.MaxLog}
	stderr := &excerpt.Tail{Limit: 4 << 10}
	limited, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(e.config.TimeLimit, func() { cancel(errTimeLimit) })
	defer timer.Stop()
	stall := time.AfterFunc(e.config.StallLimit, func() { cancel(errStalled) })
	defer stall.Stop()
	alive := func() { stall.Reset(e.config.StallLimit) }
	cmd.Stdout, cmd.Stderr = &activity{io.MultiWriter(log, events), alive}, &activity{stderr, alive}
	err = e.runner.Run(limited, request.Owner, cmd, nil)
	events.end()
	log.close()
	if cause := context.Cause(ctx); cause != nil {
		return Result{}, cause
	}
	result := Result{TaskID: events.thread, Usage: events.usage}
	var exit *exec.ExitError
	switch cause := context.Cause(limited); {
	case events.completed && (err == nil || errors.Is(context.Cause(limited), errStalled)):
		result.Outcome, result.Message = Finished, events.message
		if asked := question(events.message); asked != "" {
			result.Outcome, result.Message = Question, asked
		}
	case errors.Is(cause, errTimeLimit):
		result.Outcome, result.Message = TimedOut, fmt.Sprintf("Codex had not ended after %s and was ended. %s is the limit", e.config.TimeLimit, e.config.SettingName("MM_ORCHESTRATOR_CODEX_TIME_LIMIT"))
	case errors.Is(cause, errStalled):
		result.Outcome, result.Message = Stalled, fmt.Sprintf("Codex had printed nothing for %s and was ended. %s is the limit", e.config.StallLimit, e.config.SettingName("MM_ORCHESTRATOR_CODEX_STALL_LIMIT"))
	case err != nil && !errors.As(err, &exit):
		return Result{}, notStarted(e.config.Program, e.config.SettingName, err)
	case events.failure != "":
		result.Outcome, result.Message = classify(events.failure), events.failure
	case events.events == 0 && printed(stderr) != "":
		// An option that this release does not know, a configuration that it cannot read.
		result.Outcome, result.Message = classify(printed(stderr)), fmt.Sprintf("Codex has not begun (%s): %s", cmd.ProcessState, printed(stderr))
	default:
		result.Outcome = Garbage
		result.Message = fmt.Sprintf("Codex has ended (%s) without saying how: %d of its lines were events and %d were not", cmd.ProcessState, events.events, events.foreign)
	}
	result.Message = trimmed(result.Message)
	return result, nil
}

// command is the program, ready to be started.
func (e *Exec) command(ctx context.Context, request ExecRequest) (*exec.Cmd, error) {
	path, err := exec.LookPath(e.config.Program)
	if err != nil {
		return nil, notStarted(e.config.Program, e.config.SettingName, err)
	}
	cmd := &exec.Cmd{
		Path: path, Args: append([]string{e.config.Program}, e.config.arguments()...), Dir: request.Dir,
		Env: append([]string{}, e.config.Environ...), Stdin: strings.NewReader(request.Prompt),
	}
	if e.config.Home != "" {
		cmd.Env = append(cmd.Env, "CODEX_HOME="+e.config.Home)
	}
	if request.TempDir != "" {
		if err := os.MkdirAll(request.TempDir, 0o700); err != nil {
			return nil, err
		}
		cmd.Env = append(cmd.Env, "TMPDIR="+request.TempDir)
	}
	if e.config.Key != nil {
		key, err := e.config.Key.Read(ctx)
		switch {
		case err == nil:
			cmd.Env = append(cmd.Env, KeyVariable+"="+key.Reveal())
		case !errors.Is(err, credential.ErrNotSet):
			return nil, err
		}
	}
	return cmd, nil
}

// arguments is the command line without the program. The dash makes Codex read the prompt
// from its standard input.
func (c ExecConfig) arguments() []string {
	list := []string{"exec", "--json", "--ephemeral", "--skip-git-repo-check", "--color", "never", "--sandbox", c.Sandbox}
	if c.Model != "" {
		list = append(list, "--model", c.Model)
	}
	if c.Profile != "" {
		list = append(list, "--profile", c.Profile)
	}
	for _, override := range append([]string{
		`approval_policy="never"`,
		"sandbox_workspace_write.exclude_slash_tmp=true",
		// Variables whose names look like secrets do not reach the commands of the model.
		"shell_environment_policy.ignore_default_excludes=false",
		fmt.Sprintf("shell_environment_policy.exclude=[%q]", KeyVariable),
	}, c.Overrides...) {
		list = append(list, "--config", override)
	}
	return append(list, "-")
}

// activity tells that a program prints.
type activity struct {
	next  io.Writer
	alive func()
}

func (a *activity) Write(p []byte) (int, error) {
	a.alive()
	return a.next.Write(p)
}

// limitedLog passes on what fits, and counts the rest.
type limitedLog struct {
	next    io.Writer
	left    int64
	dropped int64
}

func (l *limitedLog) Write(p []byte) (int, error) {
	n := len(p)
	keep := p[:min(int64(n), l.left)]
	l.left -= int64(len(keep))
	l.dropped += int64(n - len(keep))
	if len(keep) > 0 {
		_, _ = l.next.Write(keep)
	}
	return n, nil
}

// close says how much is missing, as an event.
func (l *limitedLog) close() {
	if l.dropped > 0 {
		_, _ = fmt.Fprintf(l.next, "\n{\"type\":\"mm_orchestrator.log_limit\",\"dropped_bytes\":%d}\n", l.dropped)
	}
}

// printed is what is kept of a program's messages.
func printed(stderr *excerpt.Tail) string { return trimmed(stderr.Words()) }

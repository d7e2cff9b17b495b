package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// isSkillExecutor says that a command is the skill executor, the only Python
// program that plans run (docs/moonmind.md#skill-plans).
func isSkillExecutor(command []string) bool {
	return len(command) == 7 && command[0] == "python" && command[1] == "-m" &&
		command[2] == SkillModule &&
		command[3] == "--skill-id" && command[5] == "--skill-args-json"
}

// A runner runs the commands of plans. A command is a list of arguments; no shell
// is involved, and only allowed programs are started.
type runner struct {
	// allowed are the programs that the policy lets plans start. own says that the
	// command is the worker's own, for which the policy does not count.
	allowed []string
	own     bool
	compose compose.Program
	environ []string
	program processes.Runner
	owner   processes.Owner
	// setting is Config.SettingName.
	setting func(variable string) string
	// target is what the plan's commands are for, without a command line.
	target programs.Line
}

func newRunner(config Config) *runner {
	program := config.Compose
	if program.LookPath == nil {
		program.LookPath = func(name string) (string, error) {
			if path := lookPath(name, config.Environ, config.Workspace); path != "" {
				return path, nil
			}
			return "", exec.ErrNotFound
		}
	}
	return &runner{
		compose: program,
		environ: config.Environ,
		setting: config.SettingName,
		program: processes.Runner{Grace: config.KillGrace, Logger: config.Logger},
		target:  programs.Line{Workspace: config.Workspace, Resolve: artifacts.Resolve, Permit: config.Permissions},
	}
}

// forOwn returns the runner for commands that the worker runs of itself.
func (r runner) forOwn() *runner {
	r.own = true
	return &r
}

// of returns the runner for one step.
func (r runner) of(owner processes.Owner) *runner {
	r.owner = owner
	return &r
}

// check refuses a command of a plan that the rules of its program do not allow
// (docs/policy.md#programs). It starts nothing. Like the Python worker, it reports a
// missing program before.
func (r *runner) check(workspace string, command []string) *Failure {
	line := r.target
	line.Argv, line.Dir = command, workspace
	refusal := programs.Judge(line)
	if refusal == nil {
		return nil
	}
	if failure := r.checkWorkspace(workspace); failure != nil {
		return failure
	}
	if _, failure := r.find(command, r.compose.Resolve(command)[0], workspace); failure != nil {
		return failure
	}
	failure := commandError(fmt.Sprintf("Command not allowed: %s (%s): %s. To permit it, the service's overrides in the policy file need %s",
		formatCommand(command), refusal.Rule, refusal.Why, refusal.Entry()))
	failure.rule = refusal.Rule
	return failure
}

// run runs a command of a plan as [runner.runTrusted] does, if the rules of its program
// allow it.
func (r *runner) run(ctx context.Context, workspace string, command []string, stdout, stderr io.Writer, exited func(code int)) (int, *Failure) {
	if failure := r.check(workspace, command); failure != nil {
		return 0, failure
	}
	return r.runTrusted(ctx, workspace, command, stdout, stderr, exited)
}

// runTrusted runs a command in the workspace and copies its output to the two writers,
// which must not fail. It returns the exit code as [processes.ExitCode] does. A
// failure means that the program could not be started or did not end by itself.
// If it ended by itself, runTrusted calls exited, unless nil, at that moment; see
// [processes.Runner.Run].
func (r *runner) runTrusted(ctx context.Context, workspace string, command []string, stdout, stderr io.Writer, exited func(code int)) (int, *Failure) {
	if len(command) == 0 {
		return 0, commandError("Command sequence must not be empty")
	}
	// Never nil: package exec would use this process's own environment.
	environ := append([]string{}, r.environ...)
	argv := r.compose.Resolve(command)
	if filepath.Base(command[0]) == "git" {
		argv, environ = planGit(command, environ, workspace)
	}
	return r.start(ctx, workspace, command, argv, environ, stdout, stderr, exited)
}

// start runs a command as run says, with these arguments and this environment.
func (r *runner) start(ctx context.Context, workspace string, command, argv, environ []string, stdout, stderr io.Writer, exited func(code int)) (int, *Failure) {
	return r.startCmd(ctx, command, &exec.Cmd{Args: argv, Dir: workspace, Env: environ, Stdout: stdout, Stderr: stderr}, exited)
}

// startCmd runs a program as run says. It sets cmd.Path. Errors show command.
func (r *runner) startCmd(ctx context.Context, command []string, cmd *exec.Cmd, exited func(code int)) (int, *Failure) {
	failure := r.checkWorkspace(cmd.Dir)
	if failure != nil {
		return 0, failure
	}
	if cmd.Path, failure = r.find(command, cmd.Args[0], cmd.Dir); failure != nil {
		return 0, failure
	}
	byItself := false
	over := stall.FromContext(ctx).Wait()
	err := r.program.Run(ctx, r.owner, cmd, func(code int) {
		byItself = true
		if exited != nil {
			exited(code)
		}
	})
	over()
	if cause := context.Cause(ctx); cause != nil && err != nil && !byItself {
		return 0, endedFailure(command, cause)
	}
	var exit *exec.ExitError
	switch {
	case err == nil || errors.As(err, &exit):
		return processes.ExitCode(cmd.ProcessState), nil
	case errors.Is(err, fs.ErrNotExist):
		// find has seen the program itself, so its interpreter is missing.
		return 0, commandError("Command not found: " + command[0])
	default:
		return 0, commandError(fmt.Sprintf("Command %s could not be run: %s", formatCommand(command), preflight.Reason(err)))
	}
}

// endedFailure is the failure of a step whose command was ended for cause.
func endedFailure(command []string, cause error) *Failure {
	return commandError(fmt.Sprintf("Command %s was ended: %s", formatCommand(command), cause))
}

// checkWorkspace reports a missing workspace. The Python worker reports
// that as a missing program (docs/moonmind.md#c12).
func (r *runner) checkWorkspace(workspace string) *Failure {
	info, err := os.Stat(workspace)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return commandError("Workspace " + workspace + " does not exist. Mount the repository there, or set " + r.setting("WORKSPACE_ROOT") + " to where it is")
	case err != nil:
		return commandError("Workspace " + workspace + " cannot be used: " + preflight.Reason(err))
	case !info.IsDir():
		return commandError("Workspace " + workspace + " is not a directory")
	}
	return nil
}

// find returns the path of the program. Like the Python worker it
// reports a missing program before it checks whether the plan may run it.
func (r *runner) find(command []string, program, workspace string) (string, *Failure) {
	path := lookPath(program, r.environ, workspace)
	skill := isSkillExecutor(command)
	if path == "" {
		text := "Command not found: " + command[0]
		switch {
		case skill:
			text += ". Skills run in Python: install one with MoonMind on its path beside the worker"
		case program == "docker":
			text += ". Install the docker CLI, or set " + r.setting("MM_ORCHESTRATOR_COMPOSE") + " to a docker-compose program"
		}
		return "", commandError(text)
	}
	if !r.own && !skill && !slices.Contains(r.allowed, command[0]) {
		return "", commandError(fmt.Sprintf("Command not allowed: %s. Plans may run %s; %s allows more",
			command[0], strings.Join(r.allowed, ", "), r.setting("MM_ORCHESTRATOR_ALLOWED_PROGRAMS")))
	}
	return path, nil
}

// lookPath finds a program in the PATH of environ, "" if it is not there. A name
// with a slash is relative to the workspace.
func lookPath(program string, environ []string, workspace string) string {
	if strings.ContainsRune(program, '/') {
		if !filepath.IsAbs(program) {
			program = filepath.Join(workspace, program)
		}
		if isExecutable(program) {
			return program
		}
		return ""
	}
	for _, dir := range filepath.SplitList(getenv(environ, "PATH")) {
		if path := filepath.Join(dir, program); filepath.IsAbs(path) && isExecutable(path) {
			return path
		}
	}
	return ""
}

func isExecutable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// getenv returns the last value of a variable, as Go and Python do. Most C
// libraries return the first.
func getenv(environ []string, name string) string {
	for _, variable := range slices.Backward(environ) {
		if key, value, _ := strings.Cut(variable, "="); key == name {
			return value
		}
	}
	return ""
}

// repository returns the top of the work tree that a directory is in, and
// the directory relative to it. Outside of any, the directory is its own top.
func repository(dir string) (top, inside string) {
	dir = artifacts.Resolve(dir)
	for top = dir; ; top = filepath.Dir(top) {
		if _, err := os.Lstat(filepath.Join(top, ".git")); err == nil {
			inside, err := filepath.Rel(top, dir)
			if err != nil {
				return dir, "."
			}
			return top, inside
		}
		if top == filepath.Dir(top) {
			return dir, "."
		}
	}
}

package orchestrator

import (
	"context"
	"io"
	"os/exec"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/change"
)

// runOwnGit runs a git command that no plan names, as run does, with settings and
// options of our own. Errors show the command without them.
func (r *runner) runOwnGit(ctx context.Context, workspace string, command []string, stdout, stderr io.Writer) (int, *Failure) {
	top, _ := repository(workspace)
	argv := slices.Concat(command[:2], change.GitOptions(command[1]), command[2:])
	return r.start(ctx, workspace, command, argv, change.GitEnviron(r.environ, top), stdout, stderr, nil)
}

// git runs a git command of package change: a [change.Git]. It trusts every work
// tree, also one inside of the workspace, since git runs with our settings.
func (r *runner) git(ctx context.Context, command change.GitCommand) (int, error) {
	argv := append([]string{"git"}, command.Args...)
	environ := slices.Concat(change.GitEnviron(r.environ, "*"), command.Env)
	cmd := &exec.Cmd{Args: argv, Dir: command.Dir, Env: environ, Stdin: command.Stdin, Stdout: command.Stdout, Stderr: command.Stderr}
	code, failure := r.startCmd(ctx, argv, cmd, nil)
	if failure != nil {
		return 0, failure
	}
	return code, nil
}

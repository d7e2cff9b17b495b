package orchestrator

import (
	"context"
	"io"
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

package orchestrator

import (
	"context"
	"io"
	"os/exec"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
)

// gitVariables are the variables of git that a plan's git commands keep. The others
// lead git to other repositories, programs or files.
var gitVariables = []string{
	"GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_AUTHOR_DATE", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "GIT_COMMITTER_DATE",
	"GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM", "GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_COUNT",
	"GIT_ADVICE", "GIT_ATTR_NOSYSTEM", "GIT_CEILING_DIRECTORIES", "GIT_DISCOVERY_ACROSS_FILESYSTEM", "GIT_OPTIONAL_LOCKS", "GIT_TERMINAL_PROMPT",
	"GIT_ALLOW_PROTOCOL", "GIT_SSH", "GIT_SSH_COMMAND", "GIT_ASKPASS", "GIT_SSL_CAINFO", "GIT_SSL_NO_VERIFY",
}

// gitPlanSettings make git start no program that the repository's settings name.
// Filters and merge drivers stay: without them, git would take unchanged files for
// changed ones, and nothing that the rules allow can write the settings.
var gitPlanSettings = [][2]string{
	{"core.fsmonitor", "false"},
	{"core.hooksPath", "/dev/null"},
	{"core.pager", "cat"},
	{"core.editor", "false"},
	{"sequence.editor", "false"},
	{"interactive.diffFilter", ""},
	{"gpg.program", "gpg"},
	{"gpg.x509.program", "gpgsm"},
	{"gpg.ssh.program", "ssh-keygen"},
	{"gpg.ssh.defaultKeyCommand", "false"},
	{"log.showSignature", "false"},
	{"safe.bareRepository", "explicit"},
}

// gitFetchSettings are for commands that reach another repository only to get an
// object that a partial clone lacks. A command that an operator has permitted to
// reach others does so with their settings.
var gitFetchSettings = [][2]string{
	{"core.sshCommand", "ssh"},
	{"core.askPass", ""},
	{"credential.helper", ""},
}

// gitOptions are options for subcommands that would start a program for an attribute
// of a file. No setting overrides that.
var gitOptions = map[string][]string{
	"diff": {"--no-ext-diff", "--no-textconv"}, "diff-files": {"--no-ext-diff", "--no-textconv"},
	"diff-index": {"--no-ext-diff", "--no-textconv"}, "diff-tree": {"--no-ext-diff", "--no-textconv"},
	"log": {"--no-ext-diff", "--no-textconv"}, "show": {"--no-ext-diff", "--no-textconv"}, "stash show": {"--no-ext-diff", "--no-textconv"},
	"blame": {"--no-textconv"}, "grep": {"--no-textconv"},
}

// planGit returns the command line and the environment for a git command of a plan.
// Git trusts the repository also if another user owns it (docs/moonmind.md#f10), and
// starts no program that the repository names (docs/policy.md#git). Logs show the
// command as the plan has it.
func planGit(command, environ []string, workspace string) (argv, with []string) {
	top, _ := repository(workspace)
	settings := append([][2]string{{"safe.directory", top}}, gitPlanSettings...)
	at := programs.Subcommand(command)
	name := ""
	if at < len(command) {
		name = command[at]
		if name == "stash" && at+1 < len(command) && command[at+1] == "show" {
			at, name = at+1, "stash show"
		}
	}
	// Never nil: package exec would use this process's own environment.
	with = slices.DeleteFunc(append([]string{}, environ...), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		kept := slices.Contains(gitVariables, name) || strings.HasPrefix(name, "GIT_CONFIG_KEY_") || strings.HasPrefix(name, "GIT_CONFIG_VALUE_")
		return strings.HasPrefix(name, "GIT_") && !kept
	})
	if !slices.Contains([]string{"fetch", "pull", "push", "clone", "ls-remote", "remote", "submodule"}, name) {
		settings = append(settings, gitFetchSettings...)
		if getenv(with, "GIT_ALLOW_PROTOCOL") == "" {
			// Others start a program that the settings name.
			with = append(with, "GIT_ALLOW_PROTOCOL=http:https:ssh")
		}
	}
	argv = command
	if added := gitOptions[name]; added != nil {
		argv = slices.Concat(command[:at+1], added, command[at+1:])
	}
	return argv, change.WithGitSettings(with, settings)
}

// runOwnGit runs a git command that no plan names, as run does, with settings and
// options of our own. Errors show the command without them.
func (r *runner) runOwnGit(ctx context.Context, workspace string, command []string, stdout, stderr io.Writer) (int, *Failure) {
	top, _ := repository(workspace)
	argv := slices.Concat(command[:2], change.GitOptions(command[1]), command[2:])
	return r.forOwn().start(ctx, workspace, command, argv, change.GitEnviron(r.environ, top), stdout, stderr, nil)
}

// git runs a git command of package change: a [change.Git]. It trusts every work
// tree, also one inside of the workspace, since git runs with our settings.
func (r *runner) git(ctx context.Context, command change.GitCommand) (int, error) {
	argv := append([]string{"git"}, command.Args...)
	environ := slices.Concat(change.GitEnviron(r.environ, "*"), command.Env)
	cmd := &exec.Cmd{Args: argv, Dir: command.Dir, Env: environ, Stdin: command.Stdin, Stdout: command.Stdout, Stderr: command.Stderr}
	code, failure := r.forOwn().startCmd(ctx, argv, cmd, nil)
	if failure != nil {
		return 0, failure
	}
	return code, nil
}

package change

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
)

// A GitCommand is a git command that this package asks its caller to run.
type GitCommand struct {
	// Dir is the absolute path of the directory that git works in.
	Dir string
	// Args are the arguments after the program's name.
	Args []string
	// Env has variables, as NAME=value, in addition to those of [GitEnviron].
	Env []string
	// Stdin may be nil for none.
	Stdin io.Reader
	// Stdout and Stderr may be nil; the output is dropped then.
	Stdout, Stderr io.Writer
}

// Git runs a git command with the environment that [GitEnviron] returns, and
// returns its exit code. The error says that git could not be started, or did not
// end by itself.
type Git func(ctx context.Context, command GitCommand) (code int, err error)

// gitSettings are the settings for git's commands that we run ourselves, in place
// of what a repository, its user or the machine has set. Options that GitOptions
// adds have the rest. What says how the file system and the files' content work is
// not among them (core.fileMode, core.autocrlf, filters): without it, git would
// take unchanged files for changed ones.
var gitSettings = [][2]string{
	// Programs that git starts by itself.
	{"core.fsmonitor", "false"}, // a daemon or a hook, which could also hide changes
	{"core.hooksPath", "/dev/null"},
	{"core.pager", "cat"},
	// A user's list of ignored files would hide files from the allow-list. The
	// repository's own lists stay.
	{"core.excludesFile", "/dev/null"},
	{"core.quotePath", "true"},
	{"core.abbrev", "auto"},
	{"color.ui", "false"},
	// Without the refresh, files that were only touched count as changed.
	{"diff.autoRefreshIndex", "true"},
	{"diff.suppressBlankEmpty", "false"},
	{"diff.indentHeuristic", "true"},
	{"status.showUntrackedFiles", "normal"},
	{"status.renames", "false"},
	{"submodule.recurse", "false"},
}

// GitOptions returns the options after which the output of a git command depends
// on no settings. Only options can override the settings of one attribute
// (diff.NAME.textconv) or one submodule (submodule.NAME.ignore).
func GitOptions(command string) []string {
	if command != "diff" {
		return nil
	}
	return []string{
		"--no-color", "--no-ext-diff", "--no-textconv",
		"--no-relative", // names from the top of the repository
		"--no-renames",  // of a renamed file, git would name the new name only
		"--ignore-submodules=untracked",
		// A diff that git apply takes.
		"--binary", "--src-prefix=a/", "--dst-prefix=b/", "--unified=3", "--inter-hunk-context=0",
		"--diff-algorithm=myers", "--submodule=short", "-O/dev/null",
	}
}

// gitVariables are variables of the environment that override gitSettings or
// GitOptions.
var gitVariables = []string{"GIT_EXTERNAL_DIFF", "GIT_DIFF_OPTS", "GIT_CONFIG_PARAMETERS", "LC_ALL"}

// GitEnviron returns the environment for a git command of our own: settings of
// the repository, the user and the machine do not alter its output, and do not
// make it start another program. safeDirectory is a work tree that git is to trust
// even if another user owns it, or "*" for all.
//
// Only for commands of our own: those of a plan run with the settings that the
// plan's author sees.
func GitEnviron(environ []string, safeDirectory string) []string {
	// Never nil: package exec would use this process's own environment.
	own := slices.DeleteFunc(append([]string{}, environ...), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return slices.Contains(gitVariables, name)
	})
	// C: callers read git's messages.
	return append(WithGitSettings(own, append([][2]string{{"safe.directory", safeDirectory}}, gitSettings...)), "LC_ALL=C")
}

// WithGitSettings adds settings to an environment. They override those of files,
// and those that the environment has already.
func WithGitSettings(environ []string, settings [][2]string) []string {
	count, err := strconv.Atoi(lastValue(environ, "GIT_CONFIG_COUNT"))
	if err != nil || count < 0 {
		count = 0
	}
	for _, setting := range settings {
		environ = append(environ,
			fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", count, setting[0]),
			fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", count, setting[1]))
		count++
	}
	return append(environ, fmt.Sprintf("GIT_CONFIG_COUNT=%d", count))
}

// lastValue returns the last value of a variable, which is the one that git sees:
// package exec drops the others.
func lastValue(environ []string, name string) string {
	for _, variable := range slices.Backward(environ) {
		if key, value, _ := strings.Cut(variable, "="); key == name {
			return value
		}
	}
	return ""
}

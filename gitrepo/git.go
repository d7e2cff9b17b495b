package gitrepo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Config says how git is run.
type Config struct {
	// Program is git, a name or a path. Defaults to git. 2.36 is the oldest that works.
	Program string
	// Environ are the variables of this process, as NAME=value. git gets only those that
	// it needs: PATH, the ones of proxies and certificates, and for ssh also HOME and
	// SSH_AUTH_SOCK.
	Environ []string
	// Schemes are those that an address may have: https, ssh, file, http. Defaults to
	// https and ssh. A token is sent over https, and over http to this machine only.
	Schemes []string
	// CAFile has the certificates that are trusted in place of the machine's, "" for
	// these.
	CAFile string
	// Depth is how many commits of the branch a clone has. Defaults to 50.
	Depth int
	// MaxPatch is the size of the largest patch, in bytes. Defaults to 64 MiB.
	MaxPatch int64
	// MaxClone is how much of the disk a clone may take, in bytes. Defaults to 10 GiB.
	MaxClone int64
	// Timeout is how long one command of git may take. Defaults to 15 min.
	Timeout time.Duration
	// StallTimeout is how long a server may send less than 1000 bytes per second.
	// Defaults to 60 s.
	StallTimeout time.Duration
	// Redact removes secrets from what git prints, for errors. Defaults to leaving it.
	Redact func(string) string
	// Run runs a program to its end, and ends it with all its children when ctx ends.
	// Defaults to a process group of its own.
	Run func(ctx context.Context, cmd *exec.Cmd) error
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c Config) WithDefaults() Config {
	c.Program = cmp.Or(c.Program, "git")
	if len(c.Schemes) == 0 {
		c.Schemes = []string{"https", "ssh"}
	}
	c.Depth = cmp.Or(c.Depth, 50)
	c.MaxPatch = cmp.Or(c.MaxPatch, 64<<20)
	c.MaxClone = cmp.Or(c.MaxClone, 10<<30)
	c.Timeout = cmp.Or(c.Timeout, 15*time.Minute)
	c.StallTimeout = cmp.Or(c.StallTimeout, time.Minute)
	if c.Redact == nil {
		c.Redact = func(text string) string { return text }
	}
	if c.Run == nil {
		c.Run = runInGroup
	}
	return c
}

// schemes are those that this package knows.
var schemes = []string{"https", "ssh", "file", "http"}

// Validate returns an error that names what is wrong.
func (c Config) Validate() error {
	for _, scheme := range c.Schemes {
		if !slices.Contains(schemes, scheme) {
			return fmt.Errorf("gitrepo: Config.Schemes has %q, want some of %s", scheme, strings.Join(schemes, ", "))
		}
	}
	switch {
	case c.Depth < 0:
		return fmt.Errorf("gitrepo: Config.Depth is %d, want 1 or more", c.Depth)
	case c.MaxClone < 0 || c.MaxPatch < 0:
		return fmt.Errorf("gitrepo: Config.MaxClone is %d and Config.MaxPatch %d, want 1 or more", c.MaxClone, c.MaxPatch)
	case c.CAFile != "" && !filepath.IsAbs(c.CAFile):
		return fmt.Errorf("gitrepo: Config.CAFile is %q, want an absolute path", c.CAFile)
	}
	return nil
}

// Git runs git. It may be used by several goroutines.
type Git struct{ config Config }

// New returns a Git, or an error of Validate. It runs nothing.
func New(config Config) (*Git, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	return &Git{config}, nil
}

// WithRun returns a Git that runs programs by another function, such as one that knows
// for whom they run.
func (g *Git) WithRun(run func(ctx context.Context, cmd *exec.Cmd) error) *Git {
	own := *g
	own.config.Run = run
	return &own
}

// MaxPatch is the size of the largest patch, in bytes.
func (g *Git) MaxPatch() int64 { return g.config.MaxPatch }

// runInGroup runs a program in a process group of its own, and kills the group at the
// end of ctx.
func runInGroup(ctx context.Context, cmd *exec.Cmd) error {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
		return context.Cause(ctx)
	}
}

// A command is one run of git.
type command struct {
	// dir is the git directory, "" for none. tree is the work tree, "" for none.
	dir, tree string
	// index is the file with the index, "" for the one of dir.
	index string
	args  []string
	stdin io.Reader
	// stdout gets the output, nil for nobody.
	stdout io.Writer
	// remote is the server that git talks to, nil for none.
	remote *Remote
	// env has further variables.
	env []string
	// messages gets what git prints for people, nil for nobody.
	messages io.Writer
}

// settings are those of every command. There are no others: files with settings are
// not read, except for that of the git directory, which this package makes.
var settings = [][2]string{
	{"safe.directory", "*"}, // the directory may be on a volume of another user
	{"core.hooksPath", "/dev/null"},
	{"core.fsmonitor", "false"},
	{"core.attributesFile", "/dev/null"},
	{"core.excludesFile", "/dev/null"},
	{"core.pager", "cat"},
	{"core.autocrlf", "false"},
	// Names that are .git on any file system are refused.
	{"core.protectHFS", "true"},
	{"core.protectNTFS", "true"},
	{"core.quotePath", "true"},
	{"gc.auto", "0"},
	{"maintenance.auto", "false"},
	{"submodule.recurse", "false"},
	{"fetch.recurseSubmodules", "false"},
	{"push.recurseSubmodules", "no"},
	{"push.gpgSign", "false"},
	{"commit.gpgSign", "false"},
	{"transfer.bundleURI", "false"},
	// An empty one drops those of files.
	{"credential.helper", ""},
}

// keptVariables are those that git needs of the environment.
var keptVariables = []string{
	"PATH", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "MM_ORCHESTRATOR_STEP",
	"http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
}

// sshVariables are those that ssh needs in addition.
var sshVariables = []string{"HOME", "USER", "LOGNAME", "SSH_AUTH_SOCK"}

// environ is the environment of a command.
func (g *Git) environ(c command) []string {
	kept := keptVariables
	if c.remote != nil && c.remote.scheme() == "ssh" {
		kept = slices.Concat(kept, sshVariables)
	}
	env := []string{}
	for _, variable := range g.config.Environ {
		name, _, _ := strings.Cut(variable, "=")
		if slices.Contains(kept, name) {
			env = append(env, variable)
		}
	}
	env = append(env,
		"LC_ALL=C", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=/dev/null", "GIT_ATTR_NOSYSTEM=1",
		"GIT_TERMINAL_PROMPT=0", "GIT_ASKPASS=", "SSH_ASKPASS=", "GIT_NO_LAZY_FETCH=1", "GIT_NO_REPLACE_OBJECTS=1", "GIT_OPTIONAL_LOCKS=0",
		"GIT_PROTOCOL_FROM_USER=0", "GIT_CEILING_DIRECTORIES=/",
	)
	all := settings
	if c.remote == nil {
		env = append(env, "GIT_ALLOW_PROTOCOL=")
	} else {
		env = append(env, "GIT_ALLOW_PROTOCOL="+c.remote.scheme(), "GIT_SSH_COMMAND=ssh -oBatchMode=yes -oConnectTimeout=30")
		all = slices.Concat(all, [][2]string{
			{"http.lowSpeedLimit", "1000"}, {"http.lowSpeedTime", strconv.Itoa(max(1, int(g.config.StallTimeout.Seconds())))},
			{"http.userAgent", "mm-orchestrator git"},
		}, c.remote.helper())
		if g.config.CAFile != "" {
			all = append(all, [2]string{"http.sslCAInfo", g.config.CAFile})
		}
	}
	env = append(env, c.env...)
	for name, value := range map[string]string{"GIT_DIR": c.dir, "GIT_WORK_TREE": c.tree, "GIT_INDEX_FILE": c.index} {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	for i, setting := range all {
		env = append(env, fmt.Sprintf("GIT_CONFIG_KEY_%d=%s", i, setting[0]), fmt.Sprintf("GIT_CONFIG_VALUE_%d=%s", i, setting[1]))
	}
	return append(env, fmt.Sprintf("GIT_CONFIG_COUNT=%d", len(all)))
}

// messageLimit bounds what is kept of git's messages, in bytes.
const messageLimit = 16 << 10

// run runs git. The error is an *Error if git has ended with another code than 0.
func (g *Git) run(ctx context.Context, c command) error {
	limited, cancel := context.WithTimeoutCause(ctx, g.config.Timeout, fmt.Errorf("git %s did not end within %s", c.args[0], g.config.Timeout))
	defer cancel()
	cmd := exec.Command(g.config.Program, c.args...)
	cmd.Env, cmd.Stdin, cmd.Stdout = g.environ(c), c.stdin, c.stdout
	// Not in this process's directory, which may be in a repository.
	cmd.Dir = cmp.Or(c.tree, c.dir, "/")
	messages := &excerpt.Head{Limit: messageLimit}
	cmd.Stderr = messages
	var token secret.String
	if c.remote != nil && c.remote.Token != nil {
		var err error
		if token, err = c.remote.Token.Read(ctx); err != nil {
			return err
		}
		pipe, err := c.remote.pipe(token)
		if err != nil {
			return fmt.Errorf("the token cannot be given to git: %w", err)
		}
		defer pipe.Close()
		cmd.ExtraFiles = []*os.File{pipe}
	}
	err := g.config.Run(limited, cmd)
	text := g.text(messages.Words(), token)
	if c.messages != nil {
		_, _ = io.WriteString(c.messages, text)
	}
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case limited.Err() != nil:
		return context.Cause(limited)
	case errors.As(err, &exit):
		return &Error{Command: c.args[0], Code: exit.ExitCode(), Output: text}
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("there is no program %s: install git where the worker runs", g.config.Program)
	}
	return fmt.Errorf("git %s cannot be run: %w", c.args[0], err)
}

// text is what git has printed, without secrets.
func (g *Git) text(printed string, token secret.String) string {
	text := strings.ToValidUTF8(strings.ReplaceAll(printed, "\x00", ""), "\uFFFD")
	if !token.IsZero() {
		text = strings.ReplaceAll(text, token.Reveal(), secret.Mask)
	}
	return strings.TrimSpace(g.config.Redact(text))
}

// output runs git and returns its output without white space at the end.
func (g *Git) output(ctx context.Context, c command) (string, error) {
	out := &excerpt.Head{Limit: maxOutput}
	c.stdout = out
	err := g.run(ctx, c)
	if err == nil && out.Full {
		err = fmt.Errorf("git %s printed more than %d bytes", c.args[0], maxOutput)
	}
	return strings.TrimRight(string(out.Kept), " \t\r\n"), err
}

// maxOutput bounds what git may print where all of it is kept: the names of the files of
// a change, or what a server says about its branches.
const maxOutput = 64 << 20

// An Error is that of a git command which has failed.
type Error struct {
	// Command is the subcommand, such as fetch.
	Command string
	// Code is the exit code.
	Code int
	// Output is what git has printed for people, without secrets.
	Output string
}

func (e *Error) Error() string {
	text := strings.Join(strings.Fields(e.Output), " ")
	if runes := []rune(text); len(runes) > 500 {
		text = string(runes[:500]) + "…"
	}
	return fmt.Sprintf("git %s failed with code %d: %s", e.Command, e.Code, text)
}

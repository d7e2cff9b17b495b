package credential

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// ErrNotSet: the source is a variable, and it is not set.
var ErrNotSet = errors.New("not set")

// Redactor is what must know a credential before anything uses it, usually an
// artifacts.Redactor.
type Redactor interface{ Add(secrets ...string) }

// Config says what a Credential is and how it is read.
type Config struct {
	// Name is that of the credential in errors, such as "GitHub token". Required.
	Name string
	// Setting is the name of the setting that has the source, for errors. Defaults to
	// "its setting".
	Setting string
	// Source is where the credential is. Required.
	Source Source
	// Environ are the variables, as NAME=value, in which env: looks.
	Environ []string
	// CommandEnviron are the variables of the program of command:. Defaults to none.
	CommandEnviron []string
	// CommandTimeout is how long that program may take. Defaults to 20 s.
	CommandTimeout time.Duration
	// Redactors are all of the process.
	Redactors []Redactor
}

// A Credential reads one credential. It may be used by several goroutines.
type Credential struct{ config Config }

// New returns a Credential, or an error that names what is missing. It reads nothing.
func New(config Config) (*Credential, error) {
	switch {
	case config.Name == "":
		return nil, errors.New("credential: Config.Name is empty")
	case config.Source.IsZero():
		return nil, fmt.Errorf("credential: Config.Source of the %s is empty", config.Name)
	}
	if config.Setting == "" {
		config.Setting = "its setting"
	}
	if config.CommandTimeout == 0 {
		config.CommandTimeout = 20 * time.Second
	}
	return &Credential{config}, nil
}

// Source is where the credential is kept.
func (c *Credential) Source() Source { return c.config.Source }

// maxLength is the longest credential, in bytes.
const maxLength = 16 << 10

// Read reads the credential from its source.
//
//   - Every redactor knows the value, and all else that the source has, before Read
//     returns.
//   - The value is one word of printable ASCII, so that it can stand in a header.
//   - An error wraps ErrNotSet if a variable is not set.
func (c *Credential) Read(ctx context.Context) (secret.String, error) {
	source := c.config.Source
	var text string
	var err error
	switch {
	case source.variables != nil:
		text, err = c.variable()
	case source.file != "":
		text, err = c.file()
	default:
		text, err = c.command(ctx)
	}
	if err != nil {
		return secret.String{}, fmt.Errorf("the %s cannot be read from %s: %w", c.config.Name, source, err)
	}
	c.register(text)
	value := strings.TrimSpace(strings.TrimPrefix(text, "\ufeff"))
	if source.argv != nil {
		// pass and others print further lines for people.
		value, _, _ = strings.Cut(value, "\n")
		value = strings.TrimSpace(value)
	}
	if fault := faultOf(value); fault != "" {
		return secret.String{}, fmt.Errorf("the %s in %s %s: correct the source, or set %s to another one", c.config.Name, source, fault, c.config.Setting)
	}
	c.register(value)
	return secret.New(value), nil
}

// register makes the lines of a text secret.
func (c *Credential) register(text string) {
	var secrets []string
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); len(line) >= 4 {
			secrets = append(secrets, line)
		}
	}
	for _, redactor := range c.config.Redactors {
		redactor.Add(secrets...)
	}
}

// faultOf says why a text cannot be a credential, "" if it can.
func faultOf(value string) string {
	switch {
	case value == "":
		return "is empty"
	case len(value) > maxLength:
		return fmt.Sprintf("has more than %d bytes", maxLength)
	case len(value) < 4:
		return fmt.Sprintf("has only %d characters", len(value))
	case strings.ContainsAny(value, "\r\n"):
		return "has several lines, want one"
	}
	for i := range len(value) {
		if value[i] <= ' ' || value[i] >= 0x7f {
			return fmt.Sprintf("has at position %d a character that no credential has (white space, a control character or one outside of ASCII)", i+1)
		}
	}
	return ""
}

func (c *Credential) variable() (string, error) {
	value, name := "", ""
	for _, name = range c.config.Source.variables {
		// The last one counts, as for programs that are started with this environment.
		for _, variable := range c.config.Environ {
			if own, text, _ := strings.Cut(variable, "="); own == name {
				value = text
			}
		}
		if value != "" {
			return value, nil
		}
	}
	return "", fmt.Errorf("the variable is %w: set %s, or set %s to the file or the command that has it", ErrNotSet, strings.Join(c.config.Source.variables, " or "), c.config.Setting)
}

func (c *Credential) file() (string, error) {
	// Opening a pipe would block for ever without O_NONBLOCK.
	file, err := os.OpenFile(c.config.Source.file, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("the file does not exist: mount it, or correct %s", c.config.Setting)
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("permission denied for user %d: make the file readable for it", os.Geteuid())
	case err != nil:
		return "", cause(err)
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return "", cause(err)
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("it is no regular file but %s: correct %s", info.Mode().Type(), c.config.Setting)
	}
	text, err := io.ReadAll(io.LimitReader(file, maxLength+1024))
	return string(text), cause(err)
}

// cause is an error of the file system without the path, which the source has.
func cause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

// command runs the program of a command: source.
func (c *Credential) command(ctx context.Context) (string, error) {
	argv := c.config.Source.argv
	limited, cancel := context.WithTimeout(ctx, c.config.CommandTimeout)
	defer cancel()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Env = c.config.CommandEnviron
	if cmd.Env == nil {
		cmd.Env = []string{}
	}
	stdout, stderr := &excerpt.Head{Limit: 4 * maxLength}, &excerpt.Head{Limit: 4096}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	// A Runner, because that of a step would end a program without a mark as an orphan. An
	// agent that it leaves in the background (gpg-agent) ends too.
	err := processes.Runner{Grace: time.Second}.Run(limited, processes.Owner{Step: "credential"}, cmd, nil)
	printed := string(stdout.Kept)
	c.register(printed) // also of a program that failed
	var exit *exec.ExitError
	switch {
	case err == nil:
		return printed, nil
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case limited.Err() != nil:
		return "", fmt.Errorf("the program did not end within %s: it may wait for a passphrase or for the network%s", c.config.CommandTimeout, quote(stderr, printed))
	case errors.As(err, &exit):
		return "", fmt.Errorf("%s%s", exit.ProcessState, quote(stderr, printed))
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("there is no program %s: install it where the worker runs, or give its whole path", argv[0])
	case errors.Is(err, fs.ErrPermission):
		return "", fmt.Errorf("the program %s must not be executed by user %d", argv[0], os.Geteuid())
	}
	return "", err
}

// quote is what a program has printed on stderr, for an error, without the lines of its
// stdout.
func quote(stderr *excerpt.Head, stdout string) string {
	text := strings.ToValidUTF8(stderr.Words(), "\uFFFD")
	for line := range strings.Lines(stdout) {
		if line = strings.TrimSpace(line); len(line) >= 4 {
			text = strings.ReplaceAll(text, line, secret.Mask)
		}
	}
	text = strings.Join(strings.Fields(text), " ")
	end := &excerpt.Tail{Limit: 300}
	fmt.Fprint(end, text)
	if words := strings.ToValidUTF8(end.Words(), ""); words != text {
		text = "… " + strings.TrimSpace(words)
	}
	if text == "" {
		return ""
	}
	return ". It printed: " + text
}

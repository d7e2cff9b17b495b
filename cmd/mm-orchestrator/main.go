// Command mm-orchestrator takes over the queue of MoonMind's Celery
// orchestrator worker.
//
// This package is the only one that reads the environment and the command
// line. Each command is one file; settings.go is the table of all that can be
// configured; exit.go turns errors into exit codes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

func main() {
	p := &program{env: os.Environ(), stdout: os.Stdout, stderr: os.Stderr, terminal: isTerminal(os.Stderr)}
	os.Exit(p.main(context.Background(), os.Args[1:]))
}

// program is the process as commands see it: everything that tests give it
// instead.
type program struct {
	env            environment
	stdout, stderr io.Writer
	// terminal says that stderr is one.
	terminal bool
}

// command is a word after the program's name.
type command struct {
	name string
	// args are what it takes besides flags, for the usage line.
	args string
	// summary is one line for the list of commands.
	summary string
	// about explains it, in paragraphs.
	about string
	// examples are command lines with a comment each.
	examples []example
	// topics are those of the settings that it reads.
	topics []topic
	run    func(p *program, ctx context.Context, cmd *command, args []string) error
}

type example struct{ line, comment string }

// commands in the order of the help text.
func commands() []*command {
	return []*command{workerCommand, doctorCommand, configCommand, migrateCommand, runsCommand, healthCommand, versionCommand, helpCommand()}
}

func findCommand(name string) (*command, error) {
	for _, cmd := range commands() {
		if cmd.name == name {
			return cmd, nil
		}
	}
	var known []string
	for _, cmd := range commands() {
		known = append(known, cmd.name)
	}
	return nil, &usageError{fmt.Sprintf("there is no command %q; there are %s", name, strings.Join(known, ", "))}
}

// main runs the command and returns the exit code.
func (p *program) main(ctx context.Context, args []string) int {
	err := p.dispatch(ctx, args)
	if err != nil && !errors.Is(err, flag.ErrHelp) {
		p.complain(err)
	}
	return exitCode(err)
}

func (p *program) dispatch(ctx context.Context, args []string) error {
	if len(args) == 0 {
		writeOverview(p.stderr)
		return &usageError{"give a command"}
	}
	name := args[0]
	switch name {
	case "-h", "-help", "--help":
		name = "help"
	case "-version", "--version":
		name = "version"
	}
	cmd, err := findCommand(name)
	if err != nil {
		return err
	}
	return cmd.run(p, ctx, cmd, args[1:])
}

// complain writes an error to stderr, one line for each part of it. No error
// should hold a secret; that none is printed is made sure of here.
func (p *program) complain(err error) {
	text := artifacts.NewRedactor(p.env).String(err.Error())
	for line := range strings.Lines(strings.TrimSpace(text)) {
		fmt.Fprintf(p.stderr, "mm-orchestrator: %s\n", strings.TrimRight(line, "\n"))
	}
}

// flags makes the flag set of a command, with the flags of its settings.
func (p *program) flags(cmd *command) (*flag.FlagSet, *settingFlags) {
	fs := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	return fs, addSettingFlags(fs, cmd.topics...)
}

// parse reads the command line and returns what is not a flag: at most the
// given number of words. Asked for help it gives it and returns flag.ErrHelp.
func (p *program) parse(cmd *command, fs *flag.FlagSet, args []string, words int) ([]string, error) {
	err := fs.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		writeCommandHelp(p.stdout, cmd, fs)
		return nil, err
	case err != nil:
		return nil, &usageError{fmt.Sprintf("%s; see mm-orchestrator %s --help", flagProblem(err), cmd.name)}
	}
	rest := fs.Args()
	if len(rest) > words {
		return nil, &usageError{fmt.Sprintf("%s does not take %q; see mm-orchestrator %s --help", cmd.name, rest[words], cmd.name)}
	}
	return rest, nil
}

// flagProblem puts the messages of package flag into the form of ours.
func flagProblem(err error) string {
	if name, found := strings.CutPrefix(err.Error(), "flag provided but not defined: "); found {
		return "there is no flag -" + name
	}
	return err.Error()
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// Command mm-orchestrator replaces MoonMind's Celery orchestrator worker.
//
// This package is the only one that reads the environment and the command line.
// Each command has a file of its own. command.go defines what a command is and
// parses the command line, settings.go is the table of all settings, and exit.go
// maps errors to exit codes.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"unicode"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

func main() {
	p := &program{env: os.Environ(), stdout: os.Stdout, stderr: os.Stderr, terminal: isTerminal(os.Stderr)}
	os.Exit(p.main(context.Background(), os.Args[1:]))
}

// program is the process as commands see it. Tests replace its fields.
type program struct {
	env            environment
	stdout, stderr io.Writer
	// terminal: stderr is a terminal.
	terminal bool
	// args is the command line, for the redactor; written by main.
	args []string
	// made is what redactor has made. Guarded by making.
	made   *artifacts.Redactor
	making sync.Mutex
}

// main runs the command and returns the exit code.
func (p *program) main(ctx context.Context, args []string) int {
	p.args = args
	err := p.execute(ctx, args)
	if err != nil {
		p.printError(err)
	}
	return exitCode(err)
}

// printError writes an error to stderr, with the program's name before each line.
// Errors should not contain secrets; the redactor is the second line of defence.
func (p *program) printError(err error) { p.printNote(err.Error()) }

// printNote writes a text to stderr as printError does an error. Settings and rows have any
// characters: a carriage return, as a file of variables from Windows leaves it at the end of
// a path, would hide the line's beginning on a terminal.
func (p *program) printNote(text string) {
	for line := range strings.Lines(strings.TrimSpace(p.redactor().String(text))) {
		fmt.Fprintf(p.stderr, "mm-orchestrator: %s\n", visible(strings.TrimRight(line, "\r\n")))
	}
}

// visible writes control characters as Go does in strings.
func visible(line string) string {
	var out strings.Builder
	for _, r := range line {
		if unicode.IsControl(r) && r != '\t' {
			out.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
			continue
		}
		out.WriteRune(r)
	}
	return out.String()
}

// redactor knows the secrets of the environment and of the command line.
func (p *program) redactor() *artifacts.Redactor {
	p.making.Lock()
	defer p.making.Unlock()
	if p.made == nil {
		p.made = p.redactorOf(environmentRules(p.env))
	}
	return p.made
}

// redactorOf knows the secrets of the environment and of the command line by rules of
// its caller, such as those of all settings, flags included.
func (p *program) redactorOf(rules artifacts.Rules) *artifacts.Redactor {
	known := withoutSources(p.env)
	for _, arg := range p.args {
		known = append(known, "ARGUMENT="+arg)
	}
	return artifacts.NewRedactor(known, rules)
}

func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// Package command is the program that plans run in tests of package changetest, and
// that stands before git and docker there.
//
// As a plan's command it alters files as a script says. Before git and docker it
// passes calls through, and does what a trap says at the call that the trap is set
// for: it kills the worker, stalls, fails, or changes something behind the worker's
// back.
package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// An Act is one thing to do.
type Act struct {
	Do string
	// Path is relative to the folder in which the program runs. Text and Target
	// are the content of a file, and what a link points to.
	Path, Text, Target string
	Mode               fs.FileMode
	Milliseconds       int
	// Args is a command line.
	Args []string
	Code int
}

// The acts.
const (
	Write    = "write"    // write Text to Path, with Mode if it is not 0
	Append   = "append"   // append Text to Path
	Remove   = "remove"   // remove Path, with all that is below it
	Mkdir    = "mkdir"    // make the folder Path
	Symlink  = "symlink"  // replace Path by a link to Target
	Hardlink = "hardlink" // make Path another name of the file Target
	Rename   = "rename"   // rename Path to Target
	Chmod    = "chmod"    // set the mode of Path
	Fifo     = "fifo"     // make Path a named pipe
	Exec     = "exec"     // run Args, and go on whatever its exit code is
	Later    = "later"    // run Args as a process of its own, after Milliseconds
	Get      = "get"      // request the URL Text
	Sleep    = "sleep"    // wait
	Kill     = "kill"     // kill the worker
	Exit     = "exit"     // exit with Code
)

// A Script is a plan's command. Each execution does the next list of acts, and those
// after the last do the last one.
type Script struct{ Turns [][]Act }

// A Trap is what happens at a call of git or docker.
type Trap struct {
	// Program is git or docker; Args are words that the call must have. Step is
	// that of the worker, "" for any.
	Program string
	Args    []string
	Step    string
	// Skip is how many such calls pass before; Times how many are trapped after
	// that, 0 for one.
	Skip, Times int
	// Before happens before the real program starts, During while it runs, After
	// when it has ended.
	Before, During, After []Act
}

// Run is the program: "act SCRIPT", or "intercept FOLDER NAME PROGRAM ARG…". It
// returns the exit code.
func Run(args []string) (int, error) {
	switch {
	case len(args) == 2 && args[0] == "act":
		return act(args[1])
	case len(args) >= 4 && args[0] == "intercept":
		return intercept(args[1], args[2], args[3], args[4:])
	}
	return 2, fmt.Errorf("want act SCRIPT, or intercept FOLDER NAME PROGRAM ARG…, got %q", args)
}

// WriteScript writes a script that does the same acts at each execution.
func WriteScript(path string, acts []Act) error {
	text, err := json.MarshalIndent(Script{Turns: [][]Act{acts}}, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

func act(path string) (int, error) {
	var script Script
	if err := read(path, &script); err != nil {
		return 2, err
	}
	turn, err := count(path+".turn", len(script.Turns))
	if err != nil || len(script.Turns) == 0 {
		return 2, errors.Join(err, fmt.Errorf("%s has no turn", path))
	}
	return perform(script.Turns[min(turn, len(script.Turns)-1)])
}

// count returns how often it was called before for a name, at most limit.
func count(name string, limit int) (int, error) {
	for n := 0; n < limit; n++ {
		file, err := os.OpenFile(name+"-"+strconv.Itoa(n), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		return n, file.Close()
	}
	return limit, nil
}

func read(path string, value any) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, value)
}

// none means that no act has ended the program.
const none = -1

func perform(acts []Act) (int, error) {
	code, err := performAll(acts)
	return max(code, 0), err
}

func performAll(acts []Act) (int, error) {
	for _, a := range acts {
		if a.Do == Exit {
			fmt.Fprintln(os.Stderr, "this command fails as the test says")
			return a.Code, nil
		}
		if err := a.perform(); err != nil {
			return 70, fmt.Errorf("%s %s: %w", a.Do, a.Path, err)
		}
	}
	return none, nil
}

// In performs an act that alters a file, in a folder.
func (a Act) In(folder string) error {
	a.Path = filepath.Join(folder, a.Path)
	return a.perform()
}

func (a Act) perform() error {
	switch a.Do {
	case Write:
		if err := os.MkdirAll(filepath.Dir(a.Path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(a.Path, []byte(a.Text), 0o644); err != nil || a.Mode == 0 {
			return err
		}
		return os.Chmod(a.Path, a.Mode)
	case Append:
		file, err := os.OpenFile(a.Path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer file.Close()
		_, err = file.WriteString(a.Text)
		return err
	case Remove:
		return os.RemoveAll(a.Path)
	case Mkdir:
		return os.MkdirAll(a.Path, 0o755)
	case Symlink:
		if err := os.RemoveAll(a.Path); err != nil {
			return err
		}
		return os.Symlink(a.Target, a.Path)
	case Hardlink:
		if err := os.RemoveAll(a.Path); err != nil {
			return err
		}
		return os.Link(a.Target, a.Path)
	case Rename:
		return os.Rename(a.Path, a.Target)
	case Chmod:
		return os.Chmod(a.Path, a.Mode)
	case Fifo:
		return syscall.Mkfifo(a.Path, 0o644)
	case Exec:
		command := exec.Command(a.Args[0], a.Args[1:]...)
		command.Stdout, command.Stderr = os.Stderr, os.Stderr
		_ = command.Run()
		return nil
	case Later:
		// Without our output, which the worker reads to its end.
		command := exec.Command("sh", append([]string{"-c", `sleep "$0"; exec "$@"`, fmt.Sprintf("%.3f", float64(a.Milliseconds)/1000)}, a.Args...)...)
		command.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		return command.Start()
	case Get:
		response, err := http.Get(a.Text)
		if err != nil {
			return err
		}
		return response.Body.Close()
	case Sleep:
		time.Sleep(time.Duration(a.Milliseconds) * time.Millisecond)
		return nil
	case Kill:
		return syscall.Kill(worker(), syscall.SIGKILL)
	}
	return errors.New("no such act")
}

// worker returns the process id of the worker: from the mark of its programs, or the
// parent's.
func worker() int {
	owner, _, _ := strings.Cut(mark(), "/")
	if parts := strings.Split(owner, "."); len(parts) == 3 {
		if pid, err := strconv.Atoi(parts[1]); err == nil {
			return pid
		}
	}
	return os.Getppid()
}

// mark is what the worker sets in the environment of its programs:
// WORKER/RUN/STEP/N.
func mark() string { return os.Getenv("MM_ORCHESTRATOR_STEP") }

func step() string {
	if parts := strings.Split(mark(), "/"); len(parts) == 4 {
		return parts[2]
	}
	return ""
}

// TrapFile is the name of trap n in the folder of traps.
func TrapFile(folder string, n int) string {
	return filepath.Join(folder, fmt.Sprintf("trap-%d.json", n))
}

// CallsFile is where intercepted calls are written, a line each, with what a trap
// did there.
const CallsFile = "calls"

// intercept does what the traps of a call say. Without a trap it becomes the
// program.
func intercept(folder, name, program string, args []string) (int, error) {
	trap, at := caught(folder, name, args)
	note(folder, name, args, at)
	argv := append([]string{name}, args...)
	if trap == nil {
		return 126, syscall.Exec(program, argv, os.Environ())
	}
	if code, err := performAll(trap.Before); code != none || err != nil {
		return code, err
	}
	command := &exec.Cmd{Path: program, Args: argv, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	if err := command.Start(); err != nil {
		return 126, err
	}
	during, err := performAll(trap.During)
	var exit *exec.ExitError
	if waitErr := command.Wait(); waitErr != nil && !errors.As(waitErr, &exit) {
		return 126, waitErr
	}
	if during != none || err != nil {
		return during, err
	}
	if code, err := performAll(trap.After); code != none || err != nil {
		return code, err
	}
	if state := command.ProcessState.Sys().(syscall.WaitStatus); state.Signaled() {
		return 128 + int(state.Signal()), nil
	}
	return command.ProcessState.ExitCode(), nil
}

// caught returns the trap that catches a call, and its number.
func caught(folder, name string, args []string) (*Trap, int) {
	for n := 0; ; n++ {
		var trap Trap
		if read(TrapFile(folder, n), &trap) != nil {
			return nil, none
		}
		matches := trap.Program == name && (trap.Step == "" || trap.Step == step())
		for _, word := range trap.Args {
			matches = matches && slices.Contains(args, word)
		}
		if !matches {
			continue
		}
		limit := trap.Skip + max(trap.Times, 1)
		if call, err := count(TrapFile(folder, n)+".call", limit); err == nil && call >= trap.Skip && call < limit {
			return &trap, n
		}
	}
}

func note(folder, name string, args []string, trap int) {
	file, err := os.OpenFile(filepath.Join(folder, CallsFile), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return
	}
	defer file.Close()
	text := ""
	if trap != none {
		text = fmt.Sprintf(" (trap %d)", trap)
	}
	fmt.Fprintf(file, "%s %-8s %s %s%s\n", time.Now().UTC().Format("15:04:05.000"), step(), name, strings.Join(args, " "), text)
}

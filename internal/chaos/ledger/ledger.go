// Package ledger records the effects that a plan's commands have in a chaos trial.
// The worker can neither read nor change these records.
//
// Plans run the program in the folder program instead of docker. It appends a
// record when it starts and one when it ends, each synced to disk before it
// continues, and one when it exits. Meanwhile it has a lock on the workspace. If
// the lock is taken, another command runs at the same time, which it records too.
package ledger

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The events of a Record.
const (
	Start = "start"
	End   = "end"
	// Exit is the last thing that a program does. Its record is not synced, so that
	// its time is not that of the disk.
	Exit    = "exit"
	Overlap = "overlap"
)

// A Record is a line of the ledger.
type Record struct {
	// At is the time in nanoseconds since the epoch.
	At   int64  `json:"at"`
	Run  string `json:"run"`
	Step string `json:"step"`
	// Command is the command's number in its step, from 1.
	Command int    `json:"command"`
	PID     int    `json:"pid"`
	Event   string `json:"event"`
}

// Read returns the records of a run, or of all runs for "". A missing file has none.
func Read(path, run string) ([]Record, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var records []Record
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		var r Record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return nil, fmt.Errorf("%s: %q: %w", path, lines.Text(), err)
		}
		if run == "" || r.Run == run {
			records = append(records, r)
		}
	}
	return records, lines.Err()
}

// Run is the program. With the arguments FILE RUN STEP COMMAND MILLISECONDS CODE it
// takes that long and returns the code. With FILE RUN STEP COMMAND run NAME PROGRAM
// ARG… it runs a program, under a name, and returns its exit code. For "-" as RUN and
// STEP it takes those of the mark that the worker sets in the environment of its
// programs.
func Run(args []string) (int, error) {
	usage := fmt.Errorf("want FILE RUN STEP COMMAND MILLISECONDS CODE, or FILE RUN STEP COMMAND run NAME PROGRAM ARG…, got %q", args)
	if len(args) < 6 {
		return 2, usage
	}
	number, err := strconv.Atoi(args[3])
	if err != nil {
		return 2, err
	}
	if args[4] == "run" && len(args) >= 7 {
		run, step := args[1], args[2]
		if run == "-" && step == "-" {
			mark := strings.Split(os.Getenv("MM_ORCHESTRATOR_STEP"), "/") // WORKER/RUN/STEP/N
			if len(mark) != 4 {
				return 2, fmt.Errorf("the worker has set no mark: %q", mark)
			}
			run, step = mark[1], mark[2]
		}
		return record(args[0], Record{Run: run, Step: step, Command: number}, func() (int, error) { return runProgram(args[5], args[6], args[7:]) })
	}
	if len(args) != 6 {
		return 2, usage
	}
	milliseconds, err1 := strconv.Atoi(args[4])
	code, err2 := strconv.Atoi(args[5])
	if err := errors.Join(err1, err2); err != nil {
		return 2, err
	}
	return record(args[0], Record{Run: args[1], Step: args[2], Command: number}, func() (int, error) {
		time.Sleep(time.Duration(milliseconds) * time.Millisecond)
		return code, nil
	})
}

// record does an act and writes its start and end to the ledger.
func record(path string, about Record, act func() (int, error)) (int, error) {
	file, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return 2, err
	}
	defer file.Close()
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return 2, err
	}
	defer lock.Close()
	write := func(event string) error {
		about.At, about.PID, about.Event = time.Now().UnixNano(), os.Getpid(), event
		line, _ := json.Marshal(about)
		_, err := file.Write(append(line, '\n'))
		return err
	}
	record := func(event string) error { return errors.Join(write(event), file.Sync()) }
	if err := record(Start); err != nil {
		return 2, err
	}
	// The kernel releases the lock of a killed command.
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		if err := record(Overlap); err != nil {
			return 2, err
		}
	}
	code, err := act()
	if err != nil {
		return 2, err
	}
	if err := record(End); err != nil {
		return 2, err
	}
	return code, write(Exit)
}

func runProgram(name, program string, args []string) (int, error) {
	command := &exec.Cmd{Path: program, Args: append([]string{name}, args...), Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr}
	err := command.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if state := command.ProcessState.Sys().(syscall.WaitStatus); state.Signaled() {
			return 128 + int(state.Signal()), nil
		}
		return command.ProcessState.ExitCode(), nil
	}
	return 0, err
}

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
	"strconv"
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

// Run is the program, with the arguments FILE RUN STEP COMMAND MILLISECONDS CODE. It
// returns its exit code.
func Run(args []string) (int, error) {
	if len(args) != 6 {
		return 2, fmt.Errorf("want FILE RUN STEP COMMAND MILLISECONDS CODE, got %q", args)
	}
	number, err1 := strconv.Atoi(args[3])
	milliseconds, err2 := strconv.Atoi(args[4])
	code, err3 := strconv.Atoi(args[5])
	if err := errors.Join(err1, err2, err3); err != nil {
		return 2, err
	}
	file, err := os.OpenFile(args[0], os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return 2, err
	}
	defer file.Close()
	lock, err := os.OpenFile(args[0]+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return 2, err
	}
	defer lock.Close()
	write := func(event string) error {
		line, _ := json.Marshal(Record{At: time.Now().UnixNano(), Run: args[1], Step: args[2], Command: number, PID: os.Getpid(), Event: event})
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
	time.Sleep(time.Duration(milliseconds) * time.Millisecond)
	if err := record(End); err != nil {
		return 2, err
	}
	return code, write(Exit)
}

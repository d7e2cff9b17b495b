//go:build chaos

package faultpoint

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// EnvDir names the environment variable for the folder that the harness shares
// with the workers. A program that is built with the tag chaos and started
// without the variable runs as usual.
const EnvDir = "MM_CHAOS_DIR"

// The files in that folder.
const (
	// TraceFile has one Moment per line, from all processes.
	TraceFile = "trace"
	// TrapFile holds the Trap that is set. A process that meets it renames it to
	// FiredFile, so that only one process is caught.
	TrapFile  = "trap"
	FiredFile = "fired"
	// ResumeFile, once it exists, lets a paused process continue.
	ResumeFile = "resume"
)

// A Moment is a line of the trace.
type Moment struct {
	// At is in nanoseconds since the epoch.
	At      int64    `json:"at"`
	PID     int      `json:"pid"`
	Point   Point    `json:"point"`
	Subject []string `json:"subject,omitempty"`
	// Fired says that the trap caught the process at this moment.
	Fired bool `json:"fired,omitempty"`
}

// A Trap kills or pauses the first process that reaches a point.
type Trap struct {
	Point Point `json:"point"`
	// Any limits the trap to subjects that contain all texts of at least one of
	// these lists. Without lists the trap catches every subject.
	Any [][]string `json:"any,omitempty"`
	// None excludes subjects that contain one of these texts.
	None []string `json:"none,omitempty"`
	// Occurrence is the number of the hit, counted in each process, that the
	// trap catches. Zero means the first.
	Occurrence int `json:"occurrence,omitempty"`
	// Hold pauses the process at the point until ResumeFile exists. Otherwise
	// the process is killed.
	Hold bool `json:"hold,omitempty"`
	// ID distinguishes this trap from earlier ones, whose hits do not count.
	ID int64 `json:"id"`
}

var state struct {
	sync.Mutex
	dir   string
	trace *os.File
	known int64
	count int
}

func init() {
	state.dir = os.Getenv(EnvDir)
	if state.dir == "" {
		return
	}
	var err error
	state.trace, err = os.OpenFile(filepath.Join(state.dir, TraceFile), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		panic(fmt.Sprintf("chaos: %v", err))
	}
}

// Hit marks a moment. It returns unless a trap kills or pauses the process.
func Hit(point Point, subject ...string) {
	if state.dir == "" {
		return
	}
	trap, caught := caughtAt(point, subject)
	moment, _ := json.Marshal(Moment{At: time.Now().UnixNano(), PID: os.Getpid(), Point: point, Subject: subject, Fired: caught})
	_, _ = state.trace.Write(append(moment, '\n'))
	switch {
	case !caught:
	case trap.Hold:
		for resume := filepath.Join(state.dir, ResumeFile); ; time.Sleep(2 * time.Millisecond) {
			// The removal tells the harness that the process continues.
			if os.Remove(resume) == nil {
				return
			}
		}
	default:
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // until the signal arrives
	}
}

// Number formats a number for a subject: "#1", "#2" and so on.
func Number(n int) string { return fmt.Sprintf("#%d", n) }

// caughtAt counts the hit and returns the trap if it catches this one.
func caughtAt(point Point, subject []string) (Trap, bool) {
	state.Lock()
	defer state.Unlock()
	path := filepath.Join(state.dir, TrapFile)
	text, err := os.ReadFile(path)
	if err != nil {
		return Trap{}, false
	}
	var trap Trap
	if json.Unmarshal(text, &trap) != nil || trap.Point != point || !trap.matches(strings.Join(subject, " ")) {
		return Trap{}, false
	}
	if trap.ID != state.known {
		state.known, state.count = trap.ID, 0
	}
	if state.count++; state.count < trap.Occurrence {
		return Trap{}, false
	}
	return trap, os.Rename(path, filepath.Join(state.dir, FiredFile)) == nil
}

func (t Trap) matches(subject string) bool {
	for _, text := range t.None {
		if strings.Contains(subject, text) {
			return false
		}
	}
	if len(t.Any) == 0 {
		return true
	}
	for _, all := range t.Any {
		contains := true
		for _, text := range all {
			contains = contains && strings.Contains(subject, text)
		}
		if contains {
			return true
		}
	}
	return false
}

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

// EnvDir names the folder through which the harness and the workers talk. A
// program that is built with the tag chaos and started without it runs as any
// other.
const EnvDir = "MM_CHAOS_DIR"

// The files in it.
const (
	// TraceFile has one Moment per line, of all processes.
	TraceFile = "trace"
	// TrapFile is the Trap that is set. Whoever runs into it renames it to
	// FiredFile, so that one process does and no other.
	TrapFile  = "trap"
	FiredFile = "fired"
	// ResumeFile, when it appears, lets a held process go on.
	ResumeFile = "resume"
)

// A Moment is a line of the trace.
type Moment struct {
	// At is in nanoseconds since the epoch.
	At      int64    `json:"at"`
	PID     int      `json:"pid"`
	Point   Point    `json:"point"`
	Subject []string `json:"subject,omitempty"`
	// Fired says that the trap caught the process here.
	Fired bool `json:"fired,omitempty"`
}

// A Trap waits for a process at a point.
type Trap struct {
	Point Point `json:"point"`
	// Any: the subject must contain all texts of one of these lists. Without
	// lists every subject will do.
	Any [][]string `json:"any,omitempty"`
	// None: and none of these texts.
	None []string `json:"none,omitempty"`
	// Occurrence is the how-many-th hit in one process catches it. Zero is the
	// first.
	Occurrence int `json:"occurrence,omitempty"`
	// Hold keeps the process alive at the point until ResumeFile exists.
	// Otherwise it is killed.
	Hold bool `json:"hold,omitempty"`
	// ID tells traps apart.
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

// Hit marks a moment.
func Hit(point Point, subject ...string) {
	if state.dir == "" {
		return
	}
	trap, caught := look(point, subject)
	moment, _ := json.Marshal(Moment{At: time.Now().UnixNano(), PID: os.Getpid(), Point: point, Subject: subject, Fired: caught})
	_, _ = state.trace.Write(append(moment, '\n'))
	switch {
	case !caught:
	case trap.Hold:
		for resume := filepath.Join(state.dir, ResumeFile); ; time.Sleep(2 * time.Millisecond) {
			// Removing it tells the harness that it was seen.
			if os.Remove(resume) == nil {
				return
			}
		}
	default:
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // death is a moment away
	}
}

// Number is a subject that counts: "#1", "#2" and so on.
func Number(n int) string { return fmt.Sprintf("#%d", n) }

func look(point Point, subject []string) (Trap, bool) {
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

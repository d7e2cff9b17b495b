package chaos

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// A moment is package faultpoint's Moment: a line of the trace.
type moment struct {
	At      int64            `json:"at"`
	PID     int              `json:"pid"`
	Point   faultpoint.Point `json:"point"`
	Subject []string         `json:"subject"`
	Fired   bool             `json:"fired"`
}

// about says whether the moment names the text in its subject.
func (m moment) about(text string) bool { return slices.Contains(m.Subject, text) }

// traceReader reads the trace while workers append to it.
type traceReader struct {
	path   string
	offset int64
	// moments since the last forget.
	moments []moment
	// using says by process whether it has a connection to the peer, according to
	// the process. It is kept from trial to trial.
	using map[peer]map[int]bool
}

// read reads what was written since the last call.
func (t *traceReader) read() ([]moment, error) {
	file, err := os.Open(t.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.NewSectionReader(file, t.offset, 1<<40))
	if err != nil {
		return nil, err
	}
	end := bytes.LastIndexByte(text, '\n') + 1
	t.offset += int64(end)
	for line := range bytes.Lines(text[:end]) {
		var m moment
		if json.Unmarshal(line, &m) == nil {
			t.moments = append(t.moments, m)
			t.note(m)
		}
	}
	return t.moments, nil
}

// note updates which processes use their servers.
func (t *traceReader) note(m moment) {
	for p, turn := range connectionPoints {
		if m.Point != turn.lost && m.Point != turn.back {
			continue
		}
		if t.using == nil {
			t.using = map[peer]map[int]bool{toBroker: {}, toDatabase: {}}
		}
		t.using[p][m.PID] = m.Point == turn.back
	}
}

// forget drops the moments of the last trial.
func (t *traceReader) forget() { t.moments = nil }

// unackedTasks counts the tasks whose message a living process has and has not
// settled. It compares task ids, because a delivery whose connection was lost is
// never settled, but its redelivery is.
func unackedTasks(moments []moment, alive map[int]bool) int {
	type delivery struct {
		pid int
		id  string
	}
	unacked := map[delivery]bool{}
	for _, m := range moments {
		if !alive[m.PID] || len(m.Subject) == 0 {
			continue
		}
		switch m.Point {
		case faultpoint.DeliveryReceived:
			unacked[delivery{m.PID, m.Subject[0]}] = true
		case faultpoint.SettleBefore, faultpoint.DeliveryDropped:
			delete(unacked, delivery{m.PID, m.Subject[0]})
		}
	}
	return len(unacked)
}

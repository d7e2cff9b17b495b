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

// traceReader reads the trace as it grows.
type traceReader struct {
	path   string
	offset int64
	// moments since the last forget.
	moments []moment
	// using says by process whether it has a connection to the peer, as far as
	// it knows. It is never forgotten.
	using map[peer]map[int]bool
}

// read takes in what was written since the last time.
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

// note follows who uses its servers.
func (t *traceReader) note(m moment) {
	for p, turn := range turns {
		if m.Point != turn.lost && m.Point != turn.back {
			continue
		}
		if t.using == nil {
			t.using = map[peer]map[int]bool{toBroker: {}, toDatabase: {}}
		}
		t.using[p][m.PID] = m.Point == turn.back
	}
}

// forget begins a new trial.
func (t *traceReader) forget() { t.moments = nil }

// open is how many tasks are in the hands of living processes. It goes by ids:
// a delivery whose connection was lost is never settled, the one that came
// again for it is.
func open(moments []moment, alive map[int]bool) int {
	type hand struct {
		pid int
		id  string
	}
	held := map[hand]bool{}
	for _, m := range moments {
		if !alive[m.PID] || len(m.Subject) == 0 {
			continue
		}
		switch m.Point {
		case faultpoint.DeliveryReceived:
			held[hand{m.PID, m.Subject[0]}] = true
		case faultpoint.SettleBefore, faultpoint.DeliveryDropped:
			delete(held, hand{m.PID, m.Subject[0]})
		}
	}
	return len(held)
}

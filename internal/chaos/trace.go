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
		}
	}
	return t.moments, nil
}

// forget begins a new trial.
func (t *traceReader) forget() { t.moments = nil }

// open is how many deliveries are in the hands of living processes.
func open(moments []moment, alive map[int]bool) int {
	n := 0
	for _, m := range moments {
		if !alive[m.PID] {
			continue
		}
		switch m.Point {
		case faultpoint.DeliveryReceived:
			n++
		case faultpoint.SettleBefore:
			n--
		}
	}
	return n
}

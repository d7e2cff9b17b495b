package change

import (
	"encoding/json"
	"fmt"
)

// Version is the format of a [Record] that this program writes. It rises with
// every field that an older program would lose when it writes the record again.
const Version = 2

// plainVersion is the format of a record without Usage, which older programs can read
// and write.
const plainVersion = 1

// A Record says what a run changes. It has ids and refs, never content, and no
// names of files, which need not be valid UTF-8.
type Record struct {
	// Version is the format; Encode sets it.
	Version int `json:"version"`
	// Files is the change in the workspace; nil until its state before the run is
	// captured.
	Files *Files `json:"files,omitempty"`
	// Image is the change of the service; nil until its state before the run is
	// recorded.
	Image *Image `json:"image,omitempty"`
	// Helper is the last helper container that was started for the run, nil for
	// none.
	Helper *Helper `json:"helper,omitempty"`
	// Submission names the chain of steps for which the workspace is ready, by the id
	// of its first task: patch ran in it, or its first step has found or made the
	// run's change again.
	Submission string `json:"submission,omitempty"`
	// Undone says that a rollback has brought all of it back to the state before
	// the run, and has checked that. The step that changes something again clears
	// it first.
	Undone bool `json:"undone,omitempty"`
	// Refused says that a step was refused before it changed anything, when there
	// was nothing to take back. The next step that begins clears it first.
	Refused bool `json:"refused,omitempty"`
	// Usage is nil for a run without limits.
	Usage *Usage `json:"usage,omitempty"`
}

// Encode returns the record as the database keeps it.
func (r Record) Encode() (json.RawMessage, error) {
	r.Version = plainVersion
	if r.Usage != nil {
		r.Version = Version
	}
	text, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("the record of a change cannot be encoded: %w", err)
	}
	return text, nil
}

// Decode reads what Encode wrote; nothing is an empty record. It refuses a record
// of a newer version: to act on a part of it could destroy what the rest protects.
func Decode(text json.RawMessage) (Record, error) {
	if len(text) == 0 {
		return Record{Version: plainVersion}, nil
	}
	var version struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(text, &version); err != nil {
		return Record{}, fmt.Errorf("the record of the run's change cannot be read: %w", err)
	}
	switch {
	case version.Version > Version:
		return Record{}, fmt.Errorf("a newer mm-orchestrator has recorded what the run changes (format %d, this program knows %d): run its steps with a worker of that version", version.Version, Version)
	case version.Version < 1:
		return Record{}, fmt.Errorf("the record of the run's change has format %d, which no version of mm-orchestrator writes", version.Version)
	}
	var r Record
	if err := json.Unmarshal(text, &r); err != nil {
		return Record{}, fmt.Errorf("the record of the run's change cannot be read: %w", err)
	}
	return r, nil
}

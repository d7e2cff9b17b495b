package codex

import (
	"bytes"
	"encoding/json"
)

// maxLine is the longest line of Codex that is read, in bytes. A longer one, such as that
// with the output of a command, goes to the log and is not read.
const maxLine = 1 << 20

// An event is a line that `codex exec --json` prints.
type event struct {
	Type     string `json:"type"`
	ThreadID string `json:"thread_id"`
	Message  string `json:"message"`
	Item     struct {
		Type string `json:"type"`
		Text string `json:"text"`
	} `json:"item"`
	Error struct {
		Message string `json:"message"`
	} `json:"error"`
	Usage Usage `json:"usage"`
}

// An eventReader reads the lines of Codex. Its memory does not grow with them.
type eventReader struct {
	line []byte
	// skip says that the line is too long, and that its rest is skipped.
	skip bool

	// thread is the id of the conversation.
	thread string
	// events counts the lines that are events, foreign those that are not.
	events, foreign int
	// message is the last one of the model, failure the last error.
	message, failure string
	completed        bool
	failed           bool
	usage            Usage
}

// Write implements [io.Writer]. It never fails.
func (r *eventReader) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		part, rest, ended := bytes.Cut(p, []byte{'\n'})
		p = rest
		if !r.skip {
			if len(r.line)+len(part) > maxLine {
				r.skip, r.line = true, r.line[:0]
			} else {
				r.line = append(r.line, part...)
			}
		}
		if ended {
			r.end()
		}
	}
	return n, nil
}

// end reads the line that has ended.
func (r *eventReader) end() {
	line := bytes.TrimSpace(r.line)
	if !r.skip && len(line) > 0 {
		r.read(line)
	}
	r.skip, r.line = false, r.line[:0]
}

func (r *eventReader) read(line []byte) {
	var e event
	if json.Unmarshal(line, &e) != nil || e.Type == "" {
		r.foreign++
		return
	}
	r.events++
	switch e.Type {
	case "thread.started":
		r.thread = trimmed(e.ThreadID)
	case "turn.started":
		r.completed, r.failed = false, false
	case "item.completed":
		if e.Item.Type == "agent_message" {
			r.message = trimmed(e.Item.Text)
		}
	case "turn.completed":
		r.completed = true
		r.usage = e.Usage
	case "turn.failed":
		r.failed = true
		r.failure = trimmed(e.Error.Message)
	case "error":
		r.failure = trimmed(e.Message)
	}
}

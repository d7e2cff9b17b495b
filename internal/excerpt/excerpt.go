// Package excerpt keeps a part of what a program prints, in memory of a fixed size.
package excerpt

import (
	"bytes"
	"sync"
)

// white are the characters between words.
const white = " \t\r\n"

// maxCredential is about the length of the longest credential, in bytes.
const maxCredential = 256

// A Head keeps the beginning of what is written to it. Writing to it never fails.
type Head struct {
	// Limit is the most that is kept, in bytes.
	Limit int
	Kept  []byte
	// Full says that bytes beyond the limit were dropped.
	Full bool
	// OnFull is called when the first byte is dropped. It may be nil.
	OnFull func()
}

// Write implements [io.Writer].
func (h *Head) Write(p []byte) (int, error) {
	keep := p[:min(len(p), h.Limit-len(h.Kept))]
	if len(keep) < len(p) && !h.Full {
		h.Full = true
		if h.OnFull != nil {
			h.OnFull()
		}
	}
	h.Kept = append(h.Kept, keep...)
	return len(p), nil
}

// Words returns what is kept without a word that may have lost its end: half of a
// credential is none that a redactor knows. Of a word that is longer than a credential,
// it leaves out as much as one has.
func (h *Head) Words() string {
	if !h.Full {
		return string(h.Kept)
	}
	least := max(0, len(h.Kept)-maxCredential)
	return string(h.Kept[:least+bytes.LastIndexAny(h.Kept[least:], white)+1])
}

// A Tail keeps the end of what is written to it. Writing to it never fails, and it may be
// read meanwhile.
type Tail struct {
	// Limit is the most that is kept, in bytes.
	Limit int

	mu   sync.Mutex
	kept []byte
	cut  bool
}

// Write implements [io.Writer].
func (t *Tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cut = t.cut || len(t.kept)+len(p) > t.Limit
	t.kept = append(t.kept, p[max(0, len(p)-t.Limit):]...)
	t.kept = t.kept[max(0, len(t.kept)-t.Limit):]
	return len(p), nil
}

// String returns what is kept.
func (t *Tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.kept)
}

// Words returns what is kept without a word that may have lost its beginning, see
// [Head.Words].
func (t *Tail) Words() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.cut {
		return string(t.kept)
	}
	most := min(len(t.kept), maxCredential)
	first := bytes.IndexAny(t.kept[:most], white)
	if first < 0 {
		first = most
	}
	return string(t.kept[first:])
}

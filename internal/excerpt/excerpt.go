// Package excerpt keeps a part of what a program prints, in memory of a fixed size.
package excerpt

import "sync"

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

// IsCut says that bytes before those that are kept were dropped.
func (t *Tail) IsCut() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.cut
}

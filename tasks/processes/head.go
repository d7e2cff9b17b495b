package processes

// A Head keeps the beginning of a program's output, in memory. Writing to it never
// fails.
type Head struct {
	// Limit is the most that is kept, in bytes.
	Limit int
	Kept  []byte
	// Full says that bytes beyond the limit were dropped.
	Full bool
}

// Write implements [io.Writer].
func (h *Head) Write(p []byte) (int, error) {
	keep := p[:min(len(p), h.Limit-len(h.Kept))]
	h.Full = h.Full || len(keep) < len(p)
	h.Kept = append(h.Kept, keep...)
	return len(p), nil
}

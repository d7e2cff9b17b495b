package main

import (
	"bytes"
	"strings"
	"sync"
)

// lockedBuffer receives a command's output while another goroutine reads it.
type lockedBuffer struct {
	mu     sync.Mutex // guards buffer
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) text() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return strings.TrimSpace(b.buffer.String())
}

func (b *lockedBuffer) lastLine() string {
	text := b.text()
	return text[strings.LastIndexByte(text, '\n')+1:]
}

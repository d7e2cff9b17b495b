package main

import (
	"io"
	"log/slog"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// newLogger writes to w: text on a terminal, JSON otherwise, unless the
// configuration says which. Nothing that the redactor knows passes.
func newLogger(w io.Writer, c *configuration, terminal bool, redactor *artifacts.Redactor) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel}
	var handler slog.Handler = slog.NewJSONHandler(w, options)
	if c.LogFormat == "text" || (c.LogFormat == "auto" && terminal) {
		handler = slog.NewTextHandler(w, options)
	}
	return slog.New(redactor.Handler(handler))
}

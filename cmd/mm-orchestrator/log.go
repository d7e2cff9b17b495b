package main

import (
	"io"
	"log/slog"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// newLogger writes to w: text on a terminal, JSON otherwise, unless the
// configuration says which. Nothing that the redactor knows passes.
func newLogger(w io.Writer, c *configuration, terminal bool, redactor *artifacts.Redactor) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel, ReplaceAttr: readableDuration}
	var handler slog.Handler = slog.NewJSONHandler(w, options)
	if c.LogFormat == "text" || (c.LogFormat == "auto" && terminal) {
		handler = slog.NewTextHandler(w, options)
	}
	return slog.New(redactor.Handler(handler))
}

// readableDuration writes 1m30s, which JSON would show as nanoseconds.
func readableDuration(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

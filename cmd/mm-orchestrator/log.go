package main

import (
	"io"
	"log/slog"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// newLogger logs to w, as text on a terminal and as JSON otherwise, unless the
// configuration sets the format. The redactor removes secrets from each record.
func newLogger(w io.Writer, c *configuration, terminal bool, redactor *artifacts.Redactor) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel, ReplaceAttr: readableDuration}
	var handler slog.Handler = slog.NewJSONHandler(w, options)
	if c.LogFormat == "text" || (c.LogFormat == "auto" && terminal) {
		handler = slog.NewTextHandler(w, options)
	}
	return slog.New(redactor.Handler(handler))
}

// readableDuration formats durations as 1m30s; JSON would have nanoseconds.
func readableDuration(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

package worker

import (
	"context"
	"fmt"
	"log/slog"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// guardedLog is a program's log handler whose panics do not reach the worker: a
// line that cannot be written must not cost the task that it is about. In place of
// the line it writes one that says so.
type guardedLog struct{ slog.Handler }

func guardLogger(l *slog.Logger) *slog.Logger {
	if _, guarded := l.Handler().(guardedLog); guarded {
		return l
	}
	return slog.New(guardedLog{l.Handler()})
}

func (g guardedLog) Enabled(ctx context.Context, level slog.Level) (enabled bool) {
	defer func() { _ = recover() }()
	return g.Handler.Enabled(ctx, level)
}

func (g guardedLog) Handle(ctx context.Context, record slog.Record) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("log handler panicked: %v", p)
			defer func() { _ = recover() }()
			_ = g.Handler.Handle(ctx, slog.NewRecord(record.Time, record.Level, record.Message+" (the log handler panicked, and the line is incomplete)", record.PC))
		}
	}()
	return g.Handler.Handle(ctx, record)
}

func (g guardedLog) WithAttrs(attrs []slog.Attr) (h slog.Handler) {
	defer func() {
		if recover() != nil {
			h = g
		}
	}()
	return guardedLog{g.Handler.WithAttrs(attrs)}
}

func (g guardedLog) WithGroup(name string) (h slog.Handler) {
	defer func() {
		if recover() != nil {
			h = g
		}
	}()
	return guardedLog{g.Handler.WithGroup(name)}
}

// reportPanic logs a panic of this package or of package protocol. The message is
// rejected, so that it does not end the worker or return for ever.
func (w *Worker) reportPanic(p any) {
	w.metrics.bad.WithLabelValues(badPanic).Inc()
	w.cfg.Logger.Error("message is rejected: its handling has panicked", "error", fmt.Sprint(p), "stack", goStack())
}

// catch is deferred. It makes a panic of the program's code, such as its result backend,
// the error of the function that calls it.
func catch(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("panic: %v\n%s", p, goStack())
	}
}

// goStack returns the stack of a panic of this package, for the log.
func goStack() string {
	var lines []string
	for _, f := range panicFrames() {
		lines = append(lines, fmt.Sprintf("%s %s:%d", f.Function, f.File, f.Line))
	}
	return strings.Join(lines, "\n")
}

// taskLog returns a logger with the keys that every log line about a task has.
func (w *Worker) taskLog(m *protocol.Message) *slog.Logger {
	return w.cfg.Logger.With("task_id", clip(m.ID), "task", clip(m.Task), "root_id", clip(m.RootID))
}

// clip shortens text from producers, so that it cannot flood the log.
func clip(text string) string {
	const most = 200
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most], "") + "..."
}

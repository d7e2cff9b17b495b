package worker

import (
	"context"
	"fmt"
	"log/slog"
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

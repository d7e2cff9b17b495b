package artifacts

import (
	"context"
	"fmt"
	"log/slog"
)

// Handler returns a slog handler that redacts the message and every attribute
// before it passes them to next, so that no log line contains a secret.
func (r *Redactor) Handler(next slog.Handler) slog.Handler {
	return redactingHandler{redactor: r, next: next}
}

type redactingHandler struct {
	redactor *Redactor
	next     slog.Handler
}

func (h redactingHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.next.Enabled(ctx, level)
}

func (h redactingHandler) Handle(ctx context.Context, record slog.Record) error {
	clean := slog.NewRecord(record.Time, record.Level, h.redactor.String(record.Message), record.PC)
	record.Attrs(func(a slog.Attr) bool {
		clean.AddAttrs(h.attr(a))
		return true
	})
	return h.next.Handle(ctx, clean)
}

func (h redactingHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	clean := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		clean[i] = h.attr(a)
	}
	return redactingHandler{redactor: h.redactor, next: h.next.WithAttrs(clean)}
}

func (h redactingHandler) WithGroup(name string) slog.Handler {
	return redactingHandler{redactor: h.redactor, next: h.next.WithGroup(name)}
}

func (h redactingHandler) attr(a slog.Attr) slog.Attr {
	value := a.Value.Resolve()
	switch value.Kind() {
	case slog.KindString:
		return slog.String(a.Key, h.redactor.String(value.String()))
	case slog.KindGroup:
		attrs := value.Group()
		clean := make([]slog.Attr, len(attrs))
		for i, inner := range attrs {
			clean[i] = h.attr(inner)
		}
		return slog.Attr{Key: a.Key, Value: slog.GroupValue(clean...)}
	case slog.KindAny:
		switch v := value.Any().(type) {
		case error:
			return slog.String(a.Key, h.redactor.String(v.Error()))
		default:
			// A value that prints without a secret is passed on unchanged,
			// so that a JSON handler writes its structure.
			text := fmt.Sprintf("%+v", v)
			if clean := h.redactor.String(text); clean != text {
				return slog.String(a.Key, clean)
			}
		}
	}
	return a
}

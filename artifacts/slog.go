package artifacts

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
)

// Handler returns a slog handler that redacts the message, the keys and values of every
// attribute and the names of groups before it passes them to next, so that no log line
// contains a secret.
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
	return redactingHandler{redactor: h.redactor, next: h.next.WithGroup(h.redactor.String(name))}
}

func (h redactingHandler) attr(a slog.Attr) slog.Attr {
	value := a.Value.Resolve()
	key := h.redactor.String(a.Key)
	switch value.Kind() {
	case slog.KindString:
		return slog.String(key, h.redactor.String(value.String()))
	case slog.KindGroup:
		attrs := value.Group()
		clean := make([]slog.Attr, len(attrs))
		for i, inner := range attrs {
			clean[i] = h.attr(inner)
		}
		return slog.Attr{Key: key, Value: slog.GroupValue(clean...)}
	case slog.KindAny:
		switch v := value.Any().(type) {
		case error:
			return slog.String(key, h.redactor.String(v.Error()))
		default:
			// A value that prints without a secret is passed on unchanged, so that a
			// JSON handler writes its structure. That handler follows pointers and
			// knows MarshalJSON, which fmt does not.
			text := fmt.Sprintf("%+v", v) // its String method, if there is one
			if clean := h.redactor.String(text); clean != text {
				return slog.String(key, clean)
			}
			encoded, err := json.Marshal(v)
			if err != nil {
				return slog.String(key, text)
			}
			if clean := h.redactor.String(string(encoded)); clean != string(encoded) {
				return slog.String(key, clean)
			}
		}
	}
	return slog.Attr{Key: key, Value: value}
}

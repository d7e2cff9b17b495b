package protocol

import (
	"encoding/json"
	"fmt"
	"strings"
)

// NewException returns an exception whose arguments are strings, as those of
// nearly all exceptions are. module is "builtins" for Python's own exceptions.
func NewException(module, typ string, args ...string) Exception {
	e := Exception{Type: typ, Module: module, Args: []json.RawMessage{}}
	for _, a := range args {
		e.Args = append(e.Args, quoteJSON(a))
	}
	return e
}

// NotRegistered returns Celery's exception for a task name without a handler
// (docs/celery.md#bad-messages).
func NotRegistered(task string) Exception {
	return NewException("celery.exceptions", "NotRegistered", task)
}

// Repr returns what Python's repr prints: Type('arg', 42).
func (e Exception) Repr() string {
	parts := make([]string, len(e.Args))
	for i, a := range e.Args {
		parts[i] = pyRepr(a)
	}
	return e.Type + "(" + strings.Join(parts, ", ") + ")"
}

// Text returns what Python's str prints: "" without arguments, the argument
// itself if there is one, otherwise a tuple of the arguments.
func (e Exception) Text() string {
	switch {
	case len(e.Args) == 0:
		return ""
	case len(e.Args) > 1:
		parts := make([]string, len(e.Args))
		for i, a := range e.Args {
			parts[i] = pyRepr(a)
		}
		return "(" + strings.Join(parts, ", ") + ")"
	case kindOf(e.Args[0]) == kindString && !(e.Type == "KeyError" && e.Module == "builtins"):
		return textOf(e.Args[0])
	}
	return pyRepr(e.Args[0])
}

// Frame is one stack frame of a [Traceback].
type Frame struct {
	// File is the source file, Line the line in it.
	File string
	Line int
	// Function is the name of the function.
	Function string
}

// Traceback returns text as Python's traceback module prints it, the most
// recent call last. The last line is "Type: message" for exceptions of
// builtins and "module.Type: message" for others. Without frames there is only
// that line.
func Traceback(e Exception, frames ...Frame) string {
	var out strings.Builder
	if len(frames) > 0 {
		out.WriteString("Traceback (most recent call last):\n")
	}
	for _, f := range frames {
		fmt.Fprintf(&out, "  File \"%s\", line %d, in %s\n", f.File, f.Line, f.Function)
	}
	if e.Module != "" && e.Module != "builtins" && e.Module != "__main__" {
		out.WriteString(e.Module + ".")
	}
	out.WriteString(e.Type)
	if text := e.Text(); text != "" {
		out.WriteString(": " + text)
	}
	return printable(out.String()) + "\n"
}

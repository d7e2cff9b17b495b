package protocol

import "encoding/json"

// NewException makes an exception whose arguments are texts, which is what
// nearly all exceptions have. Module is "builtins" for Python's own.
func NewException(module, typ string, args ...string) Exception {
	e := Exception{Type: typ, Module: module, Args: []json.RawMessage{}}
	for _, a := range args {
		e.Args = append(e.Args, quoteJSON(a))
	}
	return e
}

// NotRegistered is Celery's exception for a task name that no handler has
// (contract 2.5).
func NotRegistered(task string) Exception {
	return NewException("celery.exceptions", "NotRegistered", task)
}

// Repr is the exception as Python's repr prints it: Type('arg', 42).
func (e Exception) Repr() string { return exceptionRepr(e) }

// Text is the exception as Python's str prints it: nothing without
// arguments, the argument itself if there is one, else a tuple of them.
func (e Exception) Text() string { return exceptionText(e) }

// Frame is one line of a traceback.
type Frame struct {
	File     string
	Line     int
	Function string
}

// Traceback is text as Python's traceback module prints it, the most recent
// call last. Its last line is "Type: message" for exceptions of builtins and
// "module.Type: message" for others.
func Traceback(e Exception, frames ...Frame) string { return tracebackText(e, frames) }

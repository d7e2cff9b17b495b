package protocol

import "errors"

// ErrUnsupportedCanvas is what a *CanvasError is, for errors.Is.
var ErrUnsupportedCanvas = errors.New("unsupported canvas")

// CanvasError says that what follows a task cannot be started by this worker:
// a chord. It is permanent.
type CanvasError struct {
	TaskID string
	// Element is the name of the offending signature, or "chord" for a task
	// that is part of a chord's header.
	Element string
}

// Error says what cannot be followed and what to do.
func (e *CanvasError) Error() string {
	return "what follows task id " + quote(e.TaskID) + " needs " + quote(e.Element) +
		", which this worker cannot start: run the task on a Python worker, or replace the chord by a chain"
}

// Is reports whether target is ErrUnsupportedCanvas.
func (e *CanvasError) Is(target error) bool { return target == ErrUnsupportedCanvas }

// Exception is what the FAILURE row says.
func (e *CanvasError) Exception() Exception {
	return NewException("builtins", "NotImplementedError", e.Error())
}

// CheckCanvas says whether everything that follows m, after success or
// failure, can be started. A worker asks before it runs the task's body, and
// fails the task with the error's Exception otherwise (contract 4.6). The
// error is a *CanvasError.
func CheckCanvas(m *Message) error { return checkCanvas(m) }

package worker

import (
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// ErrorClass gives errors of Go a class of Python, so that a caller in Python can catch
// them. An [Error] in an error's chain takes precedence.
type ErrorClass struct {
	// Match says which errors have the class: see [ErrorIs] and [ErrorAs]. Required.
	Match func(error) bool
	// Module and Type name the class, such as "shop.errors" and "OutOfStock". Type is
	// required; Module defaults to "builtins".
	Module, Type string
	// Args makes the arguments of the exception. Defaults to the text of the error as the
	// only one.
	Args func(error) []any
}

// ErrorClasses gives errors of the task their classes. The first that matches applies,
// those of the task before those of Config.ErrorClasses. An error without one is a
// RuntimeError.
func ErrorClasses(classes ...ErrorClass) TaskOption {
	return func(r *registration) { r.classes = append(r.classes, classes...) }
}

// ErrorIs matches an error that is one of the given ones, as [errors.Is] says.
func ErrorIs(targets ...error) func(error) bool {
	return func(err error) bool {
		for _, target := range targets {
			if errors.Is(err, target) {
				return true
			}
		}
		return false
	}
}

// ErrorAs matches an error of the type T, as [errors.As] says.
func ErrorAs[T error]() func(error) bool {
	return func(err error) bool {
		var target T
		return errors.As(err, &target)
	}
}

// classify gives an error the class that the task's registration has for it.
func (r registration) classify(err error) error {
	if err == nil {
		return nil
	}
	if _, typed := asValue[Error](err); typed {
		return err
	}
	var known interface{ Exception() protocol.Exception }
	if errors.As(err, &known) {
		return err
	}
	for _, class := range r.classes {
		if !class.Match(err) {
			continue
		}
		classified := &Error{Module: class.Module, Type: class.Type, Err: err}
		if class.Args != nil {
			if classified.Args = class.Args(err); classified.Args == nil {
				classified.Args = []any{}
			}
		}
		return classified
	}
	return err
}

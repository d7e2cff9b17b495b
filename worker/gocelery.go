package worker

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// KwargsTask is a task as package gocelery has it: its interface CeleryTask. See
// [FromGocelery].
type KwargsTask interface {
	// ParseKwargs receives the keyword arguments, as encoding/json decodes them: a
	// number is a float64.
	ParseKwargs(kwargs map[string]any) error
	// RunTask returns the result.
	RunTask() (any, error)
}

// FromGocelery returns a [Handler] for a task that was written for package gocelery,
// for [Worker.Register]. The task is a pointer to a struct, or any other value.
//
// Each call works on a copy of the value that was registered, so that calls may run at
// the same time: they share what its fields point to, and nothing else. (gocelery
// itself calls the registered value.) An error of ParseKwargs is a TypeError;
// positional arguments are too.
func FromGocelery(task KwargsTask) Handler {
	registered := reflect.ValueOf(task)
	return HandlerFunc(func(_ context.Context, message *Task) (any, error) {
		if n := len(message.Args); n > 0 {
			return nil, pythonTypeError(message.Task, "takes 0 positional arguments but %d %s given", n, wereGiven(n))
		}
		kwargs := make(map[string]any, len(message.Kwargs))
		for _, member := range message.Kwargs {
			value, err := plainJSON(member.Value)
			if err != nil {
				return nil, pythonTypeError(message.Task, "argument '%s': %v", member.Key, err)
			}
			kwargs[member.Key] = value
		}
		call := task
		if registered.Kind() == reflect.Pointer && !registered.IsNil() {
			copied := reflect.New(registered.Type().Elem())
			copied.Elem().Set(registered.Elem())
			call = copied.Interface().(KwargsTask)
		}
		if err := call.ParseKwargs(kwargs); err != nil {
			return nil, &Error{Type: "TypeError", Args: []any{err.Error()}, Err: err}
		}
		return call.RunTask()
	})
}

// plainJSON decodes as encoding/json does. Python's NaN and Infinity, which that
// refuses, become floats, and everything in a type wrapper what package protocol makes
// of it.
func plainJSON(text json.RawMessage) (value any, err error) {
	if json.Unmarshal(text, &value) == nil {
		return value, nil
	}
	return value, protocol.DecodeJSON(text, &value)
}

// Func returns a [Handler] that calls a function with the positional arguments of the
// task, as package gocelery does, for [Worker.Register]. The function may have a
// context.Context first, then one parameter for each argument, and may be variadic. It
// returns a result, an error, both in this order, or nothing.
//
// [Handle] is for new tasks: its arguments have names, so that Python can also give
// them by keyword.
//
// Func panics when fn is not such a function: that is an error in the program.
func Func(fn any) Handler {
	f := reflect.ValueOf(fn)
	if f.Kind() != reflect.Func || f.IsNil() {
		panic(fmt.Sprintf("worker: Func needs a function, not %T", fn))
	}
	t := f.Type()
	contextType, errorType := reflect.TypeFor[context.Context](), reflect.TypeFor[error]()
	first := 0
	if t.NumIn() > 0 && t.In(0) == contextType {
		first = 1
	}
	results := t.NumOut()
	hasError := results > 0 && t.Out(results-1) == errorType
	if hasError {
		results--
	}
	if results > 1 {
		panic(fmt.Sprintf("worker: Func: %v returns more than a result and an error", t))
	}
	return HandlerFunc(func(ctx context.Context, task *Task) (any, error) {
		in, err := positional(t, first, task)
		if err != nil {
			return nil, err
		}
		if first == 1 {
			in = append([]reflect.Value{reflect.ValueOf(ctx)}, in...)
		}
		out := f.Call(in)
		var value any
		if results == 1 {
			value = out[0].Interface()
		}
		if hasError {
			err, _ = out[len(out)-1].Interface().(error)
		}
		return value, err
	})
}

// positional decodes the arguments for the parameters of a function from first on.
func positional(t reflect.Type, first int, task *Task) ([]reflect.Value, error) {
	if len(task.Kwargs) > 0 {
		return nil, pythonTypeError(task.Task, "got an unexpected keyword argument '%s'", task.Kwargs[0].Key)
	}
	want, given := t.NumIn()-first, len(task.Args)
	if t.IsVariadic() {
		want--
	}
	if given < want || given > want && !t.IsVariadic() {
		argument := "arguments"
		if want == 1 {
			argument = "argument"
		}
		return nil, pythonTypeError(task.Task, "takes %d positional %s but %d %s given", want, argument, given, wereGiven(given))
	}
	in := make([]reflect.Value, given)
	for i, text := range task.Args {
		parameter := t.In(min(first+i, t.NumIn()-1))
		if t.IsVariadic() && i >= want {
			parameter = t.In(t.NumIn() - 1).Elem()
		}
		value := reflect.New(parameter)
		if err := protocol.DecodeJSON(text, value.Interface()); err != nil {
			return nil, pythonTypeError(task.Task, "argument %d: %v", i+1, err)
		}
		in[i] = value.Elem()
	}
	return in, nil
}

func wereGiven(n int) string {
	if n == 1 {
		return "was"
	}
	return "were"
}

// pythonTypeError is a TypeError with the name of the function, as Python has it.
func pythonTypeError(task, format string, args ...any) error {
	return &Error{Type: "TypeError", Args: []any{task[strings.LastIndexByte(task, '.')+1:] + "() " + fmt.Sprintf(format, args...)}}
}

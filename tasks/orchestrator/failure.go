package orchestrator

import (
	"errors"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Modules of MoonMind in which its exceptions live.
const (
	moduleBuiltins = "builtins"
	moduleRunner   = "moonmind.workflows.orchestrator.command_runner"
	moduleStorage  = "moonmind.workflows.orchestrator.storage"
)

// A Failure is the error of a failed step: the exception that Python clients see,
// and the files recorded with it.
type Failure struct {
	// Type and Module name the Python class.
	Type, Module string
	// Arg is the exception's only argument.
	Arg string
	// Traceback is the text for AsyncResult.traceback; "" for one made from the
	// other fields.
	Traceback string

	// rule is the one that has refused a command, "" for none.
	rule string
	// files are registered with the failed step.
	files []artifacts.File
	// log is the file that the payload names, or "".
	log string
	// output is that of the failed command, for the fallback log.
	output string
}

// Error returns Python's str() of the exception, as the state row has it.
func (f *Failure) Error() string {
	if f.Type == "KeyError" && f.Module == moduleBuiltins {
		return protocol.PythonRepr(f.Arg)
	}
	return f.Arg
}

// traceback is the text for AsyncResult.traceback.
func (f *Failure) traceback() string {
	if f.Traceback != "" {
		return f.Traceback
	}
	name := f.Type
	if f.Module != moduleBuiltins {
		name = f.Module + "." + f.Type
	}
	return "Traceback (most recent call last):\n" + name + ": " + f.Error() + "\n"
}

// isRunnerError says that the Python worker raises a CommandRunnerError here,
// which always has a log (docs/moonmind.md#fallback-log).
func (f *Failure) isRunnerError() bool { return f.Module == moduleRunner }

// attach registers the log that explains the failure, and adds its name to the
// text.
func (f *Failure) attach(file artifacts.File) *Failure {
	f.files = append(f.files, file)
	f.log = file.Path
	f.Arg += " (see " + file.Path + ")"
	return f
}

func commandError(text string) *Failure {
	return &Failure{Type: "CommandExecutionError", Module: moduleRunner, Arg: text}
}

func allowListViolation(text string) *Failure {
	return &Failure{Type: "AllowListViolation", Module: moduleRunner, Arg: text}
}

func valueError(text string) *Failure {
	return &Failure{Type: "ValueError", Module: moduleBuiltins, Arg: text}
}

func typeError(text string) *Failure {
	return &Failure{Type: "TypeError", Module: moduleBuiltins, Arg: text}
}

func keyError(text string) *Failure {
	return &Failure{Type: "KeyError", Module: moduleBuiltins, Arg: text}
}

// artifactError turns an error of package artifacts into a failure.
func artifactError(err error) *Failure {
	var path *artifacts.PathError
	if errors.As(err, &path) {
		return &Failure{Type: "ArtifactPathError", Module: moduleStorage, Arg: path.Text}
	}
	return &Failure{Type: "OSError", Module: moduleBuiltins, Arg: err.Error()}
}

// unexpected turns any other error into a failure.
func unexpected(err error) *Failure {
	var failure *Failure
	if errors.As(err, &failure) {
		return failure
	}
	return &Failure{Type: "RuntimeError", Module: moduleBuiltins, Arg: err.Error()}
}

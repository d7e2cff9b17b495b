package orchestrator

import (
	"encoding/json"
	"errors"
	"strings"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// success is the end of a step that has not failed.
type success struct {
	message string
	files   []artifacts.File
	// payload becomes the state's payload, nil for none.
	payload any
}

// logPayload is the payload of steps whose only artifact is a log.
type logPayload struct {
	Log string `json:"log"`
}

// outcome turns the end of a step into what the database records, and closes the
// run's directory.
func (s *stepRun) outcome(succeeded success, failure *Failure) store.Outcome {
	outcome := store.Outcome{Status: store.StepSucceeded, Message: succeeded.message, ArtifactRoot: s.place.RowPath}
	files, payload := succeeded.files, succeeded.payload
	if failure != nil {
		s.fallbackLog(failure)
		outcome.Status, outcome.Message = store.StepFailed, failure.Error()
		outcome.ErrorType, outcome.ErrorModule = failure.Type, failure.Module
		outcome.Traceback = cutTraceback(s.clean(failure.traceback()))
		files, payload = failure.files, nil
		if failure.log != "" {
			payload = logPayload{failure.log}
		}
	}
	if s.dir != nil {
		s.dir.Close()
	}
	if s.elsewhere != "" {
		s.logElsewhere()
		files, payload = nil, nil
	}
	outcome.Message = cut(s.clean(outcome.Message))
	for _, file := range files {
		outcome.Artifacts = append(outcome.Artifacts, store.Artifact{
			Type: artifacts.Type(string(s.step), file.Path), Path: file.Path, Checksum: file.Checksum, SizeBytes: file.SizeBytes,
		})
	}
	if payload != nil {
		// Structs of strings always encode.
		outcome.Payload, _ = json.Marshal(payload)
	}
	outcome.FinishedAt = s.config.Now().UTC()
	return outcome
}

// fallbackLog writes the log of a failure that has none
// (docs/moonmind.md#fallback-log).
func (s *stepRun) fallbackLog(failure *Failure) {
	if !failure.isRunnerError() || len(failure.files) > 0 || s.dir == nil {
		return
	}
	lines := []string{string(s.step) + " step failed while executing orchestrator command."}
	for _, line := range []string{failure.output, failure.Error()} {
		if line != "" {
			lines = append(lines, line)
		}
	}
	file, err := s.dir.Write(string(s.step)+".log", strings.Join(lines, "\n"))
	if err != nil {
		s.log.Error("log of the failed step cannot be written", "error", err)
		return
	}
	failure.files, failure.log = []artifacts.File{file}, file.Path
}

// failInLog ends the log of a failed step with the lines of the fallback log
// (docs/moonmind.md#fallback-log). The payload names the fallback log, which is
// another file only if the plan gives the step's log another name.
func (s *stepRun) failInLog(log *artifacts.Log, failure *Failure) *Failure {
	fallback := string(s.step) + ".log"
	if log.Path() == fallback {
		log.Line(string(s.step) + " step failed while executing orchestrator command.")
		log.Line(failure.Error())
	}
	file, err := log.Finish()
	if err != nil {
		s.log.Error("log of the failed step cannot be written", "error", err)
		return failure
	}
	if log.Path() == fallback {
		failure.files, failure.log = append(failure.files, file), file.Path
		return failure
	}
	others := failure.files
	failure.files = nil
	s.fallbackLog(failure)
	failure.files = append(append(failure.files, others...), file)
	return failure
}

// keepLog finishes the log that dead workers have left of a step, if there is
// one, and registers it with the failure.
func (s *stepRun) keepLog(run store.Run, failure *Failure) *Failure {
	if s.open(run) != nil {
		return failure
	}
	name, bad := s.params.text("logArtifact", string(s.step)+".log")
	if bad != nil {
		return failure
	}
	log, err := s.dir.Continue(name, 0, 0)
	if err != nil {
		if !errors.Is(err, artifacts.ErrNoLog) {
			s.log.Error("log of the failed step cannot be finished", "error", err)
		}
		return failure
	}
	defer log.Discard()
	log.Line(failure.Error())
	return s.attachLog(log, failure)
}

// revokedOutcome puts the operator's reason before the message of a step that
// failed because its run was revoked. A step that succeeded in spite of that
// keeps its outcome: the next step fails instead.
func revokedOutcome(outcome store.Outcome, cause endCause) store.Outcome {
	text := cause.Error()
	// The error of a command that was ended repeats the reason.
	if message := strings.Replace(outcome.Message, ": "+text, "", 1); message != "" && message != text {
		text += ". " + message
	}
	failure := Failure{Type: "TaskRevokedError", Module: "celery.exceptions", Arg: cut(text)}
	outcome.Message, outcome.ErrorType, outcome.ErrorModule, outcome.Traceback = failure.Arg, failure.Type, failure.Module, failure.traceback()
	return outcome
}

// messageLimit bounds a message, in bytes; the list of files in it may be long.
const messageLimit = 16 << 10

// cut shortens a text to messageLimit.
func cut(text string) string {
	if len(text) <= messageLimit {
		return text
	}
	end := messageLimit
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + " … and more"
}

// cutTraceback shortens a traceback and keeps its end, which has the exception.
func cutTraceback(text string) string {
	if len(text) <= 2*messageLimit {
		return text
	}
	return cut(text) + "\n" + strings.ToValidUTF8(text[len(text)-messageLimit:], "")
}

// clean makes a text fit for a database row: redacted, valid UTF-8, without NUL.
func (o *Orchestrator) clean(text string) string {
	return o.config.Redactor.String(strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "\uFFFD"))
}

package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// startLog starts the log of a step that runs commands, or continues the log of
// the previous worker. In a step that was started before, it writes a note.
func (s *stepRun) startLog(name, workspace string, commands [][]string) (*artifacts.Log, *Failure) {
	j := s.journal
	j.setCommands(workspace, commands)
	var log *artifacts.Log
	err := artifacts.ErrNoLog
	if j.skipped > 0 {
		log, err = s.dir.Continue(name, j.found.LogSize, j.found.LogEnd)
		j.continued = err == nil
	}
	if errors.Is(err, artifacts.ErrNoLog) {
		log, err = s.dir.Log(name)
	}
	if err != nil {
		return nil, artifactError(err)
	}
	if j.continued {
		j.excerpt = log.Excerpt(j.found.LogSize)
	}
	if note := j.note(s.record.Helper.ActsIn(string(s.step), j.claim.Attempt)); note != "" {
		s.log.Info("step continues where the previous worker has left it", "commands", j.skipped, "log_found", j.continued, "worker", j.previousWorker)
		log.Line(note)
	}
	for _, note := range s.notes {
		log.Line(note)
	}
	return log, nil
}

// command runs the step's next command and appends a headline and the output to
// the log. It does not run a command whose end is recorded; it returns the
// recorded exit code instead. Exit code and excerpt are valid only without a
// failure.
func (s *stepRun) command(ctx context.Context, log *artifacts.Log, workspace, headline string, command []string) (int, artifacts.Excerpt, *Failure) {
	j := s.journal
	if !j.isLogged() {
		log.Line(headline)
	}
	j.next++
	if j.next <= j.skipped {
		code := 0
		if j.next == j.skipped {
			code = j.found.ExitCode
			ended := s.commandEnded(workspace, command, code, j.found.EndedAt)
			ended.Command.Found = true
			s.audit(ended)
		}
		if !j.continued {
			log.Line(fmt.Sprintf("[ended before with code %d]", code))
		}
		return code, j.excerpt, nil
	}
	if context.Cause(ctx) == nil {
		s.removeStaleLocks(ctx, log, workspace)
	}
	output, size := log.Output(), log.Size()
	if cause := context.Cause(ctx); cause != nil {
		return 0, output.Close(), endedFailure(command, cause)
	}
	if failure := s.auditBefore(ctx, s.commandRecord(audit.CommandStarted, j.next, workspace, command)); failure != nil {
		if cause := context.Cause(ctx); cause != nil {
			failure = endedFailure(command, cause)
		}
		return 0, output.Close(), failure
	}
	started := s.config.Now()
	faultpoint.Hit(faultpoint.CommandBefore, s.runID, string(s.step), faultpoint.Number(j.next))
	code, failure := s.runCommand(ctx, workspace, command, output.Stdout, output.Stderr, func(code int) { j.recordExit(code, size) })
	excerpt := output.Close()
	ended := s.commandEnded(workspace, command, code, j.endedAt(s.config.Now()))
	ended.DurationMS, ended.Command.OutputBytes = max(0, ended.At.Sub(started).Milliseconds()), log.Size()-size
	if failure != nil {
		ended.Command.Exit, ended.Command.Ended = nil, cut(failure.Error())
	}
	if failure != nil {
		s.auditLimit(ctx)
	}
	s.audit(ended)
	if failure == nil && code != 0 {
		j.recordOutput(log.Size())
	}
	return code, excerpt, failure
}

// runInLog runs a command and appends a headline and the command's output to the
// log.
func (s *stepRun) runInLog(ctx context.Context, log *artifacts.Log, workspace, headline string, command []string) *Failure {
	code, excerpt, failure := s.command(ctx, log, workspace, headline, command)
	text := excerpt.Text(log.Path())
	switch {
	case failure == nil && code == 0:
		return nil
	case failure == nil:
		failure = exitFailure(command, code, text)
	case text != "":
		failure.Arg += ": " + text
	}
	failure.output = text
	switch cause := context.Cause(ctx); {
	case excerpt.Empty():
		log.Line(failure.Error())
	case cause != nil && endReasonOf(ctx) == timeLimit:
		log.Line("[The command was ended: " + s.clean(cause.Error()) + "]")
	}
	return failure
}

// exitFailure is the failure of a step whose command has exited with a code
// other than 0.
func exitFailure(command []string, code int, output string) *Failure {
	text := fmt.Sprintf("Command %s failed with code %d", formatCommand(command), code)
	if output != "" {
		text += ": " + output
	}
	if isSkillExecutor(command) && strings.Contains(output, "No module named 'moonmind") {
		text += "\nSkills need a Python that has MoonMind on its path; put one beside the worker"
	}
	failure := commandError(text)
	failure.output = output
	return failure
}

// attachLog finishes a log and registers it with the failure. If the log cannot
// be written, the failure is returned without it.
func (s *stepRun) attachLog(log *artifacts.Log, failure *Failure) *Failure {
	file, err := log.Finish()
	if err != nil {
		s.log.Error("log of the failed step cannot be written", "error", err)
		return failure
	}
	return failure.attach(file)
}

// A commandStep is a step that is one command: build or restart
// (docs/moonmind.md#build, docs/moonmind.md#restart).
type commandStep struct {
	command []string
	// log is the log's name if the plan gives none.
	log string
	// before is called before the command; if it returns a failure, the command is
	// not run. It is also called if an earlier worker has run the command.
	before func(log *artifacts.Log) *Failure
	// run runs the command with its headline in the log. Defaults to runInLog.
	run func(log *artifacts.Log, workspace, headline string) *Failure
	// after is called after the command has succeeded.
	after func(log *artifacts.Log) *Failure
}

// runCommandStep runs a step that is one command. The log has the output of a failed
// command once, not twice as the Python worker's (docs/moonmind.md#c7).
func (s *stepRun) runCommandStep(ctx context.Context, step commandStep) (artifacts.File, *Failure) {
	workspace, failure := s.workspace()
	if failure != nil {
		return artifacts.File{}, failure
	}
	name, failure := s.params.text("logArtifact", step.log)
	if failure != nil {
		return artifacts.File{}, failure
	}
	log, failure := s.startLog(name, workspace, [][]string{step.command})
	if failure != nil {
		return artifacts.File{}, failure
	}
	defer log.Discard()
	if failure := s.deploy(ctx, log, workspace, step); failure != nil {
		return artifacts.File{}, failure
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := log.Finish()
	if err != nil {
		return artifacts.File{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	return file, nil
}

// deploy runs the command, with all that is looked at and recorded before and after
// it. The failure has the log.
func (s *stepRun) deploy(ctx context.Context, log *artifacts.Log, workspace string, step commandStep) *Failure {
	fail := func(failure *Failure) *Failure {
		log.Line(failure.Error())
		return s.attachLog(log, failure)
	}
	if failure := s.runner.check(workspace, step.command); failure != nil {
		s.auditRefused(workspace, step.command, failure)
		return fail(failure)
	}
	if failure := s.preflight(ctx, log, workspace); failure != nil {
		return s.attachLog(log, failure) // its line is in the log
	}
	if failure := step.before(log); failure != nil {
		return fail(failure)
	}
	watched, failure := s.beforeDeployment(ctx, log, workspace, step.command)
	if failure != nil {
		return fail(failure)
	}
	if failure := s.checkApproval(ctx, true); failure != nil {
		return fail(failure)
	}
	headline := "$ " + formatCommand(step.command)
	if step.run != nil {
		failure = step.run(log, workspace, headline)
	} else {
		failure = s.runInLog(ctx, log, workspace, headline, step.command)
	}
	if violation := s.afterDeployment(ctx, log, watched, step.command); violation != nil {
		return s.failInLog(log, violation)
	}
	if failure != nil {
		s.explain(ctx, workspace, step.command, failure)
		return s.attachLog(log, failure)
	}
	if failure := step.after(log); failure != nil {
		return fail(failure)
	}
	return nil
}

// commandParameter reads the step's command. Without one, or for a value that is
// false in Python, it returns missing.
func (s *stepRun) commandParameter(missing []string) ([]string, *Failure) {
	value := s.params["command"]
	if falsy(value) {
		return missing, nil
	}
	return parseCommand(value)
}

package orchestrator

import (
	"context"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// rollback runs the plan's strategies (docs/moonmind.md#rollback). If one of them
// fails, the log keeps the output of those before (docs/moonmind.md#c8) and ends
// with the same lines as the Python worker's.
func (s *stepRun) rollback(ctx context.Context) (success, *Failure) {
	strategies, failure := s.params.list("strategies")
	if failure != nil {
		return success{}, failure
	}
	workspace, failure := s.workspace()
	if failure != nil {
		return success{}, failure
	}
	name, failure := s.params.text("logArtifact", "rollback.log")
	if failure != nil {
		return success{}, failure
	}
	log, failure := s.startLog(name, workspace, commandsOf(strategies))
	if failure != nil {
		return success{}, failure
	}
	defer log.Discard()
	if len(strategies) == 0 {
		log.Line("No rollback actions executed.")
	}
	for _, value := range strategies {
		if failure := s.strategy(ctx, log, workspace, value); failure != nil {
			return success{}, s.failInLog(log, failure)
		}
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := log.Finish()
	if err != nil {
		return success{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	return success{message: "Rollback executed", files: []artifacts.File{file}}, nil
}

// commandsOf returns the commands of strategies in their order, up to the first
// value that is not a command. The step fails when it reaches that value.
func commandsOf(strategies []any) [][]string {
	var all [][]string
	for _, value := range strategies {
		strategy, isMapping := value.(map[string]any)
		if !isMapping {
			return all
		}
		commands, failure := parameters(strategy).list("commands")
		if failure != nil {
			return all
		}
		for _, value := range commands {
			command, failure := parseCommand(value)
			if failure != nil {
				return all
			}
			all = append(all, command)
		}
	}
	return all
}

func (s *stepRun) strategy(ctx context.Context, log *artifacts.Log, workspace string, value any) *Failure {
	strategy, isMapping := value.(map[string]any)
	if !isMapping {
		return typeError("Rollback strategies must be mappings")
	}
	kind := "unknown"
	if given, is := strategy["type"]; is {
		kind = fmt.Sprint(given)
	}
	if !s.journal.isLogged() {
		log.Line("Executing rollback strategy: " + kind)
	}
	commands, failure := parameters(strategy).list("commands")
	if failure != nil {
		return failure
	}
	for _, value := range commands {
		command, failure := parseCommand(value)
		if failure != nil {
			return failure
		}
		code, excerpt, failure := s.command(ctx, log, workspace, formatCommand(command), command)
		text := excerpt.Text(log.Path())
		if failure == nil && code != 0 {
			failure = exitFailure(command, code, text)
		}
		if failure != nil {
			failure.output = text
			return failure
		}
	}
	return nil
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

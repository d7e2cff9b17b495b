package orchestrator

import (
	"context"
	"fmt"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// rollback runs the plan's strategies (contract moonmind.md 10.7). When one
// of them fails, the log keeps what ran before (C8) and ends as upstream's
// does.
func (s *stepRun) rollback(ctx context.Context) (done, *Failure) {
	strategies, failure := s.params.list("strategies")
	if failure != nil {
		return done{}, failure
	}
	workspace, failure := s.workspace()
	if failure != nil {
		return done{}, failure
	}
	name, failure := s.params.text("logArtifact", "rollback.log")
	if failure != nil {
		return done{}, failure
	}
	log, err := s.dir.Log(name)
	if err != nil {
		return done{}, artifactError(err)
	}
	defer log.Discard()
	for _, value := range strategies {
		if failure := s.strategy(ctx, log, workspace, value); failure != nil {
			return done{}, s.rollbackFailed(log, failure)
		}
	}
	if log.Empty() {
		log.Line("No rollback actions executed.")
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := log.Finish()
	if err != nil {
		return done{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	return done{message: "Rollback executed", files: []artifacts.File{file}}, nil
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
	log.Line("Executing rollback strategy: " + kind)
	commands, failure := parameters(strategy).list("commands")
	if failure != nil {
		return failure
	}
	for _, value := range commands {
		command, failure := parseCommand(value)
		if failure != nil {
			return failure
		}
		log.Line(formatCommand(command))
		output := log.Output()
		faultpoint.Hit(faultpoint.CommandBefore, s.runID, string(s.step))
		code, failure := s.runner.run(ctx, workspace, command, output.Stdout, output.Stderr)
		faultpoint.Hit(faultpoint.CommandAfter, s.runID, string(s.step))
		text := output.Close().Text(log.Path())
		if failure == nil && code != 0 {
			failure = exited(command, code, text)
		}
		if failure != nil {
			failure.output = text
			return failure
		}
	}
	return nil
}

// rollbackFailed ends the log with upstream's fallback lines. The payload
// names the fallback log, which is another file only when the plan named the
// log otherwise.
func (s *stepRun) rollbackFailed(log *artifacts.Log, failure *Failure) *Failure {
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
	s.fallbackLog(failure)
	failure.files = append(failure.files, file)
	return failure
}

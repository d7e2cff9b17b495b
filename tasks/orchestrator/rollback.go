package orchestrator

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// rollback takes back what the run has changed, and nothing else: its files, then
// its image and containers. In the end the log says that all is as before the run;
// if something is not, the step fails and names it (docs/moonmind.md#rollback).
//
// The plan's own commands run instead where the configuration asks for that, and
// for a part of which the run has no record.
func (s *stepRun) rollback(ctx context.Context) (success, *Failure) {
	byCommands := s.planRollback()
	nothing := s.nothingToTakeBack()
	strategies, workspace, name, failure := s.rollbackParameters(nothing == "" && byCommands.some())
	if failure != nil {
		return success{}, failure
	}
	switch {
	case nothing != "":
		strategies = nil
	case !byCommands.all():
		strategies = byCommands.of(strategies)
	}
	log, failure := s.startLog(name, workspace, commandsOf(strategies))
	if failure != nil && failure.Module == moduleStorage {
		s.notes = append(s.notes, "["+s.clean(failure.Error())+": "+name+"]")
		log, failure = s.startLog(rollbackLog, workspace, commandsOf(strategies))
	}
	if failure != nil {
		return success{}, failure
	}
	defer log.Discard()
	var outcome filesOutcome
	if nothing != "" {
		log.Line("[" + nothing + ": there is nothing to take back.]")
	} else {
		outcome, failure = s.takeBack(ctx, log, workspace, byCommands, strategies)
	}
	if failure != nil {
		failure.files = append(failure.files, outcome.files...)
		return success{}, s.failInLog(log, failure)
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	done := success{message: "Rollback executed", files: outcome.files}
	file, err := log.Finish()
	if err != nil {
		// All is as before the run, and that would no longer be said.
		s.log.Error("the rollback has taken back what the run changed, but its log could not be written; what follows is missing there", "error", err, "text", cut(log.Lost()))
		return done, nil
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	done.files = append(done.files, file)
	return done, nil
}

// rollbackLog is the step's log if the plan names no other.
const rollbackLog = "rollback.log"

// rollbackParameters reads the step's parameters. A wrong one does not keep the run
// from being taken back from its record: it fails the step only if the plan's commands
// are to run.
func (s *stepRun) rollbackParameters(commands bool) (strategies []any, workspace, name string, failure *Failure) {
	var failures [4]*Failure
	strategies, failures[0] = s.params.list("strategies")
	workspace, failures[1] = s.workspace()
	name, failures[2] = s.params.text("logArtifact", rollbackLog)
	failures[3] = s.wrong
	failure = cmp.Or(failures[:]...)
	if failure == nil || commands {
		return strategies, workspace, name, failure
	}
	s.notes = append(s.notes, "["+s.clean(failure.Error())+"]")
	if failures[1] != nil {
		workspace = artifacts.Resolve(s.config.Workspace)
	}
	if failures[2] != nil {
		name = rollbackLog
	}
	return strategies, workspace, name, nil
}

// mayBeWrong says that a step goes on although its parameters are wrong as a whole, or
// its time limit is: a rollback, which then runs without these.
func (s *stepRun) mayBeWrong(failure *Failure) bool {
	if s.step != store.StepRollback {
		return false
	}
	s.wrong = cmp.Or(s.wrong, failure)
	return true
}

// nothingToTakeBack says why there is nothing to take back, before anything is looked
// at; "" if there may be something.
//
// An earlier rollback has taken back everything, and no step has changed anything
// since, because the retry was refused: what somebody has edited or deployed since
// is not the run's. A rollback that was killed is no earlier one, and is done again.
//
// The plan's commands would take back even what a refused run has not changed.
func (s *stepRun) nothingToTakeBack() string {
	switch {
	case s.config.RollbackCommands && s.record.Refused:
		return "The run was refused before it changed anything, so that the plan's commands are not run"
	case !s.config.RollbackCommands && s.record.Undone && s.journal.claim.Starts == 1:
		return "A rollback has taken back what the run had changed, and the run has changed nothing since"
	}
	return ""
}

// byCommands says which parts of a rollback are left to the plan's own commands,
// and why; "" for a part that is brought back from the record.
type byCommands struct{ files, image string }

func (b byCommands) some() bool { return b.files != "" || b.image != "" }

func (b byCommands) all() bool { return b.files != "" && b.image != "" }

// part is the part that is left to the plan's commands, if it is one of the two.
func (b byCommands) part() string {
	switch {
	case b.files != "" && b.image == "":
		return "the workspace's files"
	case b.files == "" && b.image != "":
		return "images and containers"
	}
	return ""
}

// planRollback decides, from the record alone, which parts the plan's commands undo.
func (s *stepRun) planRollback() byCommands {
	if s.config.RollbackCommands {
		return byCommands{"configured", "configured"}
	}
	b := byCommands{image: s.imageByCommands()}
	switch files := s.record.Files; {
	case files == nil && s.ranElsewhere:
		b.files = "a worker that keeps no record has run steps of this run"
	case files != nil && files.Missing != "":
		b.files = "the workspace could not be captured before the run: " + files.Missing
	}
	return b
}

// of returns the strategies with only the commands of the parts that are left to
// them: git undoes files, everything else the image.
func (b byCommands) of(strategies []any) []any {
	var kept []any
	for _, value := range strategies {
		strategy, isMapping := value.(map[string]any)
		if !isMapping {
			continue
		}
		commands, failure := parameters(strategy).list("commands")
		if failure != nil {
			continue
		}
		commands = slices.DeleteFunc(slices.Clone(commands), func(value any) bool {
			command, failure := parseCommand(value)
			if failure != nil || len(command) == 0 {
				return true
			}
			if command[0] == "git" {
				return b.files == ""
			}
			return b.image == ""
		})
		if len(commands) > 0 {
			strategy = maps.Clone(strategy)
			strategy["commands"] = commands
			kept = append(kept, strategy)
		}
	}
	return kept
}

// takeBack does the parts of a rollback, and says in the log what is as before.
func (s *stepRun) takeBack(ctx context.Context, log *artifacts.Log, workspace string, by byCommands, strategies []any) (filesOutcome, *Failure) {
	var files filesOutcome
	var image imageOutcome
	switch part := by.part(); {
	case by.all() && len(strategies) == 0:
		log.Line("No rollback actions executed.")
	case part == "":
	case len(strategies) == 0:
		log.Line(fmt.Sprintf("[The run's record cannot bring back %s: %s. The plan has no commands for it]", part, cmp.Or(by.files, by.image)))
	default:
		log.Line(fmt.Sprintf("[The plan's commands bring back %s: %s]", part, cmp.Or(by.files, by.image)))
	}
	var failure *Failure
	if by.files == "" {
		s.removeStaleLocks(ctx, log, workspace)
		if files, failure = s.restoreFiles(ctx, log); failure != nil {
			return files, failure
		}
	}
	for _, value := range strategies {
		if failure := s.strategy(ctx, log, workspace, value); failure != nil {
			return files, failure
		}
	}
	// compose reads the workspace's files.
	if by.image == "" {
		if image, failure = s.restoreImage(ctx, log); failure != nil {
			return files, failure
		}
	}
	if by.image == "" && !image.Untouched {
		if failure := s.judgeRestored(ctx, log); failure != nil {
			return files, failure
		}
	}
	if by.files == "" && by.image == "" && files.Untouched && image.Untouched {
		log.Line("[The run has changed nothing: there is nothing to take back.]")
	}
	if by.files == "" {
		log.Line(files.Tree())
	}
	if by.image == "" && !image.Untouched {
		log.Line("image: as before the run (" + cmp.Or(image.Images, "none") + ")")
		log.Line("configuration: as before the run (" + cmp.Or(image.Configuration, "none") + ")")
	}
	if s.record.Files != nil {
		s.record.Files.Restored = true
	}
	if s.record.Files != nil || s.record.Image != nil {
		s.record.Undone = true
	}
	return files, s.saveRecord(ctx)
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

package orchestrator

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A stepRun is one execution of a step. Its methods are what steps do; each step has
// a file of its name.
type stepRun struct {
	*Orchestrator
	// runner starts the step's programs, in the name of the step.
	runner *runner
	// log is the worker's, with the run and the step.
	log     *slog.Logger
	journal *journal
	runID   string
	run     store.Run
	step    store.Step
	// runStartedAt is when the run began, or this step if that is not known.
	runStartedAt time.Time
	// afterKill: see the function of that name.
	afterKill bool

	// open sets these: the plan, the step's parameters in it, where the run's
	// directory is, and that directory, nil if it could not be opened.
	plan   plan
	params parameters
	place  artifacts.Directory
	dir    *artifacts.Run

	// profile is what the policy says about the run's target service; perform sets it.
	profile policy.Service

	// record is what is recorded about the change of the run; saveRecord writes it.
	// recorded is its text in the database, nil for nothing.
	record   change.Record
	recorded json.RawMessage
	// ranElsewhere is [store.ChangeState].RunElsewhere.
	ranElsewhere bool
	// elsewhere is the directory that stands for the run's; "" if that is used.
	elsewhere     string
	elsewhereLock *os.File
	// submission names the chain that the step belongs to, see change.Record.
	submission string
	// approval says whether the run's approval is to be checked; nil if it needs none.
	// refused is set when it does not cover the step.
	approval *store.StartApproval
	refused  *store.NotApproved
	// unwritten are records of the audit trail that are not written yet.
	unwritten []audit.Record
	// limitAudited says that audit has the limit that has ended the step.
	limitAudited bool
	// meter measures what the step takes of its limits; perform sets it.
	meter *meter
	// requested says that an operator has asked for this rollback of a run that had
	// ended.
	requested bool
	// wrong is what is wrong with the parameters of a rollback, see rollbackParameters.
	wrong *Failure
	// notes are lines for the beginning of the step's log.
	notes []string
}

// work runs a step and returns its outcome, also for a panic or a bad plan
// (docs/moonmind.md#r13). If the run's approval does not cover the step, the step has
// no outcome, and its claim is released.
func (o *Orchestrator) work(ctx context.Context, log *slog.Logger, begun store.Start, journal *journal) (store.Outcome, *store.NotApproved) {
	s := &stepRun{
		Orchestrator: o, log: log, journal: journal, runID: begun.Run.ID, run: begun.Run, step: begun.Claim.Step, approval: begun.Approval,
		runner:    o.runner.of(processes.Owner{Run: begun.Run.ID, Step: string(begun.Claim.Step)}),
		afterKill: afterKill(begun.Claim), runStartedAt: begun.Claim.StartedAt,
		submission: cmp.Or(begun.RootTaskID, begun.Claim.TaskID),
	}
	if begun.Run.StartedAt != nil {
		s.runStartedAt = *begun.Run.StartedAt
	}
	if r := begun.RollbackRequest; r != nil {
		s.notes, s.requested = append(s.notes, "[Rollback "+r.Text()+"]"), true
	}
	deaths := begun.Claim.Deaths()
	if deaths < o.config.MaxStarts {
		result, failure := s.performSafely(ctx, begun)
		left := s.leaveBehind(ctx)
		outcome := s.outcome(result, failure)
		outcome.LeftBehind, outcome.Audit = left, s.unwritten
		return outcome, s.refused
	}
	failure := unexpected(fmt.Errorf("step %s was started %d times and its worker died each time; it is not started again. "+
		"Look for what ends the worker (memory, a signal) in its log and the kernel's, then retry the run", begun.Claim.Step, deaths))
	outcome := s.outcome(success{}, s.keepLog(begun.Run, failure))
	outcome.Audit = []audit.Record{{
		Kind: audit.LimitReached, Text: cut(s.clean(failure.Error())),
		Rule: &audit.Rule{Name: "MM_ORCHESTRATOR_MAX_STARTS", Limit: strconv.Itoa(o.config.MaxStarts)},
	}}
	return outcome, nil
}

// performSafely turns a panic of perform into a failure.
func (s *stepRun) performSafely(ctx context.Context, begun store.Start) (result success, failure *Failure) {
	defer func() {
		if value := recover(); value != nil {
			stack := strings.ReplaceAll(string(debug.Stack()), "\t", "  ")
			result = success{}
			failure = &Failure{
				Type: "RuntimeError", Module: moduleBuiltins,
				Arg: fmt.Sprintf("step %s of run %s panicked: %v. This is a defect of mm-orchestrator; the worker's log has the stack", s.step, s.runID, value),
			}
			failure.Traceback = "Traceback (most recent call last):\n" + stack + "RuntimeError: " + failure.Arg + "\n"
			s.log.Error("step panicked", "error", fmt.Sprint(value), "stack", stack)
		}
	}()
	return s.perform(ctx, begun.Run, begun.Change)
}

// open reads the step's part of the plan and opens the run's directory.
func (s *stepRun) open(run store.Run) (failure *Failure) {
	if s.plan, failure = parsePlan(run.Steps); failure != nil {
		return failure
	}
	if s.params, failure = s.plan.find(s.step); failure != nil && !s.mayBeWrong(failure) {
		return failure
	}
	if s.step == store.StepRollback {
		removeElsewhere()
	}
	place, err := s.config.Artifacts.ForRun(run.ArtifactRoot, s.runID)
	if err != nil {
		return artifactError(err)
	}
	if s.dir, err = artifacts.Open(place.Dir, s.config.Redactor); err != nil {
		if s.step != store.StepRollback {
			return artifactError(err)
		}
		if failure := s.openElsewhere(err); failure != nil {
			return failure
		}
	}
	s.place = place
	faultpoint.Hit(faultpoint.ArtifactsOpened, s.runID, string(s.step))
	return nil
}

// perform does the same checks as the Python worker, in the same order, loads what
// is known about the change of the run, and runs the step.
func (s *stepRun) perform(ctx context.Context, run store.Run, known store.ChangeState) (success, *Failure) {
	if failure := s.open(run); failure != nil {
		return success{}, failure
	}
	var failure *Failure
	if s.profile, failure = s.findProfile(run.TargetService); failure != nil {
		return success{}, failure
	}
	s.runner.allowed, s.runner.target.Permit = s.profile.ProgramNames(), s.permissions(-1)
	s.noteOverrides()
	limit, failure := s.params.timeLimit()
	if failure != nil && !s.mayBeWrong(failure) {
		return success{}, failure
	}
	ctx, cancel := withTimeLimit(ctx, limit, "timeoutSeconds")
	defer cancel()
	if endReasonOf(ctx) == revoked {
		// Revoked between two steps: do not begin this one.
		return success{}, commandError(context.Cause(ctx).Error())
	}
	if failure := s.loadRecord(known); failure != nil {
		return success{}, failure
	}
	if failure := s.beginWithoutHelpers(ctx); failure != nil {
		return success{}, failure
	}
	// A retry of build or restart makes the run's change again, in resume.
	again := (s.step == store.StepBuild || s.step == store.StepRestart) && s.journal.claim.Attempt > 1
	if failure := s.checkApproval(ctx, again); failure != nil {
		return success{}, failure
	}
	if failure := s.resume(ctx); failure != nil {
		if s.record.Undone && context.Cause(ctx) == nil {
			if unrecorded := s.recordRefused(ctx, true); unrecorded != nil {
				s.log.Error("the retry is refused, and its rollback will run the plan's commands", "error", unrecorded)
			}
		}
		return success{}, failure
	}
	ctx, stopMeter, failure := s.startMeter(ctx)
	if failure != nil {
		return success{}, failure
	}
	defer stopMeter()
	result, failure := performers[s.step](s, ctx)
	if failure == nil {
		s.leaveHelpers(ctx)
		return result, nil
	}
	s.auditLimit(ctx)
	return result, failure
}

// performers has what each of [store.Steps] does.
var performers = map[store.Step]func(*stepRun, context.Context) (success, *Failure){
	store.StepAnalyze:  (*stepRun).analyze,
	store.StepPatch:    (*stepRun).patch,
	store.StepBuild:    (*stepRun).build,
	store.StepRestart:  (*stepRun).restart,
	store.StepVerify:   (*stepRun).verify,
	store.StepRollback: (*stepRun).rollback,
}

package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// A command that stops the worker's own container would end the worker in the
// middle of its step, and compose with it, perhaps between the removal of the old
// container and the start of the new one. So such a command runs in a helper, a
// container of its own:
//
//  1. The worker records the helper in the change of the run, starts it, and waits.
//  2. The helper runs the command. It stops the worker, which gives the step back,
//     or is killed.
//  3. The new worker gets the message again, takes the step over, finds the helper
//     in the record, and confirms that it goes on. The output and the exit code
//     that the helper has kept are those of the step's command. It finishes the
//     step.
//  4. The helper watches the new container for a while, until the verification has
//     succeeded and its worker removes the helper.
//
// If no worker confirms within HelperWindow, or the new container does not stay up,
// the helper puts the old container back. The old worker takes the step over, which
// then fails with what the helper has seen, and the run is rolled back as always.
//
// Each act can be repeated: a worker that takes the step over at any point finds
// the helper and goes on from there.

// Helpers starts and asks helpers. [compose.Engine] implements it, and documents
// the methods.
type Helpers interface {
	Own(ctx context.Context, candidates []string) (*compose.OwnContainer, error)
	ServiceState(ctx context.Context, project, service string) (compose.ServiceState, error)
	StartHelper(ctx context.Context, own compose.OwnContainer, program string, task compose.HelperTask) error
	ResumeHelper(ctx context.Context, name string) error
	ReadHelper(ctx context.Context, name string) (compose.HelperState, error)
	Confirm(ctx context.Context, name, by string) error
	RemoveHelpers(ctx context.Context, runID string) error
}

// helperPause is the time between two looks at a helper.
const helperPause = 250 * time.Millisecond

// helperRefusal is how long the engine may refuse requests about a helper, before
// the step fails. It refuses some while it stops or starts.
const helperRefusal = 15 * time.Second

// runCommand runs a command of the step as [runner.run] does, or has a helper run
// it if it stops this worker.
func (s *stepRun) runCommand(ctx context.Context, workspace string, command []string, stdout, stderr io.Writer, exited func(code int)) (int, *Failure) {
	if failure := s.runner.check(workspace, command); failure != nil {
		s.auditRefused(workspace, command, failure)
		return 0, failure
	}
	s.logPermissions(workspace, command, stderr)
	if o, only := s.overrideOfProgram(command); only {
		s.log.Warn("override of the policy used", "program", command[0], "reason", o.Reason, "at", o.Origin.String())
		fmt.Fprintf(stderr, "[%s may run by an override of the policy, %s]\n", command[0], o)
	}
	stdout, stderr, ended := s.meter.command(stdout, stderr)
	code, failure := s.runOrHelp(ctx, workspace, command, stdout, stderr, exited)
	if err := ended(); err != nil && failure == nil {
		failure = endedFailure(command, err)
	}
	return code, failure
}

// runOrHelp is runCommand without its rules and limits.
func (s *stepRun) runOrHelp(ctx context.Context, workspace string, command []string, stdout, stderr io.Writer, exited func(code int)) (int, *Failure) {
	h := &helped{stepRun: s, workspace: workspace, command: command, number: s.journal.next, stderr: stderr, stdout: stdout}
	if !h.acts() {
		why, failure := h.reason(ctx)
		if failure != nil {
			return 0, failure
		}
		if why == "" {
			return s.runner.runTrusted(ctx, workspace, command, stdout, stderr, exited)
		}
		s.log.Warn("the command stops this worker: a helper container runs it", "reason", why, "container", h.own.String())
		fmt.Fprintf(stderr, "[A helper container runs the command, because %s]\n", why)
		if failure := h.record(ctx); failure != nil {
			return 0, failure
		}
	}
	code, failure := h.follow(ctx)
	if failure == nil {
		exited(code)
	}
	return code, failure
}

// overrideOfProgram returns the override without which a command could not run.
func (s *stepRun) overrideOfProgram(command []string) (policy.Override, bool) {
	if len(command) == 0 || isSkillExecutor(command) {
		return policy.Override{}, false
	}
	return s.profile.OverrideOfProgram(command[0])
}

// A helped command is one that a helper runs, or that may need one.
type helped struct {
	*stepRun
	workspace string
	command   []string // nil to put back the service as it was before the run
	number    int      // of the command in the step
	// before is the service to put back; nil for the one that own is of, as it is
	// now.
	before *compose.ServiceState
	// image is the image of the helper, "" for that of own.
	image          string
	stdout, stderr io.Writer

	// own is the container that this worker runs in, nil if it is not known or there
	// is none.
	own *compose.OwnContainer
	// shown is how many of the helper's events are in the log.
	shown int
}

// acts says that the record names a helper for this command.
func (h *helped) acts() bool {
	return h.stepRun.record.Helper.Acts(string(h.step), h.journal.claim.Attempt, h.number)
}

// findOwn finds the container that this worker runs in.
func (h *helped) findOwn(ctx context.Context) error {
	if h.config.Helpers == nil || len(h.config.OwnContainers) == 0 || h.own != nil {
		return nil
	}
	var err error
	h.own, err = h.config.Helpers.Own(ctx, h.config.OwnContainers)
	return err
}

// reason says why the command stops this worker, "" if it does not. The failure is that
// this cannot be found out, although the engine has answered before.
func (h *helped) reason(ctx context.Context) (string, *Failure) {
	if h.config.Helpers == nil || len(h.config.OwnContainers) == 0 || !compose.MayStop(h.command) {
		return "", nil
	}
	err := h.untilKnownEngineAnswers(ctx, func() error { return h.findOwn(ctx) })
	switch cause := context.Cause(ctx); {
	case err == nil && h.own == nil:
		return "", nil
	case err == nil:
	case cause != nil:
		return "", endedFailure(h.command, cause)
	case h.engineHasAnswered() && !compose.IsForbidden(err):
		return "", commandError(fmt.Sprintf("Command %s was not run: it cannot be found out whether it stops this worker in the middle of it. Retry the run when docker answers: %s", formatCommand(h.command), err))
	default:
		// Without the engine the command fails too, or uses another engine.
		h.log.Warn("cannot find out whether the command stops this worker", "error", err)
		return "", nil
	}
	model := compose.Model{}
	if ask, isCompose := compose.ModelCommand(h.command); isCompose {
		output := excerpt.Head{Limit: modelLimit}
		ctx, cancel := context.WithTimeout(ctx, serviceListTimeout)
		defer cancel()
		code, failure := h.runner.forOwn().run(ctx, h.workspace, ask, &output, &excerpt.Head{}, nil)
		var err error
		if failure == nil && code == 0 {
			model, err = compose.ParseModel(output.Kept)
		}
		if failure != nil || code != 0 || err != nil {
			// The command itself will say what is wrong with the files.
			h.log.Warn("compose does not describe the project: whether the command stops this worker is judged by its words alone", "code", code, "error", errors.Join(errorOf(failure), err))
			model.Name = h.own.Project
		}
	}
	return h.own.StoppedBy(h.command, model), nil
}

// modelLimit bounds compose's description of a project, in bytes.
const modelLimit = 16 << 20

// errorOf makes a nil *Failure a nil error.
func errorOf(failure *Failure) error {
	if failure == nil {
		return nil
	}
	return failure
}

// record records the helper before it is started.
func (h *helped) record(ctx context.Context) *Failure {
	attempt := h.journal.claim.Attempt
	h.stepRun.record.Helper = &change.Helper{
		Name: fmt.Sprintf("%s%s-%s-%d-%d", compose.HelperPrefix, h.runID, h.step, attempt, h.number),
		Step: string(h.step), Attempt: attempt, Command: h.number,
		Container: h.own.ID, Image: cmp.Or(h.image, h.own.ImageID), At: h.config.Now().UTC(),
	}
	return h.saveRecord(ctx)
}

// start starts the recorded helper.
func (h *helped) start(ctx context.Context) error {
	recorded := h.stepRun.record.Helper
	if err := h.findOwn(ctx); err != nil {
		return err
	}
	if h.own == nil {
		return fmt.Errorf("%w, and this worker runs in no container of this engine: it cannot start one", compose.ErrNoHelper)
	}
	task := compose.HelperTask{
		Name: recorded.Name, RunID: h.runID, Step: string(h.step), Workspace: h.workspace, Environ: h.config.Environ,
		Host: getenv(h.config.Environ, "DOCKER_HOST"), Window: h.config.HelperWindow,
	}
	if getenv(h.config.Environ, "DOCKER_TLS_VERIFY") != "" {
		task.CertPath = getenv(h.config.Environ, "DOCKER_CERT_PATH")
	}
	if len(h.command) > 0 {
		argv := h.runner.compose.Resolve(h.command)
		program, failure := h.runner.find(h.command, argv[0], h.workspace)
		if failure != nil {
			return failure
		}
		task.Command = append([]string{program}, argv[1:]...)
	}
	if h.before != nil {
		task.Before = *h.before
	} else {
		var err error
		if task.Before, err = h.config.Helpers.ServiceState(ctx, h.own.Project, h.own.Service); err != nil {
			return err
		}
	}
	own := *h.own
	if h.image != "" {
		own.ImageID = h.image
	}
	return h.config.Helpers.StartHelper(ctx, own, h.config.Program, task)
}

// follow waits until the helper has run the command, and this worker may go on. It
// copies the output.
func (h *helped) follow(ctx context.Context) (int, *Failure) {
	state, failure := h.wait(ctx, h.start)
	return state.Code, failure
}

// errNotStarted says that a helper has never run, and is not to be started.
var errNotStarted = errors.New("the helper has not been started")

// wait waits until the helper needs this worker no more: it has done its work, or
// knows that this worker goes on with it. A helper that does not exist, or has never
// run, is started by start. If that returns errNotStarted, wait returns the zero
// state.
//
// A failure says that the service could not be replaced, or that the wait has ended.
func (h *helped) wait(ctx context.Context, start func(context.Context) error) (compose.HelperState, *Failure) {
	name, helpers := h.stepRun.record.Helper.Name, h.config.Helpers
	if helpers == nil {
		return compose.HelperState{}, commandError("Helper container " + name + " acts for this run, and this worker has no docker engine to ask it. Run a worker that reaches the engine")
	}
	log := h.log.With("helper", name)
	refusedSince, last, confirmed := time.Time{}, "", false
	for {
		state, err := helpers.ReadHelper(ctx, name)
		missing := errors.Is(err, compose.ErrNoHelper)
		if err == nil && !state.Done {
			err = helpers.ResumeHelper(ctx, name)
			missing = errors.Is(err, compose.ErrNoHelper) // created, and never started
		}
		if missing {
			if err = start(ctx); errors.Is(err, errNotStarted) {
				return compose.HelperState{}, nil
			}
		}
		if err == nil {
			err = h.findOwn(ctx)
		}
		h.show(state)
		switch cause := context.Cause(ctx); {
		case cause != nil:
			return state, endedFailure(h.shownCommand(), cause)
		case err == nil:
			refusedSince = time.Time{}
			decision, failure := helperDecision(state, h.own != nil && h.own.ID == h.stepRun.record.Helper.Container)
			switch decision {
			case helperEnd, helperFailed:
				return state, failure
			case helperConfirm:
				if !confirmed {
					log.Info("the step goes on in this worker: telling the helper")
				}
				// Repeated until the helper says that it knows: it may have been killed.
				confirmed = helpers.Confirm(ctx, name, h.config.Node) == nil
			}
		case errors.Is(err, compose.ErrUnreachable):
			refusedSince = time.Time{}
		case refusedSince.IsZero():
			refusedSince = time.Now()
		case time.Since(refusedSince) > helperRefusal:
			return state, commandError(fmt.Sprintf("Helper container %s, which runs %s: %s", name, formatCommand(h.shownCommand()), err))
		}
		if err != nil && err.Error() != last {
			log.Warn("helper cannot be asked now, retrying", "error", err)
			last = err.Error()
		}
		if failure := h.pause(ctx); failure != nil {
			return state, failure
		}
	}
}

// pause waits before the next look at the helper. When the worker is asked to stop,
// most likely by the helper's command, it gives the step back: the next worker
// follows the helper.
func (s *stepRun) pause(ctx context.Context) *Failure {
	over := stall.FromContext(ctx).Wait()
	defer over()
	timer := time.NewTimer(helperPause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return commandError("The wait for a helper container was ended: " + context.Cause(ctx).Error())
	case <-s.config.Stopping:
		err := errors.New("this worker is asked to stop; the next one follows the helper container")
		s.journal.endWork(endCause{givenBack, err})
		return commandError(err.Error())
	}
}

// shownCommand is the command as error texts show it.
func (h *helped) shownCommand() []string {
	if len(h.command) == 0 {
		return []string{"the return of the old container"}
	}
	return h.command
}

// show copies new events of the helper to the output of the command.
func (h *helped) show(state compose.HelperState) {
	for ; h.shown < len(state.Events); h.shown++ {
		switch event := state.Events[h.shown]; event.Kind {
		case compose.HelperOutput:
			if event.Stderr {
				io.WriteString(h.stderr, event.Text)
			} else {
				io.WriteString(h.stdout, event.Text)
			}
		case compose.HelperNote, compose.HelperStartedAgain, compose.HelperPuttingBack, compose.HelperNotPutBack:
			text := event.Text
			if event.Kind != compose.HelperNote {
				text = string(event.Kind) + ": " + text
			}
			fmt.Fprintf(h.stderr, "[Helper: %s]\n", strings.TrimSpace(text))
		}
	}
}

// helperNext says what a worker does about a helper.
type helperNext int

const (
	// helperWait: look again.
	helperWait helperNext = iota
	// helperConfirm: tell the helper that this worker goes on.
	helperConfirm
	// helperEnd: the command has ended, with the code in the state.
	helperEnd
	// helperFailed: the old container was put back, or could not be.
	helperFailed
)

// helperDecision decides what a worker does about a helper that acts for its step.
// replaced says that the worker runs in the container that the helper is to replace.
func helperDecision(state compose.HelperState, replaced bool) (helperNext, *Failure) {
	switch {
	case state.NotPutBack:
		return helperFailed, commandError("The old container of the worker's own service could not be put back: " + state.Why + ". What there was of the service was started")
	case !state.Done && state.Confirmed && !state.PuttingBack && state.Code == 0:
		return helperEnd, nil
	case !state.Done && (!state.Ended || state.PuttingBack || state.Code != 0):
		return helperWait, nil // this worker may be stopped at any moment
	case !state.Done && replaced:
		return helperWait, nil // the helper is about to see whether its command has changed anything
	case !state.Done:
		return helperConfirm, nil
	case state.PutBack && state.Begun && state.Code == 0:
		return helperFailed, commandError("The new version of the worker's own service did not take over: " + state.Why + ". The old container was put back")
	}
	return helperEnd, nil
}

// beginWithoutHelpers ends the helpers of earlier steps before a rollback, which
// decides itself what is to be put back.
func (s *stepRun) beginWithoutHelpers(ctx context.Context) *Failure {
	if s.step != store.StepRollback || s.record.Helper.ActsIn(string(s.step), s.journal.claim.Attempt) {
		return nil
	}
	return s.endHelpers(ctx)
}

// leaveHelpers ends the helpers of the run after the success of a step that proves
// that the service runs. If it cannot, they end by themselves.
func (s *stepRun) leaveHelpers(ctx context.Context) {
	if s.step != store.StepVerify && s.step != store.StepRollback {
		return
	}
	if failure := s.endHelpers(ctx); failure != nil {
		s.log.Warn("helper containers of the run remain: they end by themselves, and docker rm removes them", "error", failure)
	}
}

// endHelpers ends the helpers of the run: the work is done, or goes on without
// them. It first waits until no helper is in the middle of something: without it,
// nobody would bring that to its end if this worker is stopped.
func (s *stepRun) endHelpers(ctx context.Context) *Failure {
	if s.record.Helper == nil || s.config.Helpers == nil {
		return nil
	}
	h := &helped{stepRun: s, stdout: io.Discard, stderr: io.Discard}
	state, failure := h.wait(ctx, func(context.Context) error { return errNotStarted })
	if failure != nil && !state.Done && !state.NotPutBack {
		return failure
	}
	if err := s.config.Helpers.RemoveHelpers(ctx, s.runID); err != nil {
		s.log.Warn("helper containers of the run remain: remove them with docker rm --force", "error", err)
	}
	return nil
}

// byHelper lets a helper bring the worker's own service back to what it was before
// the run, if an act of the rollback stops this worker. It returns false if the act
// does not.
func (r *imageRestore) byHelper(ctx context.Context, act change.Act) (bool, error) {
	h := r.ownRestore()
	if err := h.findOwn(ctx); err != nil || h.own == nil || !stopsWorker(act, *h.own) || h.own.Project != r.record.Image.Project {
		return false, err
	}
	if h.acts() {
		return true, fmt.Errorf("helper %s has put back the worker's own service, and it is not as before: %s", r.record.Helper.Name, act)
	}
	if err := r.prepare(ctx, h); err != nil {
		return true, err
	}
	r.stepRun.log.Warn("the rollback stops this worker: a helper container brings the old container back", "container", h.own.String())
	r.log.Line("[A helper container brings service " + h.own.Service + " back, in which this worker runs]")
	if failure := h.record(ctx); failure != nil {
		return true, failure
	}
	return true, h.await(ctx, r.log, h.start)
}

// prepare tells a helper what to put back.
func (r *imageRestore) prepare(ctx context.Context, h *helped) error {
	before := compose.ServiceState{Project: h.own.Project, Service: h.own.Service}
	for _, c := range r.record.Image.Before.Of(h.own.Service) {
		recorded, err := r.recordedBefore(ctx, c)
		if err != nil {
			return err
		}
		if recorded == nil {
			return fmt.Errorf("the configuration of container %s is not recorded any more: somebody has removed its pin", c.Name)
		}
		before.Containers = append(before.Containers, compose.KeptContainer{Inspection: *recorded, Container: compose.Container{
			ID: c.ID, Name: c.Name, Service: c.Service, Number: c.Number, ImageID: c.ImageID, Image: c.Image, ConfigHash: c.ConfigHash, State: c.State, StartedAt: c.StartedAt,
		}})
	}
	if len(before.Containers) == 0 {
		return fmt.Errorf("service %s, in which this worker runs, had no container before the run: remove it by hand", h.own.Service)
	}
	h.before = &before
	if last := r.record.Helper; last != nil && last.Image == before.Containers[0].Container.ImageID {
		h.image = last.Image // a helper has run in it
	}
	return nil
}

// ownRestore is what a helper does for the rollback.
func (r *imageRestore) ownRestore() *helped {
	return &helped{stepRun: r.stepRun, workspace: r.record.Image.Workspace}
}

// awaitHelper waits for the end of a helper that an earlier worker has recorded for
// this rollback. If that worker was killed before it could start the helper, this
// one does, unless it runs elsewhere and needs none.
func (r *imageRestore) awaitHelper(ctx context.Context) error {
	h := r.ownRestore()
	if !h.acts() {
		return nil
	}
	return h.await(ctx, r.log, func(ctx context.Context) error {
		if err := h.findOwn(ctx); err != nil {
			return err
		}
		if h.own == nil || h.own.ID != r.record.Helper.Container {
			return errNotStarted
		}
		if err := r.prepare(ctx, h); err != nil {
			return err
		}
		return h.start(ctx)
	})
}

func (h *helped) await(ctx context.Context, log *artifacts.Log, start func(context.Context) error) error {
	output := log.Output()
	h.stdout, h.stderr = output.Stdout, output.Stderr
	_, failure := h.wait(ctx, start)
	output.Close()
	return errorOf(failure)
}

// stopsWorker says that an act of a rollback may stop the container that this
// worker runs in.
func stopsWorker(act change.Act, own compose.OwnContainer) bool {
	switch act.Do {
	case change.ComposeUp:
		return act.Service == own.Service
	case change.ReplaceContainer, change.StopContainer, change.PauseContainer, change.RemoveContainer:
		return act.Container.ID == own.ID
	}
	return false
}

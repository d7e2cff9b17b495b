package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
)

// restoreRounds bounds how often a rollback looks and acts. Four are enough when
// nobody else changes the project: load and mend, compose, create again, names.
const restoreRounds = 12

// imageByCommands says why only the plan's own commands can undo what the run has
// done to images and containers: nothing could be recorded before it. It is "" if
// restoreImage does that.
func (s *stepRun) imageByCommands() string {
	image := s.record.Image
	switch {
	case image == nil && s.ranElsewhere:
		return "a worker that keeps no record has run steps of this run"
	case image != nil && !image.EngineSeen:
		if _, isCompose := s.deployment(); !isCompose {
			return "the plan builds and restarts by no docker compose command"
		}
		return "the docker engine could not be read when the run began to change images"
	}
	return ""
}

// An imageOutcome is what a rollback has done for images and containers.
type imageOutcome struct {
	// Untouched says that the run has changed no image and no container.
	Untouched bool
	// Images and Configuration are the ids and hashes that are as before the run.
	Images, Configuration string
}

// restoreImage brings images and containers back to what they were before the run,
// without a build and without a registry. The workspace must be as before already:
// compose reads its files.
//
//   - It must not be called if imageByCommands gives a reason.
//   - It can be repeated after a kill at any point: it looks, decides, and acts.
//   - It returns a failure if something is not as before in the end. The text names
//     what, and the commands for doing it by hand.
func (s *stepRun) restoreImage(ctx context.Context, log *artifacts.Log) (imageOutcome, *Failure) {
	image := s.record.Image
	if image == nil || !image.Ready || image.Restored && s.journal.claim.Starts == 1 {
		return imageOutcome{Untouched: true}, nil // or nothing since the last rollback, see nothingToTakeBack
	}
	r := &imageRestore{stepRun: s, log: log, tried: map[string]bool{}, kept: map[string]bool{}}
	var now change.ImageNow
	failed := r.awaitHelper(ctx)
	if failed == nil {
		failed = errorOf(r.compareOthers(ctx))
	}
	if failed == nil {
		r.removeBuildContainers(ctx)
	}
	if failed == nil {
		now, failed = r.settle(ctx)
	}
	if cause := context.Cause(ctx); cause != nil {
		return imageOutcome{}, commandError(fmt.Sprintf("Bringing back %s of project %s was ended: %s", image.Describe(), image.Project, cause))
	}
	if failed != nil {
		return imageOutcome{}, commandError(fmt.Sprintf("%s of project %s cannot be brought back: %s. %s", capital(image.Describe()), image.Project, failed, r.byHand()))
	}
	images, configuration, differences := image.Equal(now)
	if len(differences) > 0 {
		return imageOutcome{}, commandError(fmt.Sprintf("%s of project %s is not as before the run: %s. %s",
			capital(image.Describe()), image.Project, strings.Join(differences, "; "), r.byHand()))
	}
	for _, name := range slices.Concat(image.NewVolumes(now.Project), image.Anonymous) {
		if !slices.Contains(image.Volumes, name) {
			image.Volumes = append(image.Volumes, name)
		}
		log.Line(fmt.Sprintf("[Volume %s was not there before the run. It is kept, since it may have data. To remove it: %s]", name, formatCommand(removeVolume(name))))
	}
	image.Restored = true
	s.auditContainers(image.Before, now.Project)
	s.audit(audit.Record{Kind: audit.ContainerRestored, Text: "images " + cmp.Or(images, "none") + "; configuration " + cmp.Or(configuration, "none")})
	if failure := s.saveRecord(ctx); failure != nil {
		return imageOutcome{}, failure
	}
	return imageOutcome{Images: images, Configuration: configuration}, nil
}

func capital(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// An imageRestore is the part of a rollback that acts on images and containers.
type imageRestore struct {
	*stepRun
	log *artifacts.Log
	// tried and kept are those of [change.ImageNow].
	tried, kept map[string]bool
	// places are [change.Image.Places] at the last look.
	places map[string]string
}

// compareOthers finds out which other services a restart has changed, if that was not
// compared after its command. What somebody else has changed of them since the
// command began cannot be told from that.
func (r *imageRestore) compareOthers(ctx context.Context) *Failure {
	image := r.record.Image
	if image.RestartBegun == nil || image.Compared {
		return nil
	}
	now, err := r.projectNow(ctx)
	if err != nil {
		return commandError("the containers of other services cannot be seen: " + err.Error())
	}
	changes, touched, appeared := image.OtherChanges(now, false)
	if len(changes) > 0 {
		r.log.Line(fmt.Sprintf("[The restart has failed or was cut off. Other services were changed since it began, and are brought back too: %s]", strings.Join(changes, ", ")))
	}
	image.AddOthers(touched, appeared)
	image.Compared = true
	return r.saveRecord(ctx)
}

// settle looks and acts until nothing is left to do. An act that fails is decided
// again from what is there then: somebody else may have removed its container, or the
// engine goes on with what it was asked before its answer was lost.
func (r *imageRestore) settle(ctx context.Context) (change.ImageNow, error) {
	var now change.ImageNow
	var last error
	limit := r.config.Now().Add(engineWait)
	for rounds := 0; rounds < restoreRounds; rounds++ {
		err := r.untilEngineAnswers(ctx, func() (err error) {
			now, err = r.look(ctx)
			return err
		})
		if err != nil {
			return now, err
		}
		if r.record.Image.AddAnonymous(now.Project) {
			// A container that is gone does not tell of them any more.
			if failure := r.saveRecord(ctx); failure != nil {
				return now, failure
			}
		}
		if r.requested {
			for _, name := range r.record.Image.Anonymous {
				r.kept[name] = true
			}
		}
		acts := r.record.Image.Restore(now)
		if len(acts) == 0 {
			return now, nil
		}
		err = r.do(ctx, acts)
		unanswered := errors.Is(err, compose.ErrUnreachable)
		if err != nil && !unanswered && last != nil && !errors.Is(last, compose.ErrUnreachable) {
			return now, err
		}
		if unanswered && r.config.Now().Before(limit) {
			rounds-- // an outage in which the engine answers now and then is waited out like any other
		}
		last = err
		if err != nil && !pauseFor(ctx, enginePause) {
			return now, context.Cause(ctx)
		}
	}
	return now, cmp.Or(last, errors.New("something changes them again and again"))
}

// target is the plan's compose command line without a subcommand.
func (r *imageRestore) target() compose.Target {
	return compose.Target{Prefix: r.record.Image.Compose}
}

// look returns what a rollback has to know before it acts.
func (r *imageRestore) look(ctx context.Context) (change.ImageNow, error) {
	image := r.record.Image
	now := change.ImageNow{
		Images: map[string]bool{}, Names: map[string]string{}, Differing: map[string][]string{}, Hashes: map[string]string{}, Tried: r.tried, Kept: r.kept,
	}
	project, err := r.config.Engine.Project(ctx, image.Project)
	if err != nil {
		return now, err
	}
	now.Project = change.ProjectOf(project)
	r.places = image.Places(now.Project)
	names := map[string]bool{}
	ids := map[string]bool{}
	for _, name := range image.Names {
		names[name.Name] = true
		ids[name.ID] = true
	}
	for _, before := range image.Before.Containers {
		names[before.Image] = true
		ids[before.ImageID] = true
		c, found := image.InPlaceOf(before, now.Project)
		if name := image.CutOff(c, now.Project); name != "" && image.Restores(before.Service) {
			now.Differing[c.ID] = []string{"it uses the network or processes of container " + name + ", which was removed"}
		}
		switch {
		case !found || len(now.Differences(before, c)) > 0:
			r.askCompose(ctx, &now, before.Service)
		case c.ID != before.ID:
			if now.Differing[c.ID], err = r.compare(ctx, before, c); err != nil {
				return now, err
			}
		}
	}
	for name := range names {
		if !change.CanBeNamed(name) {
			continue
		}
		found, err := r.config.Engine.InspectImage(ctx, name)
		if err != nil && !errors.Is(err, compose.ErrNotFound) {
			return now, err
		}
		now.Names[name] = found.ID
	}
	for id := range ids {
		if id == "" {
			continue
		}
		_, err := r.config.Engine.InspectImage(ctx, id)
		if err != nil && !errors.Is(err, compose.ErrNotFound) {
			return now, err
		}
		now.Images[id] = err == nil
	}
	return now, nil
}

// askCompose asks which configuration of a service the files have now. If compose
// cannot read them, it is of no use for the service.
func (r *imageRestore) askCompose(ctx context.Context, now *change.ImageNow, service string) {
	if r.tried[service] || now.Hashes[service] != "" || len(r.record.Image.Compose) == 0 {
		return
	}
	text, err := r.query(ctx, r.record.Image.Workspace, r.target().HashCommand(service))
	if err != nil {
		r.stepRun.log.Warn("compose cannot read the project's files, containers are created without it", "service", service, "error", err)
		r.tried[service] = true
		return
	}
	now.Hashes[service] = compose.ParseHash(text, service)
}

// compare lists what differs in the configuration of a container from that of the
// one of before, as far as that is recorded.
func (r *imageRestore) compare(ctx context.Context, before, now change.Container) ([]string, error) {
	recorded, err := r.recordedBefore(ctx, before)
	if err != nil || recorded == nil {
		return nil, err
	}
	found, _, err := r.config.Engine.InspectContainer(ctx, now.ID)
	if errors.Is(err, compose.ErrNotFound) {
		return []string{"it was removed just now"}, nil
	}
	if err != nil {
		return nil, err
	}
	differing := recorded.Differences(found)
	if now.StartedAt.IsZero() { // a process may have removed them since
		missing, err := r.config.Engine.MissingFiles(ctx, now.ID, *recorded)
		if err != nil && !errors.Is(err, compose.ErrNotFound) {
			return nil, err
		}
		for _, path := range missing {
			differing = append(differing, "no file "+path)
		}
	}
	return differing, nil
}

// recordedBefore returns the configuration of a container of before, nil if it is
// not recorded.
func (r *imageRestore) recordedBefore(ctx context.Context, before change.Container) (*compose.Inspection, error) {
	pin := change.Pin{Container: before.ID} // other services have none, but may still have the container
	if at := slices.IndexFunc(r.record.Image.Pins, func(pin change.Pin) bool { return pin.Container == before.ID }); at >= 0 {
		pin = r.record.Image.Pins[at]
	}
	recorded, err := r.recordedContainer(ctx, pin)
	if err != nil || recorded == nil {
		return nil, err
	}
	moved := recorded.Sharing(r.places)
	return &moved, nil
}

// do carries out acts in their order. What cannot be done for one service keeps no other
// from coming back: after an error, the rest of that service's acts is left out.
func (r *imageRestore) do(ctx context.Context, acts []change.Act) error {
	var intents []audit.Record
	for _, act := range acts {
		intents = append(intents, audit.Record{Kind: audit.ContainerChanging, Text: act.String(), Container: &audit.Container{Service: act.Service, Before: act.Container.ID}})
	}
	if failure := r.auditBefore(ctx, intents...); failure != nil {
		return failure
	}
	var failures []string
	failed := map[string]bool{}
	for _, act := range acts {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if act.Service != "" && failed[act.Service] {
			continue
		}
		if helped, err := r.byHelper(ctx, act); helped || err != nil {
			if err != nil {
				return err
			}
			continue
		}
		if act.Do != change.MendContainer { // its line is written after it
			r.log.Line("[" + act.String() + "]")
		}
		over := stall.FromContext(ctx).Wait()
		err := r.doOne(ctx, act)
		over()
		if errors.Is(err, compose.ErrUnreachable) {
			return err
		}
		if err != nil {
			failures, failed[act.Service] = append(failures, err.Error()), true
		}
	}
	if len(failures) > 0 {
		return errors.New(strings.Join(failures, "; "))
	}
	return nil
}

func (r *imageRestore) doOne(ctx context.Context, act change.Act) error {
	engine := r.config.Engine
	switch act.Do {
	case change.LoadImage:
		i := slices.IndexFunc(r.record.Image.Pins, func(pin change.Pin) bool { return pin.ImageID == act.ID })
		if i < 0 {
			return fmt.Errorf("the engine has no image %s any more, and it was not pinned", act.ID)
		}
		return r.loadArchive(ctx, r.record.Image.Pins[i])
	case change.MendContainer:
		return r.repair(ctx, r.log, act.Repair)
	case change.TagImage:
		return engine.TagImage(ctx, act.ID, act.Name)
	case change.UntagImage:
		if err := engine.UntagImage(ctx, act.Name); err != nil {
			return r.keep(act.Name, err)
		}
		return nil
	case change.ComposeUp:
		r.tried[act.Service] = true
		return r.composeUp(ctx, act)
	case change.ReplaceContainer:
		return r.replace(ctx, act)
	case change.StartContainer:
		return engine.StartContainer(ctx, act.Container.ID)
	case change.StopContainer:
		return engine.StopContainer(ctx, act.Container.ID)
	case change.PauseContainer:
		return engine.PauseContainer(ctx, act.Container.ID)
	case change.RemoveContainer:
		return engine.RemoveContainer(ctx, act.Container.ID)
	case change.ReplaceNetwork:
		return r.replaceNetwork(ctx, act)
	case change.RemoveNetwork:
		if err := engine.RemoveNetwork(ctx, act.Network.ID); err != nil {
			return r.keep(act.Network.ID, err)
		}
		return nil
	case change.RemoveVolume:
		if err := engine.RemoveVolume(ctx, act.Name); err != nil {
			return r.keep(act.Name, err)
		}
		image := r.record.Image
		image.Anonymous = slices.DeleteFunc(image.Anonymous, func(name string) bool { return name == act.Name })
		return nil
	}
	return fmt.Errorf("unknown act %q", act.Do)
}

// replaceNetwork puts a network like that of before in the place of the present one,
// which must have no containers but those that the rollback brings back.
func (r *imageRestore) replaceNetwork(ctx context.Context, act change.Act) error {
	engine, image := r.config.Engine, r.record.Image
	if act.Network.ID != "" {
		users, err := engine.NetworkUsers(ctx, act.Network.ID, image.Project)
		if err != nil {
			return err
		}
		own := r.ownRestore()
		if err := own.findOwn(ctx); err != nil {
			return err
		}
		for _, user := range users {
			switch {
			case own.own != nil && own.own.ID == user.ID:
				return r.keep(act.Network.ID, fmt.Errorf("network %s is used by container %s, in which this worker runs", act.Network.Name, user.Name))
			case user.Service == "" || !image.Restores(user.Service):
				return r.keep(act.Network.ID, fmt.Errorf("network %s is used by container %s, which is not the run's", act.Network.Name, user.Name))
			}
		}
		for _, user := range users {
			if err := engine.StopContainer(ctx, user.ID); err != nil {
				return err
			}
			if err := engine.DisconnectNetwork(ctx, act.Network.ID, user.ID); err != nil {
				return err
			}
		}
		if err := engine.RemoveNetwork(ctx, act.Network.ID); err != nil {
			return err
		}
	}
	return engine.CreateNetwork(ctx, act.NetworkBefore.Name, *act.NetworkBefore.Settings)
}

// keep leaves something in the engine that it refuses to remove.
func (r *imageRestore) keep(id string, err error) error {
	if errors.Is(err, compose.ErrUnreachable) {
		return err
	}
	r.kept[id] = true
	r.log.Line("[Left as it is: " + err.Error() + "]")
	return nil
}

// composeUp lets compose replace a service's containers. Its exit code decides
// nothing: the next look shows what it has done.
func (r *imageRestore) composeUp(ctx context.Context, act change.Act) error {
	command := r.target().BackCommand(act.Service, act.Count, act.Start)
	r.log.Line("$ " + formatCommand(command))
	output := r.log.Output()
	stdout, stderr, ended := r.meter.command(output.Stdout, output.Stderr)
	code, failure := r.runner.forOwn().runTrusted(ctx, r.record.Image.Workspace, command, stdout, stderr, nil)
	_ = ended() // the context has ended too
	output.Close()
	record := r.commandRecord(audit.CommandEnded, 0, r.record.Image.Workspace, command)
	if record.Command.Exit = &code; failure != nil {
		record.Command.Exit, record.Command.Ended = nil, cut(failure.Error())
	}
	r.audit(record)
	switch {
	case context.Cause(ctx) != nil:
		return context.Cause(ctx)
	case failure != nil:
		r.log.Line("[" + failure.Error() + "]")
	case code != 0:
		r.log.Line(fmt.Sprintf("[The command failed with code %d]", code))
	}
	return nil
}

// replace puts a container like one of before in the place of the present one. The
// new one exists before the old one is stopped.
func (r *imageRestore) replace(ctx context.Context, act change.Act) error {
	recorded, err := r.recordedBefore(ctx, act.Before)
	if err != nil {
		return err
	}
	if recorded == nil {
		return fmt.Errorf("the configuration of container %s is not recorded any more: somebody has removed its pin", act.Before.Name)
	}
	engine := r.config.Engine
	if act.Container.ID == "" {
		_, err := engine.CreateContainer(ctx, act.Before.Name, *recorded)
		return err // the next look starts it
	}
	id, err := engine.CreateContainer(ctx, change.TemporaryName(act.Container.ID, act.Before.Name), *recorded)
	if err != nil {
		return err
	}
	if err := engine.StopContainer(ctx, act.Container.ID); err != nil {
		return err
	}
	if err := engine.RemoveContainer(ctx, act.Container.ID); err != nil {
		return err
	}
	return engine.RenameContainer(ctx, id, act.Before.Name)
}

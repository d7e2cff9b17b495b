package orchestrator

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A health is what verify concludes about a service.
type health int

const (
	// unproven says that what was seen proves neither of the other two. It is
	// the zero value: nothing counts as healthy because a conclusion is missing.
	unproven health = iota
	// healthy says that everything that the requirements name was seen.
	healthy
	// sick says that something was seen that a healthy service does not have.
	sick
)

func (h health) String() string {
	return [...]string{unproven: "not proven", healthy: "healthy", sick: "sick"}[h]
}

// A verdict is a conclusion and its reason.
type verdict struct {
	health
	// reason is one line or more. It is "" if about says everything, or for
	// healthy.
	reason string
	// about are the containers that the reason is about.
	about []finding
	// ended says that the step was ended before a conclusion; the reason is why.
	ended bool
}

// A finding is what there is to say about a container.
type finding struct {
	container compose.Container
	text      string
}

// Requirements are what a service has to show, from the plan and the
// configuration.
type requirements struct {
	// project and services name the containers. All of them count. service is the
	// services in one word, for messages.
	project, service string
	services         []string
	// check is the HTTP health check, nil for none.
	check *healthCheck
	// urlIsConfigured says that the configuration replaces the URL of the plan. An
	// operator who sets it vouches for whatever answers there.
	urlIsConfigured bool
	// runningIsEnough says that a service with neither a URL nor a health check of
	// its own is healthy when it runs.
	runningIsEnough bool
	// oneShots are the services that have to complete: to end by themselves with exit
	// code 0. Then nothing else is needed.
	oneShots []string
	// composed says that the plan manages the service by compose commands, so that
	// there has to be a container.
	composed bool
	// deployed says that the plan builds the image or recreates the container, so
	// that the container has to run the image that its image name stands for.
	deployed bool
	// image is the id of the image that has to run, "" for the one that the
	// containers' image name stands for.
	image string
	// before are the target's containers before the run. If one of them was not
	// well, the same condition again is enough. Nil means no such comparison, an empty list that there were none.
	before []compose.Container
	// begun is when verification began. The service has to be well at deadline;
	// what is left of the quiet period then may follow.
	begun, deadline time.Time
	// quiet is how long everything has to stay as it is.
	quiet time.Duration
	// engineWasSeen says that the engine has answered earlier in the run, so that
	// its silence is an outage and not a deployment without one.
	engineWasSeen bool
	// otherEngine says that compose uses an engine that the worker cannot ask.
	otherEngine bool
}

func (r requirements) isOneShot(service string) bool { return slices.Contains(r.oneShots, service) }

// hasCompleted says that a container is one of a one-shot service, and has done its
// work.
func (r requirements) hasCompleted(c compose.Container) bool {
	return r.isOneShot(c.Service) && c.State == "exited" && c.ExitCode == 0 && c.Error == "" && !c.OOMKilled
}

// finalAfter is how long a state has to last that only a person or a command
// changes, such as exited: a container that is just being replaced has it too.
func (r requirements) finalAfter() time.Duration { return min(r.quiet, 5*time.Second) }

// decide concludes from the evidence. It returns false while further looks may
// change the conclusion.
//
// The service is healthy if nothing wrong was seen for the quiet period, nor is
// now. A bad reply begins the period again, also one before the first good reply:
// so a service that answers once and then ends is not healthy. Its containers'
// start times count, so that a service that has been up for longer has no wait.
func decide(e evidence, r requirements, now time.Time) (verdict, bool) {
	steadyUntil := e.steadySince.Add(r.quiet)
	wrong := e.wrong(r)
	if wrong.health == healthy {
		if pending := e.pending(r); pending.health != healthy {
			if r.before != nil && e.onlyUnchecked() && !now.Before(r.deadline) && !now.Before(steadyUntil) {
				return verdict{health: healthy, reason: "as before, although docker has not finished the first health check of " + r.service}, true
			}
			over := !now.Before(r.deadline) && (!now.Before(steadyUntil) || steadyUntil.After(r.deadline.Add(r.quiet)))
			if over && e.asBefore(r) {
				return r.likeBefore(), true
			}
			return pending, over
		}
		if !now.Before(steadyUntil) {
			return wrong, true
		}
	}
	if e.asBefore(r) {
		return r.likeBefore(), true
	}
	switch {
	case wrong.health == unproven && e.unprovable(r) && (len(e.last.containers) > 0 || !r.composed || now.Sub(r.begun) >= r.finalAfter()):
		return wrong, true
	case !e.finalSince.IsZero() && now.Sub(e.finalSince) >= r.finalAfter():
		if r.check != nil && e.firstGood == nil && now.Before(r.deadline) {
			wrong.reason = strings.Replace(wrong.reason, r.check.timedOut(), r.check.givenUp(now.Sub(r.begun)), 1)
		}
		return wrong, true
	case wrong.health != healthy:
		return wrong, !now.Before(r.deadline)
	case steadyUntil.After(r.deadline.Add(r.quiet)):
		// There has been a fault after which the rest of the time is too short.
		return e.unsteady(r), true
	}
	return e.unsteady(r), false
}

// asBefore says that the service was not well before the run, and is in the same
// condition again. A container that docker has called unhealthy before may need longer
// than the deadline until docker does so again: at the deadline, it is enough that its
// checks fail.
func (e evidence) asBefore(r requirements) bool {
	if r.before == nil || well(r.before) || !e.last.engine {
		return false
	}
	now := inLoops(e.last.containers, e.last.at, r.quiet)
	for i, c := range now {
		if !e.last.at.Before(r.deadline) && c.Health == "starting" && c.HealthExit != 0 {
			now[i].Health = "unhealthy"
		}
	}
	return sameCondition(now, r.before)
}

// likeBefore is the verdict on a service that is as sick as before the run.
func (r requirements) likeBefore() verdict {
	return verdict{health: healthy, reason: fmt.Sprintf("as before: %s was %s before the run", r.service, condition(r.before))}
}

// inLoops returns the containers with the state restarting for those that the engine
// starts again and again: most of the time, such a container runs.
func inLoops(containers []compose.Container, at time.Time, quiet time.Duration) []compose.Container {
	all := slices.Clone(containers)
	for i, c := range all {
		if c.State == "running" && c.Restarts > 0 && at.Sub(c.StartedAt) < quiet {
			all[i].State = "restarting"
		}
	}
	return all
}

// wrong says what is wrong now. It is healthy for nothing.
func (e evidence) wrong(r requirements) verdict {
	v := verdict{health: sick}
	for _, c := range e.seen.containers {
		if p := problemOf(c, e.seen, r); p.text != "" {
			v.about = append(v.about, finding{c, p.text})
		}
	}
	noContainer := e.last.engine && len(e.last.containers) == 0 && r.composed
	switch {
	case r.check != nil && (e.last.reply == nil || !e.last.reply.expected):
		if e.firstGood != nil {
			about := v.about
			v = e.unsteady(r)
			if len(about) > 0 {
				v.about = about
			}
		} else {
			v.reason = r.check.timedOut()
			if len(v.about) == 0 {
				v.about = restarted(e.last.containers)
			}
		}
		if noContainer {
			v.reason += "\n" + capitalized(e.absent(r))
		}
		return v
	case len(v.about) > 0:
		return v
	case noContainer && e.existed:
		return verdict{health: sick, reason: capitalized(e.absent(r))}
	case noContainer:
		return verdict{reason: e.absent(r)}
	case !e.last.engine && (e.engineSeen || r.engineWasSeen):
		return verdict{reason: "the docker engine does not answer any more, so that the containers of service " + r.service + " cannot be seen"}
	case r.check != nil && !e.last.reply.good():
		return verdict{reason: e.last.reply.text + ", but " + e.last.reply.elsewhere}
	case e.unprovable(r):
		return verdict{reason: e.whyUnprovable(r)}
	}
	return verdict{health: healthy}
}

// restarted are the containers that the engine has started again.
func restarted(containers []compose.Container) (all []finding) {
	for _, c := range containers {
		if c.Restarts > 0 {
			all = append(all, finding{c, describe(c)})
		}
	}
	return all
}

// capitalized makes a sentence of a clause.
func capitalized(text string) string { return strings.ToUpper(text[:1]) + text[1:] }

// absent says that there is no container.
func (e evidence) absent(r requirements) string {
	text := fmt.Sprintf("docker has no container of service %s in project %s", r.service, r.project)
	if e.existed {
		text += " any more"
	}
	return text
}

// unprovable says that nothing that can be seen would prove that the service is
// healthy.
func (e evidence) unprovable(r requirements) bool {
	if r.check != nil {
		return false
	}
	if !e.last.engine || len(e.last.containers) == 0 {
		return true
	}
	if r.runningIsEnough || r.before != nil {
		return false
	}
	return slices.ContainsFunc(e.last.containers, func(c compose.Container) bool { return c.Health == "" && !r.isOneShot(c.Service) })
}

func (e evidence) whyUnprovable(r requirements) string {
	switch {
	case !e.last.engine:
		return fmt.Sprintf("the plan has no health check, and the worker has no docker engine to see the containers of service %s", r.service)
	case len(e.last.containers) == 0:
		return "the plan has no health check, and " + e.absent(r)
	}
	return fmt.Sprintf("service %s runs, but neither the plan nor the container has a health check. Give it one, or say that running is enough: "+
		"in the plan by \"runningIsEnough\": true among the parameters of verify, or by MM_ORCHESTRATOR_RUNNING_IS_ENOUGH. If it has to do its work and end, \"oneShot\": true says so", r.service)
}

// pending names the containers whose first health checks are not finished, those that
// docker still calls healthy after a check that has failed, and those of one-shot
// services that have not completed.
func (e evidence) pending(r requirements) verdict {
	v := verdict{health: healthy}
	for _, c := range e.last.containers {
		is, text := unproven, describe(c)+", since docker has not finished its first health check"
		switch {
		case r.hasCompleted(c):
			continue
		case r.isOneShot(c.Service):
			text = describe(c) + ", and has to complete"
		case c.Health == "healthy" && c.HealthExit != 0:
			is, text = sick, describe(c)+", but its last health check has failed"
		case c.Health != "starting":
			continue
		case c.HealthExit != 0:
			is, text = sick, describe(c)
		}
		if v.health == healthy || is == sick {
			v.health = is
		}
		v.about = append(v.about, finding{c, text})
	}
	return v
}

// onlyUnchecked says that all containers run and that no health check of docker's has
// failed: what is not known is what the first one of some says, which may come an hour
// after the start.
func (e evidence) onlyUnchecked() bool {
	return !slices.ContainsFunc(e.last.containers, func(c compose.Container) bool {
		return c.State != "running" || c.HealthExit != 0 || c.Health == "unhealthy"
	})
}

// unsteady says that something was wrong that is not now, too near to the end to
// be sure that it does not come again.
func (e evidence) unsteady(r requirements) verdict {
	v := verdict{health: sick}
	if e.lastBad != nil {
		v.reason = fmt.Sprintf("Service %s did not stay healthy for %s: after %s (attempt %d) came %s (attempt %d)",
			r.service, r.quiet, e.firstGood.text, e.firstGood.attempt, cmp.Or(e.lastBad.elsewhere, e.lastBad.text), e.lastBad.attempt)
	} else {
		v.reason = fmt.Sprintf("Containers of service %s did not stay up for %s", r.service, r.quiet)
	}
	for _, c := range e.last.containers {
		if c.Restarts > 0 || !e.runs[c.ID].startedAt.Before(r.begun) {
			v.about = append(v.about, finding{c, describe(c)})
		}
	}
	return v
}

// well says that every container runs and that docker does not call it unhealthy.
// No container is not well.
func well(containers []compose.Container) bool {
	return len(containers) > 0 && !slices.ContainsFunc(containers, func(c compose.Container) bool {
		return c.State != "running" || c.Health == "unhealthy"
	})
}

// condition is the state of a service's containers in a few words, which is
// compared between before a run and after its rollback.
func condition(containers []compose.Container) string {
	if len(containers) == 0 {
		return "absent"
	}
	var all []string
	for _, c := range containers {
		text := c.State
		switch {
		case c.State == "running" && c.Health != "":
			text += " and " + c.Health
		case c.State == "exited":
			text += fmt.Sprintf(" (%d)", c.ExitCode)
		case c.State == "restarting":
			text = "in a restart loop"
		}
		all = append(all, text)
	}
	slices.Sort(all)
	return strings.Join(slices.Compact(all), ", ")
}

// sameCondition says that a service's containers are in the condition of before. A
// container that did not run before is made again without being started: how it had ended
// is part of the container that is gone.
func sameCondition(now, before []compose.Container) bool {
	return condition(stopped(now)) == condition(stopped(before))
}

// stopped gives containers that do not run one state.
func stopped(containers []compose.Container) []compose.Container {
	all := slices.Clone(containers)
	for i, c := range all {
		switch c.State {
		case "created", "exited", "dead":
			all[i].State = "stopped"
		}
	}
	return all
}

// latest returns the later of two times.
func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

// earliest returns the earlier of two times: a start time in the future is that of
// an engine whose clock is fast.
func earliest(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

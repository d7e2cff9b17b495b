package orchestrator

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// A reply is what one request brought.
type reply struct {
	// attempt counts from 1.
	attempt int
	// from is where the connection leads to, to a proxy if proxy is set.
	from  netip.AddrPort
	proxy bool
	// text is "status=200" or an error.
	text string
	// expected says that the status is the expected one.
	expected bool
	// elsewhere says who else than the target has answered, "" for the target, or
	// if the worker cannot tell.
	elsewhere string
}

func (r reply) good() bool { return r.expected && r.elsewhere == "" }

// A look is what was seen at one moment.
type look struct {
	at time.Time
	// engine says that the engine has answered; then containers are the target's.
	engine     bool
	containers []compose.Container
	// images has the id that the image name of a container stands for, by the
	// container's id. It is "" if it cannot be found.
	images map[string]string
	// reply is nil if nothing was asked.
	reply *reply
}

// A run of a container, from its start to its end.
type containerRun struct {
	startedAt time.Time
	restarts  int
	// since is startedAt, or when the run was first seen if that is earlier: the
	// engine's clock may be fast.
	since time.Time
}

// Evidence is what has been seen so far.
type evidence struct {
	last look
	// steadySince is the moment from which nothing wrong has been seen: zero, the
	// latest start of a container, or when something wrong was seen last.
	steadySince time.Time
	// finalSince is since when a container has a state that does not change by
	// itself, zero for no such state.
	finalSince time.Time
	// engineSeen and existed say that the engine has answered, and that there was a
	// container.
	engineSeen, existed bool
	// seen is the last look at which the engine has answered.
	seen look
	// runs are the containers of the last look that had some.
	runs map[string]containerRun
	// replaced counts how often a container was seen to start again or vanish.
	replaced int
	// replies counts requests. firstGood is the first good one, lastBad the last bad
	// one after it.
	replies            int
	firstGood, lastBad *reply
	// elsewhere is the last reply with the expected status that did not come from
	// the target.
	elsewhere *reply
}

// with returns the evidence and a further look.
func (e evidence) with(l look, r requirements) evidence {
	previous := e.last.at
	e.last = l
	switch {
	case l.engine:
		e.engineSeen, e.seen = true, l
		e = e.withContainers(l, previous, r)
	case e.engineSeen || r.engineWasSeen:
		e.steadySince = l.at
	}
	if len(l.containers) == 0 {
		// Nothing says since when the service is up.
		e.steadySince = latest(e.steadySince, r.begun)
	}
	if l.reply != nil {
		e = e.withReply(l, *l.reply)
	}
	return e
}

func (e evidence) withReply(l look, answer reply) evidence {
	e.replies++
	switch {
	case answer.good():
		if e.firstGood == nil {
			e.firstGood = &answer
		}
		return e
	case answer.expected:
		e.elsewhere = &answer
	}
	if e.firstGood != nil {
		e.lastBad = &answer
	}
	e.steadySince = l.at
	return e
}

func (e evidence) withContainers(l look, previous time.Time, r requirements) evidence {
	e.existed = e.existed || len(l.containers) > 0
	runs, final := map[string]containerRun{}, len(l.containers) == 0 && r.composed
	if final {
		e.steadySince = l.at
	}
	first := e.runs == nil
	for _, c := range l.containers {
		was, known := e.runs[c.ID]
		same := known && was.startedAt.Equal(c.StartedAt) && was.restarts == c.Restarts
		is := was
		if !same {
			is = containerRun{startedAt: c.StartedAt, restarts: c.Restarts, since: earliest(c.StartedAt, l.at)}
			switch {
			case c.StartedAt.IsZero():
				is.since = l.at
			case !first:
				is.since = latest(is.since, previous) // whatever the engine's clock says
			}
		}
		runs[c.ID] = is
		if !same && !first {
			e.replaced++
		}
		e.steadySince = latest(e.steadySince, is.since)
		problem := problemOf(c, l, r)
		if problem.text != "" {
			e.steadySince = l.at
		}
		final = final || problem.final
	}
	for id := range e.runs {
		if _, still := runs[id]; !still {
			e.replaced++
			e.steadySince = l.at
		}
	}
	if len(l.containers) > 0 {
		e.runs = runs
	}
	switch {
	case !final:
		e.finalSince = time.Time{}
	case e.finalSince.IsZero():
		e.finalSince = l.at
	}
	return e
}

// A problem is what is wrong with a container.
type problem struct {
	// text is "" for nothing.
	text string
	// final says that it does not end by itself.
	final bool
}

// problemOf says what is wrong with a container now. A health check that has not
// succeeded yet is no problem.
func problemOf(c compose.Container, l look, r requirements) problem {
	switch {
	case c.State == "running", r.hasCompleted(c):
	case c.State == "restarting":
		return problem{text: describe(c)}
	default:
		return problem{text: describe(c), final: true}
	}
	if c.State == "running" && c.Health == "unhealthy" {
		return problem{text: describe(c)}
	}
	if want := l.images[c.ID]; want != "" && want != c.ImageID && (r.deployed || r.image != "") {
		return problem{final: true, text: fmt.Sprintf("Container %s runs image %s, but %s", c.Name, shortID(c.ImageID), imageName(c, r)+" "+shortID(want))}
	}
	return problem{}
}

func imageName(c compose.Container, r requirements) string {
	if r.image != "" {
		return "the image to be run is"
	}
	return "the image " + c.Image + " is"
}

// shortID shortens an image's id as the docker program does.
func shortID(id string) string {
	const length = len("sha256:") + 12
	return id[:min(length, len(id))]
}

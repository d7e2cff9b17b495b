package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// logTail is how many lines of a container's log a verdict has.
const logTail = 20

// steadyPause bounds the pause between two looks during the quiet period, in which a
// fault may be short.
func (r requirements) steadyPause() time.Duration { return min(time.Second, r.quiet/8) }

// maxPhase bounds each phase of a request, such as connect or answer.
const maxPhase = 10 * time.Second

// engineLimit bounds the requests to the engine for one look.
const engineLimit = 5 * time.Second

// A verification ends at most a second after its time is over, whatever does not
// answer. These parts of the second are for the last request, for the last look with
// it and the application check, and for the logs of containers.
const (
	lastRequest = 350 * time.Millisecond
	lastLook    = 700 * time.Millisecond
	lastLogs    = 150 * time.Millisecond
)

// A judge watches a service until it can say whether the service is healthy.
type judge struct {
	run *stepRun
	log *artifacts.Log
	requirements
	sources sourceFinder
	evidence
	// logged is the last line about the containers, loggedReply the last about a
	// request.
	logged, loggedReply string
	// warned says that an engine that does not answer is in the log.
	warned bool
	// from are the sources of the good replies, to be listed once.
	from []string
	// pass counts the good replies, for the summary.
	pass int
	// oneShotsSought says that findOneShots has been called.
	oneShotsSought bool
	// appGoodAt is when the application check began that has succeeded last.
	appGoodAt time.Time
	// appRecorded is how the check has ended that is in the audit trail.
	appRecorded string
}

// end is when the time for the verification is over, as far as can be said now: the
// deadline, or the end of a quiet period that has begun before it.
func (j *judge) end() time.Time {
	if j.wrong(j.requirements).health == healthy {
		return latest(j.deadline, earliest(j.steadySince, j.deadline).Add(j.quiet))
	}
	return j.deadline
}

// errTimeOver says that the time for a verification is over.
var errTimeOver = errors.New("it had not ended when the time for the verification was over")

// judgeService watches the service until it is clear whether it is healthy, at
// most until the deadline of the requirements and the rest of the quiet period.
// The log gets what was looked at and found. If ctx ends, the verdict is
// not proven.
func (s *stepRun) judgeService(ctx context.Context, log *artifacts.Log, r requirements) verdict {
	j := &judge{run: s, log: log, requirements: r}
	if s.config.Engine != nil {
		j.sources = newSourceFinder(s.config)
	}
	v := j.watch(ctx)
	if ctx.Err() != nil {
		v = verdict{ended: true, reason: context.Cause(ctx).Error()}
	} else {
		v = j.conclude(ctx, v)
	}
	s.auditHealth(r, v)
	return v
}

// watch looks at the service, again and again, until decide has concluded.
func (j *judge) watch(ctx context.Context) verdict {
	longest := j.steadyPause()
	if j.check != nil {
		longest = j.check.interval
	}
	pause := backoff{next: min(firstPause, longest), most: longest}
	for {
		v, done := j.lookOnce(ctx)
		if done || ctx.Err() != nil {
			return v
		}
		end := j.end()
		if j.wrong(j.requirements).health == healthy {
			pause.most = min(longest, j.steadyPause())
			pause.next = min(pause.next, pause.most)
		} else {
			pause.most = longest
		}
		pause.wait(ctx, j.run.config.Now, end)
		if ctx.Err() != nil {
			return verdict{}
		}
	}
}

// lookOnce looks at the service, and concludes. It returns false while further looks
// may change the conclusion.
func (j *judge) lookOnce(ctx context.Context) (verdict, bool) {
	begun := j.run.config.Now()
	within, cancel := context.WithTimeoutCause(ctx, latest(j.end(), begun).Add(lastLook).Sub(begun), errTimeOver)
	defer cancel()
	l := look{}
	if j.check != nil {
		j.ask(within, &l)
	}
	j.see(within, &l)
	if ctx.Err() != nil {
		return verdict{}, false
	}
	if l.reply != nil {
		j.locate(within, &l)
		j.logReply(*l.reply)
	}
	l.at = j.run.config.Now()
	j.evidence = j.with(l, j.requirements)
	j.logContainers()
	v, done := decide(j.evidence, j.requirements, l.at)
	if !j.isAppDue(v, done) {
		return v, done
	}
	begun = j.run.config.Now()
	problem := j.checkApp(within)
	now := j.run.config.Now()
	switch {
	case ctx.Err() != nil:
		return verdict{}, false
	case problem == "":
		j.appGoodAt = begun
	case !done && now.Before(j.end()):
	case done && now.Before(j.deadline):
		// The application may need more time than its server.
		j.steadySince, done = now.Add(-j.quiet), false
	default:
		v, done = verdict{health: sick, reason: problem, about: restarted(l.containers)}, true
	}
	return v, done
}

// isAppDue says that the application check is to be run now: the conclusion depends
// on it, or the quiet period, half of which is over, leaves no time for it at its end.
func (j *judge) isAppDue(v verdict, done bool) bool {
	steadyUntil := j.steadySince.Add(j.quiet)
	switch {
	case j.appGoodAt.After(j.steadySince):
		return false
	case done:
		return v.health == healthy && v.reason == ""
	}
	return j.wrong(j.requirements).health == healthy && steadyUntil.After(j.deadline) && !j.last.at.Before(steadyUntil.Add(-j.quiet/2))
}

// ask makes one request, which ends at the end of the verification.
func (j *judge) ask(ctx context.Context, l *look) {
	limit := maxPhase
	if j.check.interval > 0 {
		limit = min(j.check.interval, maxPhase)
	}
	ctx, cancel := context.WithTimeout(ctx, max(j.end().Sub(j.run.config.Now()), lastRequest))
	defer cancel()
	answer, err := j.run.client.ask(ctx, j.check.method, j.check.url, limit)
	r := &reply{attempt: j.replies + 1}
	if err != nil {
		r.text = err.Error()
	} else {
		r.text, r.expected = fmt.Sprintf("status=%d", answer.status), answer.status == j.check.expected
		r.from, r.proxy = answer.from, answer.proxy
	}
	l.reply = r
}

// see lists the containers and the images that they should run.
func (j *judge) see(ctx context.Context, l *look) {
	engine := j.run.config.Engine
	if engine == nil || j.otherEngine {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, engineLimit)
	defer cancel()
	var containers []compose.Container
	var err error
	for _, service := range j.services {
		var some []compose.Container
		if some, err = engine.Containers(ctx, j.project, service); err != nil {
			break
		}
		containers = append(containers, some...)
	}
	if err != nil {
		if ctx.Err() != nil {
			j.engineWasSeen = true // it is there, and slow
		}
		if !j.warned && context.Cause(ctx) != context.Canceled {
			j.warned = true
			j.run.log.Warn("container state is unknown, verification relies on HTTP alone", "error", err)
			j.log.Line("[The docker engine does not answer, so that the containers of service " + j.service + " cannot be seen: " + err.Error() + "]")
		}
		return
	}
	l.engine, l.containers, l.images = true, containers, map[string]string{}
	j.findOneShots(ctx)
	for _, c := range containers {
		l.images[c.ID] = j.wantedImage(ctx, c)
	}
}

// wantedImage returns the id of the image that a container should run, "" if
// nothing says which.
func (j *judge) wantedImage(ctx context.Context, c compose.Container) string {
	if j.image != "" || c.Image == "" {
		return j.image
	}
	named, err := j.run.config.Engine.InspectImage(ctx, c.Image)
	if err != nil || named.ID == c.ImageID {
		return named.ID
	}
	// An engine may have two ids for one image, that of a list of images for several
	// platforms and that of an image in it.
	if same, err := j.run.config.Engine.InspectImage(ctx, c.ImageID); err == nil && same.ID == named.ID {
		return c.ImageID
	}
	return named.ID
}

// locate finds out whether an expected reply came from the target.
func (j *judge) locate(ctx context.Context, l *look) {
	r := l.reply
	if !r.expected {
		return
	}
	from := ""
	switch {
	case !l.engine || len(l.containers) == 0:
	case r.proxy:
		from = "asked through a proxy, so that the worker cannot tell which container answered"
	case !r.from.IsValid():
	default:
		ctx, cancel := context.WithTimeout(ctx, engineLimit)
		defer cancel()
		found := j.sources.find(ctx, l.containers, r.from)
		from = found.text
		switch {
		case found.elsewhere && j.urlIsConfigured:
			from += "; it counts because the configuration names this URL"
		case found.elsewhere:
			r.elsewhere = found.text
		}
	}
	if r.elsewhere == "" {
		j.pass++
		if from != "" && !slices.Contains(j.from, from) {
			j.from = append(j.from, from)
		}
	}
}

// logReply logs an attempt with Python's words. After the first good reply, only
// those that differ from the one before are logged.
func (j *judge) logReply(r reply) {
	line := r.text + r.elsewhere
	if j.firstGood != nil && line == j.loggedReply {
		return
	}
	j.loggedReply = line
	j.log.Line(fmt.Sprintf("Attempt %d: %s", r.attempt, r.text))
	if r.elsewhere != "" {
		j.log.Line("[" + r.elsewhere + "]")
	}
}

// logContainers logs what is wrong with the containers, once for each change. A
// health check of docker's that is not finished is not logged.
func (j *judge) logContainers() {
	var lines []string
	for _, c := range j.last.containers {
		if p := problemOf(c, j.last, j.requirements); p.text != "" {
			lines = append(lines, p.text)
		}
	}
	line := strings.Join(lines, "\n")
	switch {
	case line == j.logged || !j.last.engine:
		return
	case line == "":
		j.log.Line("Containers of service " + j.service + " are healthy")
	default:
		j.log.Line(line)
	}
	j.logged = line
}

// conclude completes the reason of a verdict, and logs it with the evidence.
func (j *judge) conclude(ctx context.Context, v verdict) verdict {
	if v.health == sick && j.check != nil && j.firstGood == nil && !j.last.at.Before(j.deadline) {
		j.log.Line("Health check timed out before reaching expected status")
	}
	now := j.run.config.Now()
	ctx, cancel := context.WithTimeout(ctx, latest(j.end().Add(lastLook), now.Add(lastLogs)).Sub(now))
	defer cancel()
	if v.health != healthy {
		details := j.details(ctx, v.about)
		if details != "" {
			j.log.Line(details)
		}
		if v.reason != "" && details != "" {
			v.reason += "\n"
		}
		v.reason += details
	}
	if v.health != healthy {
		j.logOthers(ctx, v.about)
	}
	for _, line := range j.found() {
		j.log.Line("[" + line + "]")
	}
	line := "[Verdict: " + v.health.String()
	if v.reason != "" {
		reason, _, _ := strings.Cut(v.reason, "\n")
		line += ": " + reason
	}
	j.log.Line(line + "]")
	return v
}

// details is what there is to say about containers, with the output of their
// health checks and the end of their logs.
func (j *judge) details(ctx context.Context, about []finding) string {
	var lines []string
	for _, f := range about {
		c, line := f.container, f.text
		if output := lastLines(j.run.clean(c.HealthOutput)); c.HealthExit != 0 && output != "" {
			line += fmt.Sprintf(". Its health check ended with code %d and printed:\n%s\n", c.HealthExit, output)
		} else {
			line += ". "
		}
		if output := lastLines(j.run.clean(j.logOf(ctx, c))); output != "" {
			line += "Last lines of its log:\n" + output
		}
		lines = append(lines, strings.TrimSuffix(strings.TrimRight(line, " \n"), "."))
	}
	return strings.Join(lines, "\n")
}

// logOthers writes the end of the logs of containers that the reason is not about:
// they run, and may say why the service does not answer.
func (j *judge) logOthers(ctx context.Context, about []finding) {
	for _, c := range j.last.containers {
		if slices.ContainsFunc(about, func(f finding) bool { return f.container.ID == c.ID }) {
			continue
		}
		for line := range strings.Lines(lastLines(j.run.clean(j.logOf(ctx, c)))) {
			j.log.Line("[Log of " + c.Name + ": " + strings.TrimRight(line, "\r\n") + "]")
		}
	}
}

func (j *judge) logOf(ctx context.Context, c compose.Container) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second) // the deadline is near
	defer cancel()
	tail, err := j.run.config.Engine.LogTail(ctx, c.ID, logTail)
	if err != nil && !errors.Is(err, compose.ErrUnreachable) {
		j.run.log.Warn("log of a container cannot be read", "error", err)
	}
	return tail
}

// lastLines returns the last lines of an output, as many as a message has room
// for.
func lastLines(output string) string {
	lines := strings.Split(artifacts.Trim(output), "\n")
	output = strings.Join(lines[max(0, len(lines)-logTail):], "\n")
	if over := len(output) - lastLinesLimit; over > 0 {
		output = "…" + strings.ToValidUTF8(output[over:], "")
	}
	return output
}

// lastLinesLimit bounds lastLines, in bytes.
const lastLinesLimit = 4 << 10

// found lists what was looked at and what it showed.
func (j *judge) found() []string {
	var lines []string
	now := j.run.config.Now()
	for _, c := range j.last.containers {
		line := fmt.Sprintf("Container %s (%.12s): %s", c.Name, c.ID, strings.TrimPrefix(describe(c), "Container "+c.Name+" is "))
		if c.State == "running" {
			line += fmt.Sprintf(" for %s", now.Sub(c.StartedAt).Round(time.Second))
		}
		line += ", image " + shortID(c.ImageID)
		switch want := j.last.images[c.ID]; {
		case want == c.ImageID && j.image != "":
			line += " as required"
		case want == c.ImageID:
			line += " as " + c.Image + " says"
		case want != "":
			line += ", not " + shortID(want)
		}
		if c.Health == "" {
			line += ", no health check of its own"
		}
		lines = append(lines, line)
	}
	if len(j.last.containers) == 0 && j.last.engine {
		lines = append(lines, capitalized(j.absent(j.requirements)))
	}
	if j.replies > 0 {
		line := fmt.Sprintf("HTTP: %d of %d attempts had status %d", j.pass, j.replies, j.check.expected)
		for _, from := range j.from {
			line += "; " + from
		}
		lines = append(lines, line)
	}
	if j.pass > 0 || len(j.last.containers) > 0 {
		line := fmt.Sprintf("No fault for the quiet period of %s", j.quiet)
		if lasted := now.Sub(j.steadySince); lasted < j.quiet {
			line = fmt.Sprintf("No fault for %s, less than the quiet period of %s", lasted.Round(100*time.Millisecond), j.quiet)
		}
		lines = append(lines, line)
	}
	return lines
}

// describe writes a container's state on one line.
func describe(c compose.Container) string {
	text := "Container " + c.Name + " is " + c.State
	switch {
	case c.State == "running" && c.Health != "":
		text = "Container " + c.Name + " is " + c.Health
	case c.State == "exited" || c.State == "dead" || c.State == "restarting":
		text += fmt.Sprintf(" (exit code %d)", c.ExitCode)
	}
	if c.Restarts > 0 {
		text += fmt.Sprintf(", restarted %d times", c.Restarts)
	}
	if c.OOMKilled {
		text += ", its memory was exhausted"
	}
	if c.Error != "" {
		text += ": " + c.Error
	}
	return text
}

// backoff makes pauses that double from next to most.
type backoff struct{ next, most time.Duration }

// firstPause is the first pause between two attempts. Pauses double up to the
// plan's interval.
const firstPause = 500 * time.Millisecond

// lastPause is twice the shortest pause.
const lastPause = 100 * time.Millisecond

// wait sleeps for the next pause, up to a quarter less, so that the workers of
// several machines do not ask in step, or for half of the time before the deadline
// if that is less. So attempts continue until the deadline. It returns false if
// the deadline has passed, or if ctx ends.
func (b *backoff) wait(ctx context.Context, now func() time.Time, deadline time.Time) bool {
	left := deadline.Sub(now())
	if left <= 0 {
		return false
	}
	pause := b.next - time.Duration(rand.Int64N(int64(b.next)/4+1))
	b.next = min(2*b.next, b.most)
	pause = min(pause, max(left/2, lastPause/2))
	return pauseFor(ctx, pause)
}

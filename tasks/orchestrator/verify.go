package orchestrator

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
)

// firstPause is the first pause between two attempts. Pauses double up to the
// plan's interval.
const firstPause = 500 * time.Millisecond

// lastPause is the least time before the deadline in which another attempt is
// made.
const lastPause = 100 * time.Millisecond

// maxPhase bounds each phase of a request, such as connect or answer.
const maxPhase = 10 * time.Second

// logTail is how many lines of a container's log an error message has.
const logTail = 20

// A healthCheck is that of the plan, with defaults (docs/moonmind.md#the-plan).
type healthCheck struct {
	url      string
	method   string
	expected int
	// timeout is in seconds.
	timeout  int
	interval time.Duration
}

// healthCheck reads the parameter of that name. Nil means that the plan has none.
func (s *stepRun) healthCheck() (*healthCheck, *Failure) {
	value := s.params["healthcheck"]
	if falsy(value) {
		return nil, nil
	}
	mapping, isMapping := value.(map[string]any)
	if !isMapping {
		return nil, typeError("Plan parameter healthcheck must be a mapping")
	}
	given := parameters(mapping)
	var check healthCheck
	var failures [5]*Failure
	check.url, failures[0] = given.text("url", "None")
	check.method, failures[1] = given.text("method", "GET")
	check.method = strings.ToUpper(check.method)
	check.expected, failures[2] = given.whole("expectedStatus", 200)
	check.timeout, failures[3] = given.whole("timeoutSeconds", 120)
	var interval float64
	interval, failures[4] = given.number("intervalSeconds", 5)
	if failure := cmp.Or(failures[:]...); failure != nil {
		return nil, failure
	}
	if interval < 0 || interval > largest {
		return nil, valueError("sleep length must be non-negative and below 2147483648 seconds")
	}
	check.interval = time.Duration(interval * float64(time.Second))
	return &check, nil
}

// verify waits until the service answers as expected and its containers are
// healthy (docs/moonmind.md#verify, docs/moonmind.md#c2).
//
// The pause between attempts grows from half a second to the plan's interval, and
// the last attempt is before the plan's deadline. For a service that answers at
// once, the log is the same as the Python worker's.
func (s *stepRun) verify(ctx context.Context) (success, *Failure) {
	check, failure := s.healthCheck()
	if failure != nil {
		return success{}, failure
	}
	name, failure := s.params.text("logArtifact", "verify.log")
	if failure != nil {
		return success{}, failure
	}
	log, err := s.dir.Log(name)
	if err != nil {
		return success{}, artifactError(err)
	}
	defer log.Discard()
	project, service := s.plan.target(s.profile)
	watch := &containerWatch{run: s, log: log, project: project, service: service}
	if check == nil {
		log.Line("No healthcheck configured; skipping HTTP verification.")
		watch.requireStable = true
		failure = watch.await(ctx, s.config.Now().Add(s.config.StateTimeout))
	} else {
		failure = s.poll(ctx, log, check, watch)
	}
	if failure != nil {
		file, err := log.Finish()
		if err != nil {
			return success{}, artifactError(err)
		}
		failure.files = []artifacts.File{file}
		return success{}, failure
	}
	file, err := log.Finish()
	if err != nil {
		return success{}, artifactError(err)
	}
	return success{message: "Verification succeeded", files: []artifacts.File{file}}, nil
}

// poll makes requests until one is answered as expected, and then waits for the
// containers.
func (s *stepRun) poll(ctx context.Context, log *artifacts.Log, check *healthCheck, watch *containerWatch) *Failure {
	if replaced := s.config.HealthURLs[s.profile.service]; replaced != "" && replaced != check.url {
		log.Line("Health check URL of the plan replaced by configuration: " + shownURL(check.url) + " -> " + shownURL(replaced))
		s.log.Info("health check URL of the plan replaced by configuration", "plan_url", shownURL(check.url), "url", shownURL(replaced))
		check.url = replaced
	}
	deadline := s.config.Now().Add(time.Duration(check.timeout) * time.Second)
	limit := maxPhase
	if check.interval > 0 {
		limit = min(check.interval, maxPhase)
	}
	pause := backoff{next: min(firstPause, check.interval), most: check.interval}
	for attempt := 1; ; attempt++ {
		code, err := s.request(ctx, check, deadline, limit)
		switch {
		case ctx.Err() != nil:
			return commandError(fmt.Sprintf("Health check for %s was ended: %s", shownURL(check.url), context.Cause(ctx)))
		case err != nil:
			log.Line(fmt.Sprintf("Attempt %d: %s", attempt, err))
		default:
			log.Line(fmt.Sprintf("Attempt %d: status=%d", attempt, code))
			if code == check.expected {
				return watch.await(ctx, deadline)
			}
		}
		if !pause.wait(ctx, s.config.Now, deadline) {
			break
		}
	}
	if ctx.Err() != nil {
		return commandError(fmt.Sprintf("Health check for %s was ended: %s", shownURL(check.url), context.Cause(ctx)))
	}
	log.Line("Health check timed out before reaching expected status")
	failure := commandError(fmt.Sprintf("Health check for %s timed out after %ds", shownURL(check.url), check.timeout))
	if problems := watch.problems(ctx); problems != "" {
		log.Line(problems)
		failure.Arg += "\n" + problems
	}
	return failure
}

// request makes one attempt, which ends at the deadline. If the deadline has
// passed already, which only the first attempt meets, limit alone bounds it.
func (s *stepRun) request(ctx context.Context, check *healthCheck, deadline time.Time, limit time.Duration) (int, error) {
	if left := deadline.Sub(s.config.Now()); left > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, left)
		defer cancel()
	}
	return s.client.status(ctx, check.method, check.url, limit)
}

// backoff makes pauses that double from next to most.
type backoff struct{ next, most time.Duration }

// wait sleeps for the next pause, or half of the time before the deadline if that
// is less. So attempts continue until the deadline and none begins after it. It
// returns false if there must be no further attempt: the deadline is near, or ctx
// has ended.
func (b *backoff) wait(ctx context.Context, now func() time.Time, deadline time.Time) bool {
	left := deadline.Sub(now())
	if left < lastPause || ctx.Err() != nil {
		return false
	}
	pause := max(min(b.next, left/2), lastPause/2)
	b.next = min(2*b.next, b.most)
	defer stall.FromContext(ctx).Wait()()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A containerWatch waits for the target's containers.
type containerWatch struct {
	run              *stepRun
	log              *artifacts.Log
	project, service string
	// requireStable says that a container without a health check of its own must
	// stay up for Config.StableTime.
	requireStable bool
}

// list returns the containers. It returns false if no engine is configured, or it
// does not answer, or it has no such container. Verification then relies on HTTP
// alone, as the Python worker's does.
func (w *containerWatch) list(ctx context.Context) ([]compose.Container, bool) {
	if w.run.config.Engine == nil {
		return nil, false
	}
	containers, err := w.run.config.Engine.Containers(ctx, w.project, w.service)
	switch {
	case ctx.Err() != nil:
		return nil, false
	case err != nil:
		w.run.log.Warn("container state is unknown, verification relies on HTTP alone", "error", err)
		return nil, false
	case len(containers) == 0:
		w.run.log.Warn("container state is unknown, verification relies on HTTP alone",
			"error", fmt.Sprintf("docker has no container of service %s in project %s", w.service, w.project))
		return nil, false
	}
	return containers, true
}

// await waits until every container is healthy. It returns a failure that says
// why if one is not at the deadline, or has ended for good. After an HTTP answer
// as expected, a container that docker still reports as starting at the deadline
// is enough.
func (w *containerWatch) await(ctx context.Context, deadline time.Time) *Failure {
	first, known := w.list(ctx)
	if !known {
		return w.interrupted(ctx)
	}
	containers, logged := first, ""
	seen := map[string]unchanged{}
	pause := backoff{next: firstPause, most: 2 * time.Second}
	for {
		waiting, ended := w.check(containers, seen)
		if waiting == "" {
			if logged != "" {
				w.log.Line("Containers of service " + w.service + " are healthy")
			}
			return nil
		}
		if waiting != logged && !mayBecomeHealthy(containers) {
			w.log.Line(waiting)
			logged = waiting
		}
		if ended || !pause.wait(ctx, w.run.config.Now, deadline) {
			break
		}
		if containers, known = w.list(ctx); !known {
			return w.interrupted(ctx)
		}
	}
	if failure := w.interrupted(ctx); failure != nil {
		return failure
	}
	if !w.requireStable && mayBecomeHealthy(containers) {
		// The service has answered as expected, and docker's first check may be
		// due much later than the plan's deadline.
		w.run.log.Info("containers are still starting at the deadline, the HTTP answer is enough", "service", w.service)
		return nil
	}
	problems := w.explain(ctx, containers)
	if problems == "" {
		problems = fmt.Sprintf("Containers of service %s did not stay up for %s", w.service, w.run.config.StableTime)
	}
	w.log.Line(problems)
	return commandError(problems)
}

func (w *containerWatch) interrupted(ctx context.Context) *Failure {
	if ctx.Err() == nil {
		return nil
	}
	return commandError(fmt.Sprintf("Verification of service %s was ended: %s", w.service, context.Cause(ctx)))
}

// unchanged says since when a container has had its present state.
type unchanged struct {
	restarts  int
	startedAt time.Time
	state     string
	since     time.Time
}

// check returns what await has to wait for, "" for nothing, and whether a
// container has ended for good, so that waiting is pointless.
func (w *containerWatch) check(containers []compose.Container, seen map[string]unchanged) (waiting string, ended bool) {
	now := w.run.config.Now()
	for _, c := range containers {
		is := unchanged{restarts: c.Restarts, startedAt: c.StartedAt, state: c.State, since: now}
		if was, found := seen[c.ID]; found && was.restarts == is.restarts && was.startedAt.Equal(is.startedAt) && was.state == is.state {
			is.since = was.since
		}
		seen[c.ID] = is
		if c.State == "exited" || c.State == "dead" {
			// A restart policy may start it again in a moment.
			ended = ended || now.Sub(is.since) >= w.run.config.StableTime
		}
		switch {
		case !isHealthy(c):
			waiting = cmp.Or(waiting, describe(c))
		case w.requireStable && c.Health == "" && now.Sub(is.since) < w.run.config.StableTime:
			waiting = cmp.Or(waiting, "stable") // never logged
		}
	}
	return waiting, ended
}

// mayBecomeHealthy says that no container has a problem: each is healthy, or
// docker has not finished its first health checks.
func mayBecomeHealthy(containers []compose.Container) bool {
	for _, c := range containers {
		if !isHealthy(c) && !isStarting(c) {
			return false
		}
	}
	return true
}

// isStarting says that a container runs and its first health checks are pending.
func isStarting(c compose.Container) bool { return c.State == "running" && c.Health == "starting" }

// isHealthy says that a container runs and that its health check, if it has one,
// has succeeded.
func isHealthy(c compose.Container) bool {
	return c.State == "running" && (c.Health == "" || c.Health == "healthy")
}

// describe writes a container's state on one line.
func describe(c compose.Container) string {
	text := "Container " + c.Name + " is " + c.State
	switch {
	case c.State == "running" && c.Health != "":
		text = "Container " + c.Name + " is " + c.Health
	case c.State != "running" && c.State != "created":
		text += fmt.Sprintf(" (exit code %d)", c.ExitCode)
	}
	if c.Restarts > 0 {
		text += fmt.Sprintf(", restarted %d times", c.Restarts)
	}
	if c.Error != "" {
		text += ": " + c.Error
	}
	return text
}

// problems says what is wrong with the containers now, "" for nothing.
func (w *containerWatch) problems(ctx context.Context) string {
	containers, known := w.list(ctx)
	if !known {
		return ""
	}
	return w.explain(ctx, containers)
}

// explain describes each container that is not healthy, with the end of its log.
func (w *containerWatch) explain(ctx context.Context, containers []compose.Container) string {
	var lines []string
	for _, c := range containers {
		if isHealthy(c) {
			continue
		}
		line := describe(c)
		tail, err := w.run.config.Engine.LogTail(ctx, c.ID, logTail)
		if err != nil {
			if !errors.Is(err, compose.ErrUnreachable) {
				w.run.log.Warn("log of a container cannot be read", "error", err)
			}
		} else if tail = artifacts.Trim(w.run.clean(tail)); tail != "" {
			line += ". Last lines of its log:\n" + cut(tail)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

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

// firstPause is the first pause between two looks at a service; it doubles up
// to the plan's interval.
const firstPause = 500 * time.Millisecond

// lastPause ends the loop: with less than this left, no further look is of
// use.
const lastPause = 100 * time.Millisecond

// maxPhase bounds each phase of a request.
const maxPhase = 10 * time.Second

// logTail is how many lines of a container's log an error tells.
const logTail = 20

// A healthCheck is the plan's, with defaults (docs/moonmind.md#the-plan).
type healthCheck struct {
	url      string
	method   string
	expected int
	// timeout in seconds, as texts show it.
	timeout  int
	interval time.Duration
}

// healthCheck reads the parameter; nil means that the plan has none.
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

// verify waits until the service answers and its containers are well
// (docs/moonmind.md#verify, docs/moonmind.md#c2).
//
// Pauses grow from half a second to the plan's interval, and end with the
// plan's deadline. A service that answers at once leaves the log that
// upstream writes.
func (s *stepRun) verify(ctx context.Context) (done, *Failure) {
	check, failure := s.healthCheck()
	if failure != nil {
		return done{}, failure
	}
	name, failure := s.params.text("logArtifact", "verify.log")
	if failure != nil {
		return done{}, failure
	}
	log, err := s.dir.Log(name)
	if err != nil {
		return done{}, artifactError(err)
	}
	defer log.Discard()
	project, service := s.plan.target(s.profile)
	watch := &containerWatch{run: s, log: log, project: project, service: service}
	if check == nil {
		log.Line("No healthcheck configured; skipping HTTP verification.")
		watch.settle = true
		failure = watch.await(ctx, s.config.Now().Add(s.config.StateTimeout))
	} else {
		failure = s.poll(ctx, log, check, watch)
	}
	if failure != nil {
		file, err := log.Finish()
		if err != nil {
			return done{}, artifactError(err)
		}
		failure.files = []artifacts.File{file}
		return done{}, failure
	}
	file, err := log.Finish()
	if err != nil {
		return done{}, artifactError(err)
	}
	return done{message: "Verification succeeded", files: []artifacts.File{file}}, nil
}

// poll makes requests until one is answered as expected, then looks at the
// containers.
func (s *stepRun) poll(ctx context.Context, log *artifacts.Log, check *healthCheck, watch *containerWatch) *Failure {
	if replaced := s.config.HealthURLs[s.profile.service]; replaced != "" && replaced != check.url {
		log.Line("Health check URL of the plan replaced by configuration: " + check.url + " -> " + replaced)
		s.log.Info("health check URL of the plan replaced by configuration", "plan_url", check.url, "url", replaced)
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
			return commandError(fmt.Sprintf("Health check for %s was ended: %s", check.url, context.Cause(ctx)))
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
		return commandError(fmt.Sprintf("Health check for %s was ended: %s", check.url, context.Cause(ctx)))
	}
	log.Line("Health check timed out before reaching expected status")
	failure := commandError(fmt.Sprintf("Health check for %s timed out after %ds", check.url, check.timeout))
	if trouble := watch.trouble(ctx); trouble != "" {
		log.Line(trouble)
		failure.Arg += "\n" + trouble
	}
	return failure
}

// request makes one attempt, which ends with the deadline. The first attempt
// of a plan that leaves no time still gets one.
func (s *stepRun) request(ctx context.Context, check *healthCheck, deadline time.Time, limit time.Duration) (int, error) {
	if left := deadline.Sub(s.config.Now()); left > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, left)
		defer cancel()
	}
	return s.client.status(ctx, check.method, check.url, limit)
}

// backoff makes pauses that double.
type backoff struct{ next, most time.Duration }

// wait sleeps, at most for half of the time that is left, so that attempts go
// on until the deadline and none begins behind it. It says false when time is
// up or ctx has ended.
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

// A containerWatch looks at the target's containers.
type containerWatch struct {
	run              *stepRun
	log              *artifacts.Log
	project, service string
	// settle asks that containers without a health check of their own stay
	// up for a while.
	settle bool
}

// look returns the containers, and false when nothing is known of them: no
// engine is configured or answers, or it has no such container. Verification
// then rests on HTTP alone, as upstream's does.
func (w *containerWatch) look(ctx context.Context) ([]compose.Container, bool) {
	if w.run.config.Engine == nil {
		return nil, false
	}
	containers, err := w.run.config.Engine.Containers(ctx, w.project, w.service)
	switch {
	case ctx.Err() != nil:
		return nil, false
	case err != nil:
		w.run.log.Warn("container state is not known, verification rests on HTTP alone", "error", err)
		return nil, false
	case len(containers) == 0:
		w.run.log.Warn("container state is not known, verification rests on HTTP alone",
			"error", fmt.Sprintf("docker has no container of service %s in project %s", w.service, w.project))
		return nil, false
	}
	return containers, true
}

// await waits until every container is well. Containers that are not by the
// deadline, or that have ended for good, are a failure that says why. One that
// docker still calls starting then is enough where HTTP has been answered.
func (w *containerWatch) await(ctx context.Context, deadline time.Time) *Failure {
	first, known := w.look(ctx)
	if !known {
		return w.interrupted(ctx)
	}
	containers, told := first, ""
	seen := map[string]steady{}
	pause := backoff{next: firstPause, most: 2 * time.Second}
	for {
		waiting, ended := w.judge(containers, seen)
		if waiting == "" {
			if told != "" {
				w.log.Line("Containers of service " + w.service + " are well")
			}
			return nil
		}
		if waiting != told && !isSettling(containers) {
			w.log.Line(waiting)
			told = waiting
		}
		if ended || !pause.wait(ctx, w.run.config.Now, deadline) {
			break
		}
		if containers, known = w.look(ctx); !known {
			return w.interrupted(ctx)
		}
	}
	if failure := w.interrupted(ctx); failure != nil {
		return failure
	}
	if !w.settle && isSettling(containers) {
		// The service has answered as expected, and docker, whose first check
		// may be due much later than the plan's deadline, says nothing else.
		w.run.log.Info("containers are still starting at the deadline, verification rests on HTTP", "service", w.service)
		return nil
	}
	trouble := w.explain(ctx, containers)
	if trouble == "" {
		trouble = fmt.Sprintf("Containers of service %s did not stay up for %s", w.service, w.run.config.SettleTime)
	}
	w.log.Line(trouble)
	return commandError(trouble)
}

func (w *containerWatch) interrupted(ctx context.Context) *Failure {
	if ctx.Err() == nil {
		return nil
	}
	return commandError(fmt.Sprintf("Verification of service %s was ended: %s", w.service, context.Cause(ctx)))
}

// steady is since when a container is as it is.
type steady struct {
	restarts  int
	startedAt time.Time
	state     string
	since     time.Time
}

// judge says what is still being waited for, and whether waiting is of no
// use because a container has ended for good.
func (w *containerWatch) judge(containers []compose.Container, seen map[string]steady) (waiting string, ended bool) {
	now := w.run.config.Now()
	for _, c := range containers {
		is := steady{restarts: c.Restarts, startedAt: c.StartedAt, state: c.State, since: now}
		if was, found := seen[c.ID]; found && was.restarts == is.restarts && was.startedAt.Equal(is.startedAt) && was.state == is.state {
			is.since = was.since
		}
		seen[c.ID] = is
		if c.State == "exited" || c.State == "dead" {
			// Between two tries of a restart policy it looks the same.
			ended = ended || now.Sub(is.since) >= w.run.config.SettleTime
		}
		switch {
		case !isWell(c):
			waiting = cmp.Or(waiting, describe(c))
		case w.settle && c.Health == "" && now.Sub(is.since) < w.run.config.SettleTime:
			waiting = cmp.Or(waiting, "settling")
		}
	}
	return waiting, ended
}

// isSettling says that nothing speaks against the containers: they are well and
// only watched for a while, or docker has not yet asked about their health.
func isSettling(containers []compose.Container) bool {
	for _, c := range containers {
		if !isWell(c) && !isStarting(c) {
			return false
		}
	}
	return true
}

// isStarting says that a container runs and its first health checks are due.
func isStarting(c compose.Container) bool { return c.State == "running" && c.Health == "starting" }

// isWell says that a container runs and nothing speaks against it.
func isWell(c compose.Container) bool {
	return c.State == "running" && (c.Health == "" || c.Health == "healthy")
}

// describe is one line on a container's state.
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

// trouble says what is wrong with the containers now, or "".
func (w *containerWatch) trouble(ctx context.Context) string {
	containers, known := w.look(ctx)
	if !known {
		return ""
	}
	return w.explain(ctx, containers)
}

// explain describes each container that is not well, with the end of its log.
func (w *containerWatch) explain(ctx context.Context, containers []compose.Container) string {
	var lines []string
	for _, c := range containers {
		if isWell(c) {
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

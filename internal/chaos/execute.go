package chaos

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// A hit is an injected fault.
type hit struct {
	stage stage
	pid   int
	at    time.Time
	// over is when the fault ended.
	over time.Time
}

// An outcome is the result of a trial.
type outcome struct {
	trial Trial
	run   run
	// others are the runs that compete for the workspace.
	others []run
	hits   []hit
	// trapped counts the traps that have paused or killed a process.
	trapped int
	// lost says that the run's message was purged.
	lost bool
	// missed counts stages whose point was not reached.
	missed int
	// problems are what the checks have found.
	problems []problem
	// resumed are the times from a kill to the next decision on a step of the
	// run by another process.
	resumed []time.Duration
	// windows are the times from a command's end to its durable record.
	windows []window
	// outages are those of workers' connections; recoveries says how they ended.
	outages    []outage
	recoveries []recovery
	// repeated counts commands that ran again because a worker was killed or
	// isolated before it had recorded their end; late counts those of them that
	// had ended by then.
	repeated, late int
	// rolledBackOnce says that the ledger has exactly one rollback, and that the
	// run is rolled back.
	rolledBackOnce bool
	// rushFigures is set for a rush.
	rushFigures *rushFigures
	// serviceFaults counts the requests that have met a fault of GitHub or the git server.
	serviceFaults int
	// mixed is set for a mixed trial.
	mixed *mixed
	// watch is set for trials of kind Real.
	watch *changetest.Watch
	// kills are what was there right after each kill of a trial of kind Real, before
	// that worker was started again.
	kills   []atKill
	moments []moment
	ledger  []ledger.Record
	took    time.Duration
}

// window is the time from the end of a command to its record.
type window struct {
	step string
	took time.Duration
}

// class of a problem.
type class string

// The classes.
const (
	lost         class = "lost"         // nothing will continue the run
	stuck        class = "stuck"        // the run did not end in time
	doubled      class = "doubled"      // an effect happened twice, or two at once
	wrong        class = "wrong"        // status, results or artifacts do not match the plan
	leaked       class = "leaked"       // a credential is where nobody may find one
	altered      class = "altered"      // files, repository or containers are not as they must be
	left         class = "left"         // something was left behind
	slowRecovery class = "slowRecovery" // a worker connected too long after its server's return
	harness      class = "harness"      // the trial itself did not work
)

type problem struct {
	class class
	text  string
}

func (p problem) String() string { return string(p.class) + ": " + p.text }

// runTrial runs a trial and checks its result.
func (l *lane) runTrial(ctx context.Context, t Trial) *outcome {
	o := &outcome{trial: t}
	began := time.Now()
	if err := l.perform(ctx, t, o); err != nil {
		o.problems = append(o.problems, problem{harness, err.Error()})
	}
	o.took = time.Since(began)
	for _, w := range l.workers {
		w.broker.set(noFault)
		w.database.set(noFault)
	}
	return o
}

func (l *lane) perform(ctx context.Context, t Trial, o *outcome) (err error) {
	l.trial = t
	l.clearTraps()
	if _, err := l.trace.read(); err != nil {
		return err
	}
	l.trace.forget()
	switch t.Kind {
	case Rush:
		return l.rush(ctx, t, o)
	case Mixed:
		return l.mix(ctx, t, o)
	}
	if t.Kind == Real {
		if err := l.makeReal(ctx); err != nil {
			return err
		}
	}
	if t.Kind.isSpec() {
		if err := l.makeSpec(); err != nil {
			return err
		}
	}
	removeGate, err := l.gate(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, removeGate()) }()
	release, err := l.configureWorkers(t)
	if err != nil {
		return err
	}
	defer func() {
		if err := release(); err != nil {
			o.report(stuck, "%v", err)
		}
	}()
	if t.Kind == Real {
		// No worker runs yet: they look at the work tree that is made anew.
		if err := l.watchReal(ctx, o); err != nil {
			return err
		}
	}
	if err := l.runTrialWorkers(ctx, t.Standby); err != nil {
		return err
	}
	if t.Kind == Approval {
		if err := l.carryOutGated(ctx, t, o); err != nil {
			return err
		}
		l.judgeAll(ctx, o)
		return nil
	}
	// The ids are needed for the first trap, which must be set before the
	// message is there: the stages wait for the run.
	prepare := func(r run) error {
		if len(t.Stages) == 0 || t.Stages[0].Point == "" {
			return nil
		}
		return l.set(t.Stages[0].trap(r))
	}
	r, err := l.submit(ctx, t.Shape, prepare)
	if err != nil {
		return err
	}
	o.run = r
	for _, s := range t.Others {
		other, err := l.submit(ctx, s, func(run) error { return nil })
		if err != nil {
			return err
		}
		o.others = append(o.others, other)
	}
	armed := true
	for i, s := range t.Stages {
		if s.Point != "" && !armed {
			if err := l.set(s.trap(r)); err != nil {
				return err
			}
		}
		if i > 0 && s.Point != "" && t.Stages[i-1].Do == kill {
			// Start the worker that was killed in the stage before only now: the
			// next trap must be set.
			if err := l.restartDead(t); err != nil {
				return err
			}
		}
		armed = false
		// arm sets the next trap while the stage still lasts, because the worker
		// may reach its point before the stage has ended.
		arm := func() error {
			if i+1 == len(t.Stages) || t.Stages[i+1].Point == "" || armed {
				return nil
			}
			armed = true
			return l.set(t.Stages[i+1].trap(r))
		}
		happened, err := l.runStage(ctx, s, o, arm)
		if err != nil {
			return err
		}
		if !happened {
			o.missed++
			break
		}
	}
	l.clearTraps()
	if err := l.restartDead(t); err != nil {
		return err
	}
	if err := l.duplicate(ctx, o); err != nil {
		return err
	}
	l.judgeAll(ctx, o)
	return nil
}

// restartDead starts killed workers again.
func (l *lane) restartDead(t Trial) error {
	if t.Standby {
		if err := l.workers[1].start(); err != nil {
			return err
		}
		if l.workers[1].alive() && !l.workers[0].alive() {
			// The standby continues the run. The other one starts for the next
			// trial, so that it does not take this run.
			return nil
		}
	}
	return l.workers[0].start()
}

// trap makes the trap of a stage for a run.
func (s stage) trap(r run) trap {
	t := trap{Point: s.Point, Occurrence: s.Occurrence, Hold: s.Do != kill}
	id := r.Tasks[s.Step]
	if s.Point == faultpoint.PublishSent {
		id = r.Tasks[next(s.Step)]
	}
	t.Any = [][]string{{r.ID, "'" + s.Step + "'"}, {r.ID + " " + s.Step}}
	switch {
	case s.Step == "":
		t.Any = nil // of any run and step
	case s.Command > 0:
		t.Any = [][]string{{r.ID + " " + s.Step + " " + commandSubject(s.Command)}}
	case id != "":
		t.Any = append(t.Any, []string{id})
	case idOnly[s.Point]:
		t.Any = nil
		for _, known := range r.Tasks {
			t.None = append(t.None, known)
		}
	}
	return t
}

// commandSubject is the name of a command in the subject of a moment
// (faultpoint.Number).
func commandSubject(number int) string { return fmt.Sprintf("#%d", number) }

// idOnly are the points whose subject is only a task id. That of the rollback is not
// known before it is published.
var idOnly = map[faultpoint.Point]bool{
	faultpoint.ConsumerTook: true, faultpoint.DeliveryReceived: true, faultpoint.SettleBefore: true, faultpoint.SettleAfter: true,
	faultpoint.PublishSent: true, faultpoint.ResultWritten: true, faultpoint.ResultCommitted: true,
}

// runStage waits for the point of a stage and injects its fault. It returns false if
// the run has ended without reaching the point. arm sets the trap of the next
// stage, if there is one.
func (l *lane) runStage(ctx context.Context, s stage, o *outcome, arm func() error) (bool, error) {
	if s.Do == retryFailed {
		return l.retrySpec(ctx, o, arm)
	}
	if s.Point == "" {
		if s.CodexHeld {
			at, err := l.awaitCodex(ctx, o.run)
			if !at || err != nil {
				return false, err
			}
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(s.After):
		}
		victim, err := l.busy()
		if err != nil {
			return false, err
		}
		h := hit{stage: s, pid: victim.pid(), at: time.Now()}
		victim.kill()
		h.over = time.Now()
		o.hits = append(o.hits, h)
		if err := l.lookAtKill(ctx, o, s); err != nil {
			return false, err
		}
		l.releaseCodex()
		return true, l.restartDead(o.trial)
	}
	ended := time.Time{}
	err := l.untilOfRun(ctx, string(s.Point)+" of "+s.Step, func() (bool, error) {
		if l.fired() {
			return true, nil
		}
		_, complete, err := l.status(ctx, o.run.ID)
		for _, other := range o.others {
			if complete && err == nil {
				_, complete, err = l.status(ctx, other.ID)
			}
		}
		switch {
		case err != nil || !complete:
			return false, err
		case ended.IsZero():
			ended = time.Now()
		}
		// The last delivery is acknowledged shortly after its run is complete.
		return time.Since(ended) > 700*time.Millisecond, nil
	})
	if err != nil {
		o.problems = append(o.problems, problem{stuck, err.Error()})
		return false, nil
	}
	if !l.fired() {
		return false, nil
	}
	pid, at, err := l.trappedProcess(ctx, o.trapped)
	if err != nil {
		return false, err
	}
	o.trapped++
	h := hit{stage: s, pid: pid, at: at}
	i := slices.IndexFunc(l.workers[:], func(w *workerProcess) bool { return w.pid() == pid })
	if i < 0 {
		return false, fmt.Errorf("process %d, which reached the trap, is no worker of this lane", pid)
	}
	victim := l.workers[i]
	if s.Alone {
		if err := l.awaitAlone(ctx, pid, s.Step); err != nil {
			return false, err
		}
	}
	switch s.Do {
	case kill:
		select {
		case <-victim.exited:
		case <-time.After(waitTimeout):
			return false, errors.New("the worker did not end after SIGKILL")
		}
		if err := l.lookAtKill(ctx, o, s); err != nil {
			return false, err
		}
		if s.PurgeMessage {
			if err := l.purge(ctx); err != nil {
				return false, err
			}
			o.lost = true
		}
		if s.ToForeign {
			if err := l.deliverToForeign(ctx, o.trial); err != nil {
				return false, err
			}
		}
	case terminate:
		if err := l.resume(ctx); err != nil {
			return false, err
		}
		if err := arm(); err != nil {
			return false, err
		}
		if l.armed() {
			if err := victim.terminate(); err != nil {
				return false, err
			}
			break
		}
		if err := victim.stop(); err != nil {
			o.problems = append(o.problems, problem{stuck, err.Error()})
		}
		if err := l.judgeReturned(ctx, o); err != nil {
			return false, err
		}
	case publishAgain:
		if err := errors.Join(l.publishSpecAgain(ctx, o, s.Step), arm(), l.resume(ctx)); err != nil {
			return false, err
		}
	case endSessions:
		if err := l.endSessions(ctx, o); err != nil {
			return false, err
		}
	case restartBroker, restartDatabase, restartBoth:
		if err := l.restart(ctx, s, o); err != nil {
			return false, err
		}
	default:
		if err := l.breakConnections(ctx, victim, s, o, arm); err != nil {
			return false, err
		}
	}
	h.over = time.Now()
	o.hits = append(o.hits, h)
	return true, nil
}

// endSessions ends all sessions in the lane's database except the harness's.
func (l *lane) endSessions(ctx context.Context, o *outcome) error {
	using, err := l.connected(toDatabase)
	if err != nil {
		return err
	}
	now := time.Now()
	if _, err := l.pool.Exec(ctx, `
		SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name <> $1`, harnessName); err != nil {
		return err
	}
	for pid, connected := range using {
		o.outages = append(o.outages, outage{peer: toDatabase, cause: "sessions ended", pid: pid, at: now, over: now, certain: connected})
	}
	return l.resume(ctx)
}

// awaitAlone waits until a worker that is paused in a step has counted the other
// consumers of its queue.
func (l *lane) awaitAlone(ctx context.Context, pid int, step string) error {
	return until(ctx, "the worker to have counted the other consumers", func() (bool, error) {
		moments, err := l.trace.read()
		return slices.ContainsFunc(moments, func(m moment) bool { return m.Point == faultpoint.OtherConsumersKnown && m.PID == pid && m.about(step) }), err
	})
}

// busy returns the worker that received the last delivery.
func (l *lane) busy() (*workerProcess, error) {
	moments, err := l.trace.read()
	for _, m := range slices.Backward(moments) {
		for _, w := range l.workers {
			if m.Point == faultpoint.DeliveryReceived && w.alive() && w.pid() == m.PID {
				return w, err
			}
		}
	}
	if l.workers[1].alive() && !l.workers[0].alive() {
		return l.workers[1], err
	}
	return l.workers[0], err
}

// breakConnections lets a paused worker continue while its connections have the
// stage's fault.
func (l *lane) breakConnections(ctx context.Context, victim *workerProcess, s stage, o *outcome, arm func() error) error {
	var proxies []*proxy
	var outages []outage
	for p, through := range map[peer]*proxy{toBroker: victim.broker, toDatabase: victim.database} {
		if s.Do == breakBroker && p == toDatabase || s.Do == breakDatabase && p == toBroker {
			continue
		}
		using, err := l.connected(p)
		if err != nil {
			return err
		}
		proxies = append(proxies, through)
		outages = append(outages, outage{peer: p, cause: string(s.Fault), pid: victim.pid(), at: time.Now(), certain: using[victim.pid()] && s.Fault.cuts()})
	}
	for _, p := range proxies {
		p.set(s.Fault)
	}
	if err := errors.Join(l.resume(ctx), arm()); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(s.For):
	}
	for i, p := range proxies {
		switch s.Fault {
		case stall, deaf, mute:
			p.drop() // the old connections do not work again
		case hole:
			p.forget()
		}
		outages[i].over = time.Now()
		p.set(noFault)
	}
	o.outages = append(o.outages, outages...)
	return nil
}

// trappedProcess reads from the trace which process reached the trap, and when.
// before is how many traps of the trial were reached earlier. It waits, because the
// trap's file is removed a moment before the trace has the line.
func (l *lane) trappedProcess(ctx context.Context, before int) (pid int, at time.Time, err error) {
	err = until(ctx, "the trace of the trap", func() (bool, error) {
		moments, err := l.trace.read()
		fired := 0
		for _, m := range moments {
			if !m.Fired {
				continue
			}
			if fired++; fired > before {
				pid, at = m.PID, time.Unix(0, m.At)
				return true, nil
			}
		}
		return false, err
	})
	return pid, at, err
}

// duplicate publishes the messages of the variant again.
func (l *lane) duplicate(ctx context.Context, o *outcome) error {
	if o.trial.Kind.isSpec() {
		return l.duplicateSpec(ctx, o)
	}
	complete := func() error {
		return until(ctx, "the run to end", func() (bool, error) {
			_, complete, err := l.status(ctx, o.run.ID)
			return complete, err
		})
	}
	reached := func(step string) error {
		return until(ctx, "the command of "+step, func() (bool, error) {
			records, err := ledger.Read(l.ledger, o.run.ID)
			return slices.ContainsFunc(records, func(r ledger.Record) bool { return r.Step == step }), err
		})
	}
	follower := func(r run, step string) error {
		m, err := r.follower(step)
		if err != nil {
			return err
		}
		return l.publish(ctx, m)
	}
	switch o.trial.Variant {
	case "":
		return nil
	case "first twice":
		if err := reached("patch"); err != nil {
			return err
		}
		return l.publish(ctx, o.run.first)
	case "follower twice":
		if err := reached("patch"); err != nil {
			return err
		}
		if err := follower(o.run, "patch"); err != nil {
			return err
		}
		if o.trial.Shape.FailAt != "" {
			return nil
		}
		if err := reached("build"); err != nil {
			return err
		}
		return follower(o.run, "build")
	case "rollback twice":
		if err := reached("rollback"); err != nil {
			return err
		}
		if err := follower(o.run, "rollback"); err != nil {
			return err
		}
		if err := complete(); err != nil {
			return err
		}
		return follower(o.run, "rollback")
	case revoked:
		if err := reached(o.trial.Shape.FailAt); err != nil {
			return err
		}
		return l.revoke(ctx, o.run)
	case deliveredAgain:
		// While the step runs, when it has failed, and at the end.
		if err := reached(o.trial.Shape.FailAt); err != nil {
			return err
		}
		if err := follower(o.run, o.trial.Shape.FailAt); err != nil {
			return err
		}
		if err := reached("rollback"); err != nil {
			return err
		}
		if err := follower(o.run, o.trial.Shape.FailAt); err != nil {
			return err
		}
		if err := complete(); err != nil {
			return err
		}
		return follower(o.run, o.trial.Shape.FailAt)
	case retriedEarly:
		if err := reached("rollback"); err != nil {
			return err
		}
		return l.retryRun(ctx, o)
	case "stale rollback":
		if err := reached("build"); err != nil {
			return err
		}
		if err := follower(o.run, "rollback"); err != nil {
			return err
		}
		if err := complete(); err != nil {
			return err
		}
		return follower(o.run, "rollback")
	}
	// After a retry.
	if err := complete(); err != nil {
		return err
	}
	if _, err := l.quiet(ctx); err != nil {
		o.problems = append(o.problems, problem{stuck, err.Error()})
		return nil
	}
	if err := l.retryRun(ctx, o); err != nil {
		return err
	}
	old := *o.run.before
	if o.trial.Variant == "old chain after a retry" {
		return l.publish(ctx, old.first)
	}
	if err := follower(old, "rollback"); err != nil {
		return err
	}
	if err := complete(); err != nil {
		return err
	}
	return follower(old, "rollback")
}

// retryRun retries the trial's run, with a plan that succeeds.
func (l *lane) retryRun(ctx context.Context, o *outcome) error {
	old := o.run
	again, err := l.retry(ctx, old, shape{Milliseconds: o.trial.Shape.Milliseconds})
	if err != nil {
		return err
	}
	again.before = &old
	o.run = again
	return nil
}

// quiet waits until no message is ready or unacknowledged.
func (l *lane) quiet(ctx context.Context) (bool, error) {
	var since time.Time
	err := until(ctx, "queue and workers to be idle", func() (bool, error) {
		moments, err := l.trace.read()
		if err != nil {
			return false, err
		}
		alive := map[int]bool{}
		for _, w := range l.workers {
			if w.alive() {
				alive[w.pid()] = true
			}
		}
		waiting, err := l.waiting()
		if err != nil {
			return false, err
		}
		if waiting > 0 || unackedTasks(moments, alive) > 0 {
			since = time.Time{}
			return false, nil
		}
		if since.IsZero() {
			since = time.Now()
		}
		return time.Since(since) > 60*time.Millisecond, nil
	})
	return err == nil, err
}

// measure computes the times from trace and ledger.
func (o *outcome) measure() {
	for i, h := range o.hits {
		if h.stage.Do != kill || o.trial.Kind == Crowd || o.trial.Kind == Rush {
			continue // this would count decisions on other runs
		}
		if h.stage.PurgeMessage || h.stage.ToForeign || h.stage.Point == faultpoint.LostBefore {
			continue // the next worker has to wait for LostGrace, or for the message
		}
		for _, m := range o.moments {
			at := time.Unix(0, m.At)
			if m.Point != faultpoint.StepDecided || m.PID == h.pid || !at.After(h.at) {
				continue
			}
			// After another kill, the decision belongs to that one.
			if i+1 == len(o.hits) || at.Before(o.hits[i+1].at) {
				o.resumed = append(o.resumed, at.Sub(h.at))
			}
			break
		}
	}
	type command struct {
		step   string
		number int
	}
	ended := map[command]int64{}
	for _, r := range o.ledger {
		if r.Event == ledger.Exit {
			ended[command{r.Step, r.Command}] = r.At
		}
	}
	for c, at := range ended {
		for _, m := range o.moments {
			if m.Point == faultpoint.CommandRecorded && m.about(c.step) && m.about(commandSubject(c.number)) && m.about(o.run.ID) && m.At > at {
				if !o.disturbed(at, m.At) {
					o.windows = append(o.windows, window{c.step, time.Duration(m.At - at)})
				}
				break
			}
		}
	}
}

// disturbed says that there was a fault between two times.
func (o *outcome) disturbed(from, to int64) bool {
	return slices.ContainsFunc(o.hits, func(h hit) bool { return h.at.UnixNano() < to && h.over.UnixNano() > from })
}

// excuses counts how often a worker ended, or killed a command because it was
// isolated, between the start of the command and the record of its end. A worker
// that is alone on its queue must not consider itself isolated.
func (o *outcome) excuses(step string, number int) int {
	n := 0
	for _, h := range o.hits {
		switch {
		case h.stage.Do == kill && o.openCommand(h.pid, step, number, h.at.UnixNano()),
			h.stage.Do == terminate && o.openCommand(h.pid, step, number, math.MaxInt64),
			h.stage.Do == breakBoth && o.trial.Kind != Blackout && o.openCommand(h.pid, step, number, math.MaxInt64):
			n++
		}
	}
	if o.trial.Kind == Blackout || o.trial.Kind == Restart || o.trial.Kind == Partition {
		return n
	}
	for _, m := range o.moments {
		if m.Point == faultpoint.Isolated && m.about(step) && m.about(o.run.ID) && o.openCommand(m.PID, step, number, m.At) {
			n++
		}
	}
	return n
}

// openCommand says that by the given time the process had begun a command and not
// recorded its end.
func (o *outcome) openCommand(pid int, step string, number int, by int64) bool {
	begun, recorded := false, false
	for _, m := range o.moments {
		if m.PID != pid || !m.about(step) || !m.about(o.run.ID) || m.At > by {
			continue
		}
		switch m.Point {
		case faultpoint.CommandBefore:
			begun = begun || m.about(commandSubject(number))
		case faultpoint.CommandRecorded:
			// The record of a command says that those before it have ended.
			for later := number; later <= several; later++ {
				recorded = recorded || m.about(commandSubject(later))
			}
		case faultpoint.FinishCommitted:
			recorded = true
		}
	}
	return begun && !recorded
}

// wronglyIsolated counts the times that a worker considered itself isolated without a
// fault of both servers: it had got no processor time.
func (o *outcome) wronglyIsolated() int {
	if slices.ContainsFunc(o.hits, func(h hit) bool { return h.stage.Do == breakBoth || h.stage.Do == restartBoth }) {
		return 0
	}
	n := 0
	for _, m := range o.moments {
		if m.Point == faultpoint.Isolated {
			n++
		}
	}
	return n
}

func median(of []time.Duration) time.Duration {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Clone(of)
	sort.Slice(sorted, func(i, j int) bool { return sorted[i] < sorted[j] })
	return sorted[len(sorted)/2]
}

func worst(of []time.Duration) time.Duration {
	if len(of) == 0 {
		return 0
	}
	return slices.Max(of)
}

package chaos

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// rushWorkers is how many workers a rush has; two of them are killed and
// replaced.
const rushWorkers = 4

// rollbackWithin is how soon a failed run's rollback must begin, however many
// other runs wait.
const rollbackWithin = time.Second

// rushFigures are the figures of a rush.
type rushFigures struct {
	runs, ended int
	// overlaps counts pairs of runs whose commands, by the ledger, or steps, by the
	// trace, used the workspace at the same time.
	overlaps, pairs int
	// outOfTurn counts handovers of the workspace to a run although another one was
	// due.
	outOfTurn, handovers int
	// rollbacks are the times from the end of the failing command to the start of
	// the rollback's. disturbed are those during which a worker was killed.
	rollbacks, disturbed []time.Duration
	// late counts rollbacks that began too late.
	late int
	// mostWaiting is how many runs had not begun when one failed.
	mostWaiting int
	took        time.Duration
	// beside counts the runs of the other workspace, during those of them that
	// overlapped with a run of the first.
	beside, during int
	besideTook     time.Duration
}

func (r *rushFigures) print(w io.Writer) {
	fmt.Fprintf(w, "%d runs at once for one workspace, %d workers: %d/%d ended in %s\n", r.runs, rushWorkers, r.ended, r.runs, r.took.Round(time.Millisecond))
	fmt.Fprintf(w, "  pairs of runs that overlap: %d/%d; handovers out of turn: %d/%d\n", r.overlaps, r.pairs, r.outOfTurn, r.handovers)
	fmt.Fprintf(w, "  from a failure to its rollback: median %s, worst %s, later than %s: %d/%d (at most %d runs waiting)\n",
		median(r.rollbacks).Round(time.Millisecond), worst(r.rollbacks).Round(time.Millisecond), rollbackWithin, r.late, len(r.rollbacks), r.mostWaiting)
	if len(r.disturbed) > 0 {
		fmt.Fprintf(w, "  the same with a worker killed in between: median %s, worst %s (of %d)\n",
			median(r.disturbed).Round(time.Millisecond), worst(r.disturbed).Round(time.Millisecond), len(r.disturbed))
	}
	fmt.Fprintf(w, "  another workspace meanwhile: %d runs ended in %s, %d/%d of them beside a run of the first\n", r.beside, r.besideTook.Round(time.Millisecond), r.during, r.beside)
}

// rushShapes draws the runs of a rush, in the order of their creation: some of
// high priority, some that fail.
func rushShapes(random *rand.Rand, runs int) []shape {
	shapes := make([]shape, runs)
	for i := range shapes {
		shapes[i] = shape{Milliseconds: 10 + random.IntN(20), High: random.IntN(5) == 0}
		if random.IntN(4) == 0 {
			shapes[i].FailAt = []string{"patch", "build", "restart"}[random.IntN(3)]
		}
	}
	return shapes
}

// rush publishes many runs at once, for a workspace with four workers and for
// another one with one worker, and checks them when all have ended.
func (l *lane) rush(ctx context.Context, t Trial, o *outcome) error {
	random := rand.New(rand.NewPCG(t.Seed, uint64(t.Number)))
	for len(l.workers) < rushWorkers {
		w, err := l.newWorker(fmt.Sprintf("%s-%c", l.name, 'a'+len(l.workers)))
		if err != nil {
			return err
		}
		l.workers = append(l.workers, w)
	}
	other, err := l.secondWorkspace(ctx)
	if err != nil {
		return err
	}
	defer func() {
		for _, w := range slices.Concat(other.workers, l.workers[2:]) {
			if err := w.stop(); err != nil {
				o.report(stuck, "%v", err)
			}
		}
		for _, w := range other.workers {
			w.close()
		}
	}()
	if err := l.runWorkers(ctx, rushWorkers); err != nil {
		return err
	}
	if err := other.runWorkers(ctx, 1); err != nil {
		return err
	}
	// The order in the queue differs from that of creation. Every run that may get
	// the workspace first fails, while all others wait.
	shapes := rushShapes(random, l.config.Runs)
	order := random.Perm(len(shapes))
	for _, first := range order[:min(rushWorkers, len(order))] {
		shapes[first].FailAt = "build"
	}
	runs, err := l.createAll(ctx, shapes)
	if err != nil {
		return err
	}
	o.run = runs[0]
	beside, err := other.createAll(ctx, rushShapes(random, max(2, l.config.Runs/10)))
	if err != nil {
		return err
	}
	began := time.Now()
	shuffled := make([]run, len(runs))
	for i, from := range order {
		shuffled[i] = runs[from]
	}
	if err := l.publishAll(ctx, shuffled); err != nil {
		return err
	}
	if err := other.publishAll(ctx, beside); err != nil {
		return err
	}
	figures := &rushFigures{runs: len(runs), beside: len(beside)}
	o.rushFigures = figures
	if err := l.watch(ctx, o, began); err != nil {
		if ctx.Err() != nil {
			return err
		}
		o.report(stuck, "%v", err)
	}
	for _, lane := range []*lane{l, other} {
		if _, err := lane.quiet(ctx); err != nil {
			o.report(stuck, "%v", err)
		}
	}
	if o.moments, err = l.trace.read(); err != nil {
		return err
	}
	if o.ledger, err = ledger.Read(l.ledger, ""); err != nil {
		return err
	}
	records, err := ledger.Read(other.ledger, "")
	if err != nil {
		return err
	}
	mine := l.judgeEach(ctx, o, runs, o.ledger)
	theirs := other.judgeEach(ctx, o, beside, records)
	if err := l.judgeLeft(ctx, o); err != nil {
		return err
	}
	o.judgeRush(mine, theirs)
	return nil
}

// secondWorkspace returns a lane with a second workspace and queue on the same
// servers and a worker of its own. It shares everything else.
func (l *lane) secondWorkspace(ctx context.Context) (*lane, error) {
	other := *l
	other.name, other.queue = l.name+"-other", queue+".other"
	other.workspace, other.ledger = filepath.Join(l.folder, "other-workspace"), filepath.Join(l.folder, "other-ledger")
	if err := makeWorkspace(ctx, other.workspace); err != nil {
		return nil, err
	}
	if err := other.declare(other.queue); err != nil {
		return nil, err
	}
	w, err := other.newWorker(other.name)
	if err != nil {
		return nil, err
	}
	other.workers = []*workerProcess{w}
	return &other, nil
}

func (l *lane) createAll(ctx context.Context, shapes []shape) ([]run, error) {
	runs := make([]run, 0, len(shapes))
	for _, s := range shapes {
		r, err := l.create(ctx, s)
		if err != nil {
			return nil, err
		}
		runs = append(runs, r)
	}
	return runs, nil
}

// publishAll sends the first messages of runs without waiting in between.
func (l *lane) publishAll(ctx context.Context, runs []run) error {
	var confirms []*amqp.DeferredConfirmation
	for _, r := range runs {
		confirm, err := l.channel.PublishWithDeferredConfirmWithContext(ctx, "", l.queue, true, false, r.first)
		if err != nil {
			return err
		}
		confirms = append(confirms, confirm)
	}
	for _, confirm := range confirms {
		if acked, err := confirm.WaitContext(ctx); err != nil || !acked {
			return fmt.Errorf("the broker refused a message (%v)", err)
		}
	}
	return nil
}

// watch waits until all runs have ended, and kills and replaces a worker when a
// fifth of them has ended, and when half of them has.
func (l *lane) watch(ctx context.Context, o *outcome, began time.Time) error {
	figures := o.rushFigures
	all := figures.runs + figures.beside
	killAt := []int{max(1, all/5), max(2, all/2)}
	ended, changed := -1, time.Now()
	for {
		var n, beside int
		err := l.pool.QueryRow(ctx, `
			SELECT count(*), count(*) FILTER (WHERE starts_with(p.service_context->>'queue', $1))
			FROM orchestrator_runs AS r JOIN orchestrator_action_plans AS p ON p.id = r.action_plan_id
			WHERE r.completed_at IS NOT NULL AND r.status IN ('succeeded', 'failed', 'rolled_back') AND r.queued_at >= $2`,
			queue+".other", o.run.created).Scan(&n, &beside)
		if err != nil {
			return err
		}
		if beside == figures.beside && figures.besideTook == 0 {
			figures.besideTook = time.Since(began)
		}
		if n-beside == figures.runs && figures.took == 0 {
			figures.took = time.Since(began)
		}
		figures.ended = n - beside
		switch {
		case n == all:
			return nil
		case n != ended:
			ended, changed = n, time.Now()
		case time.Since(changed) > waitTimeout:
			return fmt.Errorf("%d of %d runs have ended, and no other one in %s", n, all, waitTimeout)
		}
		if len(killAt) > 0 && n >= killAt[0] {
			killAt = killAt[1:]
			victim, err := l.busy()
			if err != nil {
				return err
			}
			h := hit{stage: stage{Do: kill}, pid: victim.pid(), at: time.Now()}
			victim.kill()
			h.over = time.Now()
			o.hits = append(o.hits, h)
			if err := victim.start(); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// judgeEach checks each run by itself. All should have ended.
func (l *lane) judgeEach(ctx context.Context, o *outcome, runs []run, records []ledger.Record) []*outcome {
	byRun := map[string]*outcome{}
	var all []*outcome
	for _, r := range runs {
		one := &outcome{trial: o.trial, run: r, hits: o.hits}
		byRun[r.ID], all = one, append(all, one)
	}
	for _, m := range o.moments {
		if len(m.Subject) > 0 && byRun[m.Subject[0]] != nil {
			one := byRun[m.Subject[0]]
			one.moments = append(one.moments, m)
		}
	}
	for _, r := range records {
		if one := byRun[r.Run]; one != nil {
			one.ledger = append(one.ledger, r)
		}
	}
	for _, one := range all {
		status, _, err := l.status(ctx, one.run.ID)
		if err != nil {
			o.report(harness, "%v", err)
			return all
		}
		one.measure()
		l.inspect(ctx, one, status)
		o.problems = append(o.problems, one.problems...)
		o.windows = append(o.windows, one.windows...)
		o.repeated, o.late = o.repeated+one.repeated, o.late+one.late
	}
	return all
}

// span is a time in which a run had the workspace, in nanoseconds since the epoch.
type span struct{ from, to int64 }

func (s span) overlaps(other span) bool { return s.from < other.to && other.from < s.to }

// commands returns the span of the run's commands in the ledger.
func (o *outcome) commands() span {
	if len(o.ledger) == 0 {
		return span{}
	}
	return span{o.ledger[0].At, o.ledger[len(o.ledger)-1].At}
}

// workspaceSpan returns the span from the first step begun to just before the record
// of the last one. The run had the workspace at least for that long.
func (o *outcome) workspaceSpan() (s span) {
	for _, m := range o.moments {
		switch {
		case m.Point == faultpoint.BeginCommitted && s.from == 0:
			s.from = m.At
		case m.Point == faultpoint.FinishWritten:
			s.to = m.At
		}
	}
	return s
}

// when returns when the run reached a point for the first or the last time, or 0.
func (o *outcome) when(point faultpoint.Point, last bool) (at int64) {
	for _, m := range o.moments {
		if m.Point == point && (at == 0 || last) {
			at = m.At
		}
	}
	return at
}

// judgeRush checks the runs together: that they took turns, in the right order, and
// that rollbacks did not wait. The runs are in the order of their creation.
func (o *outcome) judgeRush(runs, beside []*outcome) {
	figures := o.rushFigures
	for i, one := range runs {
		for _, other := range runs[:i] {
			figures.pairs++
			if one.commands().overlaps(other.commands()) || one.workspaceSpan().overlaps(other.workspaceSpan()) {
				figures.overlaps++
				o.report(doubled, "runs %s and %s used the workspace at the same time", one.run.ID, other.run.ID)
			}
		}
	}
	for _, one := range beside {
		if slices.ContainsFunc(runs, func(other *outcome) bool { return one.workspaceSpan().overlaps(other.workspaceSpan()) }) {
			figures.during++
		}
	}
	if figures.during == 0 {
		o.report(wrong, "no run of the other workspace overlapped with one of the first")
	}
	o.judgeOrder(runs)
	for _, one := range runs {
		if one.run.Shape.FailAt == "" {
			continue
		}
		var failed, rollback int64
		for _, r := range one.ledger {
			switch {
			case r.Step == one.run.Shape.FailAt && r.Event == ledger.End:
				failed = r.At
			case r.Step == "rollback" && r.Event == ledger.Start && rollback == 0:
				rollback = r.At
			}
		}
		if failed == 0 || rollback == 0 {
			continue // reported already
		}
		waiting := 0
		for _, other := range runs {
			if from := other.workspaceSpan().from; from == 0 || from > failed {
				waiting++
			}
		}
		figures.mostWaiting = max(figures.mostWaiting, waiting)
		took := time.Duration(rollback - failed)
		if o.disturbed(failed, rollback) {
			figures.disturbed = append(figures.disturbed, took)
			continue
		}
		figures.rollbacks = append(figures.rollbacks, took)
		if took > rollbackWithin {
			figures.late++
			o.report(wrong, "the rollback of run %s began %s after its failure, with %d runs waiting", one.run.ID, took, waiting)
		}
	}
}

// judgeOrder checks that the workspace always passed to the right one of the runs
// that were certainly parked when the run before released it: high priority first,
// then the oldest.
func (o *outcome) judgeOrder(runs []*outcome) {
	figures := o.rushFigures
	place := map[*outcome]int{}
	for i, one := range runs {
		place[one] = i
		if one.run.Shape.High {
			place[one] -= len(runs)
		}
	}
	began := slices.DeleteFunc(slices.Clone(runs), func(one *outcome) bool { return one.workspaceSpan().from == 0 })
	slices.SortFunc(began, func(a, b *outcome) int { return int(a.workspaceSpan().from - b.workspaceSpan().from) })
	for i := 1; i < len(began); i++ {
		figures.handovers++
		before, next := began[i-1], began[i]
		released := before.when(faultpoint.FinishLocked, true)
		for _, waiting := range began[i+1:] {
			if parked := waiting.when(faultpoint.ParkCommitted, false); parked > 0 && parked < released && place[waiting] < place[next] {
				figures.outOfTurn++
				o.report(wrong, "run %s had the workspace before run %s, which was waiting and comes first", next.run.ID, waiting.run.ID)
				break
			}
		}
	}
}

package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// gatedKill says where the worker of a run with an approval gate is killed.
type gatedKill struct {
	gate string
	stage
	// afterPause: after the approval of the run that has paused before verify. Otherwise
	// before that pause.
	afterPause bool
}

// gatedKills are those of kind Approval, in turn.
var gatedKills = func() (all []gatedKill) {
	add := func(gate string, afterPause bool, step string, points ...faultpoint.Point) {
		for _, point := range points {
			all = append(all, gatedKill{gate, stage{Point: point, Step: step, Do: kill}, afterPause})
		}
	}
	for _, step := range []string{"analyze", "patch", "build", "restart"} {
		add(preRun, false, step, faultpoint.ApprovalBefore, faultpoint.ApprovalChecked)
	}
	add(preVerify, false, "verify", faultpoint.BeginWritten, faultpoint.BeginCommitted, faultpoint.StepBegun, faultpoint.ApprovalBefore,
		faultpoint.ApprovalRefused, faultpoint.StepWorked, faultpoint.SettleBefore, faultpoint.SettleAfter)
	add(preVerify, true, "analyze", faultpoint.DeliveryReceived, faultpoint.StepAnswered)
	add(preVerify, true, "restart", faultpoint.StepAnswered, faultpoint.PublishConfirmed)
	add(preVerify, true, "verify", faultpoint.BeginWritten, faultpoint.BeginCommitted, faultpoint.ApprovalBefore, faultpoint.ApprovalChecked,
		faultpoint.FinishWritten, faultpoint.FinishCommitted, faultpoint.SettleBefore)
	return all
}()

// approval makes the trial one of a run with an approval gate.
func (t *Trial) approval(random *rand.Rand, turn int) {
	k := gatedKills[turn%len(gatedKills)]
	t.Case, t.AfterPause, t.Stages = k.gate, k.afterPause, []stage{k.stage}
	t.Shape.FailAt = []string{"", "verify"}[random.IntN(2)]
}

// carryOutGated submits a run whose gate requires an approval, and approves it as
// MoonMind's API does: before its start, and again when it has paused before verify. The
// trial's kill is before the pause or after it.
func (l *lane) carryOutGated(ctx context.Context, t Trial, o *outcome) (err error) {
	if err := moonmind.SetGate(ctx, l.pool, t.Case); err != nil {
		return err
	}
	defer func() {
		if removed := moonmind.SetGate(context.WithoutCancel(ctx), l.pool, "none"); err == nil {
			err = removed
		}
	}()
	if o.run, err = l.create(ctx, t.Shape); err != nil {
		return err
	}
	if err := l.approveRun(ctx, o, !t.AfterPause); err != nil || t.Case == preRun {
		return err
	}
	if err := l.awaitPause(ctx, o); err != nil || len(o.problems) > 0 {
		return err
	}
	// The API sends a new chain.
	o.run.earlier = o.run.Tasks
	if o.run.Tasks, o.run.first, err = moonmind.Chain(l.queue, o.run.ID); err != nil {
		return err
	}
	return l.approveRun(ctx, o, t.AfterPause)
}

// approveRun approves the run and publishes its chain. killed says that the worker is
// killed while it carries that out.
func (l *lane) approveRun(ctx context.Context, o *outcome, killed bool) error {
	s := o.trial.Stages[0]
	if killed {
		if err := l.set(s.trap(o.run)); err != nil {
			return err
		}
	}
	if err := moonmind.Approve(ctx, l.pool, o.run.ID); err != nil {
		return err
	}
	if err := l.publish(ctx, o.run.first); err != nil || !killed {
		return err
	}
	happened, err := l.runStage(ctx, s, o, func() error { return nil })
	if err != nil {
		return err
	}
	if !happened {
		o.missed++
	}
	l.clearTraps()
	return l.restartDead(o.trial)
}

// awaitPause waits until the run has paused before verify, and checks that nothing but
// its workspace is held, and that its change was deployed once.
func (l *lane) awaitPause(ctx context.Context, o *outcome) error {
	if err := until(ctx, "the run to pause before verify", func() (bool, error) {
		status, _, err := l.status(ctx, o.run.ID)
		return status == "awaiting_approval", err
	}); err != nil {
		o.report(stuck, "%v", err)
		return nil
	}
	if _, err := l.quiet(ctx); err != nil {
		o.report(stuck, "%v", err)
		return nil
	}
	for what, count := range map[string]string{
		"claims of a paused run are held":        `SELECT count(*) FROM mm_orchestrator.claims WHERE run_id = $1 AND holder IS NOT NULL`,
		"messages of a paused run are parked":    `SELECT count(*) FROM mm_orchestrator.parked WHERE run_id = $1`,
		"workspaces of a paused run are missing": `SELECT 1 - count(*) FROM mm_orchestrator.holds WHERE run_id = $1`,
	} {
		var n int
		if err := l.pool.QueryRow(ctx, count, o.run.ID).Scan(&n); err != nil {
			return err
		}
		if n != 0 {
			o.report(left, "%d %s", n, what)
		}
	}
	records, err := ledger.Read(l.ledger, o.run.ID)
	if err != nil {
		return fmt.Errorf("reading the ledger of a paused run: %w", err)
	}
	starts := map[string]int{}
	for _, r := range records {
		if r.Event == ledger.Start {
			starts[r.Step]++
		}
	}
	for step, want := range map[string]int{"patch": o.run.Shape.commands("patch"), "build": 1, "restart": 1, "rollback": 0} {
		if starts[step] != want {
			o.report(doubled, "before its pause, the run has begun %d commands of %s, want %d", starts[step], step, want)
		}
	}
	return nil
}

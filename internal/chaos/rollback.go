package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// The cases of trials of kind Rollback: a reason for a rollback, or a fault that
// might cause a second rollback or none.
const (
	stepError           = "step error"
	killedThrice        = "worker killed three times"
	planLimit           = "the plan's time limit"
	hardLimit           = "a message's hard limit"
	softLimit           = "a message's soft limit"
	settingLimit        = "the worker's step limit"
	revoked             = "operator's revoke"
	databaseUnavailable = "database unavailable at finish"
	brokerUnavailable   = "broker unavailable at finish"
	deliveredAgain      = "failed message twice"
)

// rollbackCases are used in this order.
var rollbackCases = []string{stepError, killedThrice, planLimit, hardLimit, softLimit, settingLimit, revoked, databaseUnavailable, brokerUnavailable, deliveredAgain}

// outageFaults are the faults with which a worker cannot use a server.
var outageFaults = []fault{reset, stall, deaf, mute}

// rollBack makes the trial one of the cases.
func (t *Trial) rollBack(random *rand.Rand, turn int) {
	t.Case = rollbackCases[turn%len(rollbackCases)]
	commands := []string{"patch", "build", "restart"}
	t.Shape.FailAt = append(commands, "verify")[random.IntN(4)]
	atFinish := func(do action, points ...faultpoint.Point) {
		t.Stages = []stage{{
			Point: points[random.IntN(len(points))], Step: t.Shape.FailAt,
			Do: do, Fault: outageFaults[random.IntN(len(outageFaults))], For: time.Duration(20+random.IntN(2000)) * time.Millisecond,
		}}
	}
	switch t.Case {
	case killedThrice:
		t.poison(random)
	case planLimit:
		t.Shape.FailAt = commands[random.IntN(len(commands))]
		t.Shape.Endless, t.Shape.LimitSeconds = true, 0.2+0.1*float64(random.IntN(5))
	case hardLimit, softLimit:
		t.Shape.FailAt, t.Shape.Endless = commands[random.IntN(len(commands))], true
		t.Shape.LinkOption = map[string]string{hardLimit: "time_limit", softLimit: "soft_time_limit"}[t.Case]
	case settingLimit:
		t.Shape.FailAt, t.Shape.Endless = commands[random.IntN(len(commands))], true
	case revoked:
		t.Shape.FailAt, t.Variant = commands[random.IntN(len(commands))], revoked
		t.Shape.Endless = true
	case databaseUnavailable:
		atFinish(breakDatabase, faultpoint.StepWorked, faultpoint.FinishBefore, faultpoint.FinishLocked, faultpoint.FinishWritten, faultpoint.FinishCommitted)
	case brokerUnavailable:
		atFinish(breakBroker, faultpoint.FinishBefore, faultpoint.FinishCommitted, faultpoint.FinishAfter, faultpoint.PublishBefore,
			faultpoint.PublishConfirmed, faultpoint.ResultStored, faultpoint.SettleBefore)
	case deliveredAgain:
		t.Shape.FailAt, t.Variant = commands[random.IntN(len(commands))], deliveredAgain
		t.Shape.Milliseconds, t.Standby = 150, true
	}
}

// poison kills every worker that starts the step, until the step fails for it.
func (t *Trial) poison(random *rand.Rand) {
	t.Shape.FailAt = ""
	step := []string{"patch", "build", "restart", "verify"}[random.IntN(4)]
	points := []faultpoint.Point{faultpoint.StepBegun, faultpoint.ArtifactsOpened, faultpoint.StepWorked}
	for range 3 {
		t.Stages = append(t.Stages, stage{Point: points[random.IntN(len(points))], Step: step, Do: kill})
	}
}

// isPoison says that every worker that starts the step is killed, until the step
// fails for that reason.
func (t Trial) isPoison() bool { return t.Kind == Poison || t.Case == killedThrice }

// limitSeconds is the time limit of a message, or of every step of a worker. It
// leaves a busy machine time to reach the command.
const limitSeconds = 3

// configureWorkers gives the workers the settings of a trial that needs its own.
// release removes them.
func (l *lane) configureWorkers(t Trial) (release func() error, err error) {
	var settings []string
	switch {
	case t.Case == settingLimit:
		settings = append(settings, fmt.Sprintf("MM_ORCHESTRATOR_STEP_TIME_LIMIT=%ds", limitSeconds))
	case t.Kind == Lost, t.Kind == Foreign:
		settings = append(settings, fmt.Sprintf("MM_ORCHESTRATOR_LOST_GRACE=%s", lostGrace))
	case t.Kind == Mixed:
		settings = append(settings, fmt.Sprintf("MM_ORCHESTRATOR_LOST_GRACE=%s", mixedGrace))
	case t.Kind == Real:
		settings = append(settings, l.real.settings...)
	case t.Kind.isSpec():
		settings = append(settings, l.specSettings(t.Case)...)
	default:
		return func() error { return nil }, nil
	}
	change := func(settings ...string) error {
		var failures []error
		for _, w := range l.workers {
			failures = append(failures, w.stop()) // the trial starts those that it needs
			w.settings = settings
		}
		return errors.Join(failures...)
	}
	return func() error { return change() }, change(settings...)
}

// revoke revokes a run as an operator does.
func (l *lane) revoke(ctx context.Context, r run) error {
	return l.workers[0].run(ctx, "runs", "revoke", r.ID, "--reason", "chaos")
}

// judgeRollback checks that there was exactly one rollback, and that each of its
// commands began once and ended once. Only a worker that was killed while it ran a
// command excuses another start of that.
func (o *outcome) judgeRollback(status string) {
	if o.trial.Kind != Rollback && o.trial.Kind != Lost {
		return
	}
	starts, ends := make([]int, several+1), make([]int, several+1)
	for _, r := range o.ledger {
		switch {
		case r.Step != "rollback":
		case r.Event == ledger.Start:
			starts[r.Command]++
		case r.Event == ledger.End:
			ends[r.Command]++
		}
	}
	commands := o.run.Shape.commands("rollback")
	o.rolledBackOnce = status == "rolled_back"
	for number := 1; number <= several; number++ {
		want := 0
		if number <= commands {
			want = 1
		}
		again := o.excuses("rollback", number)
		o.rolledBackOnce = o.rolledBackOnce && starts[number] >= want && starts[number] <= want+again && ends[number] >= want && ends[number] <= want+again
	}
	if !o.rolledBackOnce && o.missed == 0 {
		o.report(doubled, "%s: the %d commands of the rollback were begun %v times and ended %v times, want each once; the run is %s",
			o.trial.Case, commands, starts[1:], ends[1:], status)
	}
}

// onceOf counts trials with exactly one rollback, of those that had to have one.
type onceOf struct{ once, of, notReached int }

func (c onceOf) String() string {
	text := fmt.Sprintf("%d/%d", c.once, c.of)
	if c.notReached > 0 {
		text += fmt.Sprintf(" (in %d more the point was not reached)", c.notReached)
	}
	return text
}

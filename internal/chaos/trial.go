package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// Kind names a sort of trial.
type Kind string

// The kinds.
const (
	// KillAtPoint kills the worker at a named point of a step.
	KillAtPoint Kind = "kill-point"
	// KillAtRandom kills a worker at a time that has nothing to do with what
	// it does, once or twice.
	KillAtRandom Kind = "kill-random"
	// BrokerFault and DatabaseFault break the connections of the busy worker at a
	// named point.
	BrokerFault   Kind = "broker-fault"
	DatabaseFault Kind = "database-fault"
	// Duplicate delivers a message twice: the first, a later one, the rollback, or
	// an old rollback of a run that has succeeded or was retried. Or it retries
	// the run while its rollback runs.
	Duplicate Kind = "duplicate"
	// Poison kills every worker that starts a step, until the step fails for that
	// reason.
	Poison Kind = "poison"
	// Partition isolates a worker for longer than a takeover needs, by a reset or
	// a stall, when a command of it has just ended, or begins and would last all
	// that time.
	Partition Kind = "partition"
	// Blackout isolates the only worker, at a point of a step, for longer than a
	// takeover would need if there were another worker. No command may run again.
	Blackout Kind = "blackout"
	// Crowd has several runs compete for one workspace, and kills one of two
	// workers where it parks or publishes messages, or anywhere.
	Crowd Kind = "crowd"
	// Stop ends the worker by SIGTERM during a command, in half of the trials while
	// other runs wait for the workspace.
	Stop Kind = "stop"
	// Lost purges a run's message, so that a worker ends the run as lost, and kills
	// that worker.
	Lost Kind = "lost"
	// Foreign kills a worker and has a consumer that is no worker of this program
	// take the message, keep it for longer than LostGrace, and requeue it.
	Foreign Kind = "foreign"
	// Restart stops or kills the broker, the database, or both at a named point,
	// and starts them again after a while. It uses servers of its own.
	Restart Kind = "restart"
	// Approval kills a worker where it checks the approval of a run, where the run
	// pauses before verify, and where it goes on. It runs only on request.
	Approval Kind = "approval"
	// Rollback makes runs fail for every reason, in turn, and checks that each is
	// rolled back exactly once. It runs only on request.
	Rollback Kind = "rollback"
	// Rush publishes many runs at once for one workspace with four workers, and
	// some for another workspace. It runs only on request.
	Rush Kind = "rush"
	// Real runs real git and a real compose project, kills a worker at a point or at
	// any time, once or twice, and compares files, repository, images and
	// containers with what was there before the run. It runs only on request, and
	// needs an engine.
	Real Kind = "real"
	// Mixed publishes many runs at once for Celery's Python workers and workers of
	// this program on one queue, with steps longer than LostGrace. It runs only on
	// request, and needs Python.
	Mixed Kind = "mixed"
	// Spec runs the Spec workflow chain: a worker is killed at a point of it or at any time,
	// connections break, or a message comes twice. It runs only on request, as do the
	// other kinds of the Spec workflow.
	Spec Kind = "spec"
	// SpecCloud is Spec with Codex Cloud.
	SpecCloud Kind = "spec-cloud"
	// SpecRetry lets one task of the chain fail, and retries the run.
	SpecRetry Kind = "spec-retry"
	// SpecGitHub has a fault of GitHub's API or of the git server in each trial, and mostly
	// a kill as well.
	SpecGitHub Kind = "spec-github"
	// SpecTwice delivers the message of one of the three tasks twice.
	SpecTwice Kind = "spec-twice"
	// SpecRestart restarts the broker, the database, or both during the chain. It uses
	// servers of its own.
	SpecRestart Kind = "spec-restart"
)

// Kinds are the kinds of a campaign, in turn and as often as each is used.
var Kinds = []Kind{
	KillAtPoint, KillAtPoint, KillAtRandom, BrokerFault, KillAtPoint, Duplicate, KillAtPoint, DatabaseFault,
	KillAtPoint, BrokerFault, KillAtPoint, BrokerFault, Stop, KillAtPoint, KillAtRandom, DatabaseFault, KillAtPoint, Duplicate,
	BrokerFault, KillAtPoint, BrokerFault, KillAtPoint, Poison, Crowd, KillAtPoint, Partition, KillAtPoint, Crowd, Lost, Restart, Blackout, Foreign,
}

// onRequest are the kinds that no campaign uses by default. Each shows one promise.
var onRequest = []Kind{Approval, Rollback, Rush, Mixed, Real, Spec, SpecCloud, SpecRetry, SpecGitHub, SpecTwice, SpecRestart}

// retriedEarly is the variant of Duplicate that retries a run while its rollback
// runs. The API allows that for a failed run.
const retriedEarly = "retry while the rollback runs"

// A Trial describes a trial. Seed and number alone define it.
type Trial struct {
	Seed   uint64
	Number int
	Kind   Kind
	Shape  shape
	// Others are the shapes of further runs, published at the same time.
	Others []shape
	// Standby says that a second worker runs all the time. Otherwise a killed one
	// is started again at once.
	Standby bool
	// Stages happen one after the other.
	Stages []stage
	// Variant is that of Duplicate, or what else is done to a run from outside.
	Variant string
	// Case is that of Rollback or Lost, the gate's requirement of Approval, and how Codex
	// does the task of a run of the Spec workflow.
	Case string
	// Twice is the task whose message Variant delivers twice, of SpecTwice.
	Twice string
	// Service is the name of the fault of a service, of SpecGitHub and SpecCloud; "" for
	// none. Failure is the name of what makes the first attempt fail, of SpecRetry.
	Service, Failure string
	// LostStep is the step that fails because its message is lost; "" if the
	// rollback's message is lost, or none.
	LostStep string
	// AfterPause, of Approval, says that the worker is killed when the run is approved
	// that has paused before verify.
	AfterPause bool
	// Workspace is that of Real, Gate the requirement of its approval gate, "" for none.
	Workspace changetest.WorkspaceKind
	Gate      string
}

// A stage is one fault.
type stage struct {
	// Point, Step, Command and Occurrence say where; without a Point, the fault
	// happens After the last stage.
	Point      faultpoint.Point
	Step       string
	Occurrence int
	// Command is the number of the command, 0 for any.
	Command int
	After   time.Duration
	// Do is the kind of fault.
	Do action
	// Fault is that of a connection. For is how long it lasts, or how long a server
	// is stopped.
	Fault fault
	For   time.Duration
	// Abrupt says that the server is killed instead of stopped.
	Abrupt bool
	// PurgeMessage says to purge the run's message when the worker is dead.
	PurgeMessage bool
	// ToForeign says that a foreign consumer takes the run's message when the worker
	// is dead, and requeues it after a while.
	ToForeign bool
	// Alone says to wait until the worker knows that it is alone on its queue.
	Alone bool
	// CodexHeld says to wait until codex is at work, which waits for the end of the stage.
	CodexHeld bool
}

// action is the kind of fault of a stage.
type action string

// The actions.
const (
	kill          action = "kill"
	terminate     action = "terminate"
	breakBroker   action = "broker"
	breakDatabase action = "database"
	breakBoth     action = "both"
	// endSessions ends all database sessions of workers, as an administrator may:
	// both workers lose their locks at the same moment.
	endSessions action = "end-sessions"
	// restartBroker, restartDatabase and restartBoth restart the lane's own servers.
	restartBroker   action = "restart broker"
	restartDatabase action = "restart database"
	restartBoth     action = "restart both"
	// publishAgain publishes the message of the stage's task again while the worker is
	// paused in that task.
	publishAgain action = "publish the message again"
	// retryFailed waits for the failure of the run, removes its cause, and retries the run.
	retryFailed action = "retry the failed run"
)

// holeLasts is a little longer than a worker needs to notice that its broker sends
// nothing: one and a half of its heartbeats.
const holeLasts = brokerHeartbeat*3/2 + 1500*time.Millisecond

func (a action) restarts() bool {
	return a == restartBroker || a == restartDatabase || a == restartBoth
}

func (t Trial) String() string {
	var stages []string
	for _, s := range t.Stages {
		text := string(s.Do)
		if s.PurgeMessage {
			text += " and purge the message"
		}
		if s.ToForeign {
			text += " and a foreign consumer takes the message"
		}
		if s.Fault != noFault {
			text += " " + string(s.Fault) + " " + s.For.String()
		}
		if s.Do.restarts() {
			text += map[bool]string{true: " (killed for ", false: " (stopped for "}[s.Abrupt] + s.For.String() + ")"
		}
		switch {
		case s.Do == retryFailed:
		case s.CodexHeld:
			text += " while codex is at work"
		case s.Point != "":
			text += " at " + s.place()
			if s.Occurrence > 1 {
				text += fmt.Sprintf(", time %d", s.Occurrence)
			}
		default:
			text += " after " + s.After.String()
		}
		stages = append(stages, text)
	}
	if t.Workspace != "" {
		stages = append(stages, "workspace: "+string(t.Workspace))
	}
	if (t.Variant == "" || t.Kind.isSpec()) && t.Case != "" {
		stages = append([]string{t.Case}, stages...)
	}
	if t.Variant != "" {
		stages = append(stages, strings.TrimSpace(t.Variant+" "+t.Twice))
	}
	for name, text := range map[string]string{"fault of a service: ": t.Service, "made to fail: ": t.Failure} {
		if text != "" {
			stages = append(stages, name+text)
		}
	}
	if t.Gate != "" {
		stages = append(stages, t.Gate+" approval")
	}
	ends := "succeeds"
	if t.Shape.FailAt != "" {
		ends = "fails at " + t.Shape.FailAt
	}
	if t.Shape.Several {
		ends += fmt.Sprintf(", %d commands in patch and rollback", several)
	}
	who := "restarted worker"
	if t.Standby {
		who = "standby worker"
	}
	return fmt.Sprintf("%s (%s; run %s; %s)", t.Kind, strings.Join(stages, ", then "), ends, who)
}

// A place is a point of a step at which a trap can be set.
type place struct {
	point faultpoint.Point
	step  string
	// command is the number of the command that the point is about, if there
	// are several.
	command int
	// occurrence is the number of the hit, 0 for the first.
	occurrence int
	// gate is the requirement of the approval gate without which the program does not
	// reach the point, "" for any.
	gate string
	// before are stages without which the program does not reach the point.
	before []stage
	// failed says that only a step that fails reaches the point.
	failed bool
	// takes is how long commands must take for the program to reach the point.
	takes time.Duration
}

// places lists where trials kill a worker.
var places = slices.Concat(
	at(everyStep, nil, false,
		faultpoint.ConsumerTook, faultpoint.DeliveryReceived, faultpoint.DeliveryDecoded, faultpoint.SlotTaken, faultpoint.TaskStarting,
		faultpoint.BeginBefore, faultpoint.BeginLocked, faultpoint.BeginWritten, faultpoint.BeginCommitted,
		faultpoint.StepDecided, faultpoint.StepBegun, faultpoint.ArtifactsOpened, faultpoint.StepWorked,
		faultpoint.FinishBefore, faultpoint.FinishLocked, faultpoint.FinishWritten, faultpoint.FinishCommitted, faultpoint.FinishAfter,
		faultpoint.TaskReturned, faultpoint.ResultBefore, faultpoint.ResultWritten, faultpoint.ResultCommitted, faultpoint.ResultStored,
		faultpoint.SettleBefore, faultpoint.SettleAfter),
	at([]string{"analyze", "patch", "build", "restart", "rollback"}, nil, false, faultpoint.ArtifactBefore, faultpoint.ArtifactWritten),
	at(withCommand, nil, false, faultpoint.AuditBefore, faultpoint.AuditRecorded),
	at(withCommand, nil, false, aroundCommand...),
	// The same for each of several commands, and for those that are left after a
	// kill.
	ofCommand(1, at(withSeveral, nil, false, aroundCommand...)),
	ofCommand(2, at(withSeveral, nil, false, aroundCommand...)),
	ofCommand(3, at(withSeveral, nil, false, aroundCommand...)),
	ofCommand(2, at(withSeveral, []stage{{Point: faultpoint.CommandRecorded, Command: 1, Do: kill}}, false, aroundCommand...)),
	ofCommand(2, at(withSeveral, []stage{{Point: faultpoint.CommandBefore, Command: 2, Do: kill}}, false, aroundCommand...)),
	ofCommand(3, at(withSeveral, []stage{{Point: faultpoint.CommandAfter, Command: 2, Do: kill}}, false, aroundCommand...)),
	// A chain continues after every step but its last.
	at([]string{"analyze", "patch", "build", "restart"}, nil, false, faultpoint.PublishBefore, faultpoint.PublishSent, faultpoint.PublishConfirmed),
	// The error callback, and the results of links that will never run.
	at([]string{"patch", "build", "restart", "verify"}, nil, true, faultpoint.PublishBefore, faultpoint.PublishConfirmed),
	at([]string{"verify"}, nil, true, faultpoint.PublishSent),
	at([]string{"patch", "build", "restart", "verify"}, nil, true, faultpoint.ResultBefore, faultpoint.ResultStored, faultpoint.LaterBefore, faultpoint.LaterStored),
	// Points that are only reached after a first kill.
	at(everyStep, []stage{{Point: faultpoint.FinishAfter, Do: kill}}, false, faultpoint.StepAnswered),
	at(everyStep, []stage{{Point: faultpoint.StepBegun, Do: kill}}, false, faultpoint.HolderSuspected, faultpoint.BeginCommitted),
	at([]string{"patch", "build", "restart", "rollback"}, []stage{{Point: faultpoint.CommandBefore, Do: kill}}, false, faultpoint.CommandAfter, faultpoint.StepWorked),
	at(everyStep, []stage{{Point: faultpoint.FinishAfter, Do: kill}}, false, faultpoint.SettleBefore),
	// Where a redelivery joins the step that still runs, and where a stopping
	// worker releases its claim.
	taking(1500*time.Millisecond, at(withCommand, []stage{{Point: faultpoint.CommandBefore, Do: breakBroker, Fault: reset, For: 50 * time.Millisecond}}, false,
		faultpoint.TaskAttached)),
	taking(4*time.Second, at(withCommand, []stage{{Point: faultpoint.CommandBefore, Do: terminate}}, false,
		faultpoint.ReleaseBefore, faultpoint.ReleaseAfter)),
)

// crowdPoints are the points at which Crowd kills a worker, in any step.
var crowdPoints = []faultpoint.Point{
	faultpoint.ParkedTaken, faultpoint.ParkedPublished, faultpoint.ParkWritten, faultpoint.ParkCommitted, faultpoint.StepDecided, faultpoint.BeginLocked,
	faultpoint.FinishCommitted, faultpoint.SettleBefore,
}

// leftOut are the points without a kill, for the named steps or for all, and the
// reason.
var leftOut = []struct {
	points []faultpoint.Point
	steps  []string
	why    string
}{
	{[]faultpoint.Point{faultpoint.ConnectionLost, faultpoint.ConnectionRestored, faultpoint.SessionLost, faultpoint.SessionEstablished}, nil,
		"they belong to no step; they show how a worker recovers"},
	{[]faultpoint.Point{faultpoint.OtherConsumersKnown}, nil, "the query runs beside the step: a short step may end before the answer"},
	{[]faultpoint.Point{faultpoint.Isolated}, nil, "needs a fault of both servers: kind partition"},
	{[]faultpoint.Point{faultpoint.DeliveryDropped}, nil, "needs a connection that is lost between two lines, after which no delivery is left"},
	{append([]faultpoint.Point{faultpoint.AuditBefore, faultpoint.AuditRecorded}, aroundCommand...), []string{"analyze", "verify"}, "these steps have no command"},
	{[]faultpoint.Point{faultpoint.ArtifactBefore, faultpoint.ArtifactWritten}, []string{"verify"}, "its log is written at once"},
	{[]faultpoint.Point{faultpoint.PublishBefore, faultpoint.PublishSent, faultpoint.PublishConfirmed}, []string{"rollback"}, "nothing follows it"},
	{[]faultpoint.Point{faultpoint.LaterBefore, faultpoint.LaterStored}, []string{"analyze", "rollback"}, "no plan lets these steps fail"},
	{[]faultpoint.Point{faultpoint.TaskAttached, faultpoint.ReleaseBefore, faultpoint.ReleaseAfter}, []string{"analyze", "verify"},
		"without a command they end before a redelivery arrives, or a stopping worker hands them back"},
	{[]faultpoint.Point{faultpoint.ParkWritten, faultpoint.ParkCommitted, faultpoint.ParkedTaken, faultpoint.ParkedPublished}, nil,
		"which step reaches it depends on which run is first: kind crowd kills in any step"},
	{[]faultpoint.Point{faultpoint.ChangeBefore, faultpoint.ChangeRecorded}, nil,
		"a step whose programs are stand-ins records no change: kind real kills there"},
	{[]faultpoint.Point{faultpoint.ApprovalBefore, faultpoint.ApprovalChecked, faultpoint.ApprovalRefused}, nil,
		"only a run with an approval gate reaches them: kinds approval and real"},
	{[]faultpoint.Point{faultpoint.LostBefore, faultpoint.LostFailed}, nil, "they belong to a run: kind lost"},
	{specOnly(), nil, "they belong to the Spec workflow: kinds spec and spec-cloud"},
}

var (
	withCommand = []string{"patch", "build", "restart", "rollback"}
	// withSeveral are the steps that can have several commands.
	withSeveral   = []string{"patch", "rollback"}
	aroundCommand = []faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded}
)

// ofCommand returns the places for one command of several.
func ofCommand(number int, places []place) []place {
	for i := range places {
		places[i].command = number
	}
	return places
}

// stage makes the stage of a fault at the place.
func (p place) stage(do action) stage {
	return stage{Point: p.point, Step: p.step, Command: p.command, Occurrence: p.occurrence, Do: do}
}

// place is the name of the stage's place in reports.
func (s stage) place() string {
	name := string(s.Point)
	if s.Step != "" {
		name += " of " + s.Step
	}
	if s.Command > 0 {
		name += fmt.Sprintf(" command %d", s.Command)
	}
	if s.Occurrence > 0 {
		name += fmt.Sprintf(", time %d", s.Occurrence)
	}
	return name
}

// taking returns the places with the given duration of commands.
func taking(d time.Duration, places []place) []place {
	for i := range places {
		places[i].takes = d
	}
	return places
}

var everyStep = steps

func at(in []string, before []stage, failed bool, points ...faultpoint.Point) []place {
	var all []place
	for _, point := range points {
		for _, step := range in {
			p := place{point: point, step: step, failed: failed}
			for _, s := range before {
				s.Step = step
				p.before = append(p.before, s)
			}
			all = append(all, p)
		}
	}
	return all
}

// newTrial makes a trial from its seed and number. kinds are those of the campaign,
// in turn.
func newTrial(seed uint64, number int, kinds []Kind) Trial {
	random := rand.New(rand.NewPCG(seed, uint64(number)))
	t := Trial{Seed: seed, Number: number, Kind: kinds[number%len(kinds)], Standby: random.IntN(2) == 0}
	t.Shape = shape{Milliseconds: 10 + random.IntN(40), Several: random.IntN(2) == 0}
	if random.IntN(3) == 0 {
		t.Shape.FailAt = []string{"patch", "build", "restart", "verify"}[random.IntN(4)]
	}
	switch t.Kind {
	case KillAtPoint:
		t.killAtPoint(random, turnOf(number, kinds))
	case KillAtRandom:
		for range 1 + random.IntN(2) {
			t.Stages = append(t.Stages, stage{After: time.Duration(random.IntN(400)) * time.Millisecond, Do: kill})
		}
	case BrokerFault, DatabaseFault:
		do := breakBroker
		if t.Kind == DatabaseFault {
			do = breakDatabase
		}
		faults := []fault{reset, stall, deaf, mute, slow, pause}
		p := t.drawPlace(random)
		if t.Kind == DatabaseFault && random.IntN(4) == 0 {
			t.Stages = []stage{p.stage(endSessions)}
			break
		}
		t.Stages = []stage{p.stage(do)}
		t.Stages[0].Fault, t.Stages[0].For = faults[random.IntN(len(faults))], time.Duration(20+random.IntN(2000))*time.Millisecond
		if random.IntN(12) == 0 {
			// Long enough for heartbeats, or queries of the database, to notice.
			t.Stages[0].Fault, t.Stages[0].For = hole, holeLasts
		}
	case Restart:
		t.restartServer(random)
	case Duplicate:
		variants := []string{"first twice", "follower twice", "rollback twice", "stale rollback", "old rollback after a retry", "old chain after a retry", retriedEarly}
		t.Variant = variants[random.IntN(len(variants))]
		t.duplicate()
	case Poison:
		t.poison(random)
	case Approval:
		t.approval(random, turnOf(number, kinds))
	case Rollback:
		t.rollBack(random, turnOf(number, kinds))
	case Partition:
		t.partition(random)
	case Blackout:
		t.blackout(random, stage{Do: breakBoth, Fault: []fault{reset, stall, hole}[random.IntN(3)]})
	case Crowd:
		t.crowd(random, turnOf(number, kinds))
	case Mixed:
		t.Standby, t.Shape, t.Case = true, shape{}, "many runs, Python's workers restarted half-way"
	case Lost:
		t.loseMessage(random, turnOf(number, kinds))
	case Foreign:
		t.toForeign(random)
	case Stop:
		t.stop(random)
	case Real:
		t.real(random, turnOf(number, kinds))
	case Spec, SpecCloud, SpecRetry, SpecGitHub, SpecTwice, SpecRestart:
		t.spec(random, turnOf(number, kinds))
	}
	return t
}

// turnOf returns the number of earlier trials of the same kind.
func turnOf(number int, kinds []Kind) int {
	turn := number % len(kinds)
	return number/len(kinds)*count(kinds, kinds[turn]) + count(kinds[:turn], kinds[turn])
}

func count(kinds []Kind, kind Kind) int {
	n := 0
	for _, k := range kinds {
		if k == kind {
			n++
		}
	}
	return n
}

// killAtPoint uses the places in an order that depends on the seed. So a campaign
// uses each of them before it uses one twice.
func (t *Trial) killAtPoint(random *rand.Rand, turn int) {
	order := rand.New(rand.NewPCG(t.Seed, 0)).Perm(len(places))
	p := places[order[turn%len(order)]]
	t.shapeFor(p, random)
	if p.takes > 0 {
		// No other worker may get the message.
		t.Standby, t.Shape.Milliseconds, t.Shape.Several = false, int(p.takes.Milliseconds()), false
	}
	t.Stages = append(slices.Clone(p.before), p.stage(kill))
}

// drawPlace draws a place that needs no earlier stage.
func (t *Trial) drawPlace(random *rand.Rand) place {
	for {
		p := places[random.IntN(len(places))]
		if len(p.before) == 0 {
			t.shapeFor(p, random)
			return p
		}
	}
}

// shapeFor gives the run a shape that reaches the place.
func (t *Trial) shapeFor(p place, random *rand.Rand) {
	t.Shape.Several = t.Shape.Several || p.command > 0
	switch {
	case p.failed:
		t.Shape.FailAt = p.step
	case p.step == "rollback":
		t.Shape.FailAt = []string{"patch", "build", "restart", "verify"}[random.IntN(4)]
	case t.Shape.FailAt != "" && slices.Index(steps, t.Shape.FailAt) <= slices.Index(steps, p.step):
		t.Shape.FailAt = ""
		if random.IntN(3) == 0 && p.step != "verify" {
			t.Shape.FailAt = "verify"
		}
	}
}

func (t *Trial) partition(random *rand.Rand) {
	step := []string{"build", "restart"}[random.IntN(2)]
	cut := stage{Point: faultpoint.CommandAfter, Step: step, Do: breakBoth, Fault: reset, For: 6500 * time.Millisecond}
	// The next command is long enough to overlap with another one.
	milliseconds := 3000
	if random.IntN(3) > 0 {
		cut.Point, milliseconds = faultpoint.CommandBefore, 5000
	}
	if random.IntN(3) == 0 {
		cut.Fault = stall
	}
	t.Standby, t.Shape = true, shape{Milliseconds: milliseconds}
	t.Stages = []stage{cut}
}

// blackout makes the trial one that isolates the only worker for 2 to 8 s, by the
// fault of the stage.
func (t *Trial) blackout(random *rand.Rand, s stage) {
	s.Point = []faultpoint.Point{
		faultpoint.CommandBefore, faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded,
		faultpoint.FinishBefore, faultpoint.FinishWritten, faultpoint.FinishCommitted, faultpoint.PublishBefore,
	}[random.IntN(8)]
	s.Step = []string{"patch", "build", "restart"}[random.IntN(3)]
	// The worker counts other consumers as soon as a step begins. At later points a
	// short step has no command that could be killed.
	s.Alone = s.Point == faultpoint.CommandBefore || s.Point == faultpoint.CommandAfter || s.Point == faultpoint.CommandRecorded
	s.For = time.Duration(2000+random.IntN(6000)) * time.Millisecond
	t.Standby, t.Shape = false, shape{Milliseconds: 500 + random.IntN(5500)}
	t.Stages = []stage{s}
}

func (t *Trial) crowd(random *rand.Rand, turn int) {
	t.Standby = true
	for range 2 + random.IntN(2) {
		other := shape{Milliseconds: 10 + random.IntN(40)}
		if random.IntN(3) == 0 {
			other.FailAt = []string{"patch", "build", "restart"}[random.IntN(3)]
		}
		t.Others = append(t.Others, other)
	}
	turn %= len(crowdPoints) + 2
	if turn >= len(crowdPoints) {
		t.Stages = []stage{{After: time.Duration(random.IntN(600)) * time.Millisecond, Do: kill}}
		return
	}
	point, occurrence := crowdPoints[turn], 1
	if slices.ContainsFunc(places, func(p place) bool { return p.point == point }) {
		occurrence += random.IntN(4) // each worker reaches it often
	}
	t.Stages = []stage{{Point: point, Occurrence: occurrence, Do: kill}}
}

// stop makes the trial one that ends a worker during a command, in half of the
// trials while messages of other runs are parked.
func (t *Trial) stop(random *rand.Rand) {
	t.Shape.Milliseconds, t.Shape.FailAt = 300, ""
	step := []string{"patch", "build", "restart"}[random.IntN(3)]
	if random.IntN(2) == 0 {
		step = "build" // by then the messages of the others are parked
		t.Others = []shape{quick, quick}
	}
	t.Stages = []stage{{Point: faultpoint.CommandBefore, Step: step, Do: terminate}}
}

func (t *Trial) duplicate() {
	switch t.Variant {
	case "first twice", "follower twice":
		t.Standby, t.Shape.Milliseconds = true, 150
	case "rollback twice", "old rollback after a retry", "old chain after a retry":
		if t.Shape.FailAt == "" {
			t.Shape.FailAt = "restart"
		}
	case "stale rollback":
		t.Shape.FailAt = ""
	case retriedEarly:
		// The rollback must take longer than the new chain needs to reach its first
		// command, and a second worker must be idle.
		t.Standby, t.Shape = true, shape{FailAt: "build", Milliseconds: 1500}
	}
}

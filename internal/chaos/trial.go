package chaos

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

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
	// BrokerFault and DatabaseFault break the connection of the worker that
	// works, at a named point.
	BrokerFault   Kind = "broker-fault"
	DatabaseFault Kind = "database-fault"
	// Duplicate delivers messages twice: the first, a follower, the rollback,
	// a stale rollback of a run that is good or was retried. Or the run is
	// retried while its rollback runs.
	Duplicate Kind = "duplicate"
	// Poison kills every worker that starts a step, until it is given up.
	Poison Kind = "poison"
	// Partition cuts a worker off from both servers for longer than a
	// take-over needs, when a command of it has just ended, or begins and
	// would go on for all that time; by a reset, or without a word.
	Partition Kind = "partition"
	// Blackout cuts the only worker off from both servers, at a moment of a
	// step, for longer than a take-over would need if there were another one.
	// No command may run again.
	Blackout Kind = "blackout"
	// Crowd has several runs want one workspace, with two workers, one of
	// which is killed: where messages are parked and published again, or
	// anywhere.
	Crowd Kind = "crowd"
	// Stop ends the worker by SIGTERM in the middle of a command, while other
	// runs wait for the workspace or not.
	Stop Kind = "stop"
	// Lost has the broker lose a run's message, so that a worker ends the run,
	// and kills that worker.
	Lost Kind = "lost"
	// Foreign kills a worker and has a consumer that is no worker of this
	// program take the message, hold it for longer than the grace after which a
	// run is lost, and give it back.
	Foreign Kind = "foreign"
	// Restart stops or kills the broker or the database, or both, at a named
	// point, and starts them again a while later. It has servers of its own.
	Restart Kind = "restart"
	// Rollback makes runs fail in every way there is, in turn, and demands
	// that each is rolled back exactly once. It is carried out when asked for.
	Rollback Kind = "rollback"
	// Rush publishes many runs at once for one workspace with four workers,
	// and some for another workspace. It is carried out when asked for.
	Rush Kind = "rush"
	// Mixed publishes many runs at once for a fleet of Celery's workers in
	// Python and workers of this program on one queue, with steps longer than
	// the time after which a run is lost that nobody has. It is carried out when
	// asked for, and needs Python.
	Mixed Kind = "mixed"
)

// Kinds are all kinds, each as often as it has its turn in a campaign.
var Kinds = []Kind{
	KillAtPoint, KillAtPoint, KillAtRandom, BrokerFault, KillAtPoint, Duplicate, KillAtPoint, DatabaseFault,
	KillAtPoint, BrokerFault, KillAtPoint, BrokerFault, Stop, KillAtPoint, KillAtRandom, DatabaseFault, KillAtPoint, Duplicate,
	BrokerFault, KillAtPoint, BrokerFault, KillAtPoint, Poison, Crowd, KillAtPoint, Partition, KillAtPoint, Crowd, Lost, Restart, Blackout, Foreign,
}

// askedFor are the kinds that have no turn in a campaign: they show one promise
// each.
var askedFor = []Kind{Rollback, Rush, Mixed}

// retriedEarly is the variant of a duplicate whose run is retried while its
// rollback runs, as the API allows for one that has failed.
const retriedEarly = "retry while the rollback runs"

// A Trial is everything that a trial does, made from seed and number alone.
type Trial struct {
	Seed   uint64
	Number int
	Kind   Kind
	Shape  shape
	// Others are the shapes of further runs, published at the same time.
	Others []shape
	// Standby: a second worker is there all the time. Otherwise the killed one
	// is started again at once.
	Standby bool
	// Stages happen one after the other.
	Stages []stage
	// Variant of a duplicate, or of what else is done to a run from outside.
	Variant string
	// Case of a rollback.
	Case string
	// LostStep is the step that fails because its message, or the one of the
	// step before, is lost; "" if it is the rollback's that is lost, or none.
	LostStep string
}

// A stage is one thing that goes wrong.
type stage struct {
	// Point, Step, Command and Occurrence say at which moment; with After instead, at
	// that time after the last stage.
	Point      faultpoint.Point
	Step       string
	Occurrence int
	// Command is the number of the command that the moment is about, 0 for
	// whichever.
	Command int
	After   time.Duration
	// Do is what happens.
	Do action
	// Fault and For are those of a broken connection. For is also how long a
	// server stays away.
	Fault fault
	For   time.Duration
	// Abrupt: the server is killed, not stopped.
	Abrupt bool
	// Lose: when the worker is dead, the run's message is lost.
	Lose bool
	// Lend: when the worker is dead, a foreign consumer has the run's message
	// for a while.
	Lend bool
	// Alone: not before the worker knows that nobody else consumes its queue.
	Alone bool
}

// action is what happens at a stage.
type action string

// The actions.
const (
	kill          action = "kill"
	terminate     action = "terminate"
	breakBroker   action = "broker"
	breakDatabase action = "database"
	breakBoth     action = "both"
	// endSessions lets the database's administrator end all sessions of
	// workers: both workers lose their locks at the same moment.
	endSessions action = "end-sessions"
	// restartBroker, restartDatabase and restartBoth end the lane's own servers.
	restartBroker   action = "restart broker"
	restartDatabase action = "restart database"
	restartBoth     action = "restart both"
)

// holeLasts is a little longer than a worker of the harness needs to find out
// that nothing comes from its broker: one and a half of its heartbeats.
const holeLasts = brokerHeartbeat*3/2 + 1500*time.Millisecond

func (a action) restarts() bool {
	return a == restartBroker || a == restartDatabase || a == restartBoth
}

func (t Trial) String() string {
	var stages []string
	for _, s := range t.Stages {
		text := string(s.Do)
		if s.Lose {
			text += " and lose the message"
		}
		if s.Lend {
			text += " and lend the message"
		}
		if s.Fault != noFault {
			text += " " + string(s.Fault) + " " + s.For.String()
		}
		if s.Do.restarts() {
			text += map[bool]string{true: " (killed, away ", false: " (stopped, away "}[s.Abrupt] + s.For.String() + ")"
		}
		if s.Point != "" {
			text += " at " + s.place()
			if s.Occurrence > 1 {
				text += fmt.Sprintf(", time %d", s.Occurrence)
			}
		} else {
			text += " after " + s.After.String()
		}
		stages = append(stages, text)
	}
	if t.Variant == "" && t.Case != "" {
		stages = append([]string{t.Case}, stages...)
	}
	if t.Variant != "" {
		stages = append(stages, t.Variant)
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
	// before are stages that must come first for the program to get here.
	before []stage
	// failed: only a step that fails comes here.
	failed bool
	// takes is how long commands must take for the program to get here.
	takes time.Duration
}

// places lists where a worker can be killed.
var places = slices.Concat(
	at(everyStep, nil, false,
		faultpoint.ConsumerTook, faultpoint.DeliveryReceived, faultpoint.DeliveryDecoded, faultpoint.SlotTaken, faultpoint.TaskStarting,
		faultpoint.BeginBefore, faultpoint.BeginLocked, faultpoint.BeginWritten, faultpoint.BeginCommitted,
		faultpoint.StepDecided, faultpoint.StepBegun, faultpoint.ArtifactsOpened, faultpoint.StepWorked,
		faultpoint.FinishBefore, faultpoint.FinishLocked, faultpoint.FinishWritten, faultpoint.FinishCommitted, faultpoint.FinishAfter,
		faultpoint.TaskReturned, faultpoint.ResultBefore, faultpoint.ResultWritten, faultpoint.ResultCommitted, faultpoint.ResultStored,
		faultpoint.SettleBefore, faultpoint.SettleAfter),
	at([]string{"analyze", "patch", "build", "restart", "rollback"}, nil, false, faultpoint.ArtifactBefore, faultpoint.ArtifactWritten),
	at(withCommand, nil, false, aroundCommand...),
	// The same of each of several commands, and again of those that are left
	// after a crash.
	ofCommand(1, at(withSeveral, nil, false, aroundCommand...)),
	ofCommand(2, at(withSeveral, nil, false, aroundCommand...)),
	ofCommand(3, at(withSeveral, nil, false, aroundCommand...)),
	ofCommand(2, at(withSeveral, []stage{{Point: faultpoint.CommandRecorded, Command: 1, Do: kill}}, false, aroundCommand...)),
	ofCommand(2, at(withSeveral, []stage{{Point: faultpoint.CommandBefore, Command: 2, Do: kill}}, false, aroundCommand...)),
	ofCommand(3, at(withSeveral, []stage{{Point: faultpoint.CommandAfter, Command: 2, Do: kill}}, false, aroundCommand...)),
	// A chain goes on after all but its last step.
	at([]string{"analyze", "patch", "build", "restart"}, nil, false, faultpoint.PublishBefore, faultpoint.PublishSent, faultpoint.PublishConfirmed),
	// The error callback, and the results of links that will never run.
	at([]string{"patch", "build", "restart", "verify"}, nil, true, faultpoint.PublishBefore, faultpoint.PublishConfirmed),
	at([]string{"verify"}, nil, true, faultpoint.PublishSent),
	at([]string{"patch", "build", "restart", "verify"}, nil, true, faultpoint.ResultBefore, faultpoint.ResultStored, faultpoint.LaterBefore, faultpoint.LaterStored),
	// What is only done after a first crash.
	at(everyStep, []stage{{Point: faultpoint.FinishAfter, Do: kill}}, false, faultpoint.StepAnswered),
	at(everyStep, []stage{{Point: faultpoint.StepBegun, Do: kill}}, false, faultpoint.HolderSuspected, faultpoint.BeginCommitted),
	at([]string{"patch", "build", "restart", "rollback"}, []stage{{Point: faultpoint.CommandBefore, Do: kill}}, false, faultpoint.CommandAfter, faultpoint.StepWorked),
	at(everyStep, []stage{{Point: faultpoint.FinishAfter, Do: kill}}, false, faultpoint.SettleBefore),
	// Where a redelivery joins the step that still runs, and where a step that
	// is cut short is handed back.
	taking(1500*time.Millisecond, at(withCommand, []stage{{Point: faultpoint.CommandBefore, Do: breakBroker, Fault: reset, For: 50 * time.Millisecond}}, false,
		faultpoint.TaskAttached)),
	taking(4*time.Second, at(withCommand, []stage{{Point: faultpoint.CommandBefore, Do: terminate}}, false,
		faultpoint.ReleaseBefore, faultpoint.ReleaseAfter)),
)

// crowdPoints are where a crowd's worker is killed, in whatever step it is.
var crowdPoints = []faultpoint.Point{
	faultpoint.ParkedTaken, faultpoint.ParkedPublished, faultpoint.ParkWritten, faultpoint.ParkCommitted, faultpoint.StepDecided, faultpoint.BeginLocked,
	faultpoint.FinishCommitted, faultpoint.SettleBefore,
}

// leftOut are the other points, those of some steps or, with none named, of
// all, and why there is no kill that is meant for them.
var leftOut = []struct {
	points []faultpoint.Point
	steps  []string
	why    string
}{
	{[]faultpoint.Point{faultpoint.ConnectionLost, faultpoint.ConnectionRestored, faultpoint.SessionLost, faultpoint.SessionEstablished}, nil,
		"they are of no step; they tell how a worker recovers"},
	{[]faultpoint.Point{faultpoint.OtherConsumersKnown}, nil, "the question is asked beside the work: a short step may be over before the answer"},
	{[]faultpoint.Point{faultpoint.Isolated}, nil, "needs both servers to be silent: kind partition"},
	{[]faultpoint.Point{faultpoint.DeliveryDropped}, nil, "needs a connection that is lost between two lines, and nothing is in hand any more"},
	{[]faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded}, []string{"analyze", "verify"}, "these steps have no command"},
	{[]faultpoint.Point{faultpoint.ArtifactBefore, faultpoint.ArtifactWritten}, []string{"verify"}, "its log is written in one go"},
	{[]faultpoint.Point{faultpoint.PublishBefore, faultpoint.PublishSent, faultpoint.PublishConfirmed}, []string{"rollback"}, "nothing follows it"},
	{[]faultpoint.Point{faultpoint.LaterBefore, faultpoint.LaterStored}, []string{"analyze", "rollback"}, "no plan lets these steps fail"},
	{[]faultpoint.Point{faultpoint.TaskAttached, faultpoint.ReleaseBefore, faultpoint.ReleaseAfter}, []string{"analyze", "verify"},
		"without a command they are over before a redelivery comes, or a stopping worker hands them back"},
	{[]faultpoint.Point{faultpoint.ParkWritten, faultpoint.ParkCommitted, faultpoint.ParkedTaken, faultpoint.ParkedPublished}, nil,
		"which step comes by depends on which run is first: a crowd's worker is killed in whatever step it is"},
	{[]faultpoint.Point{faultpoint.LostBefore, faultpoint.LostFailed}, nil, "they are of a run: kind lost"},
}

var (
	withCommand = []string{"patch", "build", "restart", "rollback"}
	// withSeveral are the steps that can have several commands.
	withSeveral   = []string{"patch", "rollback"}
	aroundCommand = []faultpoint.Point{faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded}
)

// ofCommand is the places, about one command of several.
func ofCommand(number int, places []place) []place {
	for i := range places {
		places[i].command = number
	}
	return places
}

// stage is what happens there.
func (p place) stage(do action) stage {
	return stage{Point: p.point, Step: p.step, Command: p.command, Do: do}
}

// place is the stage's in reports.
func (s stage) place() string {
	name := string(s.Point)
	if s.Step != "" {
		name += " of " + s.Step
	}
	if s.Command > 0 {
		name += fmt.Sprintf(" command %d", s.Command)
	}
	return name
}

// taking is the places with commands that take so long.
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

// New makes a trial from its seed and number. kinds are those of the campaign,
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
		p := t.somewhere(random)
		if t.Kind == DatabaseFault && random.IntN(4) == 0 {
			t.Stages = []stage{p.stage(endSessions)}
			break
		}
		t.Stages = []stage{p.stage(do)}
		t.Stages[0].Fault, t.Stages[0].For = faults[random.IntN(len(faults))], time.Duration(20+random.IntN(2000))*time.Millisecond
		if random.IntN(12) == 0 {
			// Long enough for heartbeats, or questions to the database, to find
			// out.
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
		t.lose(random, turnOf(number, kinds))
	case Foreign:
		t.lend(random)
	case Stop:
		t.stop(random)
	}
	return t
}

// turnOf is how many trials of the same kind come before the trial.
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

// killAtPoint takes the places in an order that the seed gives, so that a
// campaign comes by all of them before it comes by one twice.
func (t *Trial) killAtPoint(random *rand.Rand, turn int) {
	order := rand.New(rand.NewPCG(t.Seed, 0)).Perm(len(places))
	p := places[order[turn%len(order)]]
	t.fit(p, random)
	if p.takes > 0 {
		// The same worker, without another that the message might go to.
		t.Standby, t.Shape.Milliseconds, t.Shape.Several = false, int(p.takes.Milliseconds()), false
	}
	t.Stages = append(slices.Clone(p.before), p.stage(kill))
}

// somewhere draws a place that needs no crash before it.
func (t *Trial) somewhere(random *rand.Rand) place {
	for {
		p := places[random.IntN(len(places))]
		if len(p.before) == 0 {
			t.fit(p, random)
			return p
		}
	}
}

// fit gives the run a shape that comes by the place.
func (t *Trial) fit(p place, random *rand.Rand) {
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
	// The next command is long enough to be caught beside another.
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

// blackout makes the trial one that takes both servers from the only worker, as
// the stage says, for 2 to 8 s.
func (t *Trial) blackout(random *rand.Rand, s stage) {
	s.Point = []faultpoint.Point{
		faultpoint.CommandBefore, faultpoint.CommandBefore, faultpoint.CommandAfter, faultpoint.CommandRecorded,
		faultpoint.FinishBefore, faultpoint.FinishWritten, faultpoint.FinishCommitted, faultpoint.PublishBefore,
	}[random.IntN(8)]
	s.Step = []string{"patch", "build", "restart"}[random.IntN(3)]
	// It asks as soon as a step begins, and a step that is short may have come
	// to its end, where nothing is left to be killed.
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
		occurrence += random.IntN(4) // each worker comes by often
	}
	t.Stages = []stage{{Point: point, Occurrence: occurrence, Do: kill}}
}

// stop ends a worker in the middle of a command. Half of them leave messages of
// other runs that wait for the workspace.
func (t *Trial) stop(random *rand.Rand) {
	t.Shape.Milliseconds, t.Shape.FailAt = 300, ""
	step := []string{"patch", "build", "restart"}[random.IntN(3)]
	if random.IntN(2) == 0 {
		step = "build" // by then the others' messages have had their turn
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
		// A rollback that takes longer than the new chain needs to come to its
		// first command, and a worker that has nothing else to do.
		t.Standby, t.Shape = true, shape{FailAt: "build", Milliseconds: 1500}
	}
}

package chaos

import (
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// The tasks of the Spec workflow chain.
const (
	discover = "discover_next_phase"
	submit   = "submit_codex_job"
	publish  = "apply_and_publish"
)

// isSpec says that trials of the kind run the Spec workflow chain.
func (k Kind) isSpec() bool {
	switch k {
	case Spec, SpecCloud, SpecRetry, SpecGitHub, SpecTwice, SpecRestart:
		return true
	}
	return false
}

// How the chain has Codex do a task, and publishes it.
const (
	// simulated is MoonMind's test mode.
	simulated = "simulated"
	// playedCodex has a stand-in of the program codex, which prints what the real one has
	// printed, and a git server and a GitHub on loopback.
	playedCodex = "a stand-in of codex"
	// realCodex has the real program, which speaks to a stand-in of the model.
	realCodex = "the real codex"
	// cloudCodex has a stand-in of the client program of Codex Cloud, and of that.
	cloudCodex = "codex cloud"
)

// codexPrints is how many lines the output of codex has.
const codexPrints = 10

// specPlace is a place with what the trial needs to reach it.
type specPlace struct {
	place
	// codex says that test mode does not reach it.
	codex bool
}

// specPlaces are where trials of kind Spec kill a worker.
var specPlaces = func() (all []specPlace) {
	add := func(codex bool, places ...place) {
		for _, p := range places {
			all = append(all, specPlace{p, codex})
		}
	}
	tasks := moonmind.SpecTasks
	add(false, at(tasks, nil, false, aroundTask...)...)
	add(false, at([]string{discover, submit}, nil, false, faultpoint.PublishBefore, faultpoint.PublishSent, faultpoint.PublishConfirmed)...)
	// Test mode writes twice while it publishes.
	add(false, timed(2, at([]string{publish}, nil, false, specWrites...))...)
	// Points that are only reached after a first kill.
	add(false, at(tasks, []stage{{Point: faultpoint.FinishAfter, Do: kill}}, false, faultpoint.StepAnswered, faultpoint.SettleBefore)...)
	add(false, at(tasks, []stage{{Point: faultpoint.StepBegun, Do: kill}}, false, faultpoint.HolderSuspected, faultpoint.BeginCommitted)...)

	// The clone, and the program.
	add(true, at([]string{submit}, nil, false, faultpoint.CodexCloneBefore, faultpoint.CodexCloned, faultpoint.CodexStarting,
		faultpoint.CodexExited, faultpoint.CodexStored, faultpoint.CodexRecorded)...)
	for part := 1; part <= codexPrints; part++ {
		add(true, ofCommand(part, at([]string{submit}, nil, false, faultpoint.CodexPrinted))...)
	}
	for time := 2; time <= 4; time++ {
		add(true, timed(time, at([]string{submit}, nil, false, specWrites...))...)
	}
	add(true, at([]string{submit}, []stage{{Point: faultpoint.CodexPrinted, Command: 3, Do: kill}}, false, faultpoint.CodexPrinted, faultpoint.CodexExited)...)
	add(true, at([]string{submit}, []stage{{Point: faultpoint.CodexRecorded, Do: kill}}, false, faultpoint.StepBegun, faultpoint.StepWorked)...)

	// The branch, and the pull request.
	add(true, at([]string{publish}, nil, false, publishPoints...)...)
	for time := 3; time <= 5; time++ {
		add(true, timed(time, at([]string{publish}, nil, false, specWrites...))...)
	}
	add(true, at([]string{publish}, []stage{{Point: faultpoint.PublishPushedBranch, Do: kill}}, false, faultpoint.PublishFetched, faultpoint.PublishPushRecorded)...)
	add(true, at([]string{publish}, []stage{{Point: faultpoint.PublishOpened, Do: kill}}, false, faultpoint.PublishOpening, faultpoint.PublishOpened)...)
	return all
}()

// cloudPlaces are where trials of kind SpecCloud kill a worker.
var cloudPlaces = func() (all []specPlace) {
	add := func(places ...place) {
		for _, p := range places {
			all = append(all, specPlace{p, true})
		}
	}
	in := []string{submit}
	add(at(in, nil, false, aroundTask...)...)
	add(at(in, nil, false, cloudPoints...)...)
	for state := 1; state <= cloudStates; state++ {
		add(ofCommand(state, at(in, nil, false, faultpoint.CodexPrinted))...)
	}
	for time := 2; time <= 5; time++ {
		add(timed(time, at(in, nil, false, specWrites...))...)
	}
	add(at(in, []stage{{Point: faultpoint.CodexStarting, Do: kill}}, false, faultpoint.CodexStarting, faultpoint.CodexSubmitted)...)
	add(at(in, []stage{{Point: faultpoint.CodexSubmitted, Do: kill}}, false, faultpoint.CodexSubmitted, faultpoint.CodexExited)...)
	add(at(in, []stage{{CodexHeld: true, Do: kill}}, false, faultpoint.CodexSubmitted, faultpoint.CodexRecorded)...)
	add(at(in, []stage{{Point: faultpoint.CodexRecorded, Do: kill}}, false, faultpoint.StepBegun, faultpoint.StepWorked)...)
	return all
}()

// aroundTask are the points that every task of the chain reaches.
var aroundTask = []faultpoint.Point{
	faultpoint.ConsumerTook, faultpoint.DeliveryReceived, faultpoint.DeliveryDecoded, faultpoint.SlotTaken, faultpoint.TaskStarting,
	faultpoint.BeginBefore, faultpoint.BeginLocked, faultpoint.BeginWritten, faultpoint.BeginCommitted, faultpoint.StepDecided, faultpoint.StepBegun,
	faultpoint.SpecWriteBefore, faultpoint.SpecWriteWritten, faultpoint.SpecWriteCommitted, faultpoint.StepWorked, faultpoint.FinishAfter,
	faultpoint.TaskReturned, faultpoint.ResultBefore, faultpoint.ResultWritten, faultpoint.ResultCommitted, faultpoint.ResultStored,
	faultpoint.SettleBefore, faultpoint.SettleAfter,
}

var specWrites = []faultpoint.Point{faultpoint.SpecWriteBefore, faultpoint.SpecWriteWritten, faultpoint.SpecWriteCommitted}

var (
	codexPoints = []faultpoint.Point{
		faultpoint.CodexCloneBefore, faultpoint.CodexCloned, faultpoint.CodexStarting, faultpoint.CodexPrinted,
		faultpoint.CodexExited, faultpoint.CodexStored, faultpoint.CodexRecorded,
	}
	// cloudPoints are those that the backend cloud reaches.
	cloudPoints = []faultpoint.Point{
		faultpoint.CodexStarting, faultpoint.CodexSubmitted, faultpoint.CodexExited, faultpoint.CodexStored, faultpoint.CodexRecorded,
	}
	publishPoints = []faultpoint.Point{
		faultpoint.PublishFetching, faultpoint.PublishFetched, faultpoint.PublishCommitRecorded, faultpoint.PublishPushing, faultpoint.PublishPushedBranch,
		faultpoint.PublishPushRecorded, faultpoint.PublishOpening, faultpoint.PublishOpened, faultpoint.PublishOpenRecorded,
	}
	// whileWorking are points of a task that is carried out.
	whileWorking = map[string][]faultpoint.Point{
		discover: {faultpoint.StepBegun, faultpoint.StepWorked, faultpoint.FinishAfter},
		submit:   {faultpoint.StepBegun, faultpoint.CodexCloned, faultpoint.CodexPrinted, faultpoint.CodexExited, faultpoint.CodexRecorded, faultpoint.StepWorked, faultpoint.FinishAfter},
		publish: {
			faultpoint.StepBegun, faultpoint.PublishFetched, faultpoint.PublishCommitRecorded, faultpoint.PublishPushedBranch, faultpoint.PublishPushRecorded,
			faultpoint.PublishOpened, faultpoint.StepWorked, faultpoint.FinishAfter,
		},
	}
)

// specOnly are the points that only tasks of the Spec workflow reach.
func specOnly() (all []faultpoint.Point) {
	all = slices.Concat(specWrites, codexPoints, cloudPoints, publishPoints)
	slices.Sort(all)
	return slices.Compact(all)
}

// timed returns the places for a later time that the worker reaches the point.
func timed(time int, places []place) []place {
	for i := range places {
		places[i].occurrence = time
	}
	return places
}

// specRound is how many trials of the kinds Spec and SpecCloud have all sorts of faults.
// specKills of them kill a worker at a place.
const specRound, specKills = 8, 5

// specTrials is how many trials of these kinds have each place and each fault, 0 if not
// all are kinds of the Spec workflow.
func specTrials(kinds []Kind) int {
	most := 0
	for _, k := range kinds {
		n := 0
		switch k {
		case Spec:
			n = (len(specPlaces)*specRound + specKills - 1) / specKills
		case SpecCloud:
			n = (len(cloudPlaces)*specRound + specKills - 1) / specKills
		case SpecRetry:
			n = len(specFailures) * 8
		case SpecGitHub:
			n = len(serviceFaults) * 2
		case SpecTwice:
			n = 36
		case SpecRestart:
			n = 24
		default:
			return 0
		}
		most = max(most, n*len(kinds))
	}
	return most
}

// The variants of the Spec workflow: when a message comes a second time.
const (
	twiceAtOnce = "the first message twice"
	twiceLater  = "the first message again while the next task runs"
	twiceAtEnd  = "the first message again at the end"
	// Of SpecTwice, with the name of the task.
	taskAtOnce = "at once twice the message of"
	taskAtEnd  = "at the end again the message of"
)

// spec makes the trial one of the Spec workflow chain.
func (t *Trial) spec(random *rand.Rand, turn int) {
	t.Shape = shape{}
	t.Case = playedCodex
	// The real program mostly: only where it can be had, the stand-in takes its place in
	// the same trial.
	if random.IntN(5) > 0 && os.Getenv(devenv.EnvCodex) != "" {
		t.Case = realCodex
	}
	switch t.Kind {
	case Spec:
		testMode := random.IntN(5) == 0
		t.specFaults(random, turn, specPlaces)
		needsCodex := slices.ContainsFunc(t.Stages, func(s stage) bool {
			return slices.ContainsFunc(specPlaces, func(p specPlace) bool { return p.codex && p.stage(s.Do).place() == s.place() })
		})
		if testMode && !needsCodex {
			t.Case = simulated
		}
	case SpecCloud:
		t.Case = cloudCodex
		t.specFaults(random, turn, cloudPlaces)
		t.Service = []string{"", "", cloudLost, cloudLong}[random.IntN(4)]
	case SpecRetry:
		t.retried(random, turn)
	case SpecGitHub:
		order := rand.New(rand.NewPCG(t.Seed, 4)).Perm(len(serviceFaults))
		fault := serviceFaults[order[turn%len(order)]]
		t.Service = fault.name
		if random.IntN(6) > 0 {
			points := fault.points
			t.Stages = []stage{{Point: points[random.IntN(len(points))], Step: fault.task, Do: kill}}
		}
		if random.IntN(6) == 0 && len(t.Stages) > 0 {
			t.Stages[0] = t.Stages[0].cut(random)
		}
	case SpecTwice:
		t.twice(random, turn)
	case SpecRestart:
		t.restarted(random)
	}
}

// specFaults draws the faults of a trial of the kinds Spec and SpecCloud.
func (t *Trial) specFaults(random *rand.Rand, turn int, places []specPlace) {
	anywhere := func() stage {
		for {
			if p := places[random.IntN(len(places))]; len(p.before) == 0 {
				return p.stage(kill)
			}
		}
	}
	switch of := turn % specRound; of {
	default: // a kill at a place
		order := rand.New(rand.NewPCG(t.Seed, 2)).Perm(len(places))
		p := places[order[(turn/specRound*specKills+of)%len(order)]]
		t.Stages = append(slices.Clone(p.before), p.stage(kill))
	case 5, 6:
		t.Stages = []stage{anywhere().cut(random)}
	case 7:
		switch random.IntN(5) {
		case 0:
			t.Stages = []stage{{After: time.Duration(random.IntN(3000)) * time.Millisecond, Do: kill}}
		case 1:
			s := anywhere()
			s.Do = terminate
			t.Stages = []stage{s}
		case 2:
			t.Stages = []stage{{CodexHeld: true, Do: kill}}
		default:
			t.Variant = []string{twiceAtOnce, twiceLater, twiceAtEnd}[random.IntN(3)]
			t.Standby = true
		}
	}
}

// cut makes the stage one that breaks the connections of the worker.
func (s stage) cut(random *rand.Rand) stage {
	s.Do = []action{breakBroker, breakDatabase}[random.IntN(2)]
	faults := []fault{reset, stall, deaf, mute, slow, pause}
	s.Fault, s.For = faults[random.IntN(len(faults))], time.Duration(20+random.IntN(2000))*time.Millisecond
	if s.Do == breakDatabase && random.IntN(4) == 0 {
		s.Do, s.Fault, s.For = endSessions, noFault, 0
	}
	return s
}

// twice makes the trial one in which the message of a task comes twice: at once, while a
// worker is at the task, or at the end of the run. After half of those in the middle the
// worker at the task is killed.
func (t *Trial) twice(random *rand.Rand, turn int) {
	t.Standby = true
	t.Twice = moonmind.SpecTasks[turn%3]
	switch turn / 3 % 4 {
	case 0:
		t.Variant = taskAtOnce
	case 1, 2:
		points := whileWorking[t.Twice]
		first := random.IntN(len(points))
		t.Stages = []stage{{Point: points[first], Step: t.Twice, Do: publishAgain}}
		if later := points[first+1:]; len(later) > 0 && random.IntN(2) == 0 {
			t.Stages = append(t.Stages, stage{Point: later[random.IntN(len(later))], Step: t.Twice, Do: kill})
		}
		t.Twice = ""
	case 3:
		t.Variant = taskAtEnd
	}
}

// restarted makes the trial one in which servers restart while a task is carried out.
// After a third of those, a worker is killed.
func (t *Trial) restarted(random *rand.Rand) {
	task := moonmind.SpecTasks[random.IntN(3)]
	draw := func() faultpoint.Point { return whileWorking[task][random.IntN(len(whileWorking[task]))] }
	t.Stages = []stage{{
		Point: draw(), Step: task, Do: []action{restartBroker, restartDatabase, restartBoth}[random.IntN(3)],
		Abrupt: random.IntN(2) == 0, For: time.Duration(random.IntN(4000)) * time.Millisecond,
	}}
	if task != publish && random.IntN(3) == 0 {
		task = publish
		t.Stages = append(t.Stages, stage{Point: draw(), Step: task, Do: kill})
	}
}

// retried makes the trial one whose first attempt fails, and whose retry is disturbed; in
// a third of them the first attempt is disturbed as well.
func (t *Trial) retried(random *rand.Rand, turn int) {
	f := specFailures[turn%len(specFailures)]
	t.Failure = f.name
	if random.IntN(3) == 0 {
		// Its outcome is recorded: the failure must not be forgotten.
		points := []faultpoint.Point{faultpoint.FinishAfter, faultpoint.TaskReturned, faultpoint.ResultCommitted, faultpoint.SettleBefore}
		t.Stages = append(t.Stages, stage{Point: points[random.IntN(len(points))], Step: f.task, Do: kill})
	}
	t.Stages = append(t.Stages, stage{Do: retryFailed})
	of := moonmind.SpecTasks[slices.Index(moonmind.SpecTasks, f.from):]
	task := of[random.IntN(len(of))]
	points := append([]faultpoint.Point{faultpoint.StepDecided, faultpoint.SpecWriteCommitted}, whileWorking[task]...)
	s := stage{Point: points[random.IntN(len(points))], Step: task, Do: kill}
	if random.IntN(5) == 0 {
		s = s.cut(random)
	}
	t.Stages = append(t.Stages, s)
}

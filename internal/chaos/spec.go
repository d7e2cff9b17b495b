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

// The cases of kind Spec: how the chain has Codex do a task, and publishes it.
const (
	// simulated is MoonMind's test mode.
	simulated = "simulated"
	// playedCodex has a stand-in of the program codex, which prints what the real one has
	// printed, and a git server and a GitHub on loopback.
	playedCodex = "a stand-in of codex"
	// realCodex has the real program, which speaks to a stand-in of the model.
	realCodex = "the real codex"
)

// codexPrints is how many parts the output of the stand-in of codex has.
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
	add(false, at(tasks, nil, false,
		faultpoint.ConsumerTook, faultpoint.DeliveryReceived, faultpoint.DeliveryDecoded, faultpoint.SlotTaken, faultpoint.TaskStarting,
		faultpoint.BeginBefore, faultpoint.BeginLocked, faultpoint.BeginWritten, faultpoint.BeginCommitted, faultpoint.StepDecided, faultpoint.StepBegun,
		faultpoint.SpecWriteBefore, faultpoint.SpecWriteWritten, faultpoint.SpecWriteCommitted, faultpoint.StepWorked, faultpoint.FinishAfter,
		faultpoint.TaskReturned, faultpoint.ResultBefore, faultpoint.ResultWritten, faultpoint.ResultCommitted, faultpoint.ResultStored,
		faultpoint.SettleBefore, faultpoint.SettleAfter)...)
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

var specWrites = []faultpoint.Point{faultpoint.SpecWriteBefore, faultpoint.SpecWriteWritten, faultpoint.SpecWriteCommitted}

// timed returns the places for a later time that the worker reaches the point.
func timed(time int, places []place) []place {
	for i := range places {
		places[i].occurrence = time
	}
	return places
}

// specRound is how many trials of kind Spec have all sorts of faults. specKills of them
// kill a worker at a place.
const specRound, specKills = 8, 5

// specTrials is how many trials of kind Spec reach every place.
func specTrials() int { return (len(specPlaces)*specRound + specKills - 1) / specKills }

// The variants of kind Spec: when the first message of the chain comes a second time.
const (
	twiceAtOnce = "the first message twice"
	twiceLater  = "the first message again while the next task runs"
	twiceAtEnd  = "the first message again at the end"
)

// spec makes the trial one of the Spec workflow chain.
func (t *Trial) spec(random *rand.Rand, turn int) {
	t.Shape = shape{}
	t.Case = simulated
	if random.IntN(3) > 0 {
		t.Case = playedCodex
	}
	in := func(p specPlace) stage {
		if p.codex && t.Case == simulated {
			t.Case = playedCodex
		}
		return p.stage(kill)
	}
	anywhere := func() stage {
		for {
			if p := specPlaces[random.IntN(len(specPlaces))]; len(p.before) == 0 {
				return in(p)
			}
		}
	}
	switch of := turn % specRound; of {
	default: // a kill at a place
		order := rand.New(rand.NewPCG(t.Seed, 2)).Perm(len(specPlaces))
		p := specPlaces[order[(turn/specRound*specKills+of)%len(order)]]
		t.Stages = append(slices.Clone(p.before), in(p))
	case 5, 6:
		s := anywhere()
		s.Do = []action{breakBroker, breakDatabase}[of-5]
		faults := []fault{reset, stall, deaf, mute, slow, pause}
		s.Fault, s.For = faults[random.IntN(len(faults))], time.Duration(20+random.IntN(2000))*time.Millisecond
		if s.Do == breakDatabase && random.IntN(4) == 0 {
			s.Do, s.Fault, s.For = endSessions, noFault, 0
		}
		t.Stages = []stage{s}
	case 7:
		switch random.IntN(4) {
		case 0:
			t.Stages = []stage{{After: time.Duration(random.IntN(1500)) * time.Millisecond, Do: kill}}
		case 1:
			s := anywhere()
			s.Do = terminate
			t.Stages = []stage{s}
		default:
			t.Variant = []string{twiceAtOnce, twiceLater, twiceAtEnd}[random.IntN(3)]
			t.Standby = true
		}
	}
	// Without the real program, the stand-in takes its place in the same trial.
	if t.Case == playedCodex && random.IntN(8) == 0 && os.Getenv(devenv.EnvCodex) != "" && !t.countsPrints() {
		t.Case = realCodex
	}
}

// countsPrints says that the trial needs the stand-in's output.
func (t *Trial) countsPrints() bool {
	return slices.ContainsFunc(t.Stages, func(s stage) bool { return s.Point == faultpoint.CodexPrinted && s.Command > 4 })
}

// specOnly are the points that only tasks of the Spec workflow reach.
func specOnly() []faultpoint.Point {
	return slices.Concat(specWrites, codexPoints, cloudPoints, publishPoints)
}

var (
	codexPoints = []faultpoint.Point{
		faultpoint.CodexCloneBefore, faultpoint.CodexCloned, faultpoint.CodexStarting, faultpoint.CodexPrinted,
		faultpoint.CodexExited, faultpoint.CodexStored, faultpoint.CodexRecorded,
	}
	// cloudPoints are those of Codex Cloud, of which no trial has a stand-in.
	cloudPoints   = []faultpoint.Point{faultpoint.CodexSubmitted}
	publishPoints = []faultpoint.Point{
		faultpoint.PublishFetching, faultpoint.PublishFetched, faultpoint.PublishCommitRecorded, faultpoint.PublishPushing, faultpoint.PublishPushedBranch,
		faultpoint.PublishPushRecorded, faultpoint.PublishOpening, faultpoint.PublishOpened, faultpoint.PublishOpenRecorded,
	}
)

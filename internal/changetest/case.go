package changetest

import (
	"fmt"
	"math/rand/v2"
)

// A Fault is what makes a run fail in a step.
type Fault string

// The faults.
const (
	CommandError Fault = "error" // the command fails
	WorkerKilled Fault = "kill"  // the worker is killed, and later the run fails
	KilledThrice Fault = "killed three times"
	TimeLimit    Fault = "time limit"  // the step takes longer than the plan allows
	BadImage     Fault = "bad image"   // the image cannot be built, does not start, or its service ends
	Unhealthy    Fault = "unhealthy"   // the service runs and is not healthy
	Violation    Fault = "violation"   // the step alters what the allow-list does not have
	LeftBehind   Fault = "left behind" // a process that the step has left behind alters it later
)

// faults has every step with what can fail in it.
var faults = []struct {
	step  string
	fault Fault
}{
	{"analyze", WorkerKilled},
	{"patch", CommandError}, {"patch", WorkerKilled}, {"patch", KilledThrice}, {"patch", TimeLimit}, {"patch", Violation},
	{"build", CommandError}, {"build", WorkerKilled}, {"build", TimeLimit}, {"build", BadImage}, {"build", Violation},
	{"restart", CommandError}, {"restart", WorkerKilled}, {"restart", TimeLimit}, {"restart", BadImage}, {"restart", Violation},
	{"verify", CommandError}, {"verify", WorkerKilled}, {"verify", TimeLimit}, {"verify", BadImage}, {"verify", Unhealthy}, {"verify", LeftBehind},
}

// A Disturbance is what else goes wrong, before the rollback or in it.
type Disturbance string

// The disturbances.
const (
	Nothing Disturbance = "nothing"
	// Pruned: docker image prune --all, of the images that are this project's. In
	// half of the cases stopped containers are removed as well, as docker system
	// prune does, and the worker saves images to disk.
	Pruned      Disturbance = "pruned"
	BaseGone    Disturbance = "base gone"    // the image that others are built FROM has lost its name
	NoNetwork   Disturbance = "no network"   // what builds download cannot be had
	RollbackCut Disturbance = "killed again" // the worker is killed in the rollback, once or twice
)

// Disturbances are all.
var Disturbances = []Disturbance{Nothing, Pruned, BaseGone, NoNetwork, RollbackCut}

// A Case is one run that fails. Seed and number alone define it.
type Case struct {
	Seed        uint64
	Number      int
	Step        string
	Fault       Fault
	Workspace   WorkspaceKind
	Disturbance Disturbance
}

// Cases is how many there are: every step with every fault, in every workspace, with
// every disturbance. A number beyond begins the table again, with other random
// numbers.
var Cases = len(faults) * len(WorkspaceKinds) * len(Disturbances)

// NewCase returns a case. Consecutive numbers differ in every respect, so that a few
// of them are a fair choice.
func NewCase(seed uint64, number int) Case {
	c := Case{Seed: seed, Number: number}
	n := number % Cases
	f, round := n%len(faults), n/len(faults)
	c.Step, c.Fault = faults[f].step, faults[f].fault
	kinds := len(WorkspaceKinds)
	c.Workspace = WorkspaceKinds[(f+round)%kinds]
	c.Disturbance = Disturbances[(f+f/kinds+round/kinds+2*(round%kinds))%len(Disturbances)]
	return c
}

// prunesContainers says that the containers that keep images are pruned as well.
func (c Case) prunesContainers() bool {
	return c.Disturbance == Pruned && (c.Number%len(faults)+c.Number/len(faults))%2 == 1
}

func (c Case) random() *rand.Rand { return rand.New(rand.NewPCG(c.Seed, uint64(c.Number))) }

func (c Case) String() string {
	return fmt.Sprintf("case %d: %s fails by %s; workspace: %s; and: %s", c.Number, c.Step, c.Fault, c.Workspace, c.Disturbance)
}

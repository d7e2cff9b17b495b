package chaos

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/defects"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// A defectProof is a defect and the trials that must find it.
type defectProof struct {
	// defect is the name of one of package defects.
	defect string
	trials []Trial
}

// quick is a shape whose trial is short.
var quick = shape{Milliseconds: 20}

func killedAt(point faultpoint.Point, step string, s shape) Trial {
	return Trial{Kind: KillAtPoint, Shape: s, Stages: []stage{{Point: point, Step: step, Do: kill}}}
}

func failing(step string) shape { return shape{FailAt: step, Milliseconds: 20} }

// proofs has one trial or two for every defect, each of which must find it. The
// trials are like those of campaigns.
var proofs = []defectProof{
	{"ack-before-settle", []Trial{killedAt(faultpoint.PublishBefore, "patch", quick)}},
	{"publish-after-result", []Trial{killedAt(faultpoint.PublishBefore, "build", quick)}},
	{"publish-unconfirmed", []Trial{{Kind: BrokerFault, Shape: quick, Stages: []stage{
		{Point: faultpoint.PublishBefore, Step: "build", Do: breakBroker, Fault: mute, For: 1500 * time.Millisecond}}}}},
	{"publish-twice", []Trial{{Kind: Duplicate, Shape: quick}}},
	{"errback-lost", []Trial{killedAt(faultpoint.PublishBefore, "build", failing("build"))}},
	{"finish-unfenced", []Trial{{Kind: Partition, Standby: true, Shape: shape{Milliseconds: 3000}, Stages: []stage{
		{Point: faultpoint.CommandAfter, Step: "build", Do: breakBoth, Fault: reset, For: 6500 * time.Millisecond}}}}},
	{"isolation-ignored", []Trial{{Kind: Partition, Standby: true, Shape: shape{Milliseconds: 5000}, Stages: []stage{
		{Point: faultpoint.CommandBefore, Step: "build", Do: breakBoth, Fault: reset, For: 6500 * time.Millisecond}}}}},
	{"never-alone", []Trial{{Kind: Blackout, Shape: shape{Milliseconds: 3000}, Stages: []stage{
		{Point: faultpoint.CommandBefore, Step: "build", Do: breakBoth, Fault: reset, For: 4 * time.Second, Alone: true}}}}},
	{"outcome-forgotten", []Trial{killedAt(faultpoint.FinishAfter, "build", failing("build"))}},
	{"begin-unclaimed", []Trial{{Kind: Duplicate, Standby: true, Variant: "follower twice", Shape: shape{Milliseconds: 400}}}},
	{"claim-stolen", []Trial{{Kind: Duplicate, Standby: true, Variant: "follower twice", Shape: shape{Milliseconds: 400}}}},
	{"claim-kept", []Trial{killedAt(faultpoint.CommandBefore, "build", quick)}},
	{"progress-ignored", []Trial{
		killedAt(faultpoint.CommandRecorded, "build", quick),
		{Kind: KillAtPoint, Shape: shape{Milliseconds: 20, Several: true}, Stages: []stage{{Point: faultpoint.CommandBefore, Step: "patch", Command: 2, Do: kill}}},
	}},
	{"starts-uncounted", []Trial{{Kind: Poison, Shape: quick, Stages: []stage{
		{Point: faultpoint.StepBegun, Step: "build", Do: kill}, {Point: faultpoint.StepBegun, Step: "build", Do: kill}, {Point: faultpoint.StepBegun, Step: "build", Do: kill}}}}},
	{"rollback-unchecked", []Trial{{Kind: Duplicate, Variant: "stale rollback", Shape: quick}}},
	{"artifacts-inserted", []Trial{{Kind: Duplicate, Variant: "old rollback after a retry", Shape: failing("restart")}}},
	{"other-steps-ignored", []Trial{{Kind: Duplicate, Variant: retriedEarly, Standby: true, Shape: shape{FailAt: "build", Milliseconds: 1500}}}},
	{"hold-ignored", []Trial{{Kind: Crowd, Standby: true, Shape: quick, Others: []shape{quick, quick}}}},
	{"hold-kept", []Trial{{Kind: Crowd, Standby: true, Shape: quick, Others: []shape{quick}}}},
	{"park-unstored", []Trial{{Kind: Crowd, Standby: true, Shape: quick, Others: []shape{quick}}}},
	{"parked-not-returned", []Trial{{Kind: Stop, Shape: shape{Milliseconds: 300}, Others: []shape{quick, quick}, Stages: []stage{
		{Point: faultpoint.CommandBefore, Step: "build", Do: terminate}}}}},
	{"hold-dropped", []Trial{{Kind: Rush}}},
	{"rollback-repeated", []Trial{{
		Kind: Rollback, Case: deliveredAgain, Variant: deliveredAgain, Standby: true, Shape: shape{FailAt: "build", Milliseconds: 150},
	}}},
	{"lost-kept", []Trial{{Kind: Lost, Case: "the message of build lost", LostStep: "build", Shape: quick, Stages: []stage{
		{Point: faultpoint.SettleAfter, Step: "patch", Do: kill, PurgeMessage: true}}}}},
	{"lost-beside-foreign", []Trial{{Kind: Foreign, Shape: quick, Stages: []stage{{Point: faultpoint.CommandBefore, Step: "build", Do: kill, ToForeign: true}}}}},
	{"python-ignored", []Trial{{Kind: Mixed}}},
	{"baseline-repeated", []Trial{{Kind: Real, Workspace: changetest.Clean, Shape: shape{Real: true, FailAt: "build"}, Stages: []stage{
		{Point: faultpoint.CommandAfter, Step: "patch", Do: kill}}}}},
	{"image-kept", []Trial{{Kind: Real, Workspace: changetest.Clean, Shape: shape{Real: true, FailAt: "verify"}}}},
	{"spec-progress-forgotten", []Trial{{Kind: Spec, Case: playedCodex, Stages: []stage{{Point: faultpoint.CodexRecorded, Step: submit, Do: kill}}}}},
	{"spec-claim-stolen", []Trial{{Kind: Spec, Case: playedCodex, Standby: true, Variant: twiceLater}}},
	{"spec-clones-kept", []Trial{{Kind: Spec, Case: playedCodex, Stages: []stage{{Point: faultpoint.FinishAfter, Step: submit, Do: kill}}}}},
	{"spec-message-unredacted", []Trial{{Kind: Spec, Case: playedCodex}}},
	{"spec-cloud-resubmitted", []Trial{{Kind: SpecCloud, Case: cloudCodex, Stages: []stage{{Point: faultpoint.CodexSubmitted, Step: submit, Do: kill}}}}},
	{"spec-git-once", []Trial{{Kind: SpecGitHub, Case: playedCodex, Service: "a push fails with 502 of a proxy"}}},
	{"commands-survive", []Trial{{Kind: KillAtRandom, Standby: true, Shape: shape{Milliseconds: 7000}, Stages: []stage{{After: 1200 * time.Millisecond, Do: kill}}}}},
}

// proofRuns is how many runs a rush or mixed trial of the proof has: enough to wait
// for each other.
const proofRuns = 10

// Prove runs the trials of each defect with workers that have the defect, and with
// workers that have none. It returns an error if a trial does not find its defect,
// or finds something without one.
func Prove(ctx context.Context, config Config) error {
	config = config.WithDefaults()
	config.Runs = proofRuns
	list, err := defects.All()
	if err != nil {
		return err
	}
	proofs, err := config.chosenProofs()
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(d defects.Defect) bool {
		return !slices.ContainsFunc(proofs, func(m defectProof) bool { return m.defect == d.Name })
	})
	began := time.Now()
	if config.programs, err = buildPrograms(ctx, config.Module, config.Folder, kindsOf(proofs)...); err != nil {
		return err
	}
	workers, err := buildDefects(ctx, config.Module, config.Folder, list)
	if err != nil {
		return err
	}
	fmt.Fprintf(config.Output, "%d workers with a defect each were built in %s\n", len(workers), time.Since(began).Round(time.Second))
	var mu sync.Mutex
	tried, unseen, falseAlarms := 0, 0, 0
	var failures []error
	prove := func(d defectProof) {
		for _, t := range d.trials {
			broken := config
			broken.programs.worker = workers[d.defect]
			seen, what, err := found(ctx, broken, d.defect, t)
			without, whatElse, err2 := found(ctx, config, "healthy", t)
			mu.Lock()
			if err := errors.Join(err, err2); err != nil {
				failures = append(failures, fmt.Errorf("%s: %w", d.defect, err))
				mu.Unlock()
				continue
			}
			tried++
			line := "found: " + strings.Join(strings.Fields(what), " ")
			if !seen {
				unseen++
				line = "NOT FOUND by " + t.String()
			}
			if without {
				falseAlarms++
				line += "; WITHOUT IT TOO: " + whatElse
			}
			fmt.Fprintf(config.Output, "%-22s %s\n", d.defect, line)
			mu.Unlock()
		}
	}
	work := make(chan defectProof)
	var wait sync.WaitGroup
	for range config.Lanes {
		wait.Go(func() {
			for d := range work {
				prove(d)
			}
		})
	}
	for _, d := range proofs {
		work <- d
	}
	close(work)
	wait.Wait()
	if err := errors.Join(failures...); err != nil {
		return err
	}
	if unseen+falseAlarms > 0 {
		return fmt.Errorf("%d of %d trials did not find the defect that was planted for them, %d fail without one", unseen, tried, falseAlarms)
	}
	fmt.Fprintf(config.Output, "%d of %d planted defects were found, by %d of %d trials\n", len(proofs), len(proofs), tried, tried)
	return nil
}

func kindsOf(proofs []defectProof) (kinds []Kind) {
	for _, d := range proofs {
		for _, t := range d.trials {
			kinds = append(kinds, t.Kind)
		}
	}
	return kinds
}

// chosenProofs returns the proofs of the defects that the Config names, or all.
func (c *Config) chosenProofs() ([]defectProof, error) {
	if len(c.Defects) == 0 {
		return proofs, nil
	}
	var chosen []defectProof
	for _, name := range c.Defects {
		i := slices.IndexFunc(proofs, func(m defectProof) bool { return m.defect == name })
		if i < 0 {
			return nil, fmt.Errorf("chaos: there is no defect %q: see internal/chaos/defects", name)
		}
		chosen = append(chosen, proofs[i])
	}
	return chosen, nil
}

// found runs a trial with the workers of config, in a lane with the given name, and
// returns whether it has found a problem, and the first one.
func found(ctx context.Context, config Config, name string, t Trial) (bool, string, error) {
	l, err := newLane(ctx, &config, fmt.Sprintf("%s-%d", name, time.Now().UnixNano()), t.Kind.needsOwnServers())
	if err != nil {
		return false, "", err
	}
	o := l.runTrial(ctx, t)
	if ctx.Err() == nil && len(o.problems) > 0 {
		c := &campaign{config: &Config{Folder: l.folder}}
		if _, err := c.saveEvidence(o, l); err != nil {
			fmt.Fprintf(config.Output, "evidence of %s cannot be saved: %v\n", l.name, err)
		}
	}
	_ = l.close(ctx)
	if ctx.Err() != nil {
		return false, "", context.Cause(ctx)
	}
	switch {
	case len(o.problems) == 0:
		return false, "", nil
	case o.problems[0].class == harness:
		return false, "", fmt.Errorf("%s: %s", t, o.problems[0].text)
	}
	return true, o.problems[0].String(), nil
}

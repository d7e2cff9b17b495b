package store_test

import (
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// BenchmarkStep begins and finishes the steps of runs. An operation is one step.
func BenchmarkStep(b *testing.B) {
	d := storetest.New(b)
	s := d.Open(b)
	b.ReportAllocs()
	run, next := "", len(toVerify)
	for b.Loop() {
		if next == len(toVerify) {
			b.StopTimer()
			run, next = d.Create(b, storetest.Seed{}), 0
			b.StartTimer()
		}
		step := toVerify[next]
		next++
		decision, err := s.BeginStep(b.Context(), alone(run, step, "task-"+string(step)))
		if err != nil {
			b.Fatal(err)
		}
		start := decision.(store.Start)
		outcome := good(step)
		outcome.FinishedAt = start.Claim.StartedAt
		if _, err := s.FinishStep(b.Context(), start.Claim, outcome); err != nil {
			b.Fatal(err)
		}
	}
}

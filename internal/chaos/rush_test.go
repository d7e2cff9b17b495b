package chaos

import (
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// inWorkspace returns the outcome of a run that was parked, had the workspace and
// failed at build. Times are in milliseconds.
func inWorkspace(id string, s shape, parked, from, rollback, to int64) *outcome {
	ms := int64(time.Millisecond)
	o := &outcome{run: run{ID: id, Shape: s}}
	for point, at := range map[faultpoint.Point]int64{
		faultpoint.ParkCommitted: parked, faultpoint.BeginCommitted: from, faultpoint.FinishLocked: to - 1, faultpoint.FinishWritten: to,
	} {
		o.moments = append(o.moments, moment{At: at * ms, Point: point, Subject: []string{id, "build"}})
	}
	o.ledger = []ledger.Record{
		{At: (from + 1) * ms, Run: id, Step: "build", Event: ledger.Start}, {At: (from + 2) * ms, Run: id, Step: "build", Event: ledger.End},
		{At: rollback * ms, Run: id, Step: "rollback", Event: ledger.Start}, {At: (rollback + 1) * ms, Run: id, Step: "rollback", Event: ledger.End},
	}
	return o
}

// The checks of a rush find what they are meant to find.
func TestRushIsJudged(t *testing.T) {
	t.Parallel()
	fails, high := shape{FailAt: "build"}, shape{FailAt: "build", High: true}
	first := inWorkspace("first", fails, 1, 10, 20, 30)
	for name, c := range map[string]struct {
		second, third                *outcome
		overlaps, outOfTurn, tooLate int
	}{
		"in turn":                  {inWorkspace("2", fails, 5, 40, 50, 60), inWorkspace("3", fails, 5, 70, 80, 90), 0, 0, 0},
		"high priority first":      {inWorkspace("2", fails, 5, 70, 80, 90), inWorkspace("3", high, 5, 40, 50, 60), 0, 0, 0},
		"at the same time":         {inWorkspace("2", fails, 5, 25, 50, 60), inWorkspace("3", fails, 5, 70, 80, 90), 1, 0, 0},
		"younger before older":     {inWorkspace("2", fails, 5, 70, 80, 90), inWorkspace("3", fails, 5, 40, 50, 60), 0, 1, 0},
		"normal before high":       {inWorkspace("2", fails, 5, 40, 50, 60), inWorkspace("3", high, 5, 70, 80, 90), 0, 1, 0},
		"the older came too late":  {inWorkspace("2", fails, 35, 70, 80, 90), inWorkspace("3", fails, 5, 40, 50, 60), 0, 0, 0},
		"the rollback had to wait": {inWorkspace("2", fails, 5, 40, 1100, 1200), inWorkspace("3", fails, 5, 1300, 1310, 1320), 0, 0, 1},
	} {
		o := &outcome{rushFigures: &rushFigures{}}
		o.judgeRush([]*outcome{first, c.second, c.third}, []*outcome{inWorkspace("beside", fails, 1, 10, 20, 30)})
		if f := o.rushFigures; f.overlaps != c.overlaps || f.outOfTurn != c.outOfTurn || f.late != c.tooLate || len(o.problems) != c.overlaps+c.outOfTurn+c.tooLate {
			t.Errorf("%s: %d overlaps, %d out of turn, %d late, %v", name, f.overlaps, f.outOfTurn, f.late, o.problems)
		}
	}
}

// A rollback that ran twice, or not to its end, is a problem.
func TestRollbackIsJudged(t *testing.T) {
	t.Parallel()
	start, end := ledger.Record{Step: "rollback", Command: 1, Event: ledger.Start}, ledger.Record{Step: "rollback", Command: 1, Event: ledger.End}
	start2, end2 := ledger.Record{Step: "rollback", Command: 2, Event: ledger.Start}, ledger.Record{Step: "rollback", Command: 2, Event: ledger.End}
	for name, c := range map[string]struct {
		records []ledger.Record
		status  string
		want    bool
	}{
		"once":        {[]ledger.Record{start, end}, "rolled_back", true},
		"twice":       {[]ledger.Record{start, end, start, end}, "rolled_back", false},
		"never":       {nil, "rolled_back", false},
		"not over":    {[]ledger.Record{start}, "rolled_back", false},
		"goes on":     {[]ledger.Record{start, end, start2, end2}, "rolled_back", false},
		"only failed": {[]ledger.Record{start, end}, "failed", false},
	} {
		o := &outcome{trial: Trial{Kind: Rollback}, ledger: c.records}
		if o.judgeRollback(c.status); o.rolledBackOnce != c.want || (len(o.problems) == 0) != c.want {
			t.Errorf("%s: %t, %v", name, o.rolledBackOnce, o.problems)
		}
	}
}

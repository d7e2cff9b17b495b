package store_test

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// nodes are the names of the live workers of a queue.
func nodes(t *testing.T, s *store.Store, queue string) (names []string) {
	t.Helper()
	list, err := s.ListWorkers(t.Context(), queue)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range list {
		names = append(names, w.Node)
	}
	slices.Sort(names)
	return names
}

func register(t *testing.T, s *store.Store, queue string) {
	t.Helper()
	if err := s.RegisterWorker(t.Context(), queue); err != nil {
		t.Fatal(err)
	}
}

func leave(t *testing.T, s *store.Store, queue string) store.Departure {
	t.Helper()
	d, err := s.LeaveQueue(t.Context(), queue)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestLiveWorkersAreListed(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two, reader := d.Open(t, as("one", 0)), d.Open(t, as("two", 0)), d.Open(t)
	register(t, one, "q")
	register(t, one, "q") // again: one row
	register(t, two, "q")
	register(t, two, "other")
	equal(t, "workers of q", nodes(t, reader, "q"), []string{"one", "two"})
	equal(t, "workers of other", nodes(t, reader, "other"), []string{"two"})
	equal(t, "all", nodes(t, reader, ""), []string{"one", "two", "two"})

	// One that is gone is not listed, and the next one that registers removes
	// its row.
	two.Close()
	for deadline := time.Now().Add(10 * time.Second); len(nodes(t, reader, "q")) > 1 && time.Now().Before(deadline); {
	}
	equal(t, "workers of q without two", nodes(t, reader, "q"), []string{"one"})
	if rows := d.Rows(t, `SELECT node FROM mm_orchestrator.workers WHERE queue = 'q'`); len(rows) != 2 {
		t.Errorf("rows %v", rows)
	}
	three := d.Open(t, as("three", 0))
	register(t, three, "q")
	if rows := d.Rows(t, `SELECT node FROM mm_orchestrator.workers WHERE queue = 'q'`); len(rows) != 2 {
		t.Errorf("rows %v", rows)
	}

	// One whose row is lost is listed again after its next registration.
	d.Rows(t, `DELETE FROM mm_orchestrator.workers RETURNING key`)
	register(t, one, "q")
	equal(t, "workers of q again", nodes(t, reader, "q"), []string{"one"})
}

func TestTheLastWorkerKnowsThatItIs(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two, elsewhere := d.Open(t, as("one", 0)), d.Open(t, as("two", 0)), d.Open(t, as("elsewhere", 0))
	register(t, one, "q")
	register(t, two, "q")
	register(t, elsewhere, "other")
	first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	starts(t, one, shared("w", first, store.StepAnalyze, "1a"))
	waits(t, two, shared("w", second, store.StepAnalyze, "2a"), store.ParkedWorkspace)

	if got := leave(t, one, "q"); len(got.Remaining) != 1 || got.Remaining[0].Node != "two" || got.Parked != 1 {
		t.Errorf("one of two leaves: %+v", got)
	}
	register(t, one, "q") // a last round of its sweep, say
	if got := leave(t, two, "q"); len(got.Remaining) != 0 || got.Parked != 1 {
		t.Errorf("the last one leaves: %+v", got)
	}
}

// Of workers that leave at once, one and only one is the last.
func TestWorkersThatLeaveAtOnce(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	for range 10 {
		var group sync.WaitGroup
		var mu sync.Mutex
		last := 0
		var workers []*store.Store
		for range 3 {
			s := d.Open(t)
			register(t, s, "q")
			workers = append(workers, s)
		}
		for _, s := range workers {
			group.Go(func() {
				got, err := s.LeaveQueue(t.Context(), "q")
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				if len(got.Remaining) == 0 {
					last++
				}
			})
		}
		group.Wait()
		if last != 1 {
			t.Errorf("%d workers were told that they were the last", last)
		}
		for _, s := range workers {
			s.Close()
		}
	}
}

// Each worker notes its own consumers; the others' are counted while these live
// and have noted them of late.
func TestConsumersOfOtherWorkersAreCounted(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	one, two := d.Open(t, as("one", 0)), d.Open(t, as("two", 0))
	count := func(s *store.Store, own int, maxAge time.Duration) int {
		t.Helper()
		n, err := s.CountOtherConsumers(t.Context(), "q", own, maxAge)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	equal(t, "before anybody has registered", count(one, 1, time.Hour), 0)
	register(t, one, "q")
	register(t, two, "q")
	register(t, two, "other")
	equal(t, "of one that has not noted any", count(one, 1, time.Hour), 0)
	equal(t, "of the first", count(two, 3, time.Hour), 1)
	equal(t, "of the second", count(one, 0, time.Hour), 3)
	equal(t, "of the first, whose broker is away", count(two, 3, time.Hour), 0)
	equal(t, "of the second, noted too long ago", count(one, 1, 0), 0)
	two.Close()
	waitFor(t, "the second is seen dead", func() bool { return count(one, 1, time.Hour) == 0 })
}

// What the last worker gives back is every message of the queue, in the order
// of turns, whoever's turn it is; what is parked meanwhile stays.
func TestAllParkedMessagesAreTakenInTheOrderOfTurns(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	holder := d.Create(t, storetest.Seed{})
	claim := starts(t, s, shared("w", holder, store.StepAnalyze, "h1"))
	waits(t, s, shared("w", holder, store.StepAnalyze, "busy"), store.ParkedBusy)
	runs := map[string]string{}
	for i, name := range []string{"n1", "h1", "n2", "h2", "n3", "n4", "n5", "n6", "n7"} {
		seed := storetest.Seed{}
		if name[0] == 'h' {
			seed.Priority = "high"
		}
		runs[name] = d.Create(t, seed)
		d.Rows(t, `UPDATE orchestrator_runs SET queued_at = now() - interval '1 hour' + $2 * interval '1 second' WHERE id = $1 RETURNING id`, runs[name], i)
	}
	// Not parked in that order.
	for _, name := range []string{"n7", "n3", "h2", "n1", "n2", "h1", "n4", "n6", "n5"} {
		waits(t, s, shared("w", runs[name], store.StepAnalyze, name), store.ParkedWorkspace)
	}
	d.Rows(t, `UPDATE orchestrator_runs SET queued_at = now() WHERE id = $1 RETURNING id`, holder)
	parked, err := s.LookAtParked(t.Context(), "q")
	if err != nil || parked.Newest == 0 || parked.Sent {
		t.Fatal(parked, err)
	}
	late := d.Create(t, storetest.Seed{})
	waits(t, s, shared("w", late, store.StepAnalyze, "late"), store.ParkedWorkspace)
	waits(t, s, shared("w", runs["n4"], store.StepAnalyze, "n4"), store.ParkedWorkspace) // again, under a new id

	list, err := s.ListParked(t.Context(), "q")
	if err != nil {
		t.Fatal(err)
	}
	var listed []string
	for _, p := range list {
		listed = append(listed, p.TaskID)
		if p.Queue != "q" || p.Workspace != "w" || p.Holder != holder {
			t.Errorf("%+v", p)
		}
	}
	equal(t, "listed", listed[:4], []string{"h1", "h2", "n1", "n2"})
	if len(listed) != 11 {
		t.Errorf("listed %q", listed)
	}

	var got []string
	for {
		messages, err := s.TakeAllParked(t.Context(), "q", parked.Newest)
		if err != nil {
			t.Fatal(err)
		}
		if len(messages) == 0 {
			break
		}
		for _, m := range messages {
			got = append(got, m.TaskID)
			if string(m.Body) != m.TaskID || m.Headers["id"] != m.TaskID {
				t.Errorf("%+v", m)
			}
			if err := s.DropParked(t.Context(), m.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	equal(t, "taken", got, []string{"h1", "h2", "n1", "n2", "n3", "n5", "n6", "n7", "busy"})
	equal(t, "left", d.Rows(t, `SELECT task_id FROM mm_orchestrator.parked ORDER BY task_id`), []storetest.Row{{"task_id": "late"}, {"task_id": "n4"}})
	finish(t, s, claim, good(store.StepAnalyze))
}

// Workspaces are free after the last worker has left, but for that of a run
// that has begun and goes on.
func TestHoldsAreCleared(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	s := d.Open(t)
	running, ended, gone, pending, elsewhere := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
	finish(t, s, starts(t, s, shared("running", running, store.StepAnalyze, "1")), good(store.StepAnalyze))
	for _, run := range []string{ended, gone, pending} {
		d.Rows(t, `INSERT INTO mm_orchestrator.holds (workspace, queue, run_id) VALUES ($1::text, 'q', $1::text::uuid) RETURNING queue`, run)
	}
	d.Rows(t, `INSERT INTO mm_orchestrator.holds (workspace, queue, run_id) VALUES ('elsewhere', 'other', $1) RETURNING queue`, elsewhere)
	d.Rows(t, `UPDATE orchestrator_runs SET status = 'succeeded' WHERE id = $1 RETURNING id`, ended)
	d.Rows(t, `DELETE FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 RETURNING id`, gone)
	d.Rows(t, `DELETE FROM orchestrator_runs WHERE id = $1 RETURNING id`, gone)
	if err := s.ClearHolds(t.Context(), "q"); err != nil {
		t.Fatal(err)
	}
	equal(t, "holders", d.Rows(t, `SELECT run_id FROM mm_orchestrator.holds WHERE run_id IS NOT NULL ORDER BY queue DESC`),
		[]storetest.Row{{"run_id": running}, {"run_id": elsewhere}})
}

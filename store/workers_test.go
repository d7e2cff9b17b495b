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

	if got := leave(t, one, "q"); len(got.Others) != 1 || got.Others[0].Node != "two" || got.Parked != 1 {
		t.Errorf("one of two leaves: %+v", got)
	}
	register(t, one, "q") // a last round of its sweep, say
	if got := leave(t, two, "q"); len(got.Others) != 0 || got.Parked != 1 {
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
				if len(got.Others) == 0 {
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

package orchestrator

import (
	"fmt"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// The API retries a failed run while its rollback runs. No two commands of the run
// work at the same time, each runs once, and the retry completes.
func TestRetryWhileTheRollbackRuns(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	r.worker(t, "one", 1, true)
	// One slot each: whoever does not roll back takes the messages below one
	// after the other, so that the last one is parked last.
	r.worker(t, "two", 1, true)
	run := r.create(t, "r", "normal", "")
	next := r.create(t, "next", "normal", "")
	r.mark(t, "fail-r-build")
	r.mark(t, "hold-r-rollback")
	r.publish(r.chain(t, "r", "build", "restart"))
	r.await(t, "the rollback runs", func() bool { return strings.HasSuffix(strings.Join(r.ledger(), "\n"), "begin r rollback") })
	r.clear(t, "fail-r-build")

	r.db.Retry(t, run, store.StepBuild, "the registry is back")
	r.names["again"] = run
	again := r.chain(t, "again", "build", "restart")
	r.publish(again)
	r.publish(again) // a broker may deliver twice
	r.publish(r.chain(t, "next", "build", "restart"))
	r.await(t, "the retry and the next run wait", func() bool { return r.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 2 })
	// Sweeps do not take it: it would only be parked again.
	since := r.db.Rows(t, `SELECT id FROM mm_orchestrator.parked ORDER BY id`)
	for range 4 {
		if messages, err := r.db.Open(t).TakeParked(t.Context(), "q"); err != nil || len(messages) > 0 {
			t.Errorf("taken: %+v, %v", messages, err)
		}
	}
	same(t, "parked", fmt.Sprint(r.db.Rows(t, `SELECT id FROM mm_orchestrator.parked ORDER BY id`)), fmt.Sprint(since))
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin r build, end r build, begin r rollback")

	r.clear(t, "hold-r-rollback")
	r.await(t, "both runs end", func() bool { return r.count(t, unfinished) == 0 })
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin r build, end r build, begin r rollback, end r rollback, "+
		"begin r build, end r build, begin r restart, end r restart, begin next build, end next build, begin next restart, end next restart")
	for _, id := range []string{run, next} {
		same(t, "status", fmt.Sprint(r.db.Run(t, id)["status"]), "running") // its plan has no verify
	}
	r.await(t, "nothing is parked", func() bool { return r.count(t, `SELECT count(*) AS n FROM mm_orchestrator.parked`) == 0 })
}

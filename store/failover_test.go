package store_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// After a fail-over the old server may still answer, and take no writes. A worker's
// sessions there count as lost: workers at the new primary do not see their locks.
func TestAServerThatTakesNoWrites(t *testing.T) {
	t.Parallel()
	server := devenv.OwnDatabase(t)
	d := storetest.At(t, server.URL)
	run := d.Create(t, storetest.Seed{})
	s := d.Open(t, as("worker", time.Minute))
	claim := begin(t, s, run, store.StepBuild, "t").Claim
	before := d.Rows(t, workerLockSessions)[0]["pid"]

	// The sessions that there are write nothing any more, and new ones do.
	for _, role := range []string{roleOf(t, d.URL), roleOf(t, server.URL)} {
		execute(t, d, "ALTER ROLE "+role+" SET default_transaction_read_only = off")
	}
	execute(t, d, "ALTER SYSTEM SET default_transaction_read_only = on")
	execute(t, d, "SELECT pg_reload_conf()")
	waitFor(t, "the worker has its lock in a new session", func() bool {
		rows := d.Rows(t, workerLockSessions)
		return len(rows) == 1 && rows[0]["pid"] != before && s.LockError() == nil
	})
	recordChange(t, s, claim, `{"n":1}`)
	d.Pool.Reset()
	execute(t, d, "ALTER SYSTEM RESET default_transaction_read_only")

	// The server becomes a standby.
	folder := d.Rows(t, `SELECT current_setting('data_directory') AS name`)[0]["name"].(string)
	execute(t, d, "COPY (SELECT '') TO '"+folder+"/standby.signal'")
	server.Stop()
	server.Start()
	d.Pool.Reset()
	const reason = "the server is a standby and takes no writes"
	waitFor(t, "the worker has no lock", func() bool { return s.LockError() != nil })
	waitFor(t, "the lock is missing because of the standby", func() bool {
		err := s.LockError()
		return errors.Is(err, store.ErrUnavailable) && strings.Contains(err.Error(), "cannot acquire this worker's lock at "+s.Place()+": "+reason)
	})
	waitFor(t, "a ping says why", func() bool { // the first may get a connection of before the restart
		err := s.Ping(t.Context())
		return errors.Is(err, store.ErrUnavailable) && strings.Contains(err.Error(), reason)
	})
	confirmed := s.LockConfirmedAt()

	// And the primary again, in which the step is still this worker's.
	execute(t, d, "SELECT pg_promote()")
	waitFor(t, "the worker has its lock again", func() bool { return s.LockError() == nil })
	if !s.LockConfirmedAt().After(confirmed) {
		t.Error("the lock is not confirmed")
	}
	if err := s.Ping(t.Context()); err != nil {
		t.Error(err)
	}
	if f := finish(t, s, claim, good(store.StepBuild)); f.Status != store.RunRunning {
		t.Errorf("%+v", f)
	}
}

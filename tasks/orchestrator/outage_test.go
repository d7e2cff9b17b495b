package orchestrator

import (
	"context"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
	"github.com/moonladderstudios/mm-orchestrator/worker"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// A worker hands a step back for as long as the database is unavailable. A quorum
// queue with a delivery limit must not drop the message meanwhile.
func TestAnOutageOfTheDatabaseOutlastsTheDeliveryLimit(t *testing.T) {
	t.Parallel()
	const limit, handedBack = 1, 3
	r := newLiveEnv(t)
	proxy, through := workertest.NewProxy(t, r.db.URL)
	s := r.db.Open(t, func(c *store.Config) {
		c.URL, c.Worker, c.TakeoverGrace = secret.New(through), "one", 10*time.Millisecond
		c.RetryFor, c.ConnectTimeout = 10*time.Millisecond, time.Second // the length of an attempt
	})
	config := r.config
	config.Steps, config.Node, config.Logger, config.HandBackDelay = s, "one", workertest.Logger(t), 10*time.Millisecond
	o, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	w, err := worker.New(worker.Config{
		Broker: r.url, Queues: []string{"q"}, Node: "one@test", Logger: workertest.Logger(t),
		TaskQueues: []worker.Queue{{Name: "q", Type: "quorum", Arguments: map[string]any{"x-delivery-limit": limit}}},
		Results:    storetest.Results(t, s, protocol.EncodingJSON),
	})
	if err != nil {
		t.Fatal(err)
	}
	var tries atomic.Int32
	w.Use(func(next worker.Handler) worker.Handler {
		return worker.HandlerFunc(func(ctx context.Context, task *worker.Task) (any, error) {
			tries.Add(1)
			return next.Handle(ctx, task)
		})
	})
	o.Register(w)
	workertest.Start(t, w)
	r.create(t, "n", "normal", "")

	proxy.Cut()
	r.publish(r.chain(t, "n", "build", "restart"))
	r.await(t, "the step was handed back often", func() bool { return tries.Load() > handedBack })
	proxy.Restore()
	r.await(t, "the run ends", func() bool { return r.count(t, unfinished) == 0 })
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin n build, end n build, begin n restart, end n restart")
}

// refuseWrites makes the database refuse what a step records, with the SQLSTATE in
// table refusal while it has one. Sequence refusals counts.
const refuseWrites = `
CREATE TABLE refusal (code text NOT NULL);
CREATE SEQUENCE refusals;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE refused text;
BEGIN
	SELECT code INTO refused FROM refusal;
	IF FOUND THEN
		PERFORM nextval('refusals');
		RAISE EXCEPTION 'no writes at present' USING ERRCODE = refused;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER refuse AFTER UPDATE ON mm_orchestrator.claims FOR EACH ROW EXECUTE FUNCTION refuse();`

// A command has ended, and the database refuses to record it for longer than a call
// tries: its disk is full, for example. The step is recorded once that is over, and its
// command does not run again.
func TestAnEndThatTheDatabaseRefusesForAWhile(t *testing.T) {
	t.Parallel()
	for name, code := range map[string]string{
		"disk full": "53100", "out of memory": "53200", "ended by an operator or a limit": "57014",
		"transaction too long": "25P04", "I/O error": "58030", "an error of a trigger": "P0001",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newLiveEnv(t)
			if _, err := r.db.Pool.Exec(t.Context(), refuseWrites); err != nil {
				t.Fatal(err)
			}
			s := r.db.Open(t, func(c *store.Config) {
				c.Worker, c.TakeoverGrace, c.RetryFor = "one", 10*time.Millisecond, 10*time.Millisecond
			})
			config := r.config
			config.Steps, config.Node, config.Logger, config.HandBackDelay = s, "one", workertest.Logger(t), 10*time.Millisecond
			o, err := New(config)
			if err != nil {
				t.Fatal(err)
			}
			w, err := worker.New(worker.Config{Broker: r.url, Queues: []string{"q"}, Node: "one@test", Logger: workertest.Logger(t)})
			if err != nil {
				t.Fatal(err)
			}
			o.Register(w)
			workertest.Start(t, w)
			r.create(t, "n", "normal", "")
			r.mark(t, "hold-n-build")
			r.publish(r.chain(t, "n", "build", "restart"))
			r.await(t, "the command begins", func() bool { return len(r.ledger()) == 1 })
			r.db.Rows(t, `INSERT INTO refusal VALUES ($1) RETURNING code`, code)
			r.clear(t, "hold-n-build")
			r.await(t, "several writes were refused", func() bool { return r.count(t, `SELECT last_value AS n FROM refusals`) >= 8 })
			r.db.Rows(t, `DELETE FROM refusal RETURNING code`)
			r.await(t, "the run ends", func() bool { return r.count(t, unfinished) == 0 })
			same(t, "ledger", strings.Join(r.ledger(), ", "), "begin n build, end n build, begin n restart, end n restart")
			if n := r.count(t, `SELECT max(starts) AS n FROM mm_orchestrator.claims`); n != 1 {
				t.Errorf("a step has started %d times", n)
			}
		})
	}
}

// A name of a log is short enough for its column and too long for the index of the
// table. No later try can store it: the step fails, and says why.
func TestAnArtifactThatTheTableCannotIndex(t *testing.T) {
	t.Parallel()
	r := newLiveEnv(t)
	var name []rune // in folders, as no file may have so long a name
	for n := range 1000 {
		if n%80 == 79 {
			name = append(name, '/')
		} else {
			name = append(name, '\u4e00'+rand.Int32N(20000)) // the index compresses what repeats
		}
	}
	run := r.create(t, "n", "normal", "")
	r.db.Rows(t, `UPDATE orchestrator_action_plans SET steps = jsonb_set(steps, '{0,parameters,logArtifact}', to_jsonb($2::text))
		WHERE id = (SELECT action_plan_id FROM orchestrator_runs WHERE id = $1) RETURNING id`, run, string(name))
	r.worker(t, "one", 1, false)
	r.publish(r.chain(t, "n", "build", "restart"))
	r.await(t, "the run is rolled back", func() bool {
		return r.count(t, `SELECT count(*) AS n FROM orchestrator_runs WHERE status = 'rolled_back'`) == 1
	})
	same(t, "ledger", strings.Join(r.ledger(), ", "), "begin n build, end n build, begin n rollback, end n rollback")
	message, _ := r.db.State(t, run, store.StepBuild)["message"].(string)
	for _, part := range []string{"the end of the step (succeeded: ", "cannot be recorded", "uq_orchestrator_artifact_path", "SQLSTATE 54000"} {
		if !strings.Contains(message, part) {
			t.Errorf("the step says %q, without %q", message, part)
		}
	}
}

package store_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// outage is a worker whose database becomes unavailable in the middle of a call, for
// longer than the call retries, and another worker with a connection of its own. The
// other worker's grace is longer than a test, so that it takes no claim over.
type outage struct {
	*storetest.Database
	*connectionCutter
	s, other *store.Store
}

// newOutage opens both workers. The worker has its lock when it returns.
func newOutage(t *testing.T) *outage {
	t.Helper()
	o := &outage{Database: storetest.New(t)}
	var through string
	o.connectionCutter, through = newConnectionCutter(t, o.URL)
	o.s = o.Open(t, as("cut off", time.Minute), func(c *store.Config) {
		c.URL, c.ConnectTimeout, c.RetryFor = secret.New(through), time.Second, 50*time.Millisecond
	})
	o.other = o.Open(t, as("other", time.Hour))
	o.hold(t)
	return o
}

// hold waits until the worker has its lock and its calls succeed.
func (o *outage) hold(t *testing.T) {
	t.Helper()
	o.eventually(t, "the worker has the database again", func() bool {
		_, err := o.s.TakeParked(t.Context(), "none")
		return err == nil
	})
}

func (o *outage) eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s. Claims: %v, parked: %v", what,
				o.Rows(t, `SELECT step, holder, token, starts, handed_back, outcome IS NOT NULL AS ended FROM mm_orchestrator.claims`),
				o.Rows(t, `SELECT task_id, why, taken_by FROM mm_orchestrator.parked`))
		}
	}
}

// everywhere repeats call with an outage at each of its moments in turn. do prepares
// before the outage, and check runs after it. The worker gets no other call between
// call and check.
func (o *outage) everywhere(t *testing.T, do func(t *testing.T) (call func() error, check func(t *testing.T, err error))) {
	t.Helper()
	failed := 0
	for _, answered := range []bool{false, true} {
		for n := 0; ; n++ {
			o.hold(t)
			call, check := do(t)
			o.armOutage(n, answered)
			err := call()
			cut := o.disarm()
			if err != nil {
				failed++
				if !cut || !errors.Is(err, store.ErrUnavailable) {
					t.Errorf("cut: %v, %v", cut, err)
				}
			}
			o.restore()
			if !t.Failed() {
				check(t, err)
			}
			if t.Failed() {
				t.Fatalf("outage after %d requests, answered: %t; the call returned %v", n, answered, err)
			}
			if !cut {
				break
			}
		}
	}
	if failed == 0 {
		t.Error("no call has failed")
	}
}

// begins waits until the other worker has begun a step, or found that it has ended.
func (o *outage) begins(t *testing.T, request store.BeginRequest) (decision store.Decision) {
	t.Helper()
	o.eventually(t, "another worker begins the step", func() bool {
		decision = ask(t, o.other, request)
		_, parked := decision.(store.Parked)
		return !parked
	})
	return decision
}

// TestNothingIsLeftBehind: the database becomes unavailable in the middle of a call,
// for longer than the call retries. Whatever the call has committed, another worker
// can go on soon after the database is available again, while the first worker is
// alive and makes no further call.
func TestNothingIsLeftBehind(t *testing.T) {
	t.Parallel()
	t.Run("begin", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run := a.Create(t, storetest.Seed{})
			request := shared(run, run, store.StepBuild, "t")
			var decision store.Decision
			return func() (err error) {
					decision, err = a.s.BeginStep(t.Context(), request)
					return err
				}, func(t *testing.T, err error) {
					if err == nil {
						if err := a.s.ReleaseClaim(t.Context(), decision.(store.Start).Claim); err != nil {
							// The worker may not have its session back.
							t.Log(err)
						}
					}
					start, is := a.begins(t, request).(store.Start)
					if !is || start.Claim.Deaths() != 0 {
						t.Errorf("%+v", start.Claim)
					}
					finish(t, a.other, start.Claim, good(store.StepBuild))
				}
		})
	})
	t.Run("begin, and the caller gives up", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		run := a.Create(t, storetest.Seed{})
		request := shared(run, run, store.StepBuild, "t")
		ctx, cancel := context.WithCancel(t.Context())
		v, through := newStallProxy(t, a.URL)
		s := a.Open(t, as("impatient", time.Minute), func(c *store.Config) { c.URL = secret.New(through) })
		v.arm()
		go func() {
			<-v.shut
			cancel()
		}()
		if _, err := s.BeginStep(ctx, request); !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		v.open()
		a.begins(t, request)
	})
	t.Run("release", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run := a.Create(t, storetest.Seed{})
			request := shared(run, run, store.StepBuild, "t")
			claim := starts(t, a.s, request)
			return func() error { return a.s.ReleaseClaim(t.Context(), claim) },
				func(t *testing.T, _ error) {
					start, is := a.begins(t, request).(store.Start)
					if !is || start.Claim.Starts != 2 || start.Claim.HandedBack != 1 {
						t.Errorf("%+v", start.Claim)
					}
				}
		})
	})
	t.Run("finish", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run := a.Create(t, storetest.Seed{})
			request := shared(run, run, store.StepBuild, "t")
			claim := starts(t, a.s, request)
			return func() error {
					outcome := good(store.StepBuild)
					outcome.FinishedAt = time.Now()
					_, err := a.s.FinishStep(t.Context(), claim, outcome)
					if err != nil && a.s.ReleaseClaim(t.Context(), claim) == nil {
						t.Error("released without a database")
					}
					return err
				}, func(t *testing.T, _ error) {
					switch decision := a.begins(t, request).(type) {
					case store.Done:
						if decision.Outcome.Status != store.StepSucceeded {
							t.Errorf("%+v", decision)
						}
					case store.Start:
						if decision.Claim.Deaths() != 0 {
							t.Errorf("%+v", decision.Claim)
						}
						finish(t, a.other, decision.Claim, good(store.StepBuild))
					default:
						t.Errorf("%T %+v", decision, decision)
					}
				}
		})
	})
	t.Run("progress", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run := a.Create(t, storetest.Seed{})
			claim := starts(t, a.s, shared(run, run, store.StepBuild, "t"))
			return func() error { return a.s.RecordProgress(t.Context(), claim, come(1, 0)) },
				func(t *testing.T, _ error) {
					a.hold(t)
					record(t, a.s, claim, come(2, 0))
					finish(t, a.s, claim, good(store.StepBuild))
					if _, done := ask(t, a.other, shared(run, run, store.StepBuild, "t")).(store.Done); !done {
						t.Error("the step has not ended")
					}
				}
		})
	})
	t.Run("change", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run := a.Create(t, storetest.Seed{})
			claim := starts(t, a.s, shared(run, run, store.StepBuild, "t"))
			return func() error { return a.s.RecordChange(t.Context(), claim, json.RawMessage(`{"n":1}`)) },
				func(t *testing.T, err error) {
					a.hold(t)
					if err == nil {
						equal(t, "record", a.Rows(t, `SELECT record FROM mm_orchestrator.changes WHERE run_id = $1`, run),
							[]storetest.Row{{"record": map[string]any{"n": 1.0}}})
					}
					recordChange(t, a.s, claim, `{"n":2}`)
					finish(t, a.s, claim, good(store.StepBuild))
					if next := begin(t, a.other, run, store.StepVerify, "v"); string(next.Change.Record) != `{"n":2}` {
						t.Errorf("the next step gets %s", next.Change.Record)
					}
				}
		})
	})
	t.Run("park", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			first, second := a.Create(t, storetest.Seed{}), a.Create(t, storetest.Seed{})
			claim := starts(t, a.other, shared(first, first, store.StepVerify, first))
			request := shared(first, second, store.StepVerify, second)
			return func() error {
					_, err := a.s.BeginStep(t.Context(), request)
					return err
				}, func(t *testing.T, err error) {
					if err != nil {
						// The broker has it still, and delivers it again.
						waits(t, a.other, request, store.ParkedWorkspace)
					}
					finish(t, a.other, claim, good(store.StepVerify))
					if ids := taken(t, a.other, "q"); ids != second {
						t.Errorf("published %q", ids)
					}
					finish(t, a.other, starts(t, a.other, request), good(store.StepVerify))
				}
		})
	})
	t.Run("take, keep and drop parked messages", func(t *testing.T) {
		t.Parallel()
		for _, c := range []struct {
			name string
			call func(ctx context.Context, s *store.Store, take func() (int64, error)) error
		}{
			{"take", func(_ context.Context, _ *store.Store, take func() (int64, error)) error {
				_, err := take()
				return err
			}},
			{"keep", func(ctx context.Context, s *store.Store, take func() (int64, error)) error {
				id, err := take()
				if err != nil || id == 0 {
					return err
				}
				return s.KeepParked(ctx, id, false)
			}},
			{"drop", func(ctx context.Context, s *store.Store, take func() (int64, error)) error {
				id, err := take()
				if err != nil || id == 0 {
					return err
				}
				return s.DropParked(ctx, id)
			}},
		} {
			t.Run(c.name, func(t *testing.T) {
				t.Parallel()
				a := newOutage(t)
				a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
					first, second := a.Create(t, storetest.Seed{}), a.Create(t, storetest.Seed{})
					claim := starts(t, a.other, shared(first, first, store.StepVerify, first))
					request := shared(first, second, store.StepVerify, second)
					waits(t, a.other, request, store.ParkedWorkspace)
					finish(t, a.other, claim, good(store.StepVerify))
					return func() error {
							return c.call(t.Context(), a.s, func() (int64, error) {
								messages, err := a.s.TakeParked(t.Context(), "q")
								if len(messages) == 0 {
									return 0, err
								}
								return messages[0].ID, err
							})
						}, func(t *testing.T, err error) {
							left := len(a.Rows(t, `SELECT id FROM mm_orchestrator.parked`))
							switch {
							case c.name == "drop" && err == nil:
								equal(t, "parked", left, 0)
							case left > 0 && (err != nil || c.name == "keep"):
								// At the next sweep of whoever had it, and at the latest
								// after 30 s of anybody's.
								a.hold(t)
								var ids []string
								a.eventually(t, "the message is given out", func() bool {
									messages, err := a.s.TakeParked(t.Context(), "q")
									for _, m := range messages {
										ids = append(ids, m.TaskID)
									}
									return err == nil && len(messages) > 0
								})
								equal(t, "given out", ids, []string{second})
								if ids := taken(t, a.other, "q"); ids != "" {
									t.Errorf("given out to two: %s", ids)
								}
								a.Rows(t, `UPDATE mm_orchestrator.parked SET taken_at = taken_at - interval '31 s' RETURNING id`)
								if ids := taken(t, a.other, "q"); ids != second {
									t.Errorf("given out to another one after 30 s: %q", ids)
								}
							}
							a.Rows(t, `DELETE FROM mm_orchestrator.parked RETURNING id`)
							finish(t, a.other, starts(t, a.other, request), good(store.StepVerify))
						}
				})
			})
		}
	})
	t.Run("pass a workspace", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			first, second := a.Create(t, storetest.Seed{}), a.Create(t, storetest.Seed{})
			starts(t, a.other, shared(first, first, store.StepVerify, first))
			request := shared(first, second, store.StepVerify, second)
			waits(t, a.other, request, store.ParkedWorkspace)
			a.Rows(t, `UPDATE mm_orchestrator.claims SET holder = NULL WHERE run_id = $1 RETURNING step`, first)
			a.Rows(t, `UPDATE orchestrator_runs SET status = 'failed', completed_at = now() WHERE id = $1 RETURNING id`, first)
			return func() error { return a.s.PassWorkspace(t.Context(), first, first) },
				func(t *testing.T, _ error) {
					if err := a.other.PassWorkspace(t.Context(), first, first); err != nil {
						t.Error(err)
					}
					if ids := taken(t, a.other, "q"); ids != second {
						t.Errorf("published %q", ids)
					}
					starts(t, a.other, request)
				}
		})
	})
	t.Run("end a lost run", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run := a.Create(t, storetest.Seed{})
			finish(t, a.other, starts(t, a.other, shared(run, run, store.StepAnalyze, run)), good(store.StepAnalyze))
			lost := func() store.Suspect {
				found := suspect(t, a.other, run, 0)
				found.Workspace = run
				return found
			}
			found := lost()
			rollback := func(run store.Run, _, _ string) (string, protocol.Delivery, error) {
				return "rollback-" + run.ID, protocol.Delivery{Body: []byte("x")}, nil
			}
			return func() error {
					_, err := a.s.FailLost(t.Context(), found, rollback)
					return err
				}, func(t *testing.T, _ error) {
					a.eventually(t, "another worker ends the run", func() bool {
						_, err := a.other.FailLost(t.Context(), lost(), rollback)
						if err != nil && !errors.Is(err, store.ErrLocked) { // by the session that was cut
							t.Fatal(err)
						}
						return err == nil
					})
					if ids := taken(t, a.other, "q"); ids != "rollback-"+run {
						t.Errorf("published %q", ids)
					}
					claim := starts(t, a.other, shared(run, run, store.StepRollback, "rollback-"+run))
					if f := finish(t, a.other, claim, good(store.StepRollback)); f.Status != store.RunRolledBack {
						t.Errorf("%+v", f)
					}
				}
		})
	})
	t.Run("revoke", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			run, begun := a.Create(t, storetest.Seed{}), a.Create(t, storetest.Seed{})
			claim := starts(t, a.other, shared(begun, begun, store.StepBuild, begun))
			revoke := func(s *store.Store) error {
				for _, id := range []string{run, begun} {
					if _, err := s.RevokeRun(t.Context(), store.Revocation{RunID: id, Reason: "r"}); err != nil {
						return err
					}
				}
				return nil
			}
			return func() error { return revoke(a.s) }, func(t *testing.T, _ error) {
				if err := revoke(a.other); err != nil {
					t.Error(err)
				}
				equal(t, "the run that had not begun", a.Run(t, run)["status"], "failed")
				if wish, err := a.other.CheckClaim(t.Context(), claim); err != nil || wish == nil || wish.Reason != "r" {
					t.Errorf("%+v, %v", wish, err)
				}
				finish(t, a.other, claim, bad(store.StepBuild))
				notRevoked(t, a.other, begun)
			}
		})
	})
	t.Run("results", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		mine, others := storetest.Results(t, a.s, protocol.EncodingJSON), storetest.Results(t, a.other, protocol.EncodingJSON)
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			id := a.Create(t, storetest.Seed{})
			return func() error {
					_, err := mine.Store(t.Context(), failed(id))
					return err
				}, func(t *testing.T, _ error) {
					equal(t, "written", save(t, others, success(id, "1")), []bool{true})
				}
		})
	})
	t.Run("register", func(t *testing.T) {
		t.Parallel()
		a := newOutage(t)
		n := 0
		a.everywhere(t, func(t *testing.T) (func() error, func(*testing.T, error)) {
			n++
			queue := fmt.Sprint("q", n)
			return func() error { return a.s.RegisterWorker(t.Context(), queue) },
				func(t *testing.T, _ error) {
					a.hold(t)
					if err := a.s.RegisterWorker(t.Context(), queue); err != nil {
						t.Error(err)
					}
					workers, err := a.other.ListWorkers(t.Context(), queue)
					if err != nil || !slices.ContainsFunc(workers, func(w store.LiveWorker) bool { return w.Node == "cut off" }) {
						t.Errorf("%+v, %v", workers, err)
					}
				}
		})
	})
}

// TestCloseWithPendingReleases: Close does not wait for an unavailable database. The
// claims are free, since the worker's lock is.
func TestCloseWithPendingReleases(t *testing.T) {
	t.Parallel()
	a := newOutage(t)
	run := a.Create(t, storetest.Seed{})
	claim := starts(t, a.s, shared(run, run, store.StepBuild, "t"))
	a.armOutage(0, false)
	if err := a.s.ReleaseClaim(t.Context(), claim); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	began := time.Now()
	a.s.Close()
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("closed after %s", took)
	}
	if err := a.s.ReleaseClaim(t.Context(), claim); err == nil { // starts nothing
		t.Error("released by a store that is closed")
	}
	a.restore()
	successor := a.Open(t, as("successor", 0))
	a.eventually(t, "the step is taken over", func() bool {
		_, is := ask(t, successor, shared(run, run, store.StepBuild, "t")).(store.Start)
		return is
	})
}

// TestASilentNetworkKeepsNoLocks: the network fails silently while a transaction has
// the run's lock. The server frees the lock.
func TestASilentNetworkKeepsNoLocks(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	v, through := newStallProxy(t, d.URL)
	silent := d.Open(t, as("silent", time.Minute), func(c *store.Config) {
		// All of a request in one: the driver prepares nothing before.
		c.URL, c.TryTimeout, c.RetryFor = secret.New(through+"&default_query_exec_mode=exec"), 500*time.Millisecond, time.Millisecond
	})
	v.armFor("orchestrator_action_plans")
	ended := make(chan error, 1)
	go func() {
		_, err := silent.BeginStep(t.Context(), alone(run, store.StepBuild, "t"))
		ended <- err
	}()
	<-v.shut
	other := d.Open(t, as("other", time.Minute), func(c *store.Config) { c.TryTimeout, c.RetryFor = 10*time.Second, time.Minute })
	began := time.Now()
	start := begin(t, other, run, store.StepBuild, "t")
	t.Logf("another worker has the lock after %s", time.Since(began))
	if err := <-ended; !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("%v", err)
	}
	v.open()
	finish(t, other, start.Claim, good(store.StepBuild))
}

package store_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// connectionCutter is a proxy between a store and its database that cuts one
// connection at a moment that the test chooses. It counts in units of the protocol:
// a client ends a request with Sync or Query, a server an answer with
// ReadyForQuery.
type connectionCutter struct {
	listener net.Listener
	target   string
	relays   sync.WaitGroup

	mu       sync.Mutex
	conns    map[net.Conn]bool
	armed    bool
	request  int  // how many requests to let pass
	answered bool // cut when the next is answered, not before it is sent
	stay     bool // with the cut the database goes away, until restore
	cut      bool
	away     bool
}

// newConnectionCutter returns a cutter and the database's address through it.
func newConnectionCutter(t *testing.T, database string) (*connectionCutter, string) {
	t.Helper()
	target, listener, through := detour(t, database)
	c := &connectionCutter{listener: listener, target: target, conns: map[net.Conn]bool{}}
	c.relays.Go(c.accept)
	t.Cleanup(func() {
		_ = c.listener.Close()
		c.mu.Lock()
		for conn := range c.conns {
			_ = conn.Close()
		}
		c.mu.Unlock()
		c.relays.Wait()
	})
	return c, through
}

// detour opens a port for a proxy, and returns the database's own address and the
// address through the proxy.
func detour(t *testing.T, database string) (target string, listener net.Listener, through string) {
	t.Helper()
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	target = u.Host
	if listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	u.Host = listener.Addr().String()
	query := u.Query()
	query.Set("sslmode", "disable")
	u.RawQuery = query.Encode()
	return target, listener, u.String()
}

// arm sets the moment of the cut: after that many requests from now on, either
// before the next one reaches the server, or after the server has executed it and
// before its answer is delivered.
func (c *connectionCutter) arm(requests int, answered bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.armed, c.request, c.answered, c.stay, c.cut = true, requests, answered, false, false
}

// armOutage is like arm, but the cut ends all connections, and none can be made
// before restore.
func (c *connectionCutter) armOutage(requests int, answered bool) {
	c.arm(requests, answered)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stay = true
}

func (c *connectionCutter) restore() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.away = false
}

// disarm says whether a connection was cut.
func (c *connectionCutter) disarm() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.armed = false
	return c.cut
}

// due counts a request, and says whether to cut now, and whether the server is to
// execute the request first. The arguments are both ends of its connection.
func (c *connectionCutter) due(one, two net.Conn) (cut, answered bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.armed || c.cut {
		return false, false
	}
	c.request--
	c.cut = c.request < 0
	if c.cut && c.stay {
		c.away = true
		for conn := range c.conns {
			if conn != one && conn != two {
				_ = conn.Close()
			}
		}
	}
	return c.cut, c.answered
}

func (c *connectionCutter) accept() {
	for {
		client, err := c.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", c.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		c.mu.Lock()
		c.conns[client], c.conns[server] = true, true
		if c.away {
			_ = client.Close()
			_ = server.Close()
		}
		c.mu.Unlock()
		swallow := make(chan struct{}) // closed when the next answer is the one
		end := func() { _ = client.Close(); _ = server.Close() }
		c.relays.Go(func() {
			defer end()
			c.requests(server, client, swallow)
		})
		c.relays.Go(func() {
			defer end()
			answers(client, server, swallow)
		})
	}
}

// requests forwards what the client sends.
func (c *connectionCutter) requests(to, from net.Conn, swallow chan struct{}) {
	for first := true; ; first = false {
		message, kind, err := readMessage(from, first)
		if err != nil {
			return
		}
		if kind == 'S' || kind == 'Q' {
			switch cut, answered := c.due(to, from); {
			case cut && !answered:
				return
			case cut:
				close(swallow)
			}
		}
		if _, err := to.Write(message); err != nil {
			return
		}
	}
}

// answers forwards what the server sends.
func answers(to, from net.Conn, swallow chan struct{}) {
	for {
		message, kind, err := readMessage(from, false)
		if err != nil {
			return
		}
		select {
		case <-swallow:
			// Done is what is asked when the server waits for more.
			if kind == 'Z' {
				return
			}
			continue
		default:
		}
		if _, err := to.Write(message); err != nil {
			return
		}
	}
}

// readMessage reads one message; the first of a client has no kind.
func readMessage(from io.Reader, first bool) (message []byte, kind byte, err error) {
	head := make([]byte, 5)
	if first {
		head = head[1:]
	}
	if _, err := io.ReadFull(from, head); err != nil {
		return nil, 0, err
	}
	if !first {
		kind = head[0]
	}
	size := int(binary.BigEndian.Uint32(head[len(head)-4:])) - 4
	message = append(head, make([]byte, size)...)
	_, err = io.ReadFull(from, message[len(head):])
	return message, kind, err
}

// everywhere repeats a call with a cut at each of its moments in turn, counted from
// its call of begin, until there are no more. The cut may hit the session of the
// worker's lock as well.
func everywhere(t *testing.T, c *connectionCutter, do func(t *testing.T, begin func())) {
	t.Helper()
	for _, answered := range []bool{false, true} {
		for n := 0; ; n++ {
			do(t, func() { c.arm(n, answered) })
			cut := c.disarm()
			if t.Failed() {
				t.Fatalf("when cut after %d requests, answered: %t", n, answered)
			}
			if !cut {
				if n < 1 {
					t.Fatalf("no moment was found")
				}
				t.Logf("cut at %d moments, answered: %t", n, answered)
				break
			}
		}
	}
}

// TestEveryCallSurvivesACutAtEveryMoment cuts the connection before each statement,
// and between its execution and its answer, the commit included.
func TestEveryCallSurvivesACutAtEveryMoment(t *testing.T) {
	t.Parallel()
	open := func(t *testing.T) (*storetest.Database, *connectionCutter, *store.Store) {
		d := storetest.New(t)
		c, through := newConnectionCutter(t, d.URL)
		s := d.Open(t, func(config *store.Config) { config.URL, config.TakeoverGrace = secret.New(through), time.Minute })
		return d, c, s
	}
	t.Run("step", func(t *testing.T) {
		t.Parallel()
		d, c, s := open(t)
		everywhere(t, c, func(t *testing.T, armed func()) {
			run := d.Create(t, storetest.Seed{})
			armed()
			claim := begin(t, s, run, store.StepBuild, "t").Claim
			record(t, s, claim, come(1, 0))
			if f := finish(t, s, claim, good(store.StepBuild)); f.RunEnded || f.Status != store.RunRunning {
				t.Errorf("finished %+v", f)
			}
			equal(t, "claim", d.Rows(t, `SELECT starts, handed_back, outcome IS NOT NULL AS ended, progress ->> 'commands' AS commands FROM mm_orchestrator.claims WHERE run_id = $1`, run),
				[]storetest.Row{{"starts": 1, "handed_back": 0, "ended": true, "commands": "1"}})
			equal(t, "artifacts", d.Rows(t, `SELECT count(*) AS n FROM orchestrator_run_artifacts WHERE run_id = $1`, run), []storetest.Row{{"n": 1}})
			equal(t, "state", d.Rows(t, `SELECT plan_step_status::text AS status, attempt FROM spec_workflow_task_states WHERE orchestrator_run_id = $1 AND plan_step = 'build'`, run),
				[]storetest.Row{{"status": "succeeded", "attempt": 1}})
			if _, done := decide(t, s, run, store.StepBuild, "t").(store.Done); !done {
				t.Error("the step is not known as ended")
			}
		})
	})
	t.Run("release", func(t *testing.T) {
		t.Parallel()
		d, c, s := open(t)
		everywhere(t, c, func(t *testing.T, armed func()) {
			run := d.Create(t, storetest.Seed{})
			begin := func() store.Claim { return begin(t, s, run, store.StepBuild, "t").Claim }
			if err := s.ReleaseClaim(t.Context(), begin()); err != nil {
				t.Error(err)
			}
			claim := begin()
			armed()
			if err := s.ReleaseClaim(t.Context(), claim); err != nil {
				t.Error(err)
			}
			equal(t, "claim", d.Rows(t, `SELECT starts, handed_back FROM mm_orchestrator.claims WHERE run_id = $1`, run),
				[]storetest.Row{{"starts": 2, "handed_back": 2}})
		})
	})
	t.Run("result", func(t *testing.T) {
		t.Parallel()
		d, c, s := open(t)
		results := storetest.Results(t, s, protocol.EncodingJSON)
		everywhere(t, c, func(t *testing.T, armed func()) {
			run := d.Create(t, storetest.Seed{}) // its id serves as a task's
			armed()
			// The error callbacks depend on this answer.
			equal(t, "failure written", save(t, results, failed(run)), []bool{true})
			save(t, results, success(run, "1"))
			equal(t, "failure after success written", save(t, results, failed(run)), []bool{false})
			equal(t, "rows", d.Rows(t, `SELECT status FROM celery_taskmeta WHERE task_id = $1`, run), []storetest.Row{{"status": "SUCCESS"}})
		})
	})
	// An operator is told what was done, and not that it was done already.
	t.Run("by hand", func(t *testing.T) {
		t.Parallel()
		d := storetest.New(t)
		c, through := newConnectionCutter(t, d.OwnerURL)
		s := d.Open(t, func(config *store.Config) { config.URL = secret.New(through) })
		everywhere(t, c, func(t *testing.T, armed func()) {
			run := d.Create(t, storetest.Seed{})
			queue := run // one for each round
			if _, _, err := s.PauseQueue(t.Context(), store.Pause{Queue: queue, Mode: store.PausePark, Reason: "upgrade"}); err != nil {
				t.Error(err)
			}
			spec := d.Rows(t, `INSERT INTO spec_workflow_runs (id, feature_key, status, phase) VALUES (gen_random_uuid(), $1, 'failed', 'discover') RETURNING id::text`, run)[0]["id"].(string)
			armed()
			if revoked, err := s.RevokeRun(t.Context(), store.Revocation{RunID: run, Reason: "no"}); err != nil || !revoked.Ended || revoked.TooLate {
				t.Errorf("revoked %+v (%v)", revoked, err)
			}
			if pause, err := s.ResumeQueue(t.Context(), queue, "ops@box"); err != nil || pause == nil || pause.Reason != "upgrade" {
				t.Errorf("resumed %+v (%v)", pause, err)
			}
			err := s.RetrySpecRun(t.Context(), spec, func(d store.SpecRunDetail) (store.SpecRetry, error) {
				if d.Run.Status != store.SpecRunFailed {
					return store.SpecRetry{}, errors.New("the run is " + string(d.Run.Status))
				}
				return store.SpecRetry{From: store.SpecDiscover, Attempt: 2, ChainID: spec}, nil
			})
			if err != nil {
				t.Errorf("retried: %v", err)
			}
			equal(t, "rows of the retry", d.Rows(t, `SELECT count(*) AS n FROM spec_workflow_task_states WHERE workflow_run_id = $1 AND attempt = 2`, spec), []storetest.Row{{"n": 3}})
		})
	})
	t.Run("pause", func(t *testing.T) {
		t.Parallel()
		d := storetest.New(t)
		c, through := newConnectionCutter(t, d.OwnerURL)
		s := d.Open(t, func(config *store.Config) { config.URL = secret.New(through) })
		everywhere(t, c, func(t *testing.T, armed func()) {
			queue := d.Create(t, storetest.Seed{}) // one for each round
			armed()
			if p, already, err := s.PauseQueue(t.Context(), store.Pause{Queue: queue, Mode: store.PausePark, Reason: "upgrade", By: "ann@box"}); err != nil || already || p.Reason != "upgrade" {
				t.Errorf("paused %+v, already: %t (%v)", p, already, err)
			}
			if p, already, err := s.PauseQueue(t.Context(), store.Pause{Queue: queue, Mode: store.PauseFinish, Reason: "longer", By: "ops@box"}); err != nil || !already || p.Reason != "longer" || p.By != "ann@box" || p.ChangedBy != "ops@box" {
				t.Errorf("paused again %+v, already: %t (%v)", p, already, err)
			}
		})
	})
	// The caller sends what follows a rollback's request, and an operator is told.
	t.Run("rollback request", func(t *testing.T) {
		t.Parallel()
		d, c, s := open(t)
		everywhere(t, c, func(t *testing.T, armed func()) {
			run := d.Create(t, storetest.Seed{})
			for _, step := range toVerify {
				claim := starts(t, s, shared(run, run, step, run+"-"+string(step)))
				if step == store.StepPatch {
					record := json.RawMessage(`{"version":1}`)
					if err := s.RecordChange(t.Context(), claim, record); err != nil {
						t.Fatal(err)
					}
				}
				finish(t, s, claim, good(step))
			}
			armed()
			if r := requestRollback(t, s, "q", run); r.Already || len(r.Obstacles) > 0 || r.PreviousStatus != store.RunSucceeded {
				t.Errorf("requested %+v", r)
			}
			if r := requestRollback(t, s, "q", run); !r.Already {
				t.Errorf("requested again %+v", r)
			}
			equal(t, "parked", d.Rows(t, `SELECT count(*) AS n FROM mm_orchestrator.parked WHERE run_id = $1`, run), []storetest.Row{{"n": 1}})
		})
	})
	// The sweep logs and counts the runs that it ends.
	t.Run("ended by a sweep", func(t *testing.T) {
		t.Parallel()
		d, c, s := open(t)
		everywhere(t, c, func(t *testing.T, armed func()) {
			lost, unapproved := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
			claim := starts(t, s, shared(lost, lost, store.StepBuild, lost))
			if err := s.ReleaseClaim(t.Context(), claim); err != nil {
				t.Fatal(err)
			}
			finish(t, s, starts(t, s, shared(unapproved, unapproved, store.StepRestart, unapproved)), good(store.StepRestart))
			d.Rows(t, `UPDATE orchestrator_runs SET status = 'awaiting_approval' WHERE id = $1 RETURNING 1`, unapproved)
			d.Rows(t, `
				INSERT INTO mm_orchestrator.approvals AS a (run_id, queue, paused_at, wait_until, workspace, paused_attempt)
				VALUES ($1::uuid, 'q', now() - interval '2 hours', now() - interval '1 hour', $1::uuid::text, 1)
				ON CONFLICT (run_id, queue) DO UPDATE SET paused_at = EXCLUDED.paused_at, wait_until = EXCLUDED.wait_until, workspace = EXCLUDED.workspace, paused_attempt = EXCLUDED.paused_attempt
				RETURNING 1`, unapproved)
			found := suspect(t, s, lost, 0)
			found.Workspace = lost
			armed()
			if ended, err := s.FailLost(t.Context(), found, rollbackMessage); err != nil || ended == nil || ended.Step != store.StepBuild || !ended.RollbackSent {
				t.Errorf("lost: %+v (%v)", ended, err)
			}
			if ended, err := s.EndUnapproved(t.Context(), "q", rollbackMessage); err != nil || len(ended) != 1 || ended[0].RunID != unapproved || !ended[0].RollbackSent {
				t.Errorf("not approved: %+v (%v)", ended, err)
			}
			for _, run := range []string{lost, unapproved} {
				equal(t, "parked", d.Rows(t, `SELECT count(*) AS n FROM mm_orchestrator.parked WHERE run_id = $1`, run), []storetest.Row{{"n": 1}})
				equal(t, "status", d.Rows(t, `SELECT status::text FROM orchestrator_runs WHERE id = $1`, run), []storetest.Row{{"status": "failed"}})
			}
		})
	})
	t.Run("parked", func(t *testing.T) {
		t.Parallel()
		d, c, s := open(t)
		everywhere(t, c, func(t *testing.T, armed func()) {
			first, second := d.Create(t, storetest.Seed{}), d.Create(t, storetest.Seed{})
			workspace := first // one for each round
			claim := starts(t, s, shared(workspace, first, store.StepVerify, first))
			armed()
			waits(t, s, shared(workspace, second, store.StepVerify, second), store.ParkedWorkspace)
			finish(t, s, claim, good(store.StepVerify))
			messages := take(t, s, "q")
			if len(messages) == 0 {
				// The answer was lost, so the message is taken by nobody who
				// knows of it. It is given out again, later.
				d.Rows(t, `UPDATE mm_orchestrator.parked SET taken_at = taken_at - interval '31 s' RETURNING id`)
				messages = take(t, s, "q")
			}
			if len(messages) != 1 || messages[0].TaskID != second {
				t.Errorf("taken %+v", messages)
				return
			}
			if err := s.KeepParked(t.Context(), messages[0].ID, false); err != nil {
				t.Error(err)
			}
			if err := s.DropParked(t.Context(), messages[0].ID); err != nil {
				t.Error(err)
			}
			equal(t, "parked", len(d.Rows(t, `SELECT id FROM mm_orchestrator.parked`)), 0)
		})
	})
}

package store_test

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// TestACommitThatIsToldLate: a worker whose path to the database falls silent
// when its claim has just been committed may be counted dead before it knows
// that it has begun. It must not begin then.
func TestACommitThatIsToldLate(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	v, through := newValve(t, d.URL)
	late := d.Open(t, func(c *store.Config) { c.URL, c.RetryFor = secret.New(through), 5*time.Minute })
	heir := d.Open(t, as("heir", 300*time.Millisecond))

	decided := make(chan store.Decision, 1)
	v.arm()
	go func() {
		decision, err := late.BeginStep(t.Context(), alone(run, store.StepBuild, "t"))
		if err != nil {
			t.Error(err)
		}
		decided <- decision
	}()
	select {
	case <-v.shut:
	case <-time.After(5 * time.Minute):
		t.Fatal("no commit was answered")
	}
	// The server sees that its client's sessions are gone, all but the one that
	// is about to answer; of that one it need not see anything.
	if n := len(d.Rows(t, `SELECT pg_terminate_backend(l.pid) FROM pg_locks AS l
		JOIN pg_stat_activity AS a ON a.pid = l.pid AND a.datname = current_database()
		WHERE l.locktype = 'advisory' AND l.mode = 'ExclusiveLock'`)); n != 1 {
		t.Fatalf("%d workers hold their locks, want the late one", n)
	}
	var taken store.Start
	for begun, is := time.Now(), false; !is; {
		if taken, is = decide(t, heir, run, store.StepBuild, "t").(store.Start); time.Since(begun) > 5*time.Minute {
			t.Fatal("never taken over")
		}
	}
	<-time.After(time.Second) // as long as the real grace would have taken
	v.open()
	select {
	case decision := <-decided:
		if start, is := decision.(store.Start); is {
			t.Errorf("started with claim %+v, which was taken over as %+v", start.Claim, taken.Claim)
		}
	case <-time.After(5 * time.Minute):
		t.Fatal("never decided")
	}
	finish(t, heir, taken.Claim, good(store.StepBuild))
}

// TestACommitThatIsToldLateAndStands: the claim is still the worker's own, and
// it begins, once.
func TestACommitThatIsToldLateAndStands(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	v, through := newValve(t, d.URL)
	late := d.Open(t, func(c *store.Config) { c.URL, c.RetryFor = secret.New(through), 5*time.Minute })
	v.arm()
	opened := time.Now().Add(1500 * time.Millisecond)
	time.AfterFunc(1500*time.Millisecond, v.open)
	start := begin(t, late, run, store.StepBuild, "t")
	if start.Claim.Starts != 1 || start.OwnedAt.Before(opened) {
		t.Errorf("%+v as of %s", start.Claim, start.OwnedAt)
	}
	finish(t, late, start.Claim, good(store.StepBuild))
}

// valve stands between a store and its database. Once armed it lets the next
// commit, or whatever it is armed for, through and nothing after that, in either
// direction, until opened: connections stay as they are, and new ones wait.
type valve struct {
	listener net.Listener
	target   string
	relays   sync.WaitGroup
	// shut is closed when the commit is on its way.
	shut chan struct{}

	mu     sync.Mutex
	armed  string        // what the last request to pass contains, "" if not armed
	found  bool          // in a message of a request that goes on
	opened chan struct{} // closed while anything may pass
	conns  []net.Conn
}

// newValve returns the address of the database that leads through it.
func newValve(t *testing.T, database string) (*valve, string) {
	t.Helper()
	target, listener, through := detour(t, database)
	v := &valve{listener: listener, target: target, shut: make(chan struct{}), opened: make(chan struct{})}
	close(v.opened)
	v.relays.Go(v.accept)
	t.Cleanup(func() {
		_ = v.listener.Close()
		v.open()
		v.mu.Lock()
		for _, conn := range v.conns {
			_ = conn.Close()
		}
		v.mu.Unlock()
		v.relays.Wait()
	})
	return v, through
}

func (v *valve) arm() { v.armFor("commit") }

// armFor shuts behind the first request that contains a text, once the server
// has all of it.
func (v *valve) armFor(text string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.armed = text
}

func (v *valve) open() {
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-v.opened:
	default:
		close(v.opened)
	}
}

// wait returns when something may pass.
func (v *valve) wait() {
	v.mu.Lock()
	opened := v.opened
	v.mu.Unlock()
	<-opened
}

// passes shuts the valve behind the request for which it is armed.
func (v *valve) passes(message []byte, kind byte) {
	v.wait()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.found = v.found || v.armed != "" && bytes.Contains(message, []byte(v.armed))
	if v.found && (kind == 'Q' || kind == 'S') {
		v.armed, v.found, v.opened = "", false, make(chan struct{})
		close(v.shut)
	}
}

func (v *valve) accept() {
	for {
		client, err := v.listener.Accept()
		if err != nil {
			return
		}
		v.wait()
		server, err := net.Dial("tcp", v.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		v.mu.Lock()
		v.conns = append(v.conns, client, server)
		v.mu.Unlock()
		end := func() { _ = client.Close(); _ = server.Close() }
		v.relays.Go(func() {
			defer end()
			for first := true; ; first = false {
				message, kind, err := readMessage(client, first)
				if err != nil {
					v.wait() // the end is a message too
					return
				}
				v.passes(message, kind)
				if _, err := server.Write(message); err != nil {
					return
				}
			}
		})
		v.relays.Go(func() {
			defer end()
			for {
				message, _, err := readMessage(server, false)
				v.wait()
				if err != nil {
					return
				}
				if _, err := client.Write(message); err != nil {
					return
				}
			}
		})
	}
}

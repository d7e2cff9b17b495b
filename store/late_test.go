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

// TestALateCommitAnswer: the network fails silently just after the commit of a claim.
// Others may consider the worker dead before it gets the answer. It must not start
// the step then.
func TestALateCommitAnswer(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	v, through := newStallProxy(t, d.URL)
	late := d.Open(t, func(c *store.Config) { c.URL, c.RetryFor = secret.New(through), 5*time.Minute })
	successor := d.Open(t, as("successor", 300*time.Millisecond))

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
		if taken, is = decide(t, successor, run, store.StepBuild, "t").(store.Start); time.Since(begun) > 5*time.Minute {
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
	finish(t, successor, taken.Claim, good(store.StepBuild))
}

// TestALateCommitAnswerKeepsTheClaim: no other worker took the claim, so the worker
// starts the step, once.
func TestALateCommitAnswerKeepsTheClaim(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	run := d.Create(t, storetest.Seed{})
	v, through := newStallProxy(t, d.URL)
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

// stallProxy is a proxy between a store and its database. Once armed it forwards the
// next commit, or the request that it is armed for, and then nothing in either
// direction until it is opened. Connections stay open, and new ones wait.
type stallProxy struct {
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

// newStallProxy returns a proxy and the database's address through it.
func newStallProxy(t *testing.T, database string) (*stallProxy, string) {
	t.Helper()
	target, listener, through := detour(t, database)
	v := &stallProxy{listener: listener, target: target, shut: make(chan struct{}), opened: make(chan struct{})}
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

func (v *stallProxy) arm() { v.armFor("commit") }

// armFor stalls the proxy after the first request that contains a text, once the
// server has received all of it.
func (v *stallProxy) armFor(text string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.armed = text
}

func (v *stallProxy) open() {
	v.mu.Lock()
	defer v.mu.Unlock()
	select {
	case <-v.opened:
	default:
		close(v.opened)
	}
}

// wait returns while the proxy does not stall, or once it is opened.
func (v *stallProxy) wait() {
	v.mu.Lock()
	opened := v.opened
	v.mu.Unlock()
	<-opened
}

// passes shuts the stallProxy behind the request for which it is armed.
func (v *stallProxy) passes(message []byte, kind byte) {
	v.wait()
	v.mu.Lock()
	defer v.mu.Unlock()
	v.found = v.found || v.armed != "" && bytes.Contains(message, []byte(v.armed))
	if v.found && (kind == 'Q' || kind == 'S') {
		v.armed, v.found, v.opened = "", false, make(chan struct{})
		close(v.shut)
	}
}

func (v *stallProxy) accept() {
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

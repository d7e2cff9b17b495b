package chaos

import (
	"io"
	"net"
	"sync"
	"time"
)

// fault is what a proxy does to the bytes that it relays.
type fault string

// The faults.
const (
	noFault fault = ""
	// reset ends all connections with RST and refuses new ones.
	reset fault = "reset"
	// stall relays nothing in either direction and closes no connection.
	stall fault = "stall"
	// deaf relays from the worker to the server and nothing back.
	deaf fault = "deaf"
	// mute relays from the server to the worker and nothing back.
	mute fault = "mute"
	// slow relays everything, with delays and in small pieces.
	slow fault = "slow"
	// pause is a stall after which all bytes are delivered: no side needs to
	// notice it.
	pause fault = "pause"
	// hole relays nothing, and connections from before it stay dead after it, as
	// when a firewall has lost its state. The server's side is closed at the end.
	// The worker's side stays open, so only its heartbeats can show that it is
	// dead. Connections made during the hole are reset at its end.
	hole fault = "hole"
)

// cuts says that the fault ends existing connections, at its beginning or end.
func (f fault) cuts() bool {
	switch f {
	case reset, stall, deaf, mute, hole:
		return true
	}
	return false
}

// A proxy is a TCP relay between one worker and one server.
type proxy struct {
	target   string
	listener net.Listener
	relays   sync.WaitGroup

	mu     sync.Mutex
	fault  fault
	change chan struct{} // closed when fault changes
	links  map[*link]struct{}
	closed bool
}

// link is one connection through a proxy.
type link struct {
	client, server net.Conn
	// made is the fault during which the link was made.
	made fault
	// dead says that nothing reaches the client any more, not even the end of the
	// connection. Guarded by the proxy's mu.
	dead bool
}

func newProxy(target string) (*proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &proxy{target: target, listener: listener, change: make(chan struct{}), links: map[*link]struct{}{}}
	p.relays.Go(p.accept)
	return p, nil
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.relays.Go(func() { p.relay(client) })
	}
}

// set changes the fault. Bytes that a stall has delayed are delivered when it ends,
// unless the connection was reset.
func (p *proxy) set(f fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = f
	close(p.change)
	p.change = make(chan struct{})
	if f == reset {
		p.endAll()
	}
}

// drop resets all connections.
func (p *proxy) drop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endAll()
}

func (p *proxy) endAll() {
	for k := range p.links {
		k.end()
	}
	clear(p.links)
}

// end resets both sides.
func (k *link) end() {
	for _, conn := range []net.Conn{k.client, k.server} {
		_ = conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
}

// forget ends a hole: connections from before stay dead, those made during it are
// reset.
func (p *proxy) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for k := range p.links {
		if k.made == hole {
			k.end()
			delete(p.links, k)
			continue
		}
		k.dead = true
		k.server.Close()
	}
}

func (p *proxy) close() {
	p.mu.Lock()
	p.closed = true
	p.endAll()
	close(p.change)
	p.change = make(chan struct{})
	p.mu.Unlock()
	p.listener.Close()
	p.relays.Wait()
}

func (p *proxy) relay(client net.Conn) {
	defer client.Close()
	p.mu.Lock()
	refuse := p.closed || p.fault == reset
	p.mu.Unlock()
	if refuse {
		_ = client.(*net.TCPConn).SetLinger(0)
		return
	}
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer server.Close()
	p.mu.Lock()
	if p.closed || p.fault == reset {
		p.mu.Unlock()
		return
	}
	k := &link{client: client, server: server, made: p.fault}
	p.links[k] = struct{}{}
	p.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { p.pass(server, client, mute); p.hangUp(k) })
	both.Go(func() { p.pass(client, server, deaf); p.hangUp(k) })
	both.Wait()
	// A dead link stays until its client closes it or the proxy ends.
	_, _ = io.Copy(io.Discard, client)
	p.mu.Lock()
	delete(p.links, k)
	p.mu.Unlock()
}

// hangUp closes both sides when one has ended, except a dead client's.
func (p *proxy) hangUp(k *link) {
	p.mu.Lock()
	dead := k.dead
	p.mu.Unlock()
	k.server.Close()
	if !dead {
		k.client.Close()
	}
}

// pass copies one direction. The fault one stops only this direction.
func (p *proxy) pass(to, from net.Conn, one fault) {
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		for sent := 0; sent < n; {
			f, ok := p.gate(one)
			if !ok {
				return
			}
			piece := buffer[sent:n]
			if f == slow {
				piece = piece[:min(len(piece), 64)]
				time.Sleep(2 * time.Millisecond)
			}
			if _, err := to.Write(piece); err != nil {
				return
			}
			sent += len(piece)
		}
		if err != nil {
			return
		}
	}
}

// gate waits while the direction is stopped. It returns false when the proxy is
// closed.
func (p *proxy) gate(one fault) (fault, bool) {
	for {
		p.mu.Lock()
		f, change, closed := p.fault, p.change, p.closed
		p.mu.Unlock()
		if closed {
			return "", false
		}
		switch f {
		case stall, pause, hole, one:
		default:
			return f, true
		}
		<-change
	}
}

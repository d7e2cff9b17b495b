package chaos

import (
	"io"
	"net"
	"sync"
	"time"
)

// fault is what a proxy does to the bytes that pass.
type fault string

// The faults.
const (
	noFault fault = ""
	// reset ends all connections with RST and refuses new ones.
	reset fault = "reset"
	// stall passes nothing, in neither direction, and closes nothing.
	stall fault = "stall"
	// deaf passes what the worker sends and nothing of what the server says.
	deaf fault = "deaf"
	// mute passes what the server says and nothing of what the worker sends.
	mute fault = "mute"
	// slow passes everything, late and in small pieces.
	slow fault = "slow"
	// pause stalls, and then passes what it has held back: nobody needs to
	// notice.
	pause fault = "pause"
	// hole swallows everything, and what was connected is never heard of
	// again: a path whose state was lost. The server learns that its client is
	// gone; the worker has to find out by itself. Who connects meanwhile is
	// refused in the end.
	hole fault = "hole"
)

// cuts says whether the fault ends the connections that are there, at its
// beginning or at its end.
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
	// made is the fault during which it was made.
	made fault
	// dead: the client is to hear nothing any more, not even an end. Guarded
	// by the proxy's mu.
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

// set changes the fault. What a stalled direction holds back passes when the
// fault ends, unless the connection was reset: a cable that is plugged in
// again.
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

// drop ends the connections of the moment.
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

// forget ends a hole: what was connected before is dead, what tried to connect
// meanwhile is refused.
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
	// A dead one stays until its client gives up or the proxy is mended.
	_, _ = io.Copy(io.Discard, client)
	p.mu.Lock()
	delete(p.links, k)
	p.mu.Unlock()
}

// hangUp passes on that one side has ended.
func (p *proxy) hangUp(k *link) {
	p.mu.Lock()
	dead := k.dead
	p.mu.Unlock()
	k.server.Close()
	if !dead {
		k.client.Close()
	}
}

// pass copies one direction, which fault one stops.
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

// gate waits while the direction is stopped. False means that the proxy ends.
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

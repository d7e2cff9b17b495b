package e2e

import (
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"
)

// proxy is a TCP relay between the worker and one of its servers. When it is cut,
// it refuses connections, as a stopped server does.
type proxy struct {
	t      *testing.T
	target string
	addr   string

	mu       sync.Mutex
	listener net.Listener
	conns    map[net.Conn]struct{}
	// frames says that the protocol is AMQP, so that trap can match methods.
	frames bool
	trap   *trap
	relays sync.WaitGroup
}

// newProxy relays to the host and port of an address until the end of the test.
func newProxy(t *testing.T, address string) *proxy {
	t.Helper()
	server, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	// No program connects from this address: meanwhile its port would be another one's.
	p := &proxy{t: t, target: server.Host, addr: "127.0.0.2:0", conns: make(map[net.Conn]struct{}), frames: server.Scheme == "amqp"}
	p.restore()
	t.Cleanup(func() {
		p.cut()
		p.relays.Wait()
	})
	return p
}

// through returns the address with the proxy's host and port.
func (p *proxy) through(address string) string {
	server, err := url.Parse(address)
	if err != nil {
		p.t.Fatal(err)
	}
	server.Host = p.addr
	return server.String()
}

// cut ends all connections and refuses new ones.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	for conn := range p.conns {
		if tcp, ok := conn.(*net.TCPConn); ok {
			_ = tcp.SetLinger(0) // sends a reset, as a crashed server's kernel does
		}
		conn.Close()
	}
	clear(p.conns)
}

// restore listens again on the same port.
func (p *proxy) restore() {
	p.t.Helper()
	listener, err := net.Listen("tcp", p.addr)
	if err != nil {
		p.t.Fatal(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener, p.addr = listener, listener.Addr().String()
	p.relays.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			p.relays.Go(func() { p.relay(client) })
		}
	})
}

// isCut reports whether the proxy is cut.
func (p *proxy) isCut() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.listener == nil
}

// trap calls act once, at the n-th AMQP method of a kind that the client sends.
type trap struct {
	method amqpMethod
	n      int
	// pass lets the method reach the server before act is called.
	pass bool
	act  func()
}

// amqpMethod is a class and a method in it.
type amqpMethod struct{ class, method uint16 }

var (
	basicPublish = amqpMethod{60, 40}
	basicAck     = amqpMethod{60, 80}
)

// set replaces the trap; the count starts now.
func (p *proxy) set(trap trap) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trap = &trap
}

// triggered counts the method and returns the trap if this is the n-th one.
func (p *proxy) triggered(method amqpMethod) *trap {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.trap == nil || p.trap.method != method {
		return nil
	}
	if p.trap.n--; p.trap.n > 0 {
		return nil
	}
	trap := p.trap
	p.trap = nil
	return trap
}

func (p *proxy) relay(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer server.Close()
	p.mu.Lock()
	if p.listener == nil {
		p.mu.Unlock()
		return
	}
	p.conns[client], p.conns[server] = struct{}{}, struct{}{}
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.conns, client)
		delete(p.conns, server)
	}()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(client, server)
		client.Close()
	}()
	if p.frames {
		p.relayFrames(server, client)
	} else {
		_, _ = io.Copy(server, client)
	}
	server.Close()
	<-done
}

// relayFrames forwards the frames of an AMQP client one by one.
func (p *proxy) relayFrames(server io.Writer, client io.Reader) {
	if _, err := io.CopyN(server, client, 8); err != nil { // the protocol header
		return
	}
	head := make([]byte, 7)
	for {
		if _, err := io.ReadFull(client, head); err != nil {
			return
		}
		frame := make([]byte, 7+binary.BigEndian.Uint32(head[3:])+1)
		copy(frame, head)
		if _, err := io.ReadFull(client, frame[7:]); err != nil {
			return
		}
		var trap *trap
		if frame[0] == 1 { // a method
			trap = p.triggered(amqpMethod{binary.BigEndian.Uint16(frame[7:]), binary.BigEndian.Uint16(frame[9:])})
		}
		if trap != nil && !trap.pass {
			trap.act()
		}
		if _, err := server.Write(frame); err != nil {
			return
		}
		if trap != nil && trap.pass {
			// A publish ends with its header and body, which follow.
			if trap.method == basicPublish && !p.relayContent(server, client) {
				return
			}
			trap.act()
		}
	}
}

// relayContent forwards the header frame and the body frames of a publish.
func (p *proxy) relayContent(server io.Writer, client io.Reader) bool {
	head := make([]byte, 7)
	for left := uint64(1); left > 0; {
		if _, err := io.ReadFull(client, head); err != nil {
			return false
		}
		frame := make([]byte, 7+binary.BigEndian.Uint32(head[3:])+1)
		copy(frame, head)
		if _, err := io.ReadFull(client, frame[7:]); err != nil {
			return false
		}
		if _, err := server.Write(frame); err != nil {
			return false
		}
		switch frame[0] {
		case 2: // a header: class, weight, size of the body
			left = binary.BigEndian.Uint64(frame[11:])
		case 3:
			left -= uint64(binary.BigEndian.Uint32(frame[3:]))
		}
	}
	return true
}

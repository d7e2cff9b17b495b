package workertest

import (
	"net"
	"net/url"
	"sync"
	"testing"
)

// Proxy is a TCP proxy between a worker and its broker that injects network
// faults. Its methods may be called by any goroutine.
type Proxy struct {
	listener net.Listener
	target   string

	mu      sync.Mutex
	pairs   map[*pair]bool
	refuse  bool
	stalled chan struct{} // nil unless stalled; closed by Restore
	wait    sync.WaitGroup
}

type pair struct{ client, server net.Conn }

// NewProxy starts a proxy for the broker at a URL, and returns the URL of the proxy.
// It ends with the test.
func NewProxy(t testing.TB, broker string) (*Proxy, string) {
	t.Helper()
	address, err := url.Parse(broker)
	if err != nil {
		t.Fatalf("proxy: %v", err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatalf("proxy: %v", err)
	}
	p := &Proxy{listener: listener, target: address.Host, pairs: map[*pair]bool{}}
	p.wait.Go(p.accept)
	t.Cleanup(p.close)
	through := *address
	through.Host = listener.Addr().String()
	return p, through.String()
}

// Cut closes every connection and refuses new ones until Restore.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = true
	p.closeAll()
}

// CutOnce closes every connection. New ones are accepted.
func (p *Proxy) CutOnce() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closeAll()
}

// Stall keeps connections open but forwards no data until Restore.
func (p *Proxy) Stall() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stalled == nil {
		p.stalled = make(chan struct{})
	}
}

// Restore ends Cut and Stall.
func (p *Proxy) Restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refuse = false
	if p.stalled != nil {
		close(p.stalled)
		p.stalled = nil
	}
}

func (p *Proxy) closeAll() {
	for c := range p.pairs {
		_ = c.client.Close()
		_ = c.server.Close()
	}
}

func (p *Proxy) close() {
	p.Cut()
	p.Restore()
	p.mu.Lock()
	p.refuse = true
	p.mu.Unlock()
	_ = p.listener.Close()
	p.wait.Wait()
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		refuse := p.refuse
		p.mu.Unlock()
		if refuse {
			_ = client.Close()
			continue
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		c := &pair{client, server}
		p.mu.Lock()
		p.pairs[c] = true
		if p.refuse {
			p.closeAll()
		}
		p.mu.Unlock()
		p.wait.Go(func() { p.relay(c, client, server) })
		p.wait.Go(func() { p.relay(c, server, client) })
	}
}

func (p *Proxy) relay(c *pair, to, from net.Conn) {
	defer func() {
		_ = c.client.Close()
		_ = c.server.Close()
		p.mu.Lock()
		delete(p.pairs, c)
		p.mu.Unlock()
	}()
	buffer := make([]byte, 32<<10)
	for {
		n, err := from.Read(buffer)
		if n > 0 {
			p.mu.Lock()
			stalled := p.stalled
			p.mu.Unlock()
			if stalled != nil {
				<-stalled
			}
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

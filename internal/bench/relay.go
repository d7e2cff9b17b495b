package bench

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"
)

// A relay stands between a process and a server. It can keep the connections open and
// forward nothing, and it counts what a client of PostgreSQL sends.
type relay struct {
	URL string

	listener net.Listener
	target   string
	postgres bool

	mu      sync.Mutex
	stalled chan struct{} // nil unless stalled; closed by resume
	conns   map[net.Conn]bool
	closed  bool
	// statements by the beginning of their text, and the waits for an answer.
	statements map[string]int
	roundTrips int
	wait       sync.WaitGroup
}

// startRelay starts a relay to the server of a URL.
func startRelay(server string, postgres bool) (*relay, error) {
	address, err := url.Parse(server)
	if err != nil {
		return nil, err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{listener: listener, target: address.Host, postgres: postgres, conns: map[net.Conn]bool{}, statements: map[string]int{}}
	through := *address
	through.Host = listener.Addr().String()
	r.URL = through.String()
	r.wait.Go(r.accept)
	return r, nil
}

func (r *relay) stall() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stalled = make(chan struct{})
}

func (r *relay) resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stalled != nil {
		close(r.stalled)
		r.stalled = nil
	}
}

// take returns what was counted since the last call.
func (r *relay) take() (statements map[string]int, total, roundTrips int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	statements, roundTrips = r.statements, r.roundTrips
	r.statements, r.roundTrips = map[string]int{}, 0
	for _, n := range statements {
		total += n
	}
	return statements, total, roundTrips
}

func (r *relay) close() {
	r.resume()
	_ = r.listener.Close()
	r.mu.Lock()
	r.closed = true
	for c := range r.conns {
		_ = c.Close()
	}
	r.mu.Unlock()
	r.wait.Wait()
}

func (r *relay) accept() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", r.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		r.mu.Lock()
		r.conns[client], r.conns[server] = true, true
		if r.closed {
			_, _ = client.Close(), server.Close()
		}
		r.mu.Unlock()
		end := func() {
			_, _ = client.Close(), server.Close()
			r.mu.Lock()
			delete(r.conns, client)
			delete(r.conns, server)
			r.mu.Unlock()
		}
		r.wait.Go(func() { defer end(); r.forward(server, client, r.postgres) })
		r.wait.Go(func() { defer end(); r.forward(client, server, false) })
	}
}

func (r *relay) forward(to io.Writer, from io.Reader, count bool) {
	if count {
		read, write := io.Pipe()
		counted := make(chan struct{})
		go func() {
			defer close(counted)
			r.count(read)
			_, _ = io.Copy(io.Discard, read) // an unknown message is not counted
		}()
		defer func() { _ = write.Close(); <-counted }()
		to = io.MultiWriter(to, write)
	}
	buffer := make([]byte, 64<<10)
	for {
		n, err := from.Read(buffer)
		r.mu.Lock()
		stalled := r.stalled
		r.mu.Unlock()
		if stalled != nil {
			<-stalled
		}
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// protocol3 is the version in the first message of a session.
const protocol3 = 3 << 16

// count reads the messages of a client of PostgreSQL.
func (r *relay) count(from io.Reader) {
	in := bufio.NewReader(from)
	prepared := map[string]string{}
	for begun := false; ; {
		var kind byte
		var err error
		if begun {
			if kind, err = in.ReadByte(); err != nil {
				return
			}
		}
		var size uint32
		if err := binary.Read(in, binary.BigEndian, &size); err != nil || size < 4 {
			return
		}
		body := make([]byte, size-4)
		if _, err := io.ReadFull(in, body); err != nil {
			return
		}
		if !begun {
			// Before it, a client may ask for encryption, which the servers of a run refuse.
			begun = len(body) >= 4 && binary.BigEndian.Uint32(body) == protocol3
			continue
		}
		text := func(body []byte) (string, []byte) {
			value, rest, _ := bytes.Cut(body, []byte{0})
			return string(value), rest
		}
		r.mu.Lock()
		switch kind {
		case 'P': // Parse
			name, rest := text(body)
			prepared[name], _ = text(rest)
		case 'B': // Bind, which an Execute follows
			_, rest := text(body)
			name, _ := text(rest)
			r.statements[shortStatement(prepared[name])]++
		case 'Q': // Query
			statement, _ := text(body)
			r.statements[shortStatement(statement)]++
			r.roundTrips++
		case 'S': // Sync
			r.roundTrips++
		}
		r.mu.Unlock()
	}
}

// shortStatement is a statement in one line, as far as it fits into a table.
func shortStatement(statement string) string {
	words := strings.Join(strings.Fields(statement), " ")
	if len(words) > 100 {
		words = strings.ToValidUTF8(words[:100], "") + " …"
	}
	return words
}

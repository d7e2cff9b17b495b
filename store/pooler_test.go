package store_test

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// pooler behaves to clients as PgBouncer does: it has a number of its own for
// each, and lends them servers, for a transaction or for the session. The
// server returned last is lent first, as PgBouncer does.
type pooler struct {
	t           *testing.T
	target      string
	transaction bool

	mu   sync.Mutex
	idle []*server
	all  []*server
}

type server struct {
	conn     net.Conn
	frontend *pgproto3.Frontend
}

func (p *pooler) take() (*server, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.idle); n > 0 {
		s := p.idle[n-1]
		p.idle = p.idle[:n-1]
		return s, nil
	}
	conn, err := pgconn.Connect(p.t.Context(), p.target)
	if err != nil {
		return nil, err
	}
	h, err := conn.Hijack()
	if err != nil {
		return nil, err
	}
	s := &server{h.Conn, h.Frontend}
	p.all = append(p.all, s)
	return s, nil
}

func (p *pooler) give(s *server) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.idle = append(p.idle, s)
}

func (p *pooler) serve(client net.Conn, number uint32) error {
	backend := pgproto3.NewBackend(client, client)
	for {
		first, err := backend.ReceiveStartupMessage()
		if err != nil {
			return err
		}
		if _, tls := first.(*pgproto3.SSLRequest); !tls {
			break
		}
		if _, err := client.Write([]byte("N")); err != nil {
			return err
		}
	}
	backend.Send(&pgproto3.AuthenticationOk{})
	for name, value := range map[string]string{"client_encoding": "UTF8", "standard_conforming_strings": "on", "server_version": "15.0"} {
		backend.Send(&pgproto3.ParameterStatus{Name: name, Value: value})
	}
	backend.Send(&pgproto3.BackendKeyData{ProcessID: number, SecretKey: []byte{1, 2, 3, 4}})
	backend.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if err := backend.Flush(); err != nil {
		return err
	}
	var lent *server
	defer func() {
		if lent != nil && !p.transaction {
			p.give(lent)
		}
	}()
	for {
		message, err := backend.Receive()
		if err != nil {
			return err
		}
		if _, bye := message.(*pgproto3.Terminate); bye {
			return nil
		}
		if lent == nil {
			if lent, err = p.take(); err != nil {
				return err
			}
		}
		lent.frontend.Send(message)
		switch message.(type) {
		case *pgproto3.Query, *pgproto3.Sync:
		default:
			continue
		}
		if err := lent.frontend.Flush(); err != nil {
			return err
		}
		for ready := false; !ready; {
			answer, err := lent.frontend.Receive()
			if err != nil {
				return err
			}
			backend.Send(answer)
			var end *pgproto3.ReadyForQuery
			if end, ready = answer.(*pgproto3.ReadyForQuery); ready && end.TxStatus == 'I' && p.transaction {
				p.give(lent)
				lent = nil
			}
		}
		if err := backend.Flush(); err != nil {
			return err
		}
	}
}

// pooled returns the address of the database through a pooler.
func pooled(t *testing.T, database string, transaction bool) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &pooler{t: t, target: database, transaction: transaction}
	var group sync.WaitGroup
	group.Go(func() {
		for number := uint32(1 << 30); ; number++ {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			group.Go(func() {
				defer client.Close()
				_ = p.serve(client, number) // the client hears of it
			})
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		p.mu.Lock()
		for _, s := range p.all {
			_ = s.conn.Close()
		}
		p.mu.Unlock()
		group.Wait()
	})
	u, err := url.Parse(database)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = listener.Addr().String()
	q := u.Query()
	q.Set("sslmode", "disable")
	u.RawQuery = q.Encode()
	return u.String()
}

// A pooler that lends a server for one transaction is found out; one that
// lends it for the session, and no pooler at all, are fine.
func TestPoolersThatBreakLocksAreFoundOut(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	for _, tt := range []struct {
		name, url string
		refused   bool
	}{
		{"direct", d.URL, false},
		{"session", pooled(t, d.URL, false), false},
		{"transaction", pooled(t, d.URL, true), true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := store.Open(t.Context(), store.Config{URL: secret.New(tt.url)})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			err = s.CheckSession(t.Context())
			if refused := errors.Is(err, store.ErrInvalid); refused != tt.refused || !refused && err != nil {
				t.Error(err)
			}
			if tt.refused && (err == nil || !strings.Contains(fmt.Sprint(err), "pool_mode=session")) {
				t.Error(err)
			}
		})
	}
}

func TestSkewOfOneMachineIsSmall(t *testing.T) {
	t.Parallel()
	s := storetest.New(t).Open(t)
	if skew, err := s.Skew(t.Context()); err != nil || skew.Abs().Seconds() > 2 {
		t.Errorf("%v %v", skew, err)
	}
}

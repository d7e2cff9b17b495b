package devenv

import (
	"context"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// A private server keeps its address and its data when it is stopped or killed,
// and Close removes everything.
func TestOwnDatabaseOutlivesItsServer(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, err := StartOwnDatabase(ctx)
	if err != nil {
		t.Fatal(err)
	}
	closed := false
	defer func() {
		if !closed {
			_ = s.Close()
		}
	}()
	exec := func(statement string) {
		t.Helper()
		conn, err := pgx.Connect(ctx, s.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close(ctx)
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.Fatal(err)
		}
	}
	exec(`CREATE TABLE kept ()`)
	for _, end := range []func() error{s.Stop, s.Kill} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		if s.answers(ctx) == nil {
			t.Fatal("the server still answers")
		}
		if err := s.Start(ctx); err != nil {
			t.Fatal(err)
		}
		exec(`SELECT FROM kept`)
	}
	h, process := s.host.(*processHost)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	closed = true
	if s.answers(ctx) == nil {
		t.Error("the server still answers after Close")
	}
	if process {
		if _, err := os.Stat(h.server.cmd.Dir); !os.IsNotExist(err) {
			t.Errorf("its folder was not removed: %v", err)
		}
	}
}

func TestOwnBrokerOutlivesItsServer(t *testing.T) {
	t.Parallel()
	s, err := StartOwnBroker(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	answers := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return s.answers(ctx) == nil
	}
	if address, err := url.Parse(s.URL); err != nil || address.Port() == "" {
		t.Errorf("its URL is %s (%v)", s.URL, err)
	}
	if err := s.Kill(); err != nil {
		t.Fatal(err)
	}
	if answers() {
		t.Fatal("the broker still answers")
	}
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !answers() {
		t.Error("the broker does not answer after its restart")
	}
}

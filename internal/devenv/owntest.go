package devenv

import (
	"context"
	"testing"
)

// PrivateServer is an [OwnServer] that is closed at the end of its test. Errors
// fail the test.
type PrivateServer struct {
	// URL is the server's.
	URL string

	t      testing.TB
	server *OwnServer
}

// OwnBroker is [StartOwnBroker] for a test.
func OwnBroker(t testing.TB, settings map[string]int) *PrivateServer {
	t.Helper()
	server, err := StartOwnBroker(t.Context(), settings)
	return private(t, server, err)
}

// OwnDatabase is [StartOwnDatabase] for a test.
func OwnDatabase(t testing.TB) *PrivateServer {
	t.Helper()
	server, err := StartOwnDatabase(t.Context())
	return private(t, server, err)
}

func private(t testing.TB, server *OwnServer, err error) *PrivateServer {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return &PrivateServer{URL: server.URL, t: t, server: server}
}

// Start is [OwnServer.Start]. It may be called by any goroutine.
func (s *PrivateServer) Start() {
	s.t.Helper()
	if err := s.server.Start(context.Background()); err != nil {
		s.t.Error(err)
	}
}

// Stop is [OwnServer.Stop]. It may be called by any goroutine.
func (s *PrivateServer) Stop() {
	s.t.Helper()
	if err := s.server.Stop(); err != nil {
		s.t.Errorf("a server of this test does not stop: %v", err)
	}
}

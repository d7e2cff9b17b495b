package store_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// CheckSession refuses a pooler that assigns server sessions by transaction, and
// accepts one that assigns them by client, or none.
func TestPoolersThatBreakLocks(t *testing.T) {
	t.Parallel()
	d := storetest.New(t)
	for _, tt := range []struct {
		name, url string
		refused   bool
	}{
		{"direct", d.URL, false},
		{"session", devenv.Pooler(t, d.URL, "session"), false},
		{"transaction", devenv.Pooler(t, d.URL, "transaction"), true},
		{"statement", devenv.Pooler(t, d.URL, "statement"), true},
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

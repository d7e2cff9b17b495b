package database

import (
	"errors"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// The driver says with a value of its own that a connection was closed between
// two statements: it is known by that, and not by its words, which may change
// and which others may use.
func TestAClosedConnectionIsUnavailable(t *testing.T) {
	t.Parallel()
	if got := classify(fmt.Errorf("some other words: %w", pgconn.ErrConnClosed)); got != ErrUnavailable {
		t.Errorf("the driver's error is classified as %v, want %v", got, ErrUnavailable)
	}
	if got := classify(errors.New("relation \"conn closed\" is odd")); got != nil {
		t.Errorf("the words alone are classified as %v, want no kind", got)
	}
}

package database

import (
	"context"
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

// What a later try may mend, and what no try does.
func TestKindsOfServerErrors(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]error{
		"53100": ErrUnavailable, // disk full
		"53200": ErrUnavailable, // out of memory
		"53300": ErrUnavailable, // too many connections
		"57014": ErrUnavailable, // statement_timeout of the role, pg_cancel_backend
		"25P04": ErrUnavailable, // transaction_timeout
		"58030": ErrUnavailable, // I/O error
		"25006": ErrUnavailable, // read-only
		"54000": ErrInvalid,     // a row too long for its index
		"42601": nil,            // syntax error
		"P0001": nil,            // raised by a trigger
	} {
		var own *Error
		if err := Translate("write", &pgconn.PgError{Code: code, Message: "m"}); !errors.As(err, &own) || own.Kind != want || own.Code != code {
			t.Errorf("%s is %+v, want the kind %v", code, err, want)
		}
	}
	// A table has changed since the statement was prepared, told in the server's language.
	changed := &pgconn.PgError{Code: "0A000", Message: "zwischengespeicherter Plan darf den Ergebnistyp nicht ändern", Routine: "RevalidateCachedQuery"}
	if err := Translate("write", changed); !errors.Is(err, ErrUnavailable) {
		t.Errorf("a plan that is out of date: %v", err)
	}
	// A call that its caller has ended is not for a retry, whatever the server says of it.
	ended := fmt.Errorf("%w: %w", context.Canceled, &pgconn.PgError{Code: "57014", Message: "canceling statement due to user request"})
	if err := Translate("write", ended); !errors.Is(err, context.Canceled) || errors.Is(err, ErrUnavailable) {
		t.Errorf("a call that was cancelled: %v", err)
	}
}

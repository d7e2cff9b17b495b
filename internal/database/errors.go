package database

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Kinds of errors, for errors.Is. An error of the driver becomes an [*Error] with
// one of these or with none, unless it is that of the caller's context.
var (
	// ErrNotFound: there is no such row.
	ErrNotFound = errors.New("not found")
	// ErrUnavailable: the database cannot be reached, is starting, stopping or
	// read-only, lacks a connection, memory or disk space, or ended the statement
	// for a limit, an operator or another transaction. A later try may succeed.
	ErrUnavailable = errors.New("database unavailable")
	// ErrSchema: a table, column or type is missing or not as expected.
	ErrSchema = errors.New("database schema does not fit")
	// ErrInvalid: a value is malformed, or the tables cannot store it.
	ErrInvalid = errors.New("invalid value")
	// ErrRefused: the database refused the role, the password or a privilege.
	ErrRefused = errors.New("database refused")
)

// Error is an error of a database. It does not wrap the driver's error, so that
// no caller depends on the driver.
type Error struct {
	// Kind is a sentinel, which errors.Is finds, or nil for any other error of the
	// database.
	Kind error
	// Code is the SQLSTATE, or "".
	Code string
	text string
}

// Error returns one line: what happened, to what, why.
func (e *Error) Error() string { return e.text }

// With returns a copy whose text ends with more.
func (e *Error) With(more string) *Error {
	return &Error{Kind: e.Kind, Code: e.Code, text: e.text + more}
}

// Unwrap returns the sentinel.
func (e *Error) Unwrap() error { return e.Kind }

// Permanent says that a retry cannot succeed.
func (e *Error) Permanent() bool { return !errors.Is(e.Kind, ErrUnavailable) }

// Failure returns an error of a kind. kind may be nil.
func Failure(kind error, format string, args ...any) *Error {
	return &Error{Kind: kind, text: fmt.Sprintf(format, args...)}
}

// Translate turns an error of the driver into an [*Error]. doing completes the
// sentence "cannot …". An *Error passes unchanged, and the errors of a context stay
// recognisable.
func Translate(doing string, err error) error {
	if err == nil {
		return nil
	}
	var own *Error
	if errors.As(err, &own) {
		return err
	}
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		// Not %w of err: the driver wraps these in types of its own.
		if errors.Is(err, context.Canceled) {
			return fmt.Errorf("cannot %s: %w", doing, context.Canceled)
		}
		return fmt.Errorf("cannot %s: %w", doing, context.DeadlineExceeded)
	}
	code, detail := "", OneLine(err.Error())
	var session *readOnlyError
	if errors.As(err, &session) {
		code = readOnly
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		code = pg.Code
		detail = fmt.Sprintf("%s (SQLSTATE %s)", OneLine(pg.Message), pg.Code)
		if pg.ConstraintName != "" {
			detail += ", constraint " + pg.ConstraintName
		}
	} else {
		detail = connectionWords(err, detail)
	}
	kind := classify(err)
	hint := ""
	if connect != nil && optionCodes[code] {
		// While a connection is made, these codes can only be about options.
		kind = ErrInvalid
		hint = "; this is an option of the database's address, and neither one of libpq's nor one that the server takes: correct it there, or leave it out"
	}
	if code == noStatement || code == duplicateStatement {
		hint = "; " + poolerCure
	}
	return &Error{Kind: kind, Code: code, text: "cannot " + doing + ": " + detail + hint}
}

// optionCodes are the server's codes for a parameter in the query of an address: an
// unknown one, an invalid value, or one that cannot be set at this time.
var optionCodes = map[string]bool{"42704": true, "22023": true, "55P02": true}

// connectionWords says briefly why there is no connection. The driver's text lists
// every address that it tried, with and without TLS.
func connectionWords(err error, otherwise string) string {
	var name *net.DNSError
	var certificate *tls.CertificateVerificationError
	var network net.Error
	var revoked *revokedError
	var peer *peerError
	switch {
	case errors.As(err, &name) && name.IsNotFound:
		return fmt.Sprintf("no such host (%s)", name.Name)
	case errors.As(err, &certificate):
		return OneLine(certificate.Error())
	case errors.As(err, &revoked):
		return revoked.Error()
	case errors.As(err, &peer):
		return peer.Error()
	case strings.HasSuffix(err.Error(), "server refused TLS connection"): // the last that was tried
		return "the server does not offer TLS, which sslmode in its address asks for"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "connection refused"
	case errors.Is(err, syscall.ENOENT):
		return "no such socket"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "no route to the host"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "the server closed the connection"
	case errors.As(err, &network) && network.Timeout():
		return "no answer in time"
	}
	return otherwise
}

// OneLine joins the lines of a text.
func OneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// classify returns the kind of an error of the driver. Unknown errors have none, and
// so are permanent.
func classify(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return classifyCode(pg.Code, pg.Routine)
	}
	var network net.Error
	var connect *pgconn.ConnectError
	var certificate *tls.CertificateVerificationError
	var revoked *revokedError
	var peer *peerError
	var session *readOnlyError
	switch {
	case errors.As(err, &session):
		return ErrUnavailable
	case errors.As(err, &certificate), errors.As(err, &revoked), errors.As(err, &peer):
		return ErrRefused
	case errors.As(err, &connect), errors.As(err, &network),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed),
		// A connection that died between two statements.
		errors.Is(err, pgconn.ErrConnClosed),
		pgconn.SafeToRetry(err), pgconn.Timeout(err):
		return ErrUnavailable
	case errors.Is(err, pgx.ErrNoRows):
		return ErrNotFound
	}
	return nil
}

// SQLSTATEs of prepared statements. A pooler that gives a session to one client after the
// other, as PgBouncer does with pool_mode=transaction, gives us one in which our statement
// is not prepared, or in which another client has prepared it: the driver derives the name
// from the text.
const (
	noStatement        = "26000"
	duplicateStatement = "42P05"
)

// poolerCure is what to do about such a pooler.
const poolerCure = "a connection pooler gives one session to several clients (PgBouncer with pool_mode=transaction): add default_query_exec_mode=exec to the database's address"

// LockNotAvailable is the SQLSTATE of NOWAIT and of lock_timeout.
const LockNotAvailable = "55P03"

// classifyCode returns the kind of a server's error. routine is the function of the server
// that has raised it: unlike the message, it is in no language (lc_messages).
func classifyCode(code, routine string) error {
	switch code {
	case "40001", "40P01", LockNotAvailable: // serialization failure, deadlock, lock not available
		return ErrUnavailable
	case "57P01", "57P02", "57P03", "57P05", "25P03": // shutdown, crash, starting up, idle session or transaction ended
		return ErrUnavailable
	case "57014", "25P04": // a limit of the role on statements or transactions, or an operator; our own limits are those of a context
		return ErrUnavailable
	case "58030": // I/O error
		return ErrUnavailable
	case "25006": // read-only: a standby, in the middle of a fail-over
		return ErrUnavailable
	case noStatement, duplicateStatement: // a pooler gave us another session
		return ErrUnavailable
	case "0A000":
		// The driver has dropped the prepared statement by now; the next try
		// prepares it anew.
		if routine == "RevalidateCachedQuery" { // cached plan must not change result type
			return ErrUnavailable
		}
		return nil
	case "42P01", "42703", "42704", "3F000", "42883": // no such table, column, type, schema, function
		return ErrSchema
	case "42501", "28000", "28P01", "3D000": // privilege, role, password, database
		return ErrRefused
	}
	switch code[:min(2, len(code))] {
	case "08", "53": // connection; no disk space, memory, connections
		return ErrUnavailable
	case "22", "23", "54": // data, integrity, more than the server can store, as in an index
		return ErrInvalid
	}
	return nil
}

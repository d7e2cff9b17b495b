package main

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strconv"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// postgresSettings are the POSTGRES_* values.
type postgresSettings struct {
	Host     string
	Port     int
	User     string
	Password secret.String
	Database string
}

// URL for package store. A host that begins with a slash is the directory of
// a Unix socket, as with libpq.
func (p postgresSettings) URL() secret.String {
	u := url.URL{Scheme: "postgresql", User: url.User(p.User), Path: "/" + p.Database}
	if !p.Password.IsZero() {
		u.User = url.UserPassword(p.User, p.Password.Reveal())
	}
	if strings.HasPrefix(p.Host, "/") {
		u.RawQuery = url.Values{"host": {p.Host}, "port": {strconv.Itoa(p.Port)}}.Encode()
	} else {
		u.Host = net.JoinHostPort(p.Host, strconv.Itoa(p.Port))
	}
	return secret.New(u.String())
}

// checkDatabaseURL takes postgres:// and postgresql:// URLs.
func checkDatabaseURL(text string) error {
	scheme, _, found := strings.Cut(text, "://")
	if !found || (scheme != "postgres" && scheme != "postgresql") {
		return errors.New("it must have the form postgresql://user:password@host:port/database")
	}
	if _, err := url.Parse(text); err != nil {
		// The error of url.Parse repeats the URL with its password.
		return errors.New("it is not a URL; characters of the password that have a meaning in URLs must be percent-encoded")
	}
	return nil
}

// parseResultBackend reads the URL of a Celery result backend. Empty and
// "disabled" mean none.
func parseResultBackend(text string) (secret.String, error) {
	trimmed := strings.TrimSpace(text)
	if trimmed == "" || trimmed == "disabled" || trimmed == "disabled://" {
		return secret.String{}, nil
	}
	scheme, rest, found := strings.Cut(trimmed, "://")
	if !found {
		return secret.String{}, errors.New("it must have the form db+postgresql://user:password@host:port/database")
	}
	dialect, _, _ := strings.Cut(strings.TrimPrefix(scheme, "db+"), "+")
	if !strings.HasPrefix(scheme, "db+") || (dialect != "postgresql" && dialect != "postgres") {
		return secret.String{}, fmt.Errorf("result backend %s:// is not supported: this program writes to db+postgresql:// or, when the variable is unset, nowhere", scheme)
	}
	plain := "postgresql://" + rest
	if err := checkDatabaseURL(plain); err != nil {
		return secret.String{}, err
	}
	return secret.New(plain), nil
}

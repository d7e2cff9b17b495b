package store

import (
	"net/url"
	"strings"
)

// DatabaseURL turns the URL of a Celery result backend into one that libpq
// and this package understand: "db+postgresql://…", "postgresql+psycopg2://…"
// and "db+postgresql+asyncpg://…" lose "db+" and the name of the driver.
// "postgres://…", "postgresql://…" and "key=value" strings pass unchanged.
func DatabaseURL(text string) (string, error) {
	scheme, rest, found := strings.Cut(text, "://")
	if !found {
		if strings.Contains(text, "=") {
			return text, nil
		}
		return "", failure(ErrInvalid, "not a PostgreSQL URL: it needs the form postgresql://user:password@host:port/database")
	}
	scheme = strings.TrimPrefix(scheme, "db+")
	dialect, _, _ := strings.Cut(scheme, "+")
	if dialect != "postgresql" && dialect != "postgres" {
		return "", failure(ErrInvalid, "scheme %q is not PostgreSQL: the URL must begin with postgresql:// or db+postgresql://", scheme)
	}
	return "postgresql://" + rest, nil
}

// place says where a database is, for logs and errors: host, port, name, and
// never the user or the password.
func place(host string, port uint16, database string) string {
	u := url.URL{Host: host, Path: "/" + database}
	if !strings.HasPrefix(host, "/") {
		u.Host = host + ":" + itoa(int(port))
	}
	return strings.TrimPrefix(u.String(), "//")
}

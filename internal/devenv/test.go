package devenv

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Environment variables that tell tests where the services are. `make test` sets
// them; `make services-up` prints them for a shell.
const (
	EnvBroker        = "MM_TEST_BROKER_URL"     // amqp://user:password@host:port
	EnvBrokerAPI     = "MM_TEST_BROKER_API_URL" // http://user:password@host:port, RabbitMQ's management plugin
	EnvBrokerImage   = "MM_TEST_BROKER_IMAGE"   // the image of the broker if it is a container, for StartOwnBroker
	EnvDatabase      = "MM_TEST_DATABASE_URL"   // postgres://…, a role that may create databases
	EnvDatabaseImage = "MM_TEST_DATABASE_IMAGE" // the image of the database if it is a container, for StartOwnDatabase
	EnvPythonRoot    = "MM_TEST_PYTHON_ROOT"    // folder with celery-5.4.0/bin/python and those of the other releases
	EnvCompose       = "MM_TEST_COMPOSE"        // path of a docker-compose program, 2.26 or later
	EnvCodex         = "MM_TEST_CODEX"          // path of a codex program
	EnvOldestCompose = "MM_TEST_COMPOSE_OLDEST" // path of the oldest docker-compose program that is supported, for `make test-change`
	EnvNewestEngine  = "MM_TEST_ENGINE_NEWEST"  // folder with the newest dockerd and containerd, for `make test-change`
	howToGetOne      = "run `make test`, or `make services-up` and the export lines that it prints"
	serviceTimeout   = 15 * time.Second
)

func need(t testing.TB, name, what string) string {
	t.Helper()
	value, err := required(name, what)
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// Broker creates an empty vhost on the test broker and returns its AMQP URL.
// The vhost is deleted at the end of the test.
func Broker(t testing.TB) string {
	t.Helper()
	return forTest(t, NewVhost)
}

// Database creates an empty database on the test server and returns its URL.
// The database is dropped at the end of the test, even if sessions are connected
// to it.
func Database(t testing.TB) string {
	t.Helper()
	return forTest(t, NewDatabase)
}

// BrokerUser creates a user on the test broker, with all permissions in the
// virtual host of an address that Broker has returned. The user is deleted at
// the end of the test.
func BrokerUser(t testing.TB, broker, user, password string) {
	t.Helper()
	address, err := url.Parse(broker)
	if err != nil {
		t.Fatal(err)
	}
	forTest(t, func(ctx context.Context) (string, func(context.Context) error, error) {
		remove, err := newBrokerUser(ctx, strings.TrimPrefix(address.Path, "/"), user, password)
		return "", remove, err
	})
}

// Role creates a role on the test server, with all privileges in a database that
// Database has returned. The role is dropped at the end of the test.
func Role(t testing.TB, database, role, password string) {
	t.Helper()
	forTest(t, func(ctx context.Context) (string, func(context.Context) error, error) {
		remove, err := newRole(ctx, database, role, password)
		return "", remove, err
	})
}

func forTest(t testing.TB, make func(context.Context) (string, func(context.Context) error, error)) string {
	t.Helper()
	address, remove, err := make(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return address
}

// Celery returns the path of a Python interpreter with the given version of
// Celery, SQLAlchemy and psycopg2.
func Celery(t testing.TB, version string) string {
	t.Helper()
	python := CeleryPython(need(t, EnvPythonRoot, "Python environments with Celery"), version)
	if _, err := os.Stat(python); err != nil {
		t.Fatalf("no Python with Celery %s: %v; %s", version, err, howToGetOne)
	}
	return python
}

// CeleryPython returns the path of the interpreter with a version of Celery in a
// folder of environments.
func CeleryPython(root, version string) string {
	return filepath.Join(root, "celery-"+version, "bin", "python")
}

// OldestCompose returns the path of the oldest docker-compose program that the
// project supports. Only `make test-change` provides it.
func OldestCompose(t testing.TB) string {
	t.Helper()
	return need(t, EnvOldestCompose, "docker compose 2.26")
}

// Compose returns the path of the docker-compose program, for tests that run
// containers. The engine is that of DOCKER_HOST or the default socket.
func Compose(t testing.TB) string {
	t.Helper()
	return need(t, EnvCompose, "docker compose")
}

// Codex returns the path of the codex program. internal/codextest has what it speaks to.
func Codex(t testing.TB) string {
	t.Helper()
	return need(t, EnvCodex, "codex "+codexVersion)
}

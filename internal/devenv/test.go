package devenv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// Environment variables by which the services find the tests. `make test`
// sets them; `make services-up` prints them for a shell.
const (
	EnvBroker      = "MM_TEST_BROKER_URL"     // amqp://user:password@host:port
	EnvBrokerAPI   = "MM_TEST_BROKER_API_URL" // http://user:password@host:port, RabbitMQ's management plugin
	EnvDatabase    = "MM_TEST_DATABASE_URL"   // postgres://…, a role that may create databases
	EnvPythonRoot  = "MM_TEST_PYTHON_ROOT"    // folder with celery-5.4.0/bin/python and its kin
	EnvCompose     = "MM_TEST_COMPOSE"        // path of a docker-compose program, 2.26 or later
	howToGetOne    = "run `make test`, or `make services-up` and the export lines that it prints"
	serviceTimeout = 15 * time.Second
)

func need(t testing.TB, name, what string) string {
	t.Helper()
	value := os.Getenv(name)
	if value == "" {
		t.Fatalf("%s is not set: this test needs %s; %s", name, what, howToGetOne)
	}
	return value
}

func randomName(t testing.TB, prefix string) string {
	b := make([]byte, 6)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return prefix + hex.EncodeToString(b)
}

// Broker makes an empty vhost on the test broker and returns its AMQP URL.
// The vhost is deleted when the test ends.
func Broker(t testing.TB) string {
	t.Helper()
	broker, err := url.Parse(need(t, EnvBroker, "a RabbitMQ broker"))
	if err != nil {
		t.Fatalf("%s: %v", EnvBroker, err)
	}
	vhost := randomName(t, "mm-test-")
	manage(t, http.MethodPut, "vhosts/"+vhost)
	t.Cleanup(func() { manage(t, http.MethodDelete, "vhosts/"+vhost) })
	broker.Path = "/" + vhost
	return broker.String()
}

func manage(t testing.TB, method, path string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), serviceTimeout)
	defer cancel()
	base := need(t, EnvBrokerAPI, "RabbitMQ's management plugin")
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base, "/")+"/api/"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/json")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		t.Fatalf("%s %s at the test broker: %v", method, path, err)
	}
	defer response.Body.Close()
	if response.StatusCode >= 300 {
		t.Fatalf("%s %s at the test broker: %s", method, path, response.Status)
	}
}

// Database makes an empty database on the test server and returns its URL.
// The database is dropped when the test ends, whoever is still connected.
func Database(t testing.TB) string {
	t.Helper()
	server := need(t, EnvDatabase, "a PostgreSQL server")
	name := strings.ReplaceAll(randomName(t, "mm_test_"), "-", "_")
	administer(t, server, `CREATE DATABASE "`+name+`"`)
	t.Cleanup(func() { administer(t, server, `DROP DATABASE IF EXISTS "`+name+`" WITH (FORCE)`) })
	database, err := url.Parse(server)
	if err != nil {
		t.Fatalf("%s: %v", EnvDatabase, err)
	}
	database.Path = "/" + name
	return database.String()
}

func administer(t testing.TB, server, statement string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), serviceTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, server)
	if err != nil {
		t.Fatalf("test database server: %v", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, statement); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

// Celery returns the Python interpreter that has the given version of Celery,
// with SQLAlchemy and psycopg2.
func Celery(t testing.TB, version string) string {
	t.Helper()
	root := need(t, EnvPythonRoot, "Python environments with Celery")
	python := filepath.Join(root, "celery-"+version, "bin", "python")
	if _, err := os.Stat(python); err != nil {
		t.Fatalf("no Python with Celery %s: %v; %s", version, err, howToGetOne)
	}
	return python
}

// Compose returns the docker-compose program for tests that run containers.
// The engine is the one that DOCKER_HOST or the default socket gives.
func Compose(t testing.TB) string {
	t.Helper()
	return need(t, EnvCompose, "docker compose")
}

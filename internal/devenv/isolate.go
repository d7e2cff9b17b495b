package devenv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/jackc/pgx/v5"
)

// NewVhost creates an empty virtual host on the broker that the environment
// names. It returns the AMQP URL and a function that deletes the virtual host.
func NewVhost(ctx context.Context) (address string, remove func(context.Context) error, err error) {
	text, err := required(EnvBroker, "a RabbitMQ broker")
	if err != nil {
		return "", nil, err
	}
	broker, err := url.Parse(text)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", EnvBroker, err)
	}
	name := "mm-test-" + randomSuffix()
	if err := manage(ctx, http.MethodPut, "vhosts/"+name); err != nil {
		return "", nil, err
	}
	broker.Path = "/" + name
	return broker.String(), func(ctx context.Context) error { return manage(ctx, http.MethodDelete, "vhosts/"+name) }, nil
}

func manage(ctx context.Context, method, path string, body ...string) error {
	base, err := required(EnvBrokerAPI, "RabbitMQ's management plugin")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, serviceTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base, "/")+"/api/"+path, strings.NewReader(strings.Join(body, "")))
	if err != nil {
		return fmt.Errorf("%s: %w", EnvBrokerAPI, err)
	}
	request.Header.Set("Content-Type", "application/json")
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("%s %s at the broker: %w", method, path, err)
	}
	response.Body.Close()
	if response.StatusCode >= 300 {
		return fmt.Errorf("%s %s at the broker: %s", method, path, response.Status)
	}
	return nil
}

// newBrokerUser creates a user with all permissions in a virtual host.
func newBrokerUser(ctx context.Context, vhost, user, password string) (remove func(context.Context) error, err error) {
	body, err := json.Marshal(map[string]string{"password": password, "tags": ""})
	if err != nil {
		return nil, err
	}
	path := "users/" + url.PathEscape(user)
	if err := manage(ctx, http.MethodPut, path, string(body)); err != nil {
		return nil, err
	}
	remove = func(ctx context.Context) error { return manage(ctx, http.MethodDelete, path) }
	err = manage(ctx, http.MethodPut, "permissions/"+url.PathEscape(vhost)+"/"+url.PathEscape(user), `{"configure": ".*", "write": ".*", "read": ".*"}`)
	if err != nil {
		return nil, errors.Join(err, remove(ctx))
	}
	return remove, nil
}

// newRole creates a role that may log in and has all privileges in a database.
func newRole(ctx context.Context, database, role, password string) (remove func(context.Context) error, err error) {
	server, err := required(EnvDatabase, "a PostgreSQL server")
	if err != nil {
		return nil, err
	}
	address, err := url.Parse(database)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", EnvDatabase, err)
	}
	name, literal := pgx.Identifier{role}.Sanitize(), "'"+strings.ReplaceAll(password, "'", "''")+"'"
	if strings.Contains(password, `\`) {
		literal = " E" + strings.ReplaceAll(literal, `\`, `\\`)
	}
	for _, statement := range []string{
		"CREATE ROLE " + name + " LOGIN PASSWORD " + literal,
		"GRANT ALL ON DATABASE " + pgx.Identifier{strings.TrimPrefix(address.Path, "/")}.Sanitize() + " TO " + name,
	} {
		if err := administer(ctx, server, statement); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context) error {
		if err := administer(ctx, database, "DROP OWNED BY "+name); err != nil {
			return err
		}
		return administer(ctx, server, "DROP ROLE "+name)
	}, nil
}

// NewDatabase creates an empty database on the server that the environment
// names. It returns the URL and a function that drops the database even if
// sessions are connected to it.
func NewDatabase(ctx context.Context) (address string, remove func(context.Context) error, err error) {
	server, err := required(EnvDatabase, "a PostgreSQL server")
	if err != nil {
		return "", nil, err
	}
	database, err := url.Parse(server)
	if err != nil {
		return "", nil, fmt.Errorf("%s: %w", EnvDatabase, err)
	}
	name := "mm_test_" + randomSuffix()
	if err := administer(ctx, server, `CREATE DATABASE "`+name+`"`); err != nil {
		return "", nil, err
	}
	database.Path = "/" + name
	return database.String(), func(ctx context.Context) error {
		return administer(ctx, server, `DROP DATABASE IF EXISTS "`+name+`" WITH (FORCE)`)
	}, nil
}

func administer(ctx context.Context, server, statement string) error {
	ctx, cancel := context.WithTimeout(ctx, serviceTimeout)
	defer cancel()
	conn, err := pgx.Connect(ctx, server)
	if err != nil {
		return fmt.Errorf("database server for tests: %w", err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, statement); err != nil {
		return fmt.Errorf("%s: %w", statement, err)
	}
	return nil
}

func required(name, what string) (string, error) {
	value := os.Getenv(name)
	if value == "" {
		return "", fmt.Errorf("%s is not set: this needs %s; %s", name, what, howToGetOne)
	}
	return value, nil
}

func randomSuffix() string {
	b := make([]byte, 6)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

package devenv

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/jackc/pgx/v5"
)

// NewVhost makes an empty virtual host on the broker that the environment
// names, and returns its AMQP URL and the function that deletes it.
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

func manage(ctx context.Context, method, path string) error {
	base, err := required(EnvBrokerAPI, "RabbitMQ's management plugin")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, serviceTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base, "/")+"/api/"+path, nil)
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

// NewDatabase makes an empty database on the server that the environment
// names, and returns its URL and the function that drops it, whoever is still
// connected.
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

package main

import (
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// A cure names the setting that was used, and each setting once.
func TestCures(t *testing.T) {
	t.Parallel()
	var (
		unavailable = &store.Error{Kind: store.ErrUnavailable}
		refused     = &store.Error{Kind: store.ErrRefused}
		missing     = &store.Error{Kind: store.ErrRefused, Code: "3D000"}
		tables      = func(err error) func(*configuration) error {
			return func(c *configuration) error { return cureDatabase(c.tablesDatabase(), err) }
		}
		results = func(err error) func(*configuration) error {
			return func(c *configuration) error { return cureDatabase(c.resultsDatabase(), err) }
		}
		broker = func(err error) func(*configuration) error {
			return func(c *configuration) error { return c.cureBroker(err) }
		}
		one      = &worker.ConnectError{Kind: worker.ErrUnreachable, What: "cannot connect to one:5672", Err: errors.New("connection refused"), Cure: "Check that RabbitMQ runs and that the address is right"}
		two      = &worker.ConnectError{Kind: worker.ErrUnreachable, What: "cannot connect to two:5672", Err: errors.New("no such host"), Cure: one.Cure}
		password = &worker.ConnectError{Kind: worker.ErrCredentials, What: `user "mm" at two:5672// (RabbitMQ: 403 ACCESS_REFUSED)`, Cure: "Check user and password in the broker URL"}
		url      = "MM_ORCHESTRATOR_DATABASE_URL=postgres://u@h/d"
	)
	for _, tt := range []struct {
		name string
		env  environment
		args []string
		err  func(*configuration) error
		want string
	}{
		{"nothing is set", nil, nil, tables(unavailable), ". Is PostgreSQL running there? The address comes from POSTGRES_HOST (not set) and POSTGRES_PORT (not set)"},
		{"a host is set", environment{"POSTGRES_HOST=db"}, nil, tables(unavailable), ". Is PostgreSQL running there? The address comes from POSTGRES_HOST and POSTGRES_PORT (not set)"},
		{"as it is spelled", environment{"postgres_host=db"}, []string{"--postgres-port=1"}, tables(unavailable), ". Is PostgreSQL running there? The address comes from postgres_host and --postgres-port"},
		{"a URL", environment{url, "POSTGRES_HOST=db"}, nil, tables(unavailable), ". Is PostgreSQL running there? The address comes from MM_ORCHESTRATOR_DATABASE_URL"},
		{"a URL by a flag", environment{url}, []string{"--database-url=postgres://x/y"}, tables(unavailable), ". Is PostgreSQL running there? The address comes from --database-url"},
		{"password", environment{"POSTGRES_HOST=db", "POSTGRES_USER=u"}, nil, tables(refused), ". Check POSTGRES_USER and POSTGRES_PASSWORD (not set)"},
		{"password in a URL", environment{url}, nil, tables(refused), ". Check MM_ORCHESTRATOR_DATABASE_URL"},
		{"no such database", environment{"POSTGRES_DB=x"}, nil, tables(missing), ". Create it, or change POSTGRES_DB"},
		{"results", environment{"RESULT_BACKEND=db+postgresql://u@h/d"}, nil, results(unavailable), ". Is PostgreSQL running there? The address comes from RESULT_BACKEND"},

		{"broker: nothing is set", nil, nil, broker(one), "broker is unreachable: cannot connect to one:5672: connection refused. Check that RabbitMQ runs and that the address is right. The address comes from CELERY_BROKER_URL (not set)"},
		{"broker: two", environment{"BROKER_URL=amqp://one;amqp://two"}, nil, broker(errors.Join(one, two)),
			"broker is unreachable: cannot connect to one:5672: connection refused; broker is unreachable: cannot connect to two:5672: no such host. " +
				"Check that RabbitMQ runs and that the address is right. The address comes from BROKER_URL"},
		{"broker: two, for different reasons", nil, []string{"--broker-url=amqp://one;amqp://two"}, broker(errors.Join(one, password)),
			`broker is unreachable: cannot connect to one:5672: connection refused; broker refused the credentials: user "mm" at two:5672// (RabbitMQ: 403 ACCESS_REFUSED). ` +
				"Check that RabbitMQ runs and that the address is right. Check user and password. The address comes from --broker-url"},
		{"exchange", environment{"DEFAULT_EXCHANGE=x"}, nil, broker(&worker.MismatchError{What: "exchange", Name: "x"}), "Change DEFAULT_EXCHANGE, or delete the exchange."},
		{"queue type", environment{"ORCHESTRATOR_QUEUE_TYPE=classic"}, nil, broker(&worker.MismatchError{What: "queue", Argument: "x-queue-type", Current: "quorum"}), "Set ORCHESTRATOR_QUEUE_TYPE=quorum, or delete the queue."},
		{"queue type by a flag", nil, []string{"--queue-type=classic"}, broker(&worker.MismatchError{What: "queue", Argument: "x-queue-type"}), "Set --queue-type=none, or delete the queue."},

		{"workspace", environment{"WORKSPACE_ROOT=/nowhere/at/all"}, nil, (*configuration).checkWorkspace, "set WORKSPACE_ROOT to its directory"},
		{"workspace by a flag", nil, []string{"--workspace=/nowhere/at/all"}, (*configuration).checkWorkspace, "set --workspace to its directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := tt.err(mustLoad(t, tt.env, tt.args...))
			if text := err.Error(); !strings.Contains(text, tt.want) || strings.Contains(tt.want, "comes from") && !strings.HasSuffix(text, tt.want) {
				t.Errorf("got  %s\nwant %s", text, tt.want)
			}
		})
	}
	if err := mustLoad(t, nil).cureBroker(errors.Join(one, password)); !errors.Is(err, worker.ErrUnreachable) || exitCode(err) != exitRefused {
		t.Errorf("%v leads to exit code %d", err, exitCode(err))
	}
	if err := mustLoad(t, nil).cureBroker(nil); err != nil {
		t.Errorf("nothing became %v", err)
	}
}

// A server that refuses connections is reported at once, also by migrate: --dry-run
// then ends, without it migrate waits.
func TestUnreachableServerIsReportedAtOnce(t *testing.T) {
	t.Parallel()
	env := environment{"POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT=1", "MM_ORCHESTRATOR_WAIT=10m"}
	begin := time.Now()
	got := invoke(t, env, "migrate", "--dry-run")
	const want = "mm-orchestrator: cannot reach the database 127.0.0.1:1/moonmind: connection refused. Is PostgreSQL running there? The address comes from POSTGRES_HOST and POSTGRES_PORT\n"
	if took := time.Since(begin); got.code != exitUnavailable || got.stderr != want || took > slowMachine {
		t.Errorf("exit %d after %s:\n%swant:\n%s", got.code, took, got.stderr, want)
	}
	p := start(t, env, "migrate")
	eventually(t, "a word about the wait", func() error {
		if text := p.stderr.String(); text != "mm-orchestrator: waiting up to 10m for the database: cannot reach the database 127.0.0.1:1/moonmind: connection refused\n" {
			return errors.New(text)
		}
		return nil
	})
}

// A server that accepts the connection and does not answer is reported too.
func TestSilentServerIsReported(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	_, port, err := net.SplitHostPort(silent.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"runs", "migrate", "parked"} {
		p := start(t, environment{"POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT=" + port, "MM_ORCHESTRATOR_WAIT=0"}, command)
		eventually(t, "a word about the wait", func() error {
			if text := p.stderr.String(); text != "mm-orchestrator: waiting for the database: no answer yet\n" {
				return errors.New(text)
			}
			return nil
		})
	}
}

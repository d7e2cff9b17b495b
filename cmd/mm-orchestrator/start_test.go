package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// A worker that cannot start prints one line: what failed, for which thing, why, and
// what to do. The exit code says whether waiting helps.
func TestStartFailures(t *testing.T) {
	t.Parallel()
	good := newTestEnv(t)
	broker, err := url.Parse(good.broker)
	if err != nil {
		t.Fatal(err)
	}

	conn, err := amqp.Dial(good.broker)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.ExchangeDeclare("fan", "fanout", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclare("quorum.run", true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		t.Fatal(err)
	}

	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = taken.Close() })
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	bare := devenv.Database(t)

	for _, tt := range []struct {
		name string
		args []string
		code int
		// want are parts of the last line of stderr.
		want []string
	}{
		{
			"value", []string{"--prefetch=x"}, exitConfig,
			[]string{`--prefetch is "x": it must be a whole number from 1 to 100`},
		},
		{
			"workspace missing", []string{"--workspace=/nowhere/at/all"}, exitConfig,
			[]string{"workspace /nowhere/at/all does not exist", "set --workspace to its directory"},
		},
		{
			"workspace is a file", []string{"--workspace=" + file}, exitConfig,
			[]string{"workspace " + file + " is not a directory"},
		},
		{
			"broker: no such host", []string{"--broker-url=amqp://u:s3cret@nowhere.invalid//"}, exitUnavailable,
			[]string{"nowhere.invalid:5672", "no such host", "The address comes from --broker-url"},
		},
		{
			"broker: refused", []string{"--broker-url=amqp://u:s3cret@127.0.0.1:1//"}, exitUnavailable,
			[]string{"127.0.0.1:1", "connection refused. Check that RabbitMQ runs and that the address is right. The address comes from --broker-url"},
		},
		{
			"broker: password", []string{"--broker-url=" + withURL(t, good.broker, func(u *url.URL) { u.User = url.UserPassword("mm", "s3cret") })}, exitRefused,
			[]string{broker.Host, `user "mm"`, "403", "Check user and password. The address comes from --broker-url"},
		},
		{
			"broker: vhost", []string{"--broker-url=" + withURL(t, good.broker, func(u *url.URL) { u.Path = "/no-such-vhost" })}, exitRefused,
			[]string{broker.Host, `virtual host "no-such-vhost"`, "not found", "Create it, or give the user its permissions. The address comes from --broker-url"},
		},
		{
			"broker: exchange of another type", []string{"--exchange=fan"}, exitConfig,
			[]string{`exchange "fan" exists with type fanout`, "Change --exchange, or delete the exchange", "PRECONDITION_FAILED"},
		},
		{
			"broker: queue of another type", []string{"--queue=quorum.run"}, exitConfig,
			[]string{`queue "quorum.run" exists with arguments {x-queue-type: quorum}, the worker would declare no arguments. Set MM_ORCHESTRATOR_QUEUE_TYPE=quorum, or delete the queue`, "PRECONDITION_FAILED"},
		},
		{
			"database: no such host", []string{"--database-url=postgres://u:s3cret@nowhere.invalid/d"}, exitUnavailable,
			[]string{"nowhere.invalid:5432/d", "The address comes from --database-url"},
		},
		{
			"database: refused", []string{"--database-url=postgres://u:s3cret@127.0.0.1:1/d"}, exitUnavailable,
			[]string{"127.0.0.1:1/d", "connection refused", "The address comes from --database-url"},
		},
		{
			"database: role", []string{"--database-url=" + withURL(t, good.database, func(u *url.URL) { u.User = url.UserPassword("nobody-at-all", "s3cret") })}, exitRefused,
			[]string{`"nobody-at-all"`, "Check --database-url"},
		},
		{
			"database: name", []string{"--database-url=" + withURL(t, good.database, func(u *url.URL) { u.Path = "/no-such-db" })}, exitRefused,
			[]string{`database "no-such-db" does not exist`, "Create it, or change --database-url"},
		},
		{
			"database: no TLS", []string{"--database-url=" + withURL(t, good.database, func(u *url.URL) { u.RawQuery = "sslmode=require" })}, exitUnavailable,
			[]string{"cannot reach the database", "the server does not offer TLS, which sslmode in its address asks for", "The address comes from --database-url"},
		},
		{
			"database: an option that nobody knows", []string{"--database-url=" + withURL(t, good.database, func(u *url.URL) { u.RawQuery = "surprise=1" })}, exitConfig,
			[]string{`"surprise"`, "correct it there, or leave it out", "The address comes from --database-url"},
		},
		{
			"database: an option that is refused", []string{"--database-url=" + withURL(t, good.database, func(u *url.URL) { u.RawQuery = "gssencmode=require" })}, exitConfig,
			[]string{`--database-url is "postgres://***"`, "option gssencmode is not supported", "gssencmode=prefer"},
		},
		{
			"database: a file that is not there", []string{"--database-url=" + withURL(t, good.database, func(u *url.URL) { u.RawQuery = "sslmode=verify-full&sslrootcert=/nowhere/at/all.pem" })}, exitConfig,
			[]string{"/nowhere/at/all.pem", "no such file", "The address comes from --database-url"},
		},
		{
			"database: MoonMind's tables are missing", []string{"--database-url=" + bare}, exitConfig,
			[]string{"has no table orchestrator_action_plans", "mm-orchestrator migrate --shared-tables"},
		},
		{
			"result backend: refused", []string{"--result-backend=db+postgresql://u:s3cret@127.0.0.1:1/d"}, exitUnavailable,
			[]string{"127.0.0.1:1/d", "connection refused", "The address comes from --result-backend"},
		},
		{
			"listener: in use", []string{"--listen=" + taken.Addr().String()}, exitConfig,
			[]string{taken.Addr().String(), "in use by another process", "Set --listen to another address, or to the empty text to disable it"},
		},
		{
			"listener: no such host", []string{"--listen=nowhere.invalid:9808", "--listen-remote"}, exitConfig,
			[]string{"cannot listen on nowhere.invalid:9808", "no such host", "Set --listen to another address"},
		},
		{
			"listener: another machine's address", []string{"--listen=192.0.2.1:9808", "--listen-remote"}, exitConfig,
			[]string{"cannot listen on 192.0.2.1:9808", "cannot assign requested address", "Set --listen to another address"},
		},
		{
			"broker: no such certificate", []string{"--broker-url=amqps://u:s3cret@127.0.0.1:1//?ssl_ca_certs=/nowhere/ca.pem"}, exitConfig,
			[]string{"ssl_ca_certs of the broker URL cannot be read", "/nowhere/ca.pem", "The address comes from --broker-url"},
		},
		{
			"listener: for all", []string{"--listen=0.0.0.0:0"}, exitConfig,
			[]string{"MM_ORCHESTRATOR_LISTEN_REMOTE=true"},
		},
		{
			"flag", []string{"--frobnicate"}, exitUsage,
			[]string{"there is no flag --frobnicate; see mm-orchestrator worker --help"},
		},
		{
			"word", []string{"now"}, exitUsage,
			[]string{`worker does not take "now"`},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := start(t, good.env(), append([]string{"worker"}, tt.args...)...)
			if code := p.exit(); code != tt.code {
				t.Errorf("exit code %d, want %d", code, tt.code)
			}
			text := strings.TrimSpace(p.stderr.String())
			last := text[strings.LastIndex(text, "\n")+1:]
			for _, part := range append(tt.want, "mm-orchestrator: ") {
				if !strings.Contains(last, part) {
					t.Errorf("the last line lacks %q:\n%s", part, last)
				}
			}
			if strings.Contains(text, "s3cret") || strings.Contains(p.stdout.String(), "s3cret") {
				t.Errorf("a password was printed")
			}
		})
	}
}

// A worker that may not create its schema, or is configured not to, says which command
// to run. After migrate it starts.
func TestWorkerWithoutRightToMigrate(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	if p := start(t, s.env(), "migrate", "--remove"); p.exit() != exitOK {
		t.Fatalf("migrate --remove: exit %d", p.code)
	}
	env := append(s.env(), "MM_ORCHESTRATOR_AUTO_MIGRATE=false")
	p := start(t, env, "worker")
	if code := p.exit(); code != exitConfig || !strings.Contains(p.stderr.String(), "Run `mm-orchestrator migrate`") {
		t.Errorf("exit %d:\n%s", code, p.stderr.String())
	}
	if p := start(t, env, "migrate"); p.exit() != exitOK {
		t.Fatalf("migrate: exit %d", p.code)
	}
	p = start(t, env, "worker")
	p.logLine("worker ready")
}

// A worker waits for a broker that is not reachable yet.
func TestWorkerWaitsForItsBroker(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	// The address of a broker that is not there yet.
	ports, err := devenv.FreePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	address := fmt.Sprintf("127.0.0.1:%d", ports[0])

	real := strings.TrimPrefix(s.broker[strings.Index(s.broker, "@"):], "@")
	host, _, _ := strings.Cut(real, "/")
	env := append(s.env(), "MM_ORCHESTRATOR_WAIT=20s")
	p := start(t, env, "worker", "--broker-url", strings.Replace(s.broker, host, address, 1))
	p.logLine("broker does not answer yet")
	relayAt(t, "tcp", address, host)
	p.logLine("worker ready")
}

func TestMigratePrintsItsChanges(t *testing.T) {
	t.Parallel()
	env := environment{"MM_ORCHESTRATOR_DATABASE_URL=" + devenv.Database(t)}
	plan := start(t, env, "migrate", "--shared-tables", "--dry-run")
	if plan.exit() != exitOK || !strings.Contains(plan.stdout.String(), "would create schema mm_orchestrator") {
		t.Errorf("dry run: exit %d:\n%s", plan.code, plan.stdout.String())
	}
	if p := start(t, env, "runs"); p.exit() != exitConfig || !strings.Contains(p.stderr.String(), "mm-orchestrator migrate") {
		t.Errorf("the dry run changed something, or runs did not say what is missing: exit %d:\n%s", p.code, p.stderr.String())
	}
	first := start(t, env, "migrate", "--shared-tables")
	if first.exit() != exitOK || !strings.Contains(first.stdout.String(), "create schema mm_orchestrator: done") {
		t.Errorf("first: exit %d:\n%s", first.code, first.stdout.String())
	}
	second := start(t, env, "migrate", "--shared-tables")
	if second.exit() != exitOK || !strings.Contains(second.stdout.String(), "nothing to do") {
		t.Errorf("second: exit %d:\n%s", second.code, second.stdout.String())
	}
	if p := start(t, env, "runs"); p.exit() != exitOK || p.stdout.String() != "no runs\n" {
		t.Errorf("runs: exit %d: %s", p.code, p.stdout.String())
	}
	if p := start(t, env, "runs", "not-an-id"); p.exit() != exitUsage {
		t.Errorf("runs not-an-id: exit %d", p.code)
	}
	if p := start(t, env, "runs", "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11"); p.exit() != exitFailure || !strings.Contains(p.stderr.String(), "there is no run 6f1c2f0e") {
		t.Errorf("runs of nothing: exit %d: %s", p.code, p.stderr.String())
	}
}

// What would make every run fail is in the log of the worker's start, with its
// cure. The worker works all the same: it may be mended while it runs.
func TestStartTellsWhatWouldRefuseRuns(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	p := start(t, append(s.env(), "ARTIFACTS_ROOT="+file+"/artifacts"), "worker", "--compose=/nowhere/docker-compose", "--docker-host=unix:///nowhere/docker.sock")
	for check, cure := range map[string]string{"artifacts": "Mount the artifact volume writable", "compose": "set --compose to"} {
		eventually(t, "the log tells of "+check, func() error {
			for line := range strings.Lines(p.stderr.String()) {
				var entry struct{ Msg, Check, Found, Cure string }
				if json.Unmarshal([]byte(line), &entry) == nil && entry.Msg == "runs will be refused until this is repaired" && entry.Check == check && strings.Contains(entry.Cure, cure) {
					return nil
				}
			}
			return errors.New("no line about it")
		})
	}
	p.signal(syscall.SIGTERM)
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d", code)
	}
}

package main

import (
	"fmt"
	"github.com/spf13/pflag"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// load resolves all settings from an environment and flags.
func load(t *testing.T, env environment, args ...string) (*configuration, []effective, error) {
	t.Helper()
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	flags := addSettingFlags(fs, topics...)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return resolve(env, flags)
}

func mustLoad(t *testing.T, env environment, args ...string) *configuration {
	t.Helper()
	c, _, err := load(t, env, args...)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestPrecedence(t *testing.T) {
	t.Parallel()
	broker := func(c *configuration) string { return c.Brokers[0].Host }
	results := func(c *configuration) string { return c.Results.URL().Reveal() }
	exchange := func(c *configuration) string { return c.Exchange }
	base := func(c *configuration) string { return c.ArtifactBase }
	docker := func(c *configuration) string { return c.DockerHost }
	statsd := func(c *configuration) string { return fmt.Sprint(c.StatsD.Host, " ", c.StatsD.Port) }
	const (
		a   = "db+postgresql://a/x"
		b   = "db+postgresql://b/x"
		inA = "postgresql://a/x"
		inB = "postgresql://b/x"
	)
	for _, tt := range []struct {
		name string
		env  environment
		args []string
		of   func(*configuration) string
		want string
	}{
		{"broker: nothing", nil, nil, broker, "rabbitmq"},
		{"broker: the documented name", environment{"SPEC_WORKFLOW_CELERY_BROKER_URL=amqp://d"}, nil, broker, "d"},
		{"broker: BROKER_URL before the documented name", environment{"SPEC_WORKFLOW_CELERY_BROKER_URL=amqp://d", "BROKER_URL=amqp://c"}, nil, broker, "c"},
		{"broker: ORCHESTRATOR_BROKER_URL before BROKER_URL", environment{"BROKER_URL=amqp://c", "ORCHESTRATOR_BROKER_URL=amqp://b"}, nil, broker, "b"},
		{"broker: CELERY_BROKER_URL before all", environment{"ORCHESTRATOR_BROKER_URL=amqp://b", "CELERY_BROKER_URL=amqp://a"}, nil, broker, "a"},
		{"broker: empty is unset", environment{"CELERY_BROKER_URL=", "ORCHESTRATOR_BROKER_URL=", "BROKER_URL=amqp://c"}, nil, broker, "c"},
		{"broker: flag before all", environment{"CELERY_BROKER_URL=amqp://a"}, []string{"--broker-url=amqp://f"}, broker, "f"},
		{"broker: any case", environment{"celery_Broker_url=amqp://a", "BROKER_URL=amqp://c"}, nil, broker, "a"},
		{"broker: exact case first", environment{"broker_url=amqp://x", "BROKER_URL=amqp://c", "Broker_Url=amqp://y"}, nil, broker, "c"},

		{"results: nothing is none, whatever POSTGRES_* say", environment{"POSTGRES_HOST=db"}, nil, results, ""},
		{"results: CELERY_RESULT_BACKEND before all", environment{"ORCHESTRATOR_RESULT_BACKEND=" + b, "CELERY_RESULT_BACKEND=" + a}, nil, results, inA},
		{"results: CELERY_RESULT_BACKEND wins over an empty one", environment{"ORCHESTRATOR_RESULT_BACKEND=", "CELERY_RESULT_BACKEND=" + a}, nil, results, inA},
		{"results: an empty CELERY_RESULT_BACKEND is unset", environment{"CELERY_RESULT_BACKEND=", "RESULT_BACKEND=" + b}, nil, results, inB},
		{"results: an empty ORCHESTRATOR_RESULT_BACKEND means none", environment{"ORCHESTRATOR_RESULT_BACKEND=", "RESULT_BACKEND=" + b}, nil, results, ""},
		{"results: ORCHESTRATOR_RESULT_BACKEND before RESULT_BACKEND", environment{"ORCHESTRATOR_RESULT_BACKEND=" + a, "RESULT_BACKEND=" + b}, nil, results, inA},
		{"results: the documented name", environment{"SPEC_WORKFLOW_CELERY_RESULT_BACKEND=" + b}, nil, results, inB},
		{"results: an empty flag means none", environment{"CELERY_RESULT_BACKEND=" + a}, []string{"--result-backend="}, results, ""},
		{"results: disabled", environment{"CELERY_RESULT_BACKEND=disabled://"}, nil, results, ""},
		{"results: with a driver", environment{"CELERY_RESULT_BACKEND=db+postgresql+psycopg2://u:p%40@h:1/x?sslmode=require"}, nil, results, "postgresql://u:p%40@h:1/x?sslmode=require"},

		{"exchange: nothing", nil, nil, exchange, "moonmind.jobs"},
		{"exchange: the oldest name", environment{"DEFAULT_EXCHANGE=speckit"}, nil, exchange, "speckit"},
		{"exchange: CELERY_DEFAULT_EXCHANGE before it", environment{"DEFAULT_EXCHANGE=speckit", "CELERY_DEFAULT_EXCHANGE=b"}, nil, exchange, "b"},
		{"exchange: WORKFLOW_DEFAULT_EXCHANGE before that", environment{"WORKFLOW_DEFAULT_EXCHANGE=a", "CELERY_DEFAULT_EXCHANGE=b"}, nil, exchange, "a"},
		{"exchange: ORCHESTRATOR_CELERY_EXCHANGE before all", environment{"WORKFLOW_DEFAULT_EXCHANGE=a", "ORCHESTRATOR_CELERY_EXCHANGE=o"}, nil, exchange, "o"},

		{"artifacts: nothing", nil, nil, base, "var/artifacts/spec_workflows"},
		{"artifacts: 4", environment{"ARTIFACTS_ROOT=4"}, nil, base, "4"},
		{"artifacts: 3", environment{"ARTIFACTS_ROOT=4", "SPEC_WORKFLOW_ARTIFACTS_ROOT=3"}, nil, base, "3"},
		{"artifacts: 2", environment{"SPEC_WORKFLOW_ARTIFACT_ROOT=2", "SPEC_WORKFLOW_ARTIFACTS_ROOT=3"}, nil, base, "2"},
		{"artifacts: 1", environment{"SPEC_WORKFLOW_ARTIFACT_ROOT=2", "WORKFLOW_ARTIFACTS_ROOT=1"}, nil, base, "1"},

		{"routing key: the queue", environment{"ORCHESTRATOR_CELERY_QUEUE=q"}, nil, func(c *configuration) string { return c.RoutingKey }, "q"},
		{"routing key: its own", environment{"ORCHESTRATOR_CELERY_QUEUE=q", "ORCHESTRATOR_CELERY_ROUTING_KEY=k"}, nil, func(c *configuration) string { return c.RoutingKey }, "k"},

		{"docker: its own name first", environment{"ORCHESTRATOR_DOCKER_HOST=tcp://b:1", "DOCKER_HOST=tcp://a:1"}, nil, docker, "tcp://a:1"},
		{"docker: ours", environment{"ORCHESTRATOR_DOCKER_HOST=tcp://b:1"}, nil, docker, "tcp://b:1"},

		{"statsd: off", nil, nil, statsd, " 8125"},
		{"statsd: empty is unset", environment{"ORCHESTRATOR_STATSD_HOST=", "STATSD_HOST=s", "ORCHESTRATOR_STATSD_PORT=", "STATSD_PORT=1"}, nil, statsd, "s 1"},
		{"statsd: ours first", environment{"ORCHESTRATOR_STATSD_HOST=o", "STATSD_HOST=s", "ORCHESTRATOR_STATSD_PORT=2", "STATSD_PORT=1"}, nil, statsd, "o 2"},
		{"statsd: prefix", environment{"ORCHESTRATOR_METRICS_PREFIX=a.b.."}, nil, func(c *configuration) string { return c.StatsD.Prefix }, "a.b"},

		{"prefetch: multiplied", environment{"ORCHESTRATOR_PREFETCH=4", "ORCHESTRATOR_CONCURRENCY=3"}, nil, func(c *configuration) string { return fmt.Sprint(c.PrefetchCount()) }, "12"},
		{"time: seconds", environment{"MM_ORCHESTRATOR_WAIT=1.5"}, nil, func(c *configuration) string { return c.Wait.String() }, "1.5s"},
		{"time: units", environment{"MM_ORCHESTRATOR_STEP_TIME_LIMIT=1h30m"}, nil, func(c *configuration) string { return c.StepLimit.String() }, "1h30m0s"},
		{"running is enough: empty is none", environment{"MM_ORCHESTRATOR_RUNNING_IS_ENOUGH="}, nil, func(c *configuration) string { return strings.Join(c.RunningIsEnough, " ") }, ""},
		{"listen: empty is off", environment{"MM_ORCHESTRATOR_LISTEN="}, nil, func(c *configuration) string { return c.Listen }, ""},
		{"bool: flag alone", environment{"MM_ORCHESTRATOR_LISTEN=0.0.0.0:1"}, []string{"--listen-remote"}, func(c *configuration) string { return fmt.Sprint(c.ListenRemote) }, "true"},
		{"log level: Celery's", environment{"ORCHESTRATOR_LOG_LEVEL=CRITICAL"}, nil, func(c *configuration) string { return c.LogLevel.String() }, "ERROR"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := tt.of(mustLoad(t, tt.env, tt.args...)); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestDatabase(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		env  environment
		want string
	}{
		{nil, "postgresql://postgres:password@api-db:5432/moonmind"},
		{environment{"POSTGRES_HOST=h", "POSTGRES_PORT=1", "POSTGRES_USER=u", "POSTGRES_PASSWORD=", "POSTGRES_DB=d"}, "postgresql://u@h:1/d"},
		{environment{"POSTGRES_PASSWORD=a/b@c d?", "POSTGRES_HOST=::1"}, "postgresql://postgres:a%2Fb%40c%20d%3F@[::1]:5432/moonmind"},
		{environment{"POSTGRES_HOST=/run/postgresql"}, "postgresql://postgres:password@/moonmind?host=/run/postgresql&port=5432"},
		{environment{"POSTGRES_HOST=h", "MM_ORCHESTRATOR_DATABASE_URL=postgres://a@b/c"}, "postgresql://a@b/c"},
	} {
		if got := mustLoad(t, tt.env).Database().URL().Reveal(); got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.env, got, tt.want)
		}
	}
}

func TestDocker(t *testing.T) {
	t.Parallel()
	env := environment{"ORCHESTRATOR_DOCKER_HOST=tcp://proxy:2375", "DOCKER_CERT_PATH=/certs", "HOME=/x"}
	c := mustLoad(t, env)
	if got := c.EngineConfig(); got.Host != "tcp://proxy:2375" || got.CertPath != "" {
		t.Errorf("without DOCKER_TLS_VERIFY: %+v", got)
	}
	if got := c.ChildEnvironment(env); !slices.Contains(got, "DOCKER_HOST=tcp://proxy:2375") || !slices.Contains(got, "HOME=/x") {
		t.Errorf("commands get %q", got)
	}
	c = mustLoad(t, append(env, "DOCKER_TLS_VERIFY=1"), "--docker-host=tcp://flag:2376")
	if got := c.EngineConfig(); got.Host != "tcp://flag:2376" || got.CertPath != "/certs" {
		t.Errorf("with DOCKER_TLS_VERIFY: %+v", got)
	}
	if got := c.ChildEnvironment(append(env, "DOCKER_HOST=tcp://env:1")); !slices.Contains(got, "DOCKER_HOST=tcp://flag:2376") || slices.Contains(got, "DOCKER_HOST=tcp://env:1") {
		t.Errorf("commands get %q", got)
	}
}

func TestLists(t *testing.T) {
	t.Parallel()
	c := mustLoad(t, environment{
		"MM_ORCHESTRATOR_ARTIFACT_PATH_MAP=/app/var/=/srv/var, /x=/y",
		"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=make,/opt/bin/tool",
		"MM_ORCHESTRATOR_HEALTH_URL=api=http://api:5000/healthz?x=y,web=https://web/",
	})
	if want := []artifacts.PrefixMapping{{From: "/app/var", To: "/srv/var"}, {From: "/x", To: "/y"}}; !reflect.DeepEqual(c.ArtifactMappings, want) {
		t.Errorf("mappings %+v", c.ArtifactMappings)
	}
	if want := []string{"make", "/opt/bin/tool"}; !reflect.DeepEqual(c.AllowedPrograms, want) {
		t.Errorf("programs %q", c.AllowedPrograms)
	}
	if want := map[string]string{"api": "http://api:5000/healthz?x=y", "web": "https://web/"}; !reflect.DeepEqual(c.HealthURLs, want) {
		t.Errorf("health URLs %q", c.HealthURLs)
	}
}

// Each invalid value is an error with the variable as it was spelled and the value,
// without secrets. All of them are reported together.
func TestInvalidValues(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("q", 256)
	for _, tt := range []struct {
		env  environment
		args []string
		want []string
	}{
		{environment{"orchestrator_prefetch=many"}, nil, []string{`orchestrator_prefetch is "many": it must be a whole number from 1 to 100`}},
		{environment{"ORCHESTRATOR_PREFETCH=0"}, nil, []string{`ORCHESTRATOR_PREFETCH is "0": it must be a whole number from 1 to 100`}},
		{nil, []string{"--concurrency", "-1"}, []string{`--concurrency is "-1": it must be a whole number from 1 to 100`}},
		{environment{"ORCHESTRATOR_CELERY_QUEUE="}, nil, []string{`ORCHESTRATOR_CELERY_QUEUE is "": it must not be empty`}},
		{environment{"CELERY_BROKER_URL=redis://:s3cret@redis:6379/0"}, nil, []string{`CELERY_BROKER_URL is "redis://***": transport "redis" is not supported: use RabbitMQ, with amqp://, pyamqp:// or amqps://`}},
		{environment{"CELERY_BROKER_URL=amqp://u:s3cret@h:port"}, nil, []string{`CELERY_BROKER_URL is "amqp://***": its port is not a number up to 65535; write %2F, %3F or %23 for / ? # in a password`}},
		{environment{"CELERY_BROKER_URL=amqp://u:s3/cret@h"}, nil, []string{`CELERY_BROKER_URL is "amqp://***": its port is not a number up to 65535; write %2F, %3F or %23 for / ? # in a password`}},
		{environment{"CELERY_RESULT_BACKEND=rpc://"}, nil, []string{`CELERY_RESULT_BACKEND is "rpc://***": result backend rpc:// is not supported: use db+postgresql://, or disabled:// to store no results`}},
		{environment{"MM_ORCHESTRATOR_DATABASE_URL=postgres://u:s3cret@h:x/d"}, nil, []string{`MM_ORCHESTRATOR_DATABASE_URL is "postgres://***": its port is not a number from 1 to 65535; write %40 for an @ and %3A for a : in a password or a user's name`}},
		{environment{"MM_ORCHESTRATOR_DATABASE_URL=postgres://u:s3cret@h/d?gssencmode=require"}, nil, []string{`MM_ORCHESTRATOR_DATABASE_URL is "postgres://***": option gssencmode is not supported: GSSAPI is not supported; write gssencmode=prefer, and sslmode=verify-full for an encrypted connection`}},
		{environment{"MM_ORCHESTRATOR_WAIT=soon"}, nil, []string{`MM_ORCHESTRATOR_WAIT is "soon": it must be a duration such as 90s, 15m or 2h`}},
		{environment{"MM_ORCHESTRATOR_WAIT=-5s"}, nil, []string{`MM_ORCHESTRATOR_WAIT is "-5s": it must be 0s or more`}},
		{environment{"MM_ORCHESTRATOR_WAIT=1e300"}, nil, []string{`MM_ORCHESTRATOR_WAIT is "1e300": it must be a duration such as 90s, 15m or 2h`}},
		{environment{"MM_ORCHESTRATOR_RESULT_ENCODING=yaml"}, nil, []string{`MM_ORCHESTRATOR_RESULT_ENCODING is "yaml": it must be pickle or json`}},
		{environment{"MM_ORCHESTRATOR_QUEUE_TYPE=stream"}, nil, []string{`MM_ORCHESTRATOR_QUEUE_TYPE is "stream": it must be none, classic or quorum`}},
		{environment{"ORCHESTRATOR_HOSTNAME=a@%x"}, nil, []string{`ORCHESTRATOR_HOSTNAME is "a@%x": %x is not a placeholder; use %h, %n, %d or %%`}},
		{environment{"ORCHESTRATOR_HOSTNAME=a@"}, nil, []string{`ORCHESTRATOR_HOSTNAME is "a@": it expands to "a@", which is not of the form name@host`}},
		{environment{"MM_ORCHESTRATOR_ARTIFACT_PATH_MAP=var=/x"}, nil, []string{`MM_ORCHESTRATOR_ARTIFACT_PATH_MAP is "var=/x": it must have the form /path/of/the/api=/path/here, with absolute paths`}},
		{environment{"MM_ORCHESTRATOR_HEALTH_URL=api:5000"}, nil, []string{`MM_ORCHESTRATOR_HEALTH_URL is "api:5000": it must have the form service=http://host:port/path`}},
		{environment{"MM_ORCHESTRATOR_ALLOWED_PROGRAMS=bin/tool"}, nil, []string{`MM_ORCHESTRATOR_ALLOWED_PROGRAMS is "bin/tool": bin/tool is neither a name nor an absolute path`}},
		{environment{"MM_ORCHESTRATOR_LISTEN=9808"}, nil, []string{`MM_ORCHESTRATOR_LISTEN is "9808": it must have the form host:port`}},
		{environment{"MM_ORCHESTRATOR_LISTEN=:9808"}, nil, []string{`MM_ORCHESTRATOR_LISTEN is ":9808", which other machines can reach: set MM_ORCHESTRATOR_LISTEN_REMOTE=true to allow that, or use 127.0.0.1`}},
		{environment{"MM_ORCHESTRATOR_AUTO_MIGRATE=perhaps"}, nil, []string{`MM_ORCHESTRATOR_AUTO_MIGRATE is "perhaps": it must be true or false`}},
		{environment{"DOCKER_TLS_VERIFY=1"}, nil, []string{`DOCKER_TLS_VERIFY is set, but DOCKER_CERT_PATH is not: set it to the directory with ca.pem, cert.pem and key.pem`}},
		{environment{"ORCHESTRATOR_CELERY_QUEUE=" + long, "MM_ORCHESTRATOR_SPEC_QUEUES=a," + long, "CODEX_QUEUE=" + long}, nil, []string{
			`ORCHESTRATOR_CELERY_QUEUE is "` + long + `": a name has at most 255 bytes`,
			`MM_ORCHESTRATOR_SPEC_QUEUES is "a,` + long + `": a name has at most 255 bytes`,
			`CODEX_QUEUE is "` + long + `": a name has at most 255 bytes`,
		}},
		{environment{"CELERY_BROKER_URL=amqp://u:p@ss w#rd@rabbitmq//"}, nil, []string{`CELERY_BROKER_URL is "amqp://***": its host is neither a name nor an address; write %2F, %3F or %23 for / ? # in a password`}},
		{environment{"DOCKER_HOST=docker-proxy:2375"}, nil, []string{`DOCKER_HOST is "docker-proxy:2375": it must have the form unix:///path or tcp://host:port`}},
		{environment{"MM_ORCHESTRATOR_DATABASE_URL=postgres://u:s3cret@h/d"}, []string{"--postgres-host=x"}, []string{`--postgres-host has no effect while MM_ORCHESTRATOR_DATABASE_URL is set, which is the whole address: use --database-url instead`}},
		{environment{"ORCHESTRATOR_METRICS_PREFIX=a b", "POSTGRES_PORT=x"}, nil, []string{
			`POSTGRES_PORT is "x": it must be a whole number from 1 to 65535`,
			`ORCHESTRATOR_METRICS_PREFIX is "a b": it must be a name without spaces and without any of : | @ #`,
		}},
	} {
		_, _, err := load(t, tt.env, tt.args...)
		if want := strings.Join(tt.want, "\n"); err == nil || err.Error() != want {
			t.Errorf("%q %q:\n got %v\nwant %s", tt.env, tt.args, err, want)
		}
		if code := exitCode(err); code != exitConfig {
			t.Errorf("%q: exit code %d", tt.env, code)
		}
	}
}

func TestNodeName(t *testing.T) {
	t.Parallel()
	for pattern, want := range map[string]string{
		"orchestrator@%h": "orchestrator@box.example.org",
		"o@%n":            "o@box",
		"o%%@%d":          "o%@example.org",
		"%n":              "celery@box",
		"w1@x":            "w1@x",
	} {
		got, err := nodeName(pattern, "box.example.org")
		if err != nil || got != want {
			t.Errorf("%s: got %q, %v, want %q", pattern, got, err, want)
		}
	}
}

// No variable belongs to two settings, or to a setting and to the list without
// effect.
func TestNamesAreUnambiguous(t *testing.T) {
	t.Parallel()
	seen, shared := map[string]bool{}, map[string]int{}
	take := func(name string) {
		if upper := strings.ToUpper(name); seen[upper] {
			t.Errorf("%s is used twice", name)
		} else {
			seen[upper] = true
		}
	}
	for _, s := range settings {
		if s.flag != "" {
			take("--" + s.flag)
		}
		for _, v := range s.vars {
			if v.shared {
				shared[v.name]++
			} else {
				take(v.name)
			}
		}
		if s.def == "" && s.defaultNote == "" {
			t.Errorf("%s does not say what happens without it", s.name())
		}
		if s.secret && s.flag != "" {
			t.Errorf("%s is a secret and must have no flag", s.name())
		}
	}
	for name, n := range shared {
		if n < 2 {
			t.Errorf("%s is shared with no other setting", name)
		}
		take(name)
	}
	for _, entry := range withoutEffects {
		for _, name := range entry.vars {
			take(name)
		}
	}
}

// A variable with this program's prefix that no setting has is a typing error, and is
// named with the setting that was meant.
func TestUnknownVariables(t *testing.T) {
	t.Parallel()
	got := unused(environment{
		"MM_ORCHESTRATOR_LOSTGRACE=3m", "mm_orchestrator_wait=1s", "MM_ORCHESTRATOR_LOST_GRACE=3m", "MM_ORCHESTRATOR_COLOUR=never",
		processes.Variable + "=1", "MM_OTHER=1", "MM_ORCHESTRATOR",
	})
	want := []notice{
		{"MM_ORCHESTRATOR_LOSTGRACE", "there is no such setting; did you mean MM_ORCHESTRATOR_LOST_GRACE?"},
		{"MM_ORCHESTRATOR_COLOUR", "there is no such setting"},
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	p := start(t, environment{"MM_ORCHESTRATOR_LOSTGRACE=3m", "MM_ORCHESTRATOR_LOG_FORMAT=json", "WORKSPACE_ROOT=" + t.TempDir(), "POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT=1", "MM_ORCHESTRATOR_WAIT=0"}, "worker")
	if line := p.logLine("variable has no effect"); line["variable"] != "MM_ORCHESTRATOR_LOSTGRACE" {
		t.Errorf("%v", line)
	}
	p.exit()
}

func TestWaitDefault(t *testing.T) {
	t.Parallel()
	if c := mustLoad(t, nil); c.Wait != 30*time.Second || c.ShutdownGrace != time.Hour {
		t.Errorf("wait %v, grace %v", c.Wait, c.ShutdownGrace)
	}
}

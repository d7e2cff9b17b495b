package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address/addresstest"
)

// closedPort is an address at which nothing listens.
const closedPort = "127.0.0.1:1"

// leakCase is an environment with generated addresses, and flags with others.
type leakCase struct {
	env   environment
	flags []string
	// words are pieces of all the secrets.
	words []string
}

// newLeakCase makes addresses at which nothing listens or that are invalid, so that
// every command fails with an error about them.
func newLeakCase(g *addresstest.Generator, dir string) leakCase {
	var c leakCase
	add := func(s addresstest.Sample) string {
		c.words = append(c.words, s.Words...)
		return s.Text
	}
	password := func() string {
		written, words := g.Password()
		c.words = append(c.words, words...)
		return written
	}
	hosts := []string{closedPort, closedPort, "localhost:1", "[::1]:1"}
	c.env = environment{
		"CELERY_BROKER_URL=" + add(g.Broker(hosts...)),
		"CELERY_RESULT_BACKEND=" + add(g.Database("db+postgresql", hosts...)),
		"POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT=1", "POSTGRES_PASSWORD=" + password(),
		"DOCKER_HOST=tcp://docker:" + password() + "@" + closedPort,
		"MM_ORCHESTRATOR_HEALTH_URL=web=http://probe:" + password() + "@" + closedPort + "/health?token=x",
		"MM_ORCHESTRATOR_WAIT=0", "MM_ORCHESTRATOR_LISTEN=" + closedPort, "WORKSPACE_ROOT=" + dir, "PATH=" + dir, "HOME=" + dir,
	}
	switch len(c.words) % 3 {
	case 0:
		c.env = append(c.env, "MM_ORCHESTRATOR_DATABASE_URL="+add(g.Database("postgresql", hosts...)))
	case 1:
		c.flags = []string{"--database-url=" + add(g.Database("postgresql", hosts...))}
	}
	return c
}

// check runs a command and searches its output for the secrets' words.
func (c leakCase) check(t *testing.T, args ...string) {
	t.Helper()
	var out bytes.Buffer
	p := &program{env: c.env, stdout: &out, stderr: &out}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	code := p.main(ctx, args)
	c.look(t, fmt.Sprintf("%q (exit code %d)", args, code), out.String())
	if code == exitOK && args[0] != "config" {
		t.Errorf("%q succeeds: %s", args, out.String())
	}
}

func (c leakCase) look(t *testing.T, what, out string) {
	t.Helper()
	for _, word := range c.words {
		if i := strings.Index(out, word); i >= 0 {
			t.Errorf("%s shows %s: %s\nenvironment %q", what, word, out[max(0, i-200):min(len(out), i+100)], c.env)
			return
		}
	}
}

// run runs commands that connect only to the addresses: those that show the
// configuration in every round, the others in turn.
func (c leakCase) run(t *testing.T, round int) {
	t.Helper()
	c.check(t, append([]string{"config"}, c.flags...)...)
	_, broker, _ := strings.Cut(c.env[0], "=")
	_, results, _ := strings.Cut(c.env[1], "=")
	commands := [][]string{
		{"config", "--json"}, {"migrate", "--dry-run"}, {"migrate"}, {"runs"}, {"runs", "--json"}, {"runs", someRun}, {"runs", "revoke", someRun}, {"runs", "parked"},
		// Mistyped, or not quoted.
		append([]string{"runs"}, strings.Fields(broker)...), append([]string{"runs"}, strings.Fields(results)...),
		append([]string{"config", "--broker-ulr"}, strings.Fields(broker)...), strings.Fields(broker), strings.Fields(results),
		append([]string{"help"}, strings.Fields(results)...), {"worker", "--log-level", results}, {"worker", broker},
	}
	for i := range 3 {
		args := commands[(3*round+i)%len(commands)]
		if len(args) > 0 && !strings.Contains(strings.Join(args, " "), "://") {
			args = append(args, c.flags...)
		}
		c.check(t, args...)
	}
	switch round % 30 {
	case 0:
		c.check(t, append([]string{"doctor", "--timeout=10s"}, c.flags...)...)
	case 1:
		c.check(t, append([]string{"doctor", "--json", "--timeout=10s"}, c.flags...)...)
	case 2:
		c.check(t, "health", "--timeout=1s")
	}
}

// No output of any command contains a part of an address's secret, whether the
// address is valid or not.
func TestNoCommandShowsAPassword(t *testing.T) {
	t.Parallel()
	g := addresstest.New(11)
	for round := range 1000 {
		newLeakCase(g, t.TempDir()).run(t, round)
		if t.Failed() {
			return
		}
	}
}

// FuzzNoCommandShowsAPassword is the same test for other seeds.
func FuzzNoCommandShowsAPassword(f *testing.F) {
	f.Add(uint64(1))
	f.Fuzz(func(t *testing.T, seed uint64) {
		newLeakCase(addresstest.New(seed), t.TempDir()).run(t, int(seed%64))
	})
}

// The same for a worker: for its log when it cannot start, with and without a
// database, and for the stack dump after SIGQUIT.
func TestNoWorkerShowsAPassword(t *testing.T) {
	t.Parallel()
	good := newTestEnv(t)
	g := addresstest.New(12)
	for round := range 24 {
		c := newLeakCase(g, t.TempDir())
		args := append([]string{"worker", "--log-level=debug"}, c.flags...)
		if round%2 == 0 {
			args = []string{"worker", "--database-url=" + good.database, "--result-backend=disabled"}
		}
		env := append(environment{}, c.env...)
		p := start(t, append(env, "MM_ORCHESTRATOR_LISTEN="), args...)
		if code := p.exit(); code == exitOK {
			t.Errorf("%q ends with 0", args)
		}
		c.look(t, fmt.Sprintf("%q", args), p.stdout.String()+p.stderr.String())
	}

	// A broker that accepts and never answers: the worker waits for it.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	c := leakCase{words: []string{"Geheim99", "Sesam88"}}
	c.env = append(good.env(), "CELERY_BROKER_URL=amqp://us er:Geheim99 Sesam88@"+listener.Addr().String()+"/v", "MM_ORCHESTRATOR_LOG_LEVEL=debug")
	p := start(t, c.env, "worker")
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p.signal(syscall.SIGQUIT)
	if p.exit() == exitOK || !strings.Contains(p.stderr.String(), "goroutine ") {
		t.Errorf("no dump: %s", p.stderr.String())
	}
	c.look(t, "the dump", p.stderr.String())
}

// Addresses from bug reports, each of which was once shown with its password.
func TestAddressesOfBugReportsAreNotShown(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"broker", "database"} {
		content, err := os.ReadFile(filepath.Join("..", "..", "internal", "address", "testdata", kind+"_addresses.txt"))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			text := strings.TrimSuffix(line, "\n")
			if !strings.Contains(text, "Geheim") {
				continue
			}
			text = strings.NewReplacer(":5432", ":1", ":5672", ":1").Replace(text)
			variables := []string{"CELERY_BROKER_URL="}
			if kind == "database" {
				variables = []string{"CELERY_RESULT_BACKEND=", "MM_ORCHESTRATOR_DATABASE_URL="}
			}
			for _, variable := range variables {
				c := leakCase{env: environment{variable + text, "MM_ORCHESTRATOR_WAIT=0", "POSTGRES_HOST=127.0.0.1", "POSTGRES_PORT=1"}, words: []string{"Geheim"}}
				for _, args := range [][]string{{"config"}, {"config", "--json"}, {"runs"}, {"migrate", "--dry-run"}} {
					c.check(t, args...)
				}
			}
		}
	}
}

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

type doctorReport struct {
	OK     bool      `json:"ok"`
	Checks []finding `json:"checks"`
}

func runDoctor(t *testing.T, env environment, code int, args ...string) map[string]finding {
	t.Helper()
	p := start(t, env, append([]string{"doctor", "--json"}, args...)...)
	if got := p.exit(); got != code {
		t.Errorf("exit code %d, want %d: %s", got, code, p.stderr.String())
	}
	var d doctorReport
	if err := json.Unmarshal([]byte(p.stdout.String()), &d); err != nil {
		t.Fatalf("%v: %s", err, p.stdout.String())
	}
	if d.OK != (code == exitOK) {
		t.Errorf("ok is %v", d.OK)
	}
	byName := map[string]finding{}
	for _, f := range d.Checks {
		// Of several findings of a check, keep the worst.
		if old, known := byName[f.Name]; !known || old.Status == statusOK {
			byName[f.Name] = f
		}
	}
	return byName
}

// dockerOnPath returns a compose program that knows the services of runs.
func dockerOnPath(t *testing.T) string {
	t.Helper()
	return fakeCompose(t, "2.26.1")
}

func TestDoctorFindsNoFaultAndChangesNothing(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	env := append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t))
	found := runDoctor(t, env, exitOK)
	for _, name := range []string{"broker", "queue", "database", "tables", "results", "clock", "docker", "workspace", "git", "compose", "services", "artifacts"} {
		if f := found[name]; f.Status != statusOK {
			t.Errorf("%s: %+v", name, f)
		}
	}
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclarePassive("orchestrator.run", true, false, false, false, nil); err == nil {
		t.Error("doctor declared the queue")
	}
	if entries, err := os.ReadDir(s.workspace); err != nil || len(entries) != 1 {
		t.Errorf("the workspace has %v (%v)", entries, err)
	}
	p := start(t, env, "doctor")
	if p.exit() != exitOK || !strings.Contains(p.stdout.String(), "ok    broker       RabbitMQ ") {
		t.Errorf("exit %d:\n%s", p.code, p.stdout.String())
	}
	if strings.Contains(p.stdout.String(), "mm:mm@") {
		t.Errorf("a password is shown:\n%s", p.stdout.String())
	}
}

// Without its compose plugin, docker complains about an unknown flag.
func TestDoctorWithoutComposePlugin(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	dir := t.TempDir()
	script := "#!/bin/sh\necho 'unknown flag: --short' >&2\nexit 125\n"
	if err := os.WriteFile(filepath.Join(dir, "docker"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	env := append(s.env(), "PATH="+dir+":"+os.Getenv("PATH"))
	found := runDoctor(t, env, exitFailure)
	p := start(t, env, "doctor")
	if p.exit(); strings.Count(p.stdout.String(), "its compose plugin is not") != 1 {
		t.Error("doctor does not say once that the plugin is missing")
	}
	if f := found["compose"]; f.Found != "docker is installed, its compose plugin is not" || !strings.Contains(f.Cure, "MM_ORCHESTRATOR_COMPOSE") {
		t.Errorf("%+v", f)
	}
	if f := found["services"]; f.Status != statusSkip {
		t.Errorf("%+v", f)
	}
}

func TestDoctorNamesTheCure(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclare("quorum.run", true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		t.Fatal(err)
	}
	bare := devenv.Database(t)
	compose := dockerOnPath(t)
	for _, tt := range []struct {
		name, check, found, cure string
		args                     []string
	}{
		{"queue", "queue", "x-queue-type: quorum", "", []string{"--queue=quorum.run"}},
		{"broker unreachable", "broker", "connection refused", "comes from --broker-url", []string{"--broker-url=amqp://127.0.0.1:1"}},
		{"database unreachable", "database", "connection refused", "comes from --database-url", []string{"--database-url=postgres://127.0.0.1:1/x"}},
		{"no tables", "tables", "has no table", "", []string{"--database-url=" + bare}},
		{"docker unreachable", "docker", "at unix:///nowhere/docker.sock: no such file or directory", "set --docker-host;", []string{"--docker-host=unix:///nowhere/docker.sock"}},
		{"no workspace", "workspace", "does not exist", "", []string{"--workspace=/nowhere/at/all"}},
		{"no repository", "git", "is not a git work tree", "WORKSPACE_ROOT", nil},
		{"compose", "compose", "/nowhere/docker-compose failed", "set --compose to", []string{"--compose=/nowhere/docker-compose"}},
		{"disk", "artifacts", "free, less than the 1000000000 MiB required by --disk-reserve", "Free disk space", []string{"--disk-reserve=1000000000"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			found := runDoctor(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+compose), exitFailure, tt.args...)
			f := found[tt.check]
			if f.Status != statusFail || !strings.Contains(f.Found, tt.found) || !strings.Contains(f.Cure, tt.cure) {
				t.Errorf("%+v", f)
			}
		})
	}
}

// Scripts find each check under one name, whether it succeeds, fails or is skipped.
func TestDoctorHasTheSameChecksInEveryRun(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	names := func(code int, args ...string) []string {
		var list []string
		for name := range runDoctor(t, append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t)), code, args...) {
			list = append(list, name)
		}
		slices.Sort(list)
		return list
	}
	succeeding := names(exitOK)
	var all []string
	for _, c := range checks {
		all = append(all, c.name)
	}
	slices.Sort(all)
	if !slices.Equal(succeeding, all) {
		t.Errorf("a good run has the checks %q, want %q", succeeding, all)
	}
	for _, args := range [][]string{
		{"--broker-url=amqp://127.0.0.1:1", "--database-url=postgres://127.0.0.1:1/x", "--docker-host=unix:///nowhere/docker.sock", "--workspace=/nowhere/at/all", "--compose=/nowhere/docker-compose"},
		{"--database-url=" + devenv.Database(t), "--workspace=" + t.TempDir()},
		{"--workspace=" + emptyRepository(t), "--compose=" + fakeCompose(t, "1.29.2")},
	} {
		if failing := names(exitFailure, args...); !slices.Equal(failing, succeeding) {
			t.Errorf("%q: the checks are %q, of a good run %q", args, failing, succeeding)
		}
	}
}

// emptyRepository is a git work tree without a commit.
func emptyRepository(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("git", "init", "-q", dir).CombinedOutput(); err != nil {
		t.Fatalf("git init: %v: %s", err, out)
	}
	return dir
}

// fakeCompose makes a docker-compose program that prints a version and the services
// of runs.
func fakeCompose(t *testing.T, version string) string {
	t.Helper()
	script := "#!/bin/sh\nfor word; do case $word in version) echo " + version + ";; --services) printf 'api\\ncelery-worker\\norchestrator\\n';; esac; done\n"
	path := filepath.Join(t.TempDir(), "docker-compose")
	if err := os.WriteFile(path, []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// Missing permissions at the broker that would fail only a step are reported, and
// the check leaves the messages in the queue untouched.
func TestDoctorReportsMissingBrokerPermissions(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.git(t)
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	if err := ch.ExchangeDeclare("moonmind.jobs", "direct", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := ch.QueueDeclare("orchestrator.run", true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	if err := ch.Publish("", "orchestrator.run", true, false, amqp.Publishing{Body: []byte("waits")}); err != nil {
		t.Fatal(err)
	}
	env := append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t))
	for _, tt := range []struct {
		name, configure, write, read string
		check, found                 string
	}{
		{"publish", ".*", "^orchestrator|^moonmind", ".*", "publish", "write permission on the default exchange, amq.default"},
		{"consume", ".*", ".*", "^moonmind", "queue", "read permission on it"},
		{"bind", ".*", ".*", "^orchestrator", "queue", "write and read permission on it and on exchange"},
		{"declare", "^moonmind", ".*", ".*", "queue", "configure, write and read permission"},
	} {
		s.setPermissions(t, tt.configure, tt.write, tt.read)
		f := runDoctor(t, env, exitFailure)[tt.check]
		if f.Status != statusFail || !strings.Contains(f.Found, tt.found) || !strings.Contains(f.Found, "ACCESS_REFUSED") {
			t.Errorf("%s: %+v", tt.name, f)
		}
	}
	s.setPermissions(t, ".*", ".*", ".*")
	found := runDoctor(t, env, exitOK)
	for _, name := range []string{"queue", "publish"} {
		if f := found[name]; f.Status != statusOK {
			t.Errorf("%+v", f)
		}
	}
	message, there, err := ch.Get("orchestrator.run", true)
	if err != nil || !there || string(message.Body) != "waits" || message.Redelivered || message.MessageCount != 0 {
		t.Errorf("%q %v %v, redelivered %v, %d more", message.Body, there, err, message.Redelivered, message.MessageCount)
	}
}

// doctor recognizes a quorum queue, and notes its delivery limit where it has one.
func TestDoctorNotesDeliveryLimitOfQuorumQueue(t *testing.T) {
	t.Parallel()
	for server, status := range map[string]string{"RabbitMQ 3.10.8": statusOK, "RabbitMQ 3.13.7": statusOK, "RabbitMQ 4.0.5": statusNote, "RabbitMQ 4.3.6": statusNote, "": statusNote} {
		if v := deliveryLimit("q", server)[0]; v.status != status {
			t.Errorf("%s: %+v", server, v)
		}
	}
	s := newTestEnv(t)
	s.git(t)
	env := append(s.env(), "MM_ORCHESTRATOR_COMPOSE="+dockerOnPath(t))
	p := start(t, append(env, "MM_ORCHESTRATOR_QUEUE_TYPE=quorum"), "doctor", "--queue=quorum.run")
	if p.exit() != exitOK || !strings.Contains(p.stdout.String(), `"quorum.run" is a quorum queue`) {
		t.Errorf("not there yet: exit %d", p.code)
	}
	conn, err := amqp.Dial(s.broker)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	for name, arguments := range map[string]amqp.Table{"quorum.run": {"x-queue-type": "quorum"}, "classic.run": nil} {
		if _, err := ch.QueueDeclare(name, true, false, false, false, arguments); err != nil {
			t.Fatal(err)
		}
	}
	p = start(t, append(env, "MM_ORCHESTRATOR_QUEUE_TYPE=quorum"), "doctor", "--queue=quorum.run")
	if p.exit() != exitOK || !strings.Contains(p.stdout.String(), `"quorum.run" is a quorum queue`) {
		t.Errorf("it is there: exit %d", p.code)
	}
	p = start(t, env, "doctor", "--queue=classic.run")
	if p.exit() != exitOK || strings.Contains(p.stdout.String(), "quorum queue") {
		t.Errorf("classic: exit %d", p.code)
	}
}

package orchestrator

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestTheApplicationIsChecked(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(server.Close)
	for _, test := range []struct {
		name, program, script string
		log, text             string // parts of the log and of the failure
	}{
		{name: "succeeds", program: "check", script: "exit 0", log: "[Application check check a b: it succeeded]\n"},
		{name: "succeeds later", program: "check", script: "test -e tried || { touch tried; echo not yet; exit 1; }",
			log: "[Application check check a b failed: it ended with code 1]\n[Application check: not yet]\n"},
		{name: "fails", program: "check", script: "echo no login $A_TOKEN >&2; exit 7", log: "[Application check: no login ***]\n",
			text: "Application check check a b failed: it ended with code 7\nno login ***"},
		{name: "is not allowed", program: "other", script: "exit 0", text: "Application check other a b failed: "},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t, "A_TOKEN=hushhush")
			b.program(test.program, test.script)
			b.config.Programs = []string{"check"}
			b.config.AppChecks = map[string][]string{"api": {test.program, "a", "b"}}
			b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "` + server.URL + `", "timeoutSeconds": 2, "intervalSeconds": 0.2}}}]`)
			if test.text == "" {
				b.succeed("verify")
			} else if failure, _ := b.fail("verify"); !strings.HasPrefix(failure.Error(), test.text) {
				t.Errorf("%s\nwant %s", failure.Error(), test.text)
			}
			if log := b.artifact("verify.log"); !strings.Contains(log, test.log) {
				t.Errorf("log\n%s\nwant %s", log, test.log)
			}
		})
	}
}

// A quiet period that ends after the deadline has room for a check that is slow.
func TestASlowApplicationCheckRunsInTheQuietPeriod(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(server.Close)
	b := newTestEnv(t)
	b.program("check", "sleep 2")
	b.config.Programs, b.config.QuietPeriod = []string{"check"}, 6*time.Second
	b.config.AppChecks = map[string][]string{"api": {"check"}}
	b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "` + server.URL + `", "timeoutSeconds": 1, "intervalSeconds": 0.2}}}]`)
	b.succeed("verify")
	if log := b.artifact("verify.log"); strings.Count(log, "[Application check check: it succeeded]\n") != 1 {
		t.Errorf("log\n%s", log)
	}
}

package orchestrator

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// silentEngine answers nothing until the request is given up.
type silentEngine struct{ Engine }

func (silentEngine) Containers(ctx context.Context, _, _ string) ([]compose.Container, error) {
	<-ctx.Done()
	return nil, compose.ErrUnreachable
}

// An engine that is slow is not an engine that does not exist: the URL alone is not
// enough then.
func TestASlowEngineIsNoMissingEngine(t *testing.T) {
	t.Parallel()
	s := &stepRun{Orchestrator: &Orchestrator{config: Config{Engine: silentEngine{}, Now: time.Now}}, log: newTestEnv(t).config.Logger}
	dir, err := artifacts.Open(t.TempDir(), artifacts.NewRedactor(nil))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	log, err := dir.Log("verify.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Discard()
	j := &judge{run: s, log: log, requirements: requirements{services: []string{"web"}}}
	var l look
	j.see(t.Context(), &l)
	if l.engine || !j.engineWasSeen {
		t.Errorf("seen %t, expected again %t", l.engine, j.engineWasSeen)
	}
}

// stuckEngine answers for containers until a time, and nothing else.
type stuckEngine struct {
	Engine
	until      time.Time
	containers []compose.Container
}

func (stuckEngine) HasAnswered() bool { return false }

func (e stuckEngine) Containers(ctx context.Context, _, _ string) ([]compose.Container, error) {
	if !time.Now().Before(e.until) {
		return nil, hang(ctx)
	}
	containers := slices.Clone(e.containers)
	for i, c := range containers {
		if time.Now().Before(c.StartedAt) {
			containers[i].State, containers[i].StartedAt = "restarting", time.Time{}
		}
	}
	return containers, nil
}

func (e stuckEngine) InspectImage(context.Context, string) (compose.Image, error) {
	return compose.Image{}, nil
}

func (e stuckEngine) LogTail(ctx context.Context, _ string, _ int) (string, error) {
	return "", hang(ctx)
}

func (e stuckEngine) Neighbourhood(ctx context.Context) (compose.Neighbourhood, error) {
	return compose.Neighbourhood{}, hang(ctx)
}

func hang(ctx context.Context) error {
	<-ctx.Done()
	return compose.ErrUnreachable
}

// A verification ends at most a second after its time is over, in the time of a test
// that no busy machine disturbs.
func TestVerifyDoesNotWaitForTheEngine(t *testing.T) {
	t.Parallel()
	var unhealthy, well []compose.Container
	for i := range 4 {
		c := compose.Container{ID: fmt.Sprint(i), Name: fmt.Sprint("web-", i), State: "running", Health: "unhealthy"}
		unhealthy = append(unhealthy, c)
		c.Health = "healthy"
		well = append(well, c)
	}
	const timeout, quiet = 20 * time.Second, 4 * time.Second
	for name, test := range map[string]struct {
		containers []compose.Container
		// starts is when they start, stuck when the engine ceases to answer, over when
		// the time is over.
		starts, stuck, over time.Duration
		health              health
	}{
		"it never answers":          {over: quiet}, // nothing else could prove anything
		"it ceases to answer":       {containers: well, starts: 8 * time.Second, stuck: 10 * time.Second, over: timeout},
		"it has no logs":            {containers: unhealthy, stuck: time.Hour, over: timeout, health: sick},
		"it has neither in the end": {containers: unhealthy, stuck: timeout - time.Second, over: timeout, health: sick},
		"in the quiet period":       {containers: well, starts: timeout - time.Second, stuck: timeout + time.Second, over: timeout + quiet - time.Second},
		"never, all is well":        {containers: well, starts: timeout - time.Second, stuck: time.Hour, over: timeout + quiet - time.Second, health: healthy},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, err := artifacts.Open(t.TempDir(), artifacts.NewRedactor(nil))
			if err != nil {
				t.Fatal(err)
			}
			defer dir.Close()
			logger := newTestEnv(t).config.Logger
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				engine := stuckEngine{until: begun.Add(test.stuck), containers: slices.Clone(test.containers)}
				for i := range engine.containers {
					engine.containers[i].StartedAt = begun.Add(test.starts)
				}
				s := &stepRun{Orchestrator: &Orchestrator{config: Config{Engine: engine}.WithDefaults()}, log: logger}
				log, err := dir.Log("verify.log")
				if err != nil {
					t.Fatal(err)
				}
				defer log.Discard()
				v := s.judgeService(t.Context(), log, requirements{service: "web", services: []string{"web"}, composed: true, begun: begun, deadline: begun.Add(timeout), quiet: quiet})
				took := time.Since(begun)
				if took > test.over+time.Second {
					t.Errorf("took %s, want at most %s and a second", took, test.over)
				}
				if v.health != test.health {
					t.Errorf("%s: %s, want %s", v.health, v.reason, test.health)
				}
			})
		})
	}
}

// What is not this process's own takes the time of the machine: the bound has room
// for a busy one.
func TestVerifyDoesNotWaitForTheService(t *testing.T) {
	t.Parallel()
	trickle := func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusOK)
		for r.Context().Err() == nil {
			w.Write([]byte("x"))
			w.(http.Flusher).Flush()
			select {
			case <-r.Context().Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	good := func(http.ResponseWriter, *http.Request) {}
	for name, test := range map[string]struct {
		serve   http.HandlerFunc
		timeout int
		check   string // the script of the application check
		engine  Engine
	}{
		"an answer that does not end":                {serve: trickle, timeout: 1},
		"the same without any time":                  {serve: trickle},
		"an application check that does not end":     {serve: good, timeout: 1, check: "trap '' TERM; while :; do sleep 0.1; done"},
		"an engine that does not say who answers":    {serve: good, timeout: 1, engine: stuckEngine{until: time.Now().Add(time.Hour), containers: []compose.Container{{ID: "1", Name: "api-1", State: "running", Health: "starting"}}}},
		"an engine that does not answer, and no one": {serve: trickle, timeout: 1, engine: stuckEngine{}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			service := httptest.NewServer(test.serve)
			defer service.Close()
			if test.check != "" {
				b.program("check", test.check)
				b.config.Programs, b.config.AppChecks = []string{"check"}, map[string][]string{"api": {"check"}}
			}
			if test.engine != nil {
				b.config.Engine = test.engine
			}
			b.plan(fmt.Sprintf(`[{"name": "verify", "parameters": {"healthcheck": {"url": %q, "timeoutSeconds": %d, "intervalSeconds": 5}}}]`, service.URL, test.timeout))
			begun := time.Now()
			failure, _ := b.fail("verify")
			over := time.Since(begun) - time.Duration(test.timeout)*time.Second
			t.Logf("%s more than its %d s: %v", over.Round(time.Millisecond), test.timeout, failure)
			if over > time.Second+busy {
				t.Errorf("verify took %s more than its time", over)
			}
		})
	}
}

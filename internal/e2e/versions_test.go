package e2e

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"sync"
	"testing"
)

// With every Celery release that MoonMind may use, the worker must write the same
// rows for the same call, and AsyncResult must be able to read the results.
func TestEveryCeleryVersionGivesTheSameRowsAndReadsThem(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	documents := make(map[string]map[string]any)
	// The same for all, since the plans are compared.
	service := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	t.Cleanup(service.Close)
	healthy := set("verify.healthcheck.url", service.URL)
	t.Run("celery", func(t *testing.T) {
		for _, version := range versions {
			t.Run(version, func(t *testing.T) {
				t.Parallel()
				s := newStack(t, stackConfig{})
				good := s.submit(version, append(s.withoutDocker(), healthy)...)
				s.awaitRun(good.RunID)
				s.requireReadableSuccess(version, good)
				bad := s.submit(version, append(s.withoutDocker(), healthy,
					set("build.command", []string{"git", "rev-parse", "--verify", "no-such-branch"}))...)
				s.awaitRun(bad.RunID)
				s.requireReadableFailure(version, bad)
				document := map[string]any{"good": s.document(good), "bad": s.document(bad)}
				mu.Lock()
				documents[version] = document
				mu.Unlock()
				s.requireEmptyQueue()
			})
		}
	})
	if t.Failed() {
		return
	}
	for _, version := range versions[1:] {
		for _, d := range differences(documents[versions[0]], documents[version]) {
			if attempts.MatchString(d.Path) {
				continue
			}
			t.Errorf("celery %s against %s: %s", version, versions[0], d)
		}
	}
}

// attempts matches differences of verify.log, which has the number of requests that
// were made while the service had to stay healthy.
var attempts = regexp.MustCompile(`^good\.(files\.verify\.log|artifacts\.\d verify\.log\.(checksum|size_bytes))`)

func (s *stack) requireReadableSuccess(version string, run submission) {
	s.t.Helper()
	if got, want := summary(s.states(run.RunID)), "analyze:succeeded patch:succeeded build:succeeded restart:succeeded verify:succeeded rollback:skipped"; got != want {
		s.t.Errorf("states: %s\nwant:   %s", got, want)
	}
	messages := map[string]string{
		"analyze": "Analysis complete", "patch": "Patched files: none", "build": "Build completed",
		"restart": "Restart command issued (timeout 60s)", "verify": "Verification succeeded",
	}
	results := s.read(version, run.ids()...)
	for step, id := range run.TaskIDs {
		result := results[id]
		var value struct {
			Message   string         `json:"message"`
			Artifacts []string       `json:"artifacts"`
			Metadata  map[string]any `json:"metadata"`
		}
		if err := json.Unmarshal(result.Get.Value, &value); err != nil {
			s.t.Errorf("%s: get() gave %s: %v", step, result.Get.Value, err)
			continue
		}
		if result.State != "SUCCESS" || !result.Successful || result.Failed || result.Traceback != "" {
			s.t.Errorf("%s: state %s, traceback %q", step, result.State, result.Traceback)
		}
		if string(result.Result) != string(result.Get.Value) {
			s.t.Errorf("%s: .result is %s, get() gave %s", step, result.Result, result.Get.Value)
		}
		if value.Message != messages[step] || len(value.Artifacts) == 0 || value.Metadata == nil {
			s.t.Errorf("%s: get() gave %s, want the message %q, artifacts and metadata", step, result.Get.Value, messages[step])
		}
		if len(result.Args) != 2 || result.Args[0] != run.RunID || result.Args[1] != step || result.Queue != queue || !strings.Contains(result.Worker, "@") {
			s.t.Errorf("%s: extended columns: args %v, queue %q, worker %q", step, result.Args, result.Queue, result.Worker)
		}
	}
}

func (s *stack) requireReadableFailure(version string, run submission) {
	s.t.Helper()
	if got, want := summary(s.states(run.RunID)), "analyze:succeeded patch:succeeded build:failed restart:pending verify:pending rollback:succeeded"; got != want {
		s.t.Errorf("states: %s\nwant:   %s", got, want)
	}
	const words = "Command git rev-parse --verify no-such-branch failed with code 128: fatal: Needed a single revision (see build.log)"
	results := s.read(version, run.ids()...)
	for step, id := range run.TaskIDs {
		result := results[id]
		if step == "analyze" || step == "patch" {
			if result.State != "SUCCESS" {
				s.t.Errorf("%s: state %s, want SUCCESS", step, result.State)
			}
			continue
		}
		// Celery stores the exception of a failed step for all later steps too.
		raised := result.Get.Raised
		if result.State != "FAILURE" || !result.Failed || raised == nil {
			s.t.Errorf("%s: state %s, get() gave %s; want the failure of build", step, result.State, result.Get.Value)
			continue
		}
		if raised.Class != "CommandExecutionError" || raised.Text != words {
			s.t.Errorf("%s: get() raised %s %q, want CommandExecutionError %q", step, raised.Class, raised.Text, words)
		}
		if !strings.Contains(string(result.Stored), `"exc_module": "moonmind.workflows.orchestrator.command_runner"`) {
			s.t.Errorf("%s: stored is %s, want the module of MoonMind's exception", step, result.Stored)
		}
		var stored pythonException
		if err := json.Unmarshal(result.Result, &stored); err != nil || stored.Text != words {
			s.t.Errorf("%s: .result is %s, want the exception", step, result.Result)
		}
		if !strings.HasPrefix(result.Traceback, "Traceback (most recent call last):\n") || !strings.Contains(result.Traceback, words) {
			s.t.Errorf("%s: .traceback is %q", step, result.Traceback)
		}
	}
}

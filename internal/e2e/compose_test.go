package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
)

// A service lacks a dependency, and its operator has left an edit that adds it in
// the work tree. The run must build and restart the service and find it healthy.
// No other container may change.
func TestRepairOfAMissingDependency(t *testing.T) {
	t.Parallel()
	s := newStack(t, stackConfig{Project: true})
	api, other := s.containers()
	if err := s.project.Require(sample.Dependency); err != nil {
		t.Fatal(err)
	}
	run := s.submit(newest, set("verify.healthcheck.timeoutSeconds", 20), set("verify.healthcheck.intervalSeconds", 0.5))
	if row := s.awaitRun(run.RunID); row["status"] != "succeeded" {
		t.Errorf("the run is %s, want succeeded", row["status"])
	}
	if got := summary(s.states(run.RunID)); got != succeeded {
		t.Errorf("states: %s\nwant:   %s", got, succeeded)
	}
	if diff := s.files(run.RunID)["patch.diff"]; !strings.Contains(diff, "\n+"+sample.Dependency+"\n") {
		t.Errorf("patch.diff is %q, want the added line", diff)
	}
	if state := s.states(run.RunID)[1]; state["message"] != "Patched files: "+sample.Requirements {
		t.Errorf("message of patch: %q", state["message"])
	}
	after := s.awaitHealth("healthy")
	if after.ID == api.ID || after.Image == api.Image {
		t.Errorf("service api is still container %.12s of image %.19s", after.ID, after.Image)
	}
	if _, now := s.containers(); now.ID != other.ID || now.Image != other.Image {
		t.Errorf("service other was changed")
	}
	s.requireEmptyQueue()
}

// Every failure of a repair of a real service must end in a rollback. The files
// and the service must be as before, the logs and rows as docs/moonmind.md says,
// and no other container may change.
func TestFailedRepairIsRolledBack(t *testing.T) {
	t.Parallel()
	quick := []string{set("verify.healthcheck.timeoutSeconds", 2), set("verify.healthcheck.intervalSeconds", 0.5)}
	const (
		dockerfile  = "api_service/Dockerfile"
		builtBefore = "analyze:succeeded patch:succeeded build:succeeded "
	)
	for name, c := range map[string]struct {
		file, line string
		args       []string
		states     string
		// failed is the step that fails. Its message contains words and its log
		// contains traces.
		failed string
		words  []string
		traces []string
		// recreated says that the run replaced the container before the rollback.
		recreated bool
	}{
		"build failure": {
			file: dockerfile, line: "COPY nothing-of-this-name /x",
			states: "analyze:succeeded patch:succeeded build:failed restart:pending verify:pending rollback:succeeded",
			failed: "build",
			words:  []string{"Command docker compose --project-name ", " build api failed with code ", "nothing-of-this-name", " (see build.log)"},
			traces: []string{"$ docker compose --project-name ", "nothing-of-this-name"},
		},
		"restart failure": {
			file: dockerfile, line: `ENTRYPOINT ["/nothing-of-this-name"]`,
			states: builtBefore + "restart:failed verify:pending rollback:succeeded",
			failed: "restart", recreated: true,
			words:  []string{"Command docker compose --project-name ", " up -d --no-deps api failed with code ", "nothing-of-this-name", " (see restart.log)"},
			traces: []string{"$ docker compose --project-name ", "nothing-of-this-name"},
		},
		"unhealthy service": {
			file: sample.Requirements, line: "unhealthy", args: quick,
			states: builtBefore + "restart:succeeded verify:failed rollback:succeeded",
			failed: "verify", recreated: true,
			words:  []string{"Health check for http://127.0.0.1:", "/health timed out after 2s"},
			traces: []string{"Attempt 1: ", "status=503", "Health check timed out before reaching expected status"},
		},
		"crashing service": {
			file: dockerfile, line: `CMD ["/service", "serve", "/app/nothing-of-this-name"]`, args: quick,
			states: builtBefore + "restart:succeeded verify:failed rollback:succeeded",
			failed: "verify", recreated: true,
			words:  []string{"Health check for http://127.0.0.1:", "/health timed out after 2s"},
			traces: []string{"Attempt 1: ", "Health check timed out before reaching expected status"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStack(t, stackConfig{Project: true, Healthy: true})
			api, other := s.containers()
			before := read(t, filepath.Join(s.project.Dir, c.file))
			if err := s.project.Append(c.file, c.line); err != nil {
				t.Fatal(err)
			}
			run := s.submit(newest, c.args...)
			if row := s.awaitRun(run.RunID); row["status"] != "rolled_back" {
				t.Errorf("the run is %s, want rolled_back", row["status"])
			}
			states := s.states(run.RunID)
			if got := summary(states); got != c.states {
				t.Errorf("states: %s\nwant:   %s", got, c.states)
			}
			for _, state := range states {
				if state["plan_step"] != c.failed {
					continue
				}
				message, _ := state["message"].(string)
				for _, word := range c.words {
					if !strings.Contains(message, word) {
						t.Errorf("message of %s lacks %q: %q", c.failed, word, message)
					}
				}
			}
			files := s.files(run.RunID)
			for _, trace := range c.traces {
				if !strings.Contains(files[c.failed+".log"], trace) {
					t.Errorf("%s.log lacks %q:\n%s", c.failed, trace, files[c.failed+".log"])
				}
			}
			if text := read(t, filepath.Join(s.project.Dir, c.file)); text != before {
				t.Errorf("after the rollback %s is\n%s\nwant\n%s", c.file, text, before)
			}
			after := s.awaitHealth("healthy")
			if (after.ID != api.ID) != c.recreated {
				t.Errorf("service api was container %.12s, is %.12s; want a new one: %v", api.ID, after.ID, c.recreated)
			}
			if _, now := s.containers(); now.ID != other.ID || now.Image != other.Image {
				t.Errorf("service other was changed")
			}
			s.requireEmptyQueue()
		})
	}
}

func (s *stack) containers() (api, other sample.Container) {
	s.t.Helper()
	api, err := s.project.Container(s.t.Context(), "api")
	if err != nil {
		s.t.Fatal(err)
	}
	other, err = s.project.Container(s.t.Context(), "other")
	if err != nil {
		s.t.Fatal(err)
	}
	return api, other
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

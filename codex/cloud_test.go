package codex_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

var owner = processes.Owner{Run: "run", Step: "submit"}

const aDiff = "diff --git a/a b/a\nnew file mode 100644\n--- /dev/null\n+++ b/a\n@@ -0,0 +1 @@\n+hello\n"

func withCloud(t *testing.T, script codextest.CloudScript, change ...func(*codex.CloudConfig)) (*codex.Cloud, *codextest.Cloud) {
	t.Helper()
	stand, err := codextest.NewCloud(t.TempDir(), script)
	if err != nil {
		t.Fatal(err)
	}
	config := codex.CloudConfig{Program: stand.Program(), Environ: codex.Environment(os.Environ()), Environment: "env_1", FirstPoll: time.Millisecond, MaxPoll: 20 * time.Millisecond}
	for _, f := range change {
		f(&config)
	}
	cloud, err := codex.NewCloud(config)
	if err != nil {
		t.Fatal(err)
	}
	return cloud, stand
}

func state(t *testing.T, stand *codextest.Cloud) codextest.CloudState {
	t.Helper()
	s, err := stand.State()
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestATaskOfCodexCloudIsWaitedFor(t *testing.T) {
	t.Parallel()
	cloud, stand := withCloud(t, codextest.CloudScript{Polls: 3, State: "READY", Diff: aDiff})
	const prompt = "Run r, attempt 1: T012\nDo it."
	id, err := cloud.Submit(t.Context(), codex.CloudRequest{Owner: owner, Prompt: prompt, Branch: "main"})
	if err != nil {
		t.Fatal(err)
	}
	out := newLog()
	result, err := cloud.Wait(t.Context(), owner, id, out)
	if err != nil || result.Outcome != codex.Finished || result.TaskID != id {
		t.Errorf("got %+v, %v", result, err)
	}
	if diff, err := cloud.Diff(t.Context(), owner, id); err != nil || string(diff) != aDiff {
		t.Errorf("diff is %q, %v", diff, err)
	}
	s := state(t, stand)
	if len(s.Tasks) != 1 || s.Tasks[0].Prompt != prompt || s.Tasks[0].Branch != "main" || s.Tasks[0].Environment != "env_1" || s.Tasks[0].Polled != 4 {
		t.Errorf("tasks are %+v", s.Tasks)
	}
	if want := []string{"cloud", "exec", "--env", "env_1", "--branch", "main", "-"}; !slices.Equal(s.Calls[0], want) {
		t.Errorf("first call is %q", s.Calls[0])
	}
	if lines := strings.Count(out.String(), "\n"); lines != 2 || !strings.Contains(out.String(), `"status":"READY"`) {
		t.Errorf("log is %s", out)
	}
}

func TestOutcomesOfCodexCloud(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		script  codextest.CloudScript
		outcome codex.Outcome
		message string
	}{
		"no diff":       {codextest.CloudScript{State: "READY"}, codex.Finished, ""},
		"error":         {codextest.CloudScript{State: "ERROR"}, codex.ModelError, "has ended the task with an error"},
		"never ends":    {codextest.CloudScript{State: "PENDING"}, codex.TimedOut, "MM_ORCHESTRATOR_CODEX_TIME_LIMIT"},
		"not logged in": {codextest.CloudScript{State: "READY", Fail: map[string]string{"status": "Not signed in. Please run 'codex login' to sign in with ChatGPT, then re-run 'codex cloud'."}}, codex.NotLoggedIn, "codex login"},
		"out of reach":  {codextest.CloudScript{State: "READY", Fail: map[string]string{"status": "http error: get_task_details failed: error sending request"}}, codex.TimedOut, "error sending request"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cloud, _ := withCloud(t, c.script, func(c *codex.CloudConfig) { c.TimeLimit = 2 * time.Second })
			id, err := cloud.Submit(t.Context(), codex.CloudRequest{Owner: owner, Prompt: "Do it."})
			if err != nil {
				t.Fatal(err)
			}
			result, err := cloud.Wait(t.Context(), owner, id, newLog())
			if err != nil || result.Outcome != c.outcome || !strings.Contains(result.Message, c.message) {
				t.Errorf("got %+v, %v", result, err)
			}
			if diff, err := cloud.Diff(t.Context(), owner, id); diff != nil || err != nil {
				t.Errorf("diff %q, %v", diff, err)
			}
		})
	}
}

func TestALargeDiffIsNotTaken(t *testing.T) {
	t.Parallel()
	for size, refused := range map[int64]bool{int64(len(aDiff)) - 1: true, int64(len(aDiff)): false} {
		cloud, _ := withCloud(t, codextest.CloudScript{Diff: aDiff}, func(c *codex.CloudConfig) { c.MaxDiff = size })
		if diff, err := cloud.Diff(t.Context(), owner, "task_e_0001"); errors.Is(err, codex.ErrDiffTooLarge) != refused || (err == nil) != (string(diff) == aDiff) {
			t.Errorf("limit %d: %d bytes, %v", size, len(diff), err)
		}
	}
}

// Whoever did not see the answer to a submission finds the task by its mark, or is told
// that it cannot be found, or that there is none.
func TestASubmissionWithoutAnAnswerIsFound(t *testing.T) {
	t.Parallel()
	const mark = "[run 7, attempt 1]"
	cloud, stand := withCloud(t, codextest.CloudScript{State: "READY", Hang: true}, func(c *codex.CloudConfig) { c.CallLimit = 3 * time.Second })
	if err := stand.Change(func(s *codextest.CloudState) {
		for range 47 {
			s.NewTask("env_1", "main", "somebody else's")
		}
	}); err != nil {
		t.Fatal(err)
	}
	tasks, err := cloud.Tasks(t.Context(), owner)
	if err != nil || len(tasks) != 20 || tasks[0].ID != "task_e_0047" {
		t.Fatalf("%d tasks, %v", len(tasks), err)
	}
	var known []string
	for _, task := range tasks {
		known = append(known, task.ID)
	}
	if id, err := cloud.Find(t.Context(), owner, mark, known); id != "" || err != nil {
		t.Errorf("before the submission: %q, %v", id, err)
	}
	_, err = cloud.Submit(t.Context(), codex.CloudRequest{Owner: owner, Prompt: mark + "\nDo it."})
	var failed *codex.Failure
	if !errors.As(err, &failed) || failed.Refused || !strings.Contains(failed.Message, "did not end within") {
		t.Errorf("submission: %v", err)
	}
	if err := stand.Change(func(s *codextest.CloudState) {
		for range 30 { // more than one page
			s.NewTask("env_1", "main", "somebody else's")
		}
	}); err != nil {
		t.Fatal(err)
	}
	if id, err := cloud.Find(t.Context(), owner, mark, known); id != "task_e_0048" || err != nil {
		t.Errorf("after the submission: %q, %v", id, err)
	}
	// The service has given the task a title of its own.
	if id, err := cloud.Find(t.Context(), owner, "[run 8, attempt 1]", known); id != "" || !errors.Is(err, codex.ErrUncertain) || !strings.Contains(err.Error(), "task_e_0077") {
		t.Errorf("another title: %q, %v", id, err)
	}
}

func TestRefusedSubmissions(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]struct {
		outcome codex.Outcome
		refused bool
	}{
		"Not signed in. Please run 'codex login' to sign in with ChatGPT, then re-run 'codex cloud'.":                                                      {codex.NotLoggedIn, true},
		"http error: create_task failed: POST https://chatgpt.com/backend-api/wham/tasks failed: 401 Unauthorized; content-type=application/json; body={}": {codex.NotLoggedIn, true},
		"http error: create_task failed: POST https://chatgpt.com/backend-api/wham/tasks failed: 429 Too Many Requests; body={}":                           {codex.Limited, true},
		"http error: create_task failed: POST https://chatgpt.com/backend-api/wham/tasks failed: 404 Not Found; body={}":                                   {codex.ModelError, true},
		"environment 'env_1' not found; run `codex cloud` to list available environments":                                                                  {codex.ModelError, true},
		"error sending request for url (https://chatgpt.com/backend-api/wham/tasks)\n\nCaused by:\n    0: client error (Connect)\n    1: dns error":        {codex.ModelError, true},
		"http error: create_task failed: POST https://chatgpt.com/backend-api/wham/tasks failed: 502 Bad Gateway; body=":                                   {codex.ModelError, false},
		"http error: create_task failed: error sending request for url (https://chatgpt.com/backend-api/wham/tasks)":                                       {codex.ModelError, false},
	} {
		t.Run(text[:20], func(t *testing.T) {
			t.Parallel()
			cloud, _ := withCloud(t, codextest.CloudScript{Fail: map[string]string{"exec": text}})
			_, err := cloud.Submit(t.Context(), codex.CloudRequest{Owner: owner, Prompt: "Do it."})
			var failed *codex.Failure
			if !errors.As(err, &failed) || failed.Outcome != want.outcome || failed.Refused != want.refused || strings.Contains(failed.Message, "<unknown>") {
				t.Errorf("%s: got %+v", text, err)
			}
		})
	}
}

func TestWaitingEndsWithTheWorker(t *testing.T) {
	t.Parallel()
	cloud, _ := withCloud(t, codextest.CloudScript{State: "PENDING"}, func(c *codex.CloudConfig) {
		c.FirstPoll, c.MaxPoll = time.Hour, time.Hour
		c.TimeLimit = 100 * time.Hour
	})
	id, err := cloud.Submit(t.Context(), codex.CloudRequest{Owner: owner, Prompt: "Do it."})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancelCause(t.Context())
	stopping := errors.New("the worker stops")
	out := newLog()
	go func() {
		<-out.wrote
		stop(stopping)
	}()
	if _, err := cloud.Wait(ctx, owner, id, out); !errors.Is(err, stopping) {
		t.Errorf("error is %v", err)
	}
}

// The real program accepts these command lines. It has no login here, and says so.
func TestTheRealProgramKnowsTheCommandLines(t *testing.T) {
	t.Parallel()
	config := codex.CloudConfig{Program: devenv.Codex(t), Environ: codex.Environment(os.Environ()), Environment: "env_1", Home: t.TempDir()}
	cloud, err := codex.NewCloud(config)
	if err != nil {
		t.Fatal(err)
	}
	_, submitted := cloud.Submit(t.Context(), codex.CloudRequest{Owner: owner, Prompt: "Do it.", Branch: "main"})
	_, listed := cloud.Tasks(t.Context(), owner)
	_, diffed := cloud.Diff(t.Context(), owner, "task_e_1")
	result, waited := cloud.Wait(t.Context(), owner, "task_e_1", newLog())
	if waited != nil || result.Outcome != codex.NotLoggedIn {
		t.Errorf("status: %+v, %v", result, waited)
	}
	for what, err := range map[string]error{"exec": submitted, "list": listed, "diff": diffed} {
		var failed *codex.Failure
		if !errors.As(err, &failed) || failed.Outcome != codex.NotLoggedIn || !strings.Contains(failed.Message, "Not signed in") {
			t.Errorf("%s: %v", what, err)
		}
	}
	// An option that it does not know is another error, so the others are known.
	out, _ := exec.Command(config.Program, "cloud", "list", "--jsonl").CombinedOutput()
	if !strings.Contains(string(out), "unexpected argument") {
		t.Errorf("an unknown option: %s", out)
	}
}

func TestAnEnvironmentIsNeeded(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", "--env"} {
		if _, err := codex.NewCloud(codex.CloudConfig{Environment: name}); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", name)) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

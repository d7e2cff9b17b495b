package orchestrator

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

func digest(t testing.TB, path string) (string, int64) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, file)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(hash.Sum(nil)), size
}

// reference is a run of MoonMind's own worker.
type reference struct {
	Plan []struct {
		Steps []map[string]any `json:"steps"`
	} `json:"plan"`
	States []struct {
		Step    string          `json:"plan_step"`
		Message string          `json:"message"`
		Payload json.RawMessage `json:"payload"`
		Status  string          `json:"plan_step_status"`
	} `json:"states"`
	Artifacts []struct {
		Type string `json:"artifact_type"`
		Path string `json:"path"`
	} `json:"artifacts"`
	Results []struct {
		Args    string          `json:"args"`
		Status  string          `json:"status"`
		Decoded json.RawMessage `json:"result_decoded"`
	} `json:"taskmeta"`
	Files map[string]string `json:"files"`
}

func readReference(t testing.TB, name string) reference {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	var r reference
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

// asReference installs programs with the output of the reference run, in which
// compose writes to stderr.
func (b *testEnv) asReference(r reference, health string) {
	b.t.Helper()
	b.repository()
	for _, step := range []string{"build", "restart"} {
		_, output, _ := strings.Cut(r.Files[step+".log"], "\n")
		if err := os.WriteFile(filepath.Join(b.bin, step+".out"), []byte(output+"\n"), 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	b.program("docker", `case " $* " in *" build "*) cat "$(dirname "$0")/build.out" >&2;; *" up "*) cat "$(dirname "$0")/restart.out" >&2;; *) exit 9;; esac`)
	for _, step := range r.Plan[0].Steps {
		if step["name"] == "verify" {
			step["parameters"].(map[string]any)["healthcheck"].(map[string]any)["url"] = health
		}
	}
	plan, err := json.Marshal(r.Plan[0].Steps)
	if err != nil {
		b.t.Fatal(err)
	}
	b.plan(string(plan))
	b.steps.run.ArtifactRoot = filepath.Join(b.base, testRun)
}

func compact(t testing.TB, text json.RawMessage) string {
	t.Helper()
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	out, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func TestStepsRecordWhatTheReferenceRunHas(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	service := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer service.Close()
	r := readReference(t, "api_ok.json")
	b.asReference(r, service.URL)
	var registered []string
	for i, step := range []string{"analyze", "patch", "build", "restart", "verify"} {
		result, outcome := b.succeed(step)
		for _, file := range outcome.Artifacts {
			registered = append(registered, file.Type+":"+file.Path)
			same(t, file.Path, withoutNotes(b.artifact(file.Path)), r.Files[file.Path])
		}
		same(t, step+" message", outcome.Message, r.States[i].Message)
		got := outcome.Payload
		if got == nil {
			got = json.RawMessage("null")
		}
		same(t, step+" payload", compact(t, got), compact(t, r.States[i].Payload))
		same(t, step+" artifact root", outcome.ArtifactRoot, filepath.Join(b.base, testRun))
		returned, err := json.Marshal(result)
		if err != nil {
			t.Fatal(err)
		}
		// The order of keys matters: the fixture has Python's.
		var want strings.Builder
		encoder := json.NewEncoder(&want)
		if err := encoder.Encode(r.Results[i].Decoded); err != nil {
			t.Fatal(err)
		}
		same(t, step+" result", string(returned), strings.TrimSpace(want.String()))
	}
	var want []string
	for _, file := range r.Artifacts {
		want = append(want, file.Type+":"+file.Path)
	}
	same(t, "registered", strings.Join(registered, " "), strings.Join(want, " "))
}

func TestAFailedVerifyAndItsRollbackRecordWhatTheReferenceRunHas(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	service := httptest.NewServer(http.NotFoundHandler())
	defer service.Close()
	r := readReference(t, "verify_times_out.json")
	b.asReference(r, service.URL+"/nothing")
	b.config.RollbackCommands = true
	failure, outcome := b.fail("verify")
	same(t, "text", failure.Error(), "Health check for "+service.URL+"/nothing timed out after 3s")
	same(t, "class", failure.Module+"."+failure.Type, "moonmind.workflows.orchestrator.command_runner.CommandExecutionError")
	same(t, "artifacts", paths(outcome), "verify_log:verify.log")
	if outcome.Payload != nil {
		t.Errorf("payload %s, want none", outcome.Payload)
	}
	// The number of attempts differs from upstream's: pauses grow, and none passes
	// the deadline.
	lines := strings.Split(withoutNotes(b.artifact("verify.log")), "\n")
	for i, line := range lines[:len(lines)-1] {
		same(t, "line", line, fmt.Sprintf("Attempt %d: status=404", i+1))
	}
	same(t, "last line", lines[len(lines)-1], "Health check timed out before reaching expected status")

	_, outcome = b.succeed("rollback")
	same(t, "message", outcome.Message, "Rollback executed")
	same(t, "artifacts", paths(outcome), "rollback_log:rollback.log")
	got := b.artifact("rollback.log")
	head := strings.Index(got, "HEAD is now at ")
	got = got[:head+len("HEAD is now at ")] + "5af8a53" + got[head+len("HEAD is now at ")+7:]
	same(t, "rollback.log", got, r.Files["rollback.log"])
}

func TestAnalyze(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.plan(`[{"name": "analyze", "parameters": {"instruction": " a\r\nb\t", "logArtifact": "x/y.log"}}]`)
	result, outcome := b.succeed("analyze")
	same(t, "log", b.artifact("x/y.log"), "Instruction: a  b\nTarget service: api")
	same(t, "artifacts", paths(outcome), "metrics:x/y.log")
	same(t, "metadata", string(result.Metadata), `{"log":"x/y.log"}`)
	b.plan(`["analyze", {"name": "analyze"}]`)
	b.succeed("analyze")
	same(t, "log", b.artifact("analyze.log"), "Instruction: \nTarget service: api")
}

func TestBadPlansAreRecordedWithoutArtifacts(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ plan, service, class, text string }{
		{`[{"name": "build"}]`, "api", "builtins.ValueError", "Action plan missing step 'analyze'"},
		{``, "api", "builtins.ValueError", "Action plan missing step 'analyze'"},
		{`["analyze"]`, "api", "builtins.ValueError", "Action plan missing step 'analyze'"},
		{`[{"name": "analyze", "parameters": []}]`, "api", "builtins.TypeError", "Plan step parameters must be a mapping"},
		{`[{"name": "analyze", "parameters": "x"}]`, "api", "builtins.TypeError", "Plan step parameters must be a mapping"},
		{`[{"name": "analyze"}]`, "ghost", "builtins.KeyError", `"Service 'ghost' is not managed by the orchestrator"`},
		{`[{"name": "analyze", "parameters": {"notes": {}}}, 5]`, "ghost", "builtins.KeyError", `"Service 'ghost' is not managed by the orchestrator"`},
		{`[{"name": "analyze", "parameters": {"notes": {"a": 1}}}]`, " API ", "builtins.TypeError", "Plan parameter notes must be a text"},
		{`[{"name": "analyze", "parameters": {"logArtifact": "../x"}}]`, "api", "moonmind.workflows.orchestrator.storage.ArtifactPathError", "Artifact path escapes the run directory"},
		{`{"name": "analyze"}`, "api", "builtins.TypeError", "Action plan must be a list of steps"},
	} {
		t.Run(test.text, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.plan(test.plan)
			b.steps.run.TargetService = test.service
			failure, outcome := b.fail("analyze")
			same(t, "text", failure.Error(), test.text)
			same(t, "class", failure.Module+"."+failure.Type, test.class)
			if len(outcome.Artifacts) > 0 || outcome.Payload != nil {
				t.Errorf("recorded %+v", outcome)
			}
			if !strings.HasSuffix(outcome.Traceback, ": "+test.text+"\n") {
				t.Errorf("traceback %q", outcome.Traceback)
			}
		})
	}
}

func TestCommandsOfPlansAreChecked(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ command, text string }{
		{`"git status"`, "Command strings are not supported; provide a sequence of arguments"},
		{`5`, "Command must be a sequence of strings"},
		{`{"a": 1}`, "Command must be a sequence of strings"},
		{`["git", 5]`, "Command sequences must contain only strings"},
	} {
		b := newTestEnv(t)
		b.plan(`[{"name": "build", "parameters": {"command": ` + test.command + `, "logArtifact": "other.log"}}]`)
		failure, outcome := b.fail("build")
		same(t, "text", failure.Error(), test.text)
		same(t, "artifacts", paths(outcome), "build_log:build.log")
		same(t, "payload", string(outcome.Payload), `{"log":"build.log"}`)
		same(t, "log", b.artifact("build.log"), "build step failed while executing orchestrator command.\n"+test.text)
	}
	b := newTestEnv(t)
	b.repository()
	b.plan(`[{"name": "patch", "parameters": {"commands": [[]]}}]`)
	failure, _ := b.fail("patch")
	same(t, "text", failure.Error(), "Command sequence must not be empty (see patch.log)")
}

func TestPrograms(t *testing.T) {
	t.Parallel()
	skill := `["python", "-m", "moonmind.workflows.orchestrator.skill_executor", "--skill-id", "x", "--skill-args-json", "{}"]`
	for _, test := range []struct{ name, command, python, want string }{
		{"missing", `["sed-in-place", "x"]`, "", "Command not found: sed-in-place (see build.log)"},
		{"not allowed", `["sh", "-c", "true"]`, "", "Command not allowed: sh. Plans may run docker, docker-compose, git; MM_ORCHESTRATOR_ALLOWED_PROGRAMS allows more (see build.log)"},
		{"path of an allowed program", `["./git"]`, "", "Command not found: ./git (see build.log)"},
		{"python in general", `["python", "-c", "1"]`, "exit 0", "Command not allowed: python. Plans may run docker, docker-compose, git; MM_ORCHESTRATOR_ALLOWED_PROGRAMS allows more (see build.log)"},
		{"skill", skill, `[ "$2" = moonmind.workflows.orchestrator.skill_executor ]`, ""},
		{"skill without MoonMind", skill, `echo "ModuleNotFoundError: No module named 'moonmind'" >&2; exit 1`,
			"Command python -m moonmind.workflows.orchestrator.skill_executor --skill-id x --skill-args-json {} failed with code 1: ModuleNotFoundError: No module named 'moonmind'\nSkills need a Python that has MoonMind on its path; put one beside the worker (see build.log)"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			if test.python != "" {
				b.program("python", test.python)
			}
			b.plan(`[{"name": "build", "parameters": {"command": ` + test.command + `}}]`)
			if test.want == "" {
				b.succeed("build")
				return
			}
			failure, _ := b.fail("build")
			same(t, "text", failure.Error(), test.want)
		})
	}
	t.Run("skill without Python", func(t *testing.T) {
		t.Parallel()
		b := newTestEnv(t)
		b.config.Environ = []string{"PATH=" + b.bin}
		b.plan(`[{"name": "build", "parameters": {"command": ` + skill + `}}]`)
		failure, _ := b.fail("build")
		same(t, "text", failure.Error(), "Command not found: python. Skills run in Python: install one with MoonMind on its path beside the worker (see build.log)")
	})
	t.Run("not allowed, where a flag says what is", func(t *testing.T) {
		t.Parallel()
		b := newTestEnv(t)
		b.config.SettingName = func(variable string) string {
			return map[string]string{"MM_ORCHESTRATOR_ALLOWED_PROGRAMS": "--allowed-programs"}[variable]
		}
		b.plan(`[{"name": "build", "parameters": {"command": ["sh", "-c", "true"]}}]`)
		failure, _ := b.fail("build")
		same(t, "text", failure.Error(), "Command not allowed: sh. Plans may run docker, docker-compose, git; --allowed-programs allows more (see build.log)")
	})
	t.Run("allowed by configuration", func(t *testing.T) {
		t.Parallel()
		b := newTestEnv(t)
		b.config.Programs = []string{"mine"}
		b.program("mine", "echo $1")
		b.plan(`[{"name": "build", "parameters": {"command": ["mine", "$HOME; ls"]}}]`)
		b.succeed("build")
		same(t, "log", b.artifact("build.log"), "$ mine $HOME; ls\n$HOME; ls")
	})
}

func TestAFailedBuildHasItsOutputOnceInTheLog(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `echo "#8 ERROR: exit code: 1" >&2; exit 17`)
	b.plan(`[{"name": "build"}]`)
	failure, outcome := b.fail("build")
	same(t, "text", failure.Error(), "Command docker compose --project-name moonmind build api failed with code 17: #8 ERROR: exit code: 1 (see build.log)")
	same(t, "log", b.artifact("build.log"), "$ docker compose --project-name moonmind build api\n#8 ERROR: exit code: 1")
	same(t, "payload", string(outcome.Payload), `{"log":"build.log"}`)
	same(t, "artifacts", paths(outcome), "build_log:build.log")

	b.program("docker", `kill -9 $$`)
	failure, _ = b.fail("build")
	same(t, "text", failure.Error(), "Command docker compose --project-name moonmind build api failed with code -9 (see build.log)")
	same(t, "log", b.artifact("build.log"), "$ docker compose --project-name moonmind build api\nCommand docker compose --project-name moonmind build api failed with code -9")
}

func TestAServiceThatIsNotInTheComposeFileIsReported(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", `case " $* " in *" config --services "*) echo web; echo other; exit 0;; *" ls --quiet "*) exit 0;; esac
echo "no such service: api" >&2; exit 1`)
	b.plan(`[{"name": "restart"}]`)
	failure, _ := b.fail("restart")
	same(t, "text", failure.Error(), `Run refused before it changed anything: Service "api" is not in the compose file of project moonmind. Services there: other, web. The plan was made for another project, or COMPOSE_FILE points elsewhere (see restart.log)`)
}

func TestRestartReportsItsTimeout(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", "")
	for parameter, want := range map[string]string{`60`: " (timeout 60s)", `0`: "", `"5"`: " (timeout 5s)", `1.9`: " (timeout 1s)"} {
		b.plan(`[{"name": "restart", "parameters": {"restartTimeoutSeconds": ` + parameter + `}}]`)
		_, outcome := b.succeed("restart")
		same(t, "message", outcome.Message, "Restart command issued"+want)
	}
}

func TestAMissingWorkspaceIsReported(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.plan(`[{"name": "patch", "parameters": {"workspace": "no/where", "commands": [["git", "status"]]}}]`)
	failure, _ := b.fail("patch")
	same(t, "text", failure.Error(), "Run refused before it changed anything: workspace "+b.workspace+"/no/where does not exist. Mount the repository there, or set WORKSPACE_ROOT to its directory (see patch.log)")
}

// composeStandIn is a program in place of docker that knows a project with the
// service api, and does nothing.
const composeStandIn = `case "$*" in *" config --format json"*) echo '{"name": "moonmind", "services": {"api": {}, "other": {}}}' ;; esac`

func TestRestartFailsWhenOtherServicesChange(t *testing.T) {
	t.Parallel()
	old, young := strings.Repeat("01", 32), strings.Repeat("fe", 32)
	api := compose.Container{ID: strings.Repeat("aa", 32), Service: "api", State: "running"}
	other := compose.Container{ID: old, Service: "other", State: "running", Health: "healthy"}
	changed := func(change func(*compose.Container)) []compose.Container {
		c := other
		change(&c)
		return []compose.Container{c, api}
	}
	for want, after := range map[string][]compose.Container{
		"other (container 010101010101 was removed)":                                        {api},
		"other (container 010101010101 was removed), other (container fefefefefefe is new)": changed(func(c *compose.Container) { c.ID = young }),
		"other (container 010101010101 was started again)":                                  changed(func(c *compose.Container) { c.StartedAt = time.Now() }),
		"other (container 010101010101 was running, is exited)":                             changed(func(c *compose.Container) { c.State, c.ExitCode = "exited", 137 }),
		"other (container 010101010101 was healthy, is unhealthy)":                          changed(func(c *compose.Container) { c.Health = "unhealthy" }),
		"db (container fefefefefefe is new)":                                                {other, api, {ID: young, Service: "db"}},
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.program("docker", composeStandIn+"\ncase \"$*\" in *' ps '*) echo "+api.ID+";; esac")
			b.config.Engine = &fakeEngine{containers: func(call int, _ string) ([]compose.Container, error) {
				if call < 3 { // for the record, and for what an interrupted restart has left
					return []compose.Container{other, api}, nil
				}
				return after, nil
			}}
			b.plan(`[{"name": "restart", "parameters": {"restartTimeoutSeconds": 1}}]`)
			failure, _ := b.fail("restart")
			same(t, "text", failure.Error(), "Restart of service api changed other services of project moonmind too: "+want+" (see restart.log)")
		})
	}
}

func TestRollback(t *testing.T) {
	t.Parallel()
	t.Run("nothing to do", func(t *testing.T) {
		t.Parallel()
		b := newTestEnv(t)
		b.config.RollbackCommands = true
		b.plan(`[{"name": "rollback"}]`)
		_, outcome := b.succeed("rollback")
		same(t, "log", b.artifact("rollback.log"), "No rollback actions executed.")
		if outcome.Payload != nil {
			t.Errorf("payload %s", outcome.Payload)
		}
	})
	t.Run("a failure keeps what ran before", func(t *testing.T) {
		t.Parallel()
		for _, log := range []string{"rollback.log", "mine.log"} {
			b := newTestEnv(t)
			b.config.RollbackCommands = true
			b.program("docker", `echo "no space left on device" >&2; exit 1`)
			b.program("git", `echo "HEAD is now at 91c0aa4"`)
			b.plan(`[{"name": "rollback", "parameters": {"logArtifact": "` + log + `", "strategies": [
				{"type": "git-revert", "commands": [["git", "reset", "--hard", "HEAD"]]},
				{"commands": [["docker", "compose", "build", "api"], ["git", "never"]]}]}}]`)
			failure, outcome := b.fail("rollback")
			text := "Command docker compose build api failed with code 1: no space left on device"
			same(t, "text", failure.Error(), text)
			same(t, "payload", string(outcome.Payload), `{"log":"rollback.log"}`)
			before := "Executing rollback strategy: git-revert\ngit reset --hard HEAD\nHEAD is now at 91c0aa4\n" +
				"Executing rollback strategy: unknown\ndocker compose build api\nno space left on device"
			if log == "rollback.log" {
				same(t, "artifacts", paths(outcome), "rollback_log:rollback.log")
				same(t, "log", b.artifact(log), before+"\nrollback step failed while executing orchestrator command.\n"+text)
			} else {
				same(t, "artifacts", paths(outcome), "rollback_log:rollback.log rollback_log:mine.log")
				same(t, "log", b.artifact(log), before)
				same(t, "fallback log", b.artifact("rollback.log"), "rollback step failed while executing orchestrator command.\nno space left on device\n"+text)
			}
		}
	})
}

func TestPatch(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.Artifacts.Base = filepath.Join(b.workspace, "var/artifacts")
	b.base = b.config.Artifacts.Base
	b.repository()
	b.file("api_service/Dockerfile", "FROM scratch\n")
	b.file("api_service/requirements.txt", "httpx>=0.28\n")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "y")
	b.file("api_service/requirements.txt", "httpx==0.28.1\n")
	b.file("api_service/Dockerfile", "FROM scratch\nLABEL a=b\n")
	b.git("add", "api_service/Dockerfile")
	b.file("api_service/requirements/ünïcode.txt", "x\n")
	b.plan(`[{"name": "analyze"}, {"name": "patch", "parameters": {"commands": [["git", "status", "--short"]]}}]`)
	b.succeed("analyze") // leaves an untracked file in the workspace
	result, outcome := b.succeed("patch")
	same(t, "message", outcome.Message, "Patched files: api_service/requirements.txt, api_service/Dockerfile, api_service/requirements/ünïcode.txt")
	same(t, "payload", string(result.Metadata), `{"unstagedFiles":["api_service/requirements.txt"],"stagedFiles":["api_service/Dockerfile"],"untrackedFiles":["api_service/requirements/ünïcode.txt"],`+
		`"validatedFiles":["api_service/requirements.txt","api_service/Dockerfile","api_service/requirements/ünïcode.txt"],"log":"patch.log","files":[`+
		`{"path":"api_service/requirements.txt","before":{"sha256":"fd408a479eb61f900ad68c2ac333048bd1fc283af22aa7f971ab762eb8250198","mode":"100644"},"after":{"sha256":"84a869ce0ab453cbdb7dbf81622ea2bc4eaddcc182528fbaacba09365df9446d","mode":"100644"}},`+
		`{"path":"api_service/Dockerfile","before":{"sha256":"bb57c7da220a8753d7bdabac0d3afdb6efa742e4c736c5bc93ab40dfd5e23b9b","mode":"100644"},"after":{"sha256":"765853dbf8205e27ad87df4b1f07e9b7323ecfbef9a7ed3bf152bf859f127d89","mode":"100644"}},`+
		`{"path":"api_service/requirements/ünïcode.txt","before":null,"after":{"sha256":"73cb3858a687a8494ca3323053016282f3dad39d42cf62ca4e79dda2aac7d9ac","mode":"100644"}}]}`)
	same(t, "artifacts", paths(outcome), "patch_diff:patch.diff metrics:patch.log")
	if diff := b.artifact("patch.diff"); !strings.HasPrefix(diff, "diff --git a/api_service/Dockerfile") || !strings.Contains(diff, "+httpx==0.28.1\ndiff --git") || !strings.HasSuffix(diff, "+x\n") {
		t.Errorf("diff %q", diff)
	}
	same(t, "log", b.artifact("patch.log"), "git status --short\nM  api_service/Dockerfile\n M api_service/requirements.txt\n?? api_service/requirements/\n?? var/")
}

func TestPatchRefusesOtherFiles(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	b.file("docs/notes.md", "x")
	b.file("README", "changed")
	b.plan(`[{"name": "patch", "parameters": {"commands": [["git", "status", "--short"]]}}]`)
	failure, outcome := b.fail("patch")
	text := "README is not allow-listed; docs/notes.md is not allow-listed"
	same(t, "text", failure.Error(), text)
	same(t, "class", failure.Module+"."+failure.Type, "moonmind.workflows.orchestrator.command_runner.AllowListViolation")
	same(t, "artifacts", paths(outcome), "patch_diff:patch.diff metrics:patch.log")
	same(t, "log", b.artifact("patch.log"), "patch step failed while executing orchestrator command.\n"+text)
	if diff := b.artifact("patch.diff"); !strings.Contains(diff, "+changed") || !strings.Contains(diff, "b/docs/notes.md") {
		t.Errorf("diff %s", diff)
	}
}

func TestPatchWorksWithoutACommit(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.git("init", "-q", "-b", "main")
	b.file("pyproject.toml", "x\n")
	b.plan(`[{"name": "patch", "parameters": {}}]`)
	_, outcome := b.succeed("patch")
	same(t, "message", outcome.Message, "Patched files: pyproject.toml")
	if diff := b.artifact("patch.diff"); !strings.HasPrefix(diff, "diff --git a/pyproject.toml b/pyproject.toml\nnew file mode 100644\n") {
		t.Errorf("diff %s", diff)
	}
}

func TestPatchInASubdirectoryNamesFilesFromThere(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	b.file("sub/pyproject.toml", "x\n")
	b.git("add", ".")
	b.git("commit", "-q", "-m", "y")
	b.file("sub/pyproject.toml", "y\n")
	b.plan(`[{"name": "patch", "parameters": {"workspace": "sub"}}]`)
	_, outcome := b.succeed("patch")
	same(t, "message", outcome.Message, "Patched files: pyproject.toml")
	b.file("README", "changed outside of the workspace\n")
	failure, _ := b.fail("patch")
	same(t, "text", failure.Error(), "../README is not allow-listed")
}

func TestPatchFailsOutsideARepository(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.Environ = append(b.config.Environ, "GIT_CEILING_DIRECTORIES="+filepath.Dir(b.workspace))
	b.plan(`[{"name": "patch", "parameters": {}}]`)
	failure, outcome := b.fail("patch")
	if !strings.HasPrefix(failure.Error(), "Run refused before it changed anything: "+b.workspace+" is not a git work tree: ") {
		t.Errorf("%s", failure.Error())
	}
	same(t, "artifacts", paths(outcome), "metrics:patch.log")
}

func TestNoSecretGetsOut(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("testdata/redaction_vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors struct {
		Scrubbing []struct {
			Secrets []string `json:"secrets"`
		} `json:"scrubbing"`
	}
	if err := json.Unmarshal(data, &vectors); err != nil {
		t.Fatal(err)
	}
	var environ, forms []string
	for i, vector := range vectors.Scrubbing {
		for j, secret := range vector.Secrets {
			if len(secret) < 4 {
				continue // "*" and "abc" occur in harmless text
			}
			environ = append(environ, fmt.Sprintf("S%d_%d_TOKEN=%s", i, j, secret))
			forms = append(forms, secret, base64.StdEncoding.EncodeToString([]byte(secret)), url.QueryEscape(secret))
		}
	}
	// Secrets that MoonMind misses: by their names, in a file, in no variable, over several
	// lines behind prefixes, and with a colour in it.
	const key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEowIBAAKCAQEAx8aB1\nq2ZrL0uT5cGQ3N1bJpWsXy\n-----END RSA PRIVATE KEY-----"
	environ = append(environ, "PGPASSWORD=Pg-pass/word 1", "DEPLOY_SSH_KEY="+key)
	printed := append(slices.Clone(forms), "Pg-pass/word 1", "Pg%2dpass%2Fword%201", "Pg-\x1b[31mpass/word 1", "\n#12 0.345 "+strings.ReplaceAll(key, "\n", "\n#12 0.345 "),
		"from-dot-env-1", "https://mm:Geheim-99@h/", base64.StdEncoding.EncodeToString([]byte("{from-dot-env-1}")))
	forms = append(forms, "Pg-pass", "pass/word", "MIIEowIBAA", "q2ZrL0uT5c", "Pg%2dpass", "from-dot-env", "Geheim-99", "ZnJvbS1kb3QtZW52", "yb20tZG90LWVud")
	b := newTestEnv(t, environ...)
	b.repository()
	b.file(".env", "APP_SECRET=from-dot-env-1\n")
	all := strings.Join(printed, " ")
	b.file("pyproject.toml", all+"\n")
	b.git("add", ".")
	if err := os.WriteFile(filepath.Join(b.bin, "all"), []byte(all), 0o644); err != nil {
		t.Fatal(err)
	}
	b.program("docker", `cat "$(dirname "$0")/all"; cat "$(dirname "$0")/all" >&2; exit 3`)
	quoted, err := json.Marshal(all)
	if err != nil {
		t.Fatal(err)
	}
	b.plan(fmt.Sprintf(`[{"name": "analyze", "parameters": {"instruction": %[1]s, "notes": %[1]s}},
		{"name": "patch", "parameters": {"commands": [["git", "log", "--grep", %[1]s]]}},
		{"name": "build", "parameters": {"command": ["docker", %[1]s]}},
		{"name": "restart", "parameters": {"command": ["docker-missing", %[1]s]}},
		{"name": "verify", "parameters": {"healthcheck": {"url": %[1]s, "timeoutSeconds": 0}}},
		{"name": "rollback", "parameters": {"strategies": [{"type": %[1]s, "commands": [["docker", %[1]s]]}]}}]`, quoted))
	for _, step := range []string{"analyze", "patch", "build", "restart", "verify", "rollback"} {
		result, outcome, err := b.execute(step)
		recorded := fmt.Sprintf("%+v %s %+v %v", outcome, outcome.Payload, result, err)
		for _, form := range forms {
			if strings.Contains(recorded, form) {
				t.Errorf("%s: %q is in %s", step, form, recorded)
			}
		}
	}
	everything := b.logged.String()
	err = filepath.WalkDir(b.base, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			text, readErr := os.ReadFile(path)
			everything += string(text)
			err = readErr
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, form := range forms {
		if strings.Contains(everything, form) {
			t.Errorf("%q is in a file or log line", form)
		}
	}
	if !strings.Contains(everything, "***") {
		t.Error("nothing was redacted")
	}
}

func TestGitTrustsTheWorkspaceOfAnotherUser(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Log("not root: the repository stays our own")
	}
	b := newTestEnv(t)
	b.repository()
	if os.Getuid() == 0 {
		err := filepath.WalkDir(b.workspace, func(path string, _ os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			return os.Lchown(path, 12345, 12345)
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	b.plan(`[{"name": "patch", "parameters": {"commands": [["git", "status", "--short"]]}}]`)
	b.succeed("patch")
	same(t, "log", b.artifact("patch.log"), "git status --short")
}

func TestAPanicFailsTheStep(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", composeStandIn)
	b.config.Engine = &fakeEngine{containers: func(int, string) ([]compose.Container, error) { panic("boom") }}
	b.plan(`[{"name": "restart"}]`)
	failure, outcome := b.fail("restart")
	same(t, "class", failure.Type, "RuntimeError")
	if !strings.Contains(failure.Error(), "panicked: boom") || !strings.Contains(outcome.Traceback, "steps_test.go") {
		t.Errorf("%s\n%s", failure.Error(), outcome.Traceback)
	}
}

func TestUpstreamsCountOfAttempts(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	var calls atomic.Int32
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		switch calls.Add(1) {
		case 1:
			panic(http.ErrAbortHandler)
		case 2:
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer service.Close()
	b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "` + service.URL + `", "intervalSeconds": 0.1}}}]`)
	b.succeed("verify")
	same(t, "log", withoutNotes(b.artifact("verify.log")), "Attempt 1: Server disconnected without sending a response.\nAttempt 2: status=503\nAttempt 3: status=200")
}

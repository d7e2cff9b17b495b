package orchestrator

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/policy"
)

// withPolicy gives the orchestrator a policy file.
func (b *testEnv) withPolicy(text string) {
	b.t.Helper()
	p, err := policy.Parse("profiles.yaml", text)
	if err != nil {
		b.t.Fatal(err)
	}
	b.config.Policy = p
}

// patching has a plan whose patch edits these files, and an allow-list, "" for none.
func (b *testEnv) patching(allowList string, files ...string) {
	b.t.Helper()
	b.program("edit", `for f in "$@"; do mkdir -p "$(dirname "$f")"; echo edited >> "$f"; done`)
	b.config.Programs = []string{"edit"}
	b.file("pyproject.toml", "a\n")
	b.repository()
	if allowList != "" {
		allowList = `, "allowlist": ` + allowList
	}
	b.plan(`[{"name": "patch", "parameters": {"commands": [["edit", "` + strings.Join(files, `", "`) + `"]]` + allowList + `}}]`)
}

func TestAnOverrideLetsAFileThroughAndSaysWhy(t *testing.T) {
	t.Parallel()
	for name, allowList := range map[string]string{"the plan has no list": "", "the plan has a list": `["pyproject.toml"]`} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.withPolicy("services:\n  api:\n    overrides:\n      - reason: INC-4711, the login page\n        allowList: [templates/*.html]\n")
			b.patching(allowList, "pyproject.toml", "templates/login.html")
			b.succeed("patch")
			if log := b.artifact("patch.log"); !strings.Contains(log, "[Allowed by an override of the policy, INC-4711, the login page (profiles.yaml:4): templates/login.html]") {
				t.Errorf("log:\n%s", log)
			}
			if logged := b.logged.String(); !strings.Contains(logged, "override of the policy used") || !strings.Contains(logged, "profiles.yaml:4") {
				t.Errorf("logged:\n%s", logged)
			}
		})
	}
}

func TestAnOverrideThatHasEndedLetsNothingThrough(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.Now = func() time.Time { return time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC) }
	b.withPolicy("services: {api: {overrides: [{reason: x, until: 2027-01-31, allowList: [templates/*.html]}]}}\n")
	b.patching("", "templates/login.html")
	failure, _ := b.fail("patch")
	if got := failure.Error(); !strings.Contains(got, "templates/login.html is not allow-listed") {
		t.Errorf("%s", got)
	}
}

// Without a file, the plan's list is all that counts, as in Python. A list in the file
// cannot be widened by a plan.
func TestTheListOfTheFileBoundsPlans(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		policy  string
		refused bool
	}{
		"built-in":          {"", false},
		"a file without":    {"services: {api: {limits: {build: {time: 1h}}}}\n", false},
		"a file with":       {"services: {api: {allowList: [pyproject.toml]}}\n", true},
		"a service of mine": {"services: {api: {enabled: true}, web: {allowList: [web/**]}}\n", false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			if test.policy != "" {
				b.withPolicy(test.policy)
			}
			b.patching(`["**"]`, "elsewhere/file")
			if !test.refused {
				b.succeed("patch")
				return
			}
			failure, _ := b.fail("patch")
			if got := failure.Error(); !strings.Contains(got, "elsewhere/file is not allow-listed") {
				t.Errorf("%s", got)
			}
		})
	}
}

func TestAServiceThatThePolicyRefuses(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.withPolicy("services:\n  api:\n    enabled: false\n")
	b.plan(`[{"name": "analyze"}]`)
	failure, _ := b.fail("analyze")
	same(t, "text", failure.Error(), `"Service 'api' is not managed by the orchestrator: the policy has enabled: false (profiles.yaml:3)"`)
}

func TestAServiceOfTheFile(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.withPolicy("services:\n  Web-1:\n    compose: {service: frontend, project: shop}\n    allowList: [web/**]\n")
	b.program("docker", `case "$*" in "compose --project-name shop build frontend") echo built;; *) echo "$*" >&2; exit 3;; esac`)
	b.steps.run.TargetService = "WEB-1"
	b.plan(`[{"name": "build"}]`)
	b.succeed("build")
	if log := b.artifact("build.log"); !strings.Contains(log, "built") {
		t.Errorf("log:\n%s", log)
	}
}

func TestProgramsOfThePolicy(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ policy, want, log string }{
		"the setting":            {"services: {celery-worker: {programs: [git]}}\n", "", ""},
		"the file wins":          {"services: {api: {programs: [docker]}}\n", "Command not allowed: tool", ""},
		"an override":            {"services: {api: {programs: [docker], overrides: [{reason: RFC 7, programs: [tool]}]}}\n", "", "[tool may run by an override of the policy, RFC 7 (profiles.yaml:1)]"},
		"an override not needed": {"services: {api: {overrides: [{reason: RFC 7, programs: [tool]}]}}\n", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newTestEnv(t)
			b.withPolicy(test.policy)
			b.program("tool", "echo done")
			b.config.Programs = []string{"tool"}
			b.plan(`[{"name": "build", "parameters": {"command": ["tool"]}}]`)
			if test.want != "" {
				failure, _ := b.fail("build")
				if !strings.HasPrefix(failure.Error(), test.want) {
					t.Errorf("%s", failure.Error())
				}
				return
			}
			b.succeed("build")
			if log := b.artifact("build.log"); strings.Contains(log, "override") != (test.log != "") || !strings.Contains(log, test.log) {
				t.Errorf("log:\n%s", log)
			}
		})
	}
}

// What a refusal says is needed is what permits the command line.
func TestTheEntryThatARefusalNames(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.Permissions = nil
	b.program("docker", "echo ran")
	b.plan(`[{"name": "build", "parameters": {"command": ["docker", "run", "alpine"]}}]`)
	failure, _ := b.fail("build")
	_, entry, found := strings.Cut(failure.Error(), "the service's overrides in the policy file need ")
	entry, _, _ = strings.Cut(entry, " (see ")
	if !found {
		t.Fatalf("%s", failure.Error())
	}
	b.withPolicy("services:\n  api:\n    overrides:\n      - " + strings.Replace(entry, "…", "INC-5", 1) + "\n      - {reason: unused, command: docker exec, options: ['*']}\n")
	b.succeed("build")
	log := b.artifact("build.log")
	if !strings.Contains(log, "[The command may run against the rule docker.runs by an override of the policy, INC-5 (profiles.yaml:4)]") || strings.Contains(log, "unused") {
		t.Errorf("log:\n%s", log)
	}
}

// The worker's own git is no command of a plan.
func TestThePatchOfAServiceWithoutGit(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.withPolicy("services: {api: {programs: [docker], overrides: [{reason: x, programs: [edit]}]}}\n")
	b.patching("", "pyproject.toml")
	b.succeed("patch")
}

func TestTheFileWinsOverTheHealthURLForAllServices(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	service := httptest.NewServer(http.NotFoundHandler())
	defer service.Close()
	b.config.HealthURLs = map[string]string{"api": "http://192.0.2.1/"}
	b.withPolicy("services:\n  api:\n    verify: {healthURL: " + service.URL + "/x}\n    overrides:\n      - {reason: RFC 8, verify: {quietPeriod: 100ms}}\n")
	b.plan(`[{"name": "verify", "parameters": {"healthcheck": {"url": "http://api:5000/health", "expectedStatus": 404}}}]`)
	b.succeed("verify")
	log := b.artifact("verify.log")
	for _, want := range []string{"-> " + service.URL + "/x\n", "[Altered by an override of the policy, RFC 8 (profiles.yaml:5): verify.quietPeriod: 100ms]\n"} {
		if !strings.Contains(log, want) {
			t.Errorf("no %q in:\n%s", want, log)
		}
	}
}

func TestTheTimeLimitOfTheFile(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.StepTimeLimit = time.Hour
	b.withPolicy("services: {api: {limits: {build: {time: 1s}}}}\n")
	b.program("docker", "sleep 30")
	b.plan(`[{"name": "build", "parameters": {"command": ["docker", "build"]}}]`)
	failure, _ := b.fail("build")
	if got := failure.Error(); !strings.Contains(got, "1s") {
		t.Errorf("%s", got)
	}
}

func TestTheStartLogsOverrides(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.withPolicy("services:\n  api:\n    overrides:\n      - {reason: RFC 9, until: 2099-01-31, programs: [make]}\n      - {reason: over, until: 2020-01-31, programs: [make]}\n")
	o, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	o.LogPolicy()
	if logged := b.logged.String(); strings.Count(logged, "policy has an override") != 1 || !strings.Contains(logged, `reason="RFC 9"`) || !strings.Contains(logged, "profiles.yaml:4") {
		t.Errorf("logged:\n%s", logged)
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

func policyFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "profiles.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const policyWithMistakes = "services:\n  api:\n    allow_list: [a]\n  web: {limits: {biuld: {time: 3}}}\n"

func TestPolicyCheckTellsEveryMistake(t *testing.T) {
	t.Parallel()
	path := policyFile(t, policyWithMistakes)
	got := invoke(t, nil, "policy", "check", path)
	if got.code != exitConfig || strings.Count(got.stdout, path+":") != 3 || !strings.Contains(got.stdout, path+":3:5: ") || !strings.Contains(got.stderr, "3 mistakes") {
		t.Errorf("exit %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	again := invoke(t, environment{"MM_ORCHESTRATOR_PROFILES=" + path}, "policy", "check", "--json")
	var report policyReport
	if err := json.Unmarshal([]byte(again.stdout), &report); err != nil {
		t.Fatal(err)
	}
	if again.code != exitConfig || report.OK || len(report.Errors) != 3 || report.Errors[0].Line != 3 || report.Errors[0].Cure == "" {
		t.Errorf("exit %d %+v", again.code, report)
	}
}

func TestAWorkerRefusesAPolicyFileWithMistakes(t *testing.T) {
	t.Parallel()
	path := policyFile(t, policyWithMistakes)
	for _, env := range []environment{{"MM_ORCHESTRATOR_PROFILES=" + path}, {}} {
		args := []string{"worker", "--workspace", t.TempDir(), "--wait", "0"}
		if len(env) == 0 {
			args = append(args, "--profiles", path)
		}
		got := invoke(t, env, args...)
		for _, want := range []string{path + ":3:5: ", path + ":4:18: ", "Did you mean allowList?", "mm-orchestrator policy check " + path} {
			if got.code != exitConfig || !strings.Contains(got.stderr, want) {
				t.Errorf("exit %d, no %q in:\n%s", got.code, want, got.stderr)
			}
		}
	}
	if got := invoke(t, environment{"MM_ORCHESTRATOR_PROFILES=profiles.yaml"}, "worker"); got.code != exitConfig || !strings.Contains(got.stderr, "it must be an absolute path") {
		t.Errorf("exit %d %s", got.code, got.stderr)
	}
}

func TestPolicyCheckOfAGoodFile(t *testing.T) {
	t.Parallel()
	workspace := t.TempDir()
	path := filepath.Join(workspace, "services", "orchestrator", "profiles.yaml")
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	text := "services:\n  api:\n    verify: {quietPeriod: 20s, healthURL: http://u:s3cret@api/}\n    overrides:\n      - {reason: INC-4711, until: 2099-01-31, programs: [make]}\n      - {reason: over, until: 2020-01-31, programs: [make]}\n"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	env := environment{"MM_ORCHESTRATOR_QUIET_PERIOD=3s", "WORKSPACE_ROOT=" + workspace}
	got := invoke(t, env, "policy", "check", path)
	for _, want := range []string{
		"no mistakes", "docker docker-compose git make", "override of api (" + path + ":5): INC-4711", "it ends at 2099-02-01",
		"note: MM_ORCHESTRATOR_QUIET_PERIOD does not count for service api: the file has verify.quietPeriod (" + path + ":3)",
		"note: the override over (" + path + ":6) of service api has ended",
		"note: runs for service orchestrator may change the policy file itself",
	} {
		if got.code != exitOK || !strings.Contains(got.stdout, want) {
			t.Errorf("exit %d, no %q in:\n%s%s", got.code, want, got.stdout, got.stderr)
		}
	}
	shown := invoke(t, env, "policy", "show", "API", "--profiles", path)
	for _, want := range []string{"service api", "verify.quietPeriod      20s", path + ":3", "programs                make", "built-in", "MM_ORCHESTRATOR_RUNNING_IS_ENOUGH (default)", "http://u:***@api/"} {
		if shown.code != exitOK || !strings.Contains(shown.stdout, want) {
			t.Errorf("exit %d, no %q in:\n%s%s", shown.code, want, shown.stdout, shown.stderr)
		}
	}
	if all := got.stdout + shown.stdout; strings.Contains(all, "s3cret") {
		t.Errorf("a password is shown:\n%s", all)
	}
	asJSON := invoke(t, env, "policy", "show", "--profiles", path, "--json")
	var list []policyService
	if err := json.Unmarshal([]byte(asJSON.stdout), &list); err != nil || len(list) != 3 || len(list[0].Overrides) != 2 || !list[0].Overrides[0].Valid || list[0].Overrides[1].Valid {
		t.Errorf("%v %s", err, asJSON.stdout)
	}
	if wrong := invoke(t, env, "policy", "show", "apo", "--profiles", path); wrong.code != exitFailure || !strings.Contains(wrong.stderr, "did you mean api?") {
		t.Errorf("exit %d %s", wrong.code, wrong.stderr)
	}
}

const policyPage = "../../docs/policy.md"

// The table of fields in docs/policy.md is that of the code.
func TestPolicyPageHasTheFields(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(policyPage)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- fields: go test ./cmd/mm-orchestrator -run TestPolicyPage -update -->\n", "<!-- end of fields -->\n"
	before, rest, found := strings.Cut(string(page), begin)
	_, after, closed := strings.Cut(rest, end)
	if !found || !closed {
		t.Fatal("the page has no place for the table of fields")
	}
	var table bytes.Buffer
	table.WriteString("\n| field | value | meaning |\n|---|---|---|\n")
	for _, f := range policy.Fields {
		form := f.Form
		if form == "" {
			form = "fields"
		}
		table.WriteString("| `" + f.Path + "` | " + cell(form) + " | " + cell(f.Help) + " |\n")
	}
	table.WriteString("\n")
	golden(t, policyPage, []byte(before+begin+table.String()+end+after))
}

// Every file that the page shows is one that a worker would start with.
func TestPolicyPageShowsValidFiles(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(policyPage)
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	files := 0
	for _, match := range found {
		if !strings.HasPrefix(match[1], "services:\n  orchestrator:\n    environment:") { // of compose
			files++
			if _, err := policy.Parse("docs/policy.md", match[1]); err != nil {
				t.Errorf("%v\n%s", err, match[1])
			}
		}
	}
	if files < 4 {
		t.Errorf("the page has only %d files", files)
	}
}

// Every command line of the page is one that the program knows.
func TestPolicyPageShowsValidCommands(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(policyPage)
	if err != nil {
		t.Fatal(err)
	}
	path := policyFile(t, "services: {api: {limits: {build: {time: 30m}}}}\n")
	tried := 0
	for _, match := range regexp.MustCompile(`(?m)^    mm-orchestrator (.*)$`).FindAllStringSubmatch(string(page), -1) {
		line, _, _ := strings.Cut(match[1], " #")
		args := strings.Fields(strings.ReplaceAll(line, "/etc/mm-orchestrator/profiles.yaml", path))
		if args[0] != "policy" {
			continue
		}
		tried++
		if got := invoke(t, nil, args...); got.code != exitOK {
			t.Errorf("%s: exit %d %s", line, got.code, got.stderr)
		}
	}
	if tried < 3 {
		t.Errorf("only %d command lines were tried", tried)
	}
}

func TestThePolicyAddsToRedaction(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"redaction: {add: [DEPLOY_PIN], commonWords: guard}\n": "*** a guest of X_TOKEN=*** by ***",
		"redaction: {commonWords: mask}\n":                     "4711-0815 a *** of X_TOKEN=*** by ***",
		"redaction: {commonWords: guard, words: [other-word]}": "4711-0815 a *** of X_TOKEN=*** by other-word",
		"redaction: {words: [other-word]}\n":                   "4711-0815 a *** of X_TOKEN=*** by ***",
		"redaction: {add: [deploy_pin], words: [other-word]}":  "*** a *** of X_TOKEN=*** by ***",
	} {
		env := environment{"MM_ORCHESTRATOR_PROFILES=" + policyFile(t, text), "DEPLOY_PIN=4711-0815", "X_TOKEN=guest", "Y_TOKEN=other-word"}
		c := mustLoad(t, env)
		if err := c.loadPolicy(); err != nil {
			t.Fatal(err)
		}
		for name, redactor := range map[string]*artifacts.Redactor{
			"worker":  artifacts.NewRedactor(env, c.redaction()),
			"command": (&program{env: env}).redactor(),
		} {
			if got := redactor.String("4711-0815 a guest of X_TOKEN=guest by other-word"); got != want {
				t.Errorf("%s, %s: %s, want %s", text, name, got, want)
			}
		}
	}
}

// What the policy file takes for secret counts for the doctor too, which prints what programs
// and the engine say.
func TestThePolicyAddsToRedactionOfTheDoctor(t *testing.T) {
	t.Parallel()
	env := environment{
		"MM_ORCHESTRATOR_DATABASE_URL=postgres://u:p@" + closedPort + "/d", "CELERY_BROKER_URL=amqp://u:p@" + closedPort + "//", "DOCKER_HOST=tcp://" + closedPort,
		"MM_ORCHESTRATOR_WAIT=0", "MM_ORCHESTRATOR_LISTEN=", "PATH=/nowhere", "WORKSPACE_ROOT=/nowhere/4711-0815", "DEPLOY_PIN=4711-0815",
	}
	for _, args := range [][]string{{"doctor"}, {"doctor", "--json"}} {
		got := invoke(t, env, append(args, "--profiles", policyFile(t, "redaction: {add: [DEPLOY_PIN]}\n"))...)
		if out := got.stdout + got.stderr; strings.Contains(out, "4711-0815") || !strings.Contains(out, "workspace /nowhere/*** does not exist") {
			t.Errorf("%s: exit code %d: %s", args, got.code, out)
		}
	}
}

// A gate that belongs to no service of the policy lets runs go without an approval.
func TestPolicyCheckTellsStrayGates(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	for _, gate := range []string{"api", "orchestrator", "celery-woker"} {
		s.exec(t, fmt.Sprintf(`INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes) VALUES (gen_random_uuid(), '%s', 'pre-run', '{sre}', 60)`, gate))
	}
	s.exec(t, `INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes) VALUES (gen_random_uuid(), 'nothing', 'none', '{}', 60)`)
	path := policyFile(t, "services:\n  api:\n    compose: {service: web}\n")
	got := invoke(t, s.env(), "policy", "check", path)
	for _, want := range []string{
		`note: no run needs the approval (pre-run) of the gate for "api" in approval_gates: no service of the policy has that compose service. That of service api is web: set the gate's service_name to web, or runs for api go without an approval`,
		`note: no run needs the approval (pre-run) of the gate for "celery-woker" in approval_gates: no service of the policy has that compose service. Correct its service_name: did you mean celery-worker?`,
	} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q in\n%s", want, got.stdout)
		}
	}
	if got.code != exitOK || strings.Count(got.stdout, "approval_gates") != 2 {
		t.Errorf("exit %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	s.exec(t, `INSERT INTO approval_gates (id, service_name, requirement, approver_roles, valid_for_minutes) VALUES (gen_random_uuid(), 'web', 'pre-run', '{sre}', 60)`)
	if got := invoke(t, s.env(), "policy", "check", path); !strings.Contains(got.stdout, "That of service api is web, which has a gate of its own: remove this one") {
		t.Errorf("exit %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	// A policy needs no database: not one that is configured and does not answer, and
	// none.
	got = invoke(t, environment{"MM_ORCHESTRATOR_DATABASE_URL=postgres://x:x@127.0.0.1:1/x"}, "policy", "check", path)
	if got.code != exitOK || !strings.Contains(got.stdout, "note: the approval gates in the database were not checked: ") {
		t.Errorf("without an answer: exit %d\n%s%s", got.code, got.stdout, got.stderr)
	}
	if got := invoke(t, nil, "policy", "check", path); got.code != exitOK || strings.Contains(got.stdout, "approval") {
		t.Errorf("without a database: exit %d\n%s%s", got.code, got.stdout, got.stderr)
	}
}

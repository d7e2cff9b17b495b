package main

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

const testToken = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"

// serveGitHub is a GitHub behind TLS that accepts testToken. It returns its settings.
func serveGitHub(t *testing.T) environment {
	t.Helper()
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, password, _ := r.BasicAuth()
		switch {
		case r.Header.Get("Authorization") != "Bearer "+testToken && password != testToken:
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"message":"Bad credentials"}`)
		case r.URL.String() == "/octo/widgets.git/info/refs?service=git-receive-pack":
			w.Header().Set("Content-Type", "application/x-git-receive-pack-advertisement")
		case r.URL.Path == "/api/v3/repos/octo/widgets":
			w.Header().Set("X-OAuth-Scopes", "repo")
			fmt.Fprint(w, `{"full_name":"octo/widgets","private":true,"permissions":{"push":true}}`)
		default:
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"message":"Not Found"}`)
		}
	}))
	t.Cleanup(server.Close)
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return environment{"MM_ORCHESTRATOR_GITHUB_URL=" + server.URL, "MM_ORCHESTRATOR_GITHUB_CA_FILE=" + file}
}

// codexProgram is a codex with a login.
func codexProgram(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "codex")
	if err := os.WriteFile(path, []byte("#!/bin/sh\ncase \"$*\" in --version) echo codex-cli 0.99.0;; \"login status\") echo Logged in using ChatGPT >&2;; *) exit 2;; esac\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// serveModel is the API of a model that accepts one key.
func serveModel(t *testing.T) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/models" || r.Header.Get("Authorization") != "Bearer "+acceptedKey {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"data":[]}`)
	}))
	t.Cleanup(server.Close)
	return server
}

// codexOf is a codex whose model is at an address.
func codexOf(t *testing.T, address string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "codex")
	text := fmt.Sprintf("#!/bin/sh\ncase \"$*\" in --version) echo codex-cli 0.99.0;; *app-server) echo '{\"id\":2,\"result\":{\"config\":{\"openai_base_url\":\"%s\"}}}'; cat >/dev/null;; *) exit 2;; esac\n", address)
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSpecPreflight(t *testing.T) {
	t.Parallel()
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte(testToken+"\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	needsVariable := filepath.Join(t.TempDir(), "codex")
	if err := os.WriteFile(needsVariable, []byte("#!/bin/sh\n[ -n \"$NEEDED\" ] && exec "+codexProgram(t)+" \"$@\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	model := serveModel(t)
	env := append(serveGitHub(t), "MM_ORCHESTRATOR_GITHUB_CREDENTIAL=file:"+token, "MM_ORCHESTRATOR_CODEX_PROGRAM="+codexProgram(t), "GITHUB_REPOSITORY=octo/widgets")
	guardSpec(t, leaktest.State{Files: []string{token}})
	for name, test := range map[string]struct {
		env  environment
		args []string
		code int
		want []string
	}{
		"all is well":                {nil, nil, exitOK, []string{"valid          codex", "codex-cli 0.99.0, with its login: Logged in using ChatGPT", "valid          github", "may push to octo/widgets, with the scope repo", "skipped        login check"}},
		"a key":                      {environment{"CODEX_API_KEY=" + codexKey}, nil, exitOK, []string{"with the key in env:CODEX_API_KEY, which was not tried"}},
		"a key that is refused":      {environment{"CODEX_API_KEY=" + codexKey, "MM_ORCHESTRATOR_CODEX_PROGRAM=" + codexOf(t, model.URL)}, nil, exitFailure, []string{"invalid        codex", "refuses the key in env:CODEX_API_KEY (401)"}},
		"a key that is accepted":     {environment{"CODEX_API_KEY=" + acceptedKey, "MM_ORCHESTRATOR_CODEX_PROGRAM=" + codexOf(t, model.URL)}, nil, exitOK, []string{"which the model's API at " + model.URL + " accepts"}},
		"a key that is not tried":    {environment{"CODEX_API_KEY=" + codexKey, "MM_ORCHESTRATOR_CODEX_KEY_CHECK=false", "MM_ORCHESTRATOR_CODEX_PROGRAM=" + codexOf(t, model.URL)}, nil, exitOK, []string{"with the key in env:CODEX_API_KEY\n"}},
		"no such profile":            {environment{"CODEX_PROFILE=work", "CODEX_HOME=/nowhere"}, nil, exitFailure, []string{"no file /nowhere/work.config.toml"}},
		"a key for Codex Cloud":      {environment{"CODEX_API_KEY=" + codexKey, "MM_ORCHESTRATOR_CODEX_BACKEND=cloud", "CODEX_ENVIRONMENT=env_1"}, nil, exitOK, []string{"codex-cli 0.99.0, with its login"}},
		"a variable of Codex":        {environment{"MM_ORCHESTRATOR_CODEX_PROGRAM=" + needsVariable, "MM_ORCHESTRATOR_CODEX_VARIABLES=NEEDED", "NEEDED=yes"}, nil, exitOK, []string{"codex-cli 0.99.0, with its login"}},
		"a program":                  {environment{"MM_ORCHESTRATOR_GITHUB_CREDENTIAL=command:cat " + token}, nil, exitOK, []string{"may push"}},
		"another repository":         {nil, []string{"--repository", "octo/other"}, exitFailure, []string{"scope_missing", "shows no repository octo/other", "a run cannot work"}},
		"a revoked token":            {environment{"MM_ORCHESTRATOR_GITHUB_CREDENTIAL=env:T", "T=" + otherToken}, nil, exitFailure, []string{"invalid        github", "refuses the token in env:T (401: Bad credentials)"}},
		"no certificate":             {environment{"MM_ORCHESTRATOR_GITHUB_CA_FILE="}, nil, exitFailure, []string{"cannot be asked", "certificate"}},
		"a volume without an engine": {environment{"CODEX_VOLUME_NAME=codex_auth_0", "DOCKER_HOST=tcp://127.0.0.1:1"}, nil, exitFailure, []string{"failed         login check", "Unable to execute Codex login status for volume 'codex_auth_0'"}},
		"a bad certificate":          {environment{"MM_ORCHESTRATOR_GITHUB_CA_FILE=" + token}, nil, exitConfig, []string{"no certificate in PEM"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			guardSpec(t, leaktest.State{})
			own := env
			for _, assignment := range test.env {
				variable, value, _ := strings.Cut(assignment, "=")
				own = own.with(variable, value)
				if value == "" {
					own = slices.DeleteFunc(slices.Clone(own), func(entry string) bool { return strings.HasPrefix(entry, variable+"=") })
				}
			}
			p := start(t, own, append([]string{"spec", "preflight"}, test.args...)...)
			code, text := p.exit(), p.stdout.String()+p.stderr.String()
			if code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			for _, want := range test.want {
				if !strings.Contains(text, want) {
					t.Errorf("%q is missing in\n%s", want, text)
				}
			}
		})
	}
	p := start(t, env, "spec", "preflight", "--json")
	var report specPreflightReport
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d: %s", code, p.stderr.String())
	}
	if err := json.Unmarshal([]byte(p.stdout.String()), &report); err != nil || !report.OK || report.GitHub.Status != "valid" || report.Login.Status != "skipped" || report.Repository != "octo/widgets" {
		t.Errorf("%+v, %v", report, err)
	}
}

// The doctor checks what a worker of the Spec workflow needs, and nothing that only a
// worker of steps needs.
func TestDoctorChecksTheSpecWorkflow(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.guard(t)
	s.writeTasks(t, "014-refresh-docs", "- [ ] T1 x\n")
	env := append(append(s.specEnv(), serveGitHub(t)...), "TEST_MODE=false", "MM_ORCHESTRATOR_SPEC_ONLY=true", "WORKSPACE_ROOT=/nowhere", "DOCKER_HOST=tcp://127.0.0.1:1",
		"GITHUB_TOKEN="+testToken, "GITHUB_REPOSITORY=octo/widgets", "MM_ORCHESTRATOR_CODEX_PROGRAM="+codexProgram(t))
	p := start(t, env, "doctor")
	text := ""
	if code := p.exit(); code != exitOK {
		t.Errorf("exit code %d: %s", code, p.stderr.String())
	}
	text = p.stdout.String()
	for _, want := range []string{`queue "codex-0"`, `queue "speckit"`, "has 1 feature", "files of runs go to", "codex-cli 0.99.0, with its login", "may push to octo/widgets", "not needed: the worker runs only the Spec workflow"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	if _, err := os.Stat(filepath.Join(s.workspace, "var")); !os.IsNotExist(err) {
		t.Errorf("the doctor has left a directory: %v", err)
	}
	refused := runDoctor(t, env.with("CODEX_API_KEY", codexKey).with("MM_ORCHESTRATOR_CODEX_PROGRAM", codexOf(t, serveModel(t).URL)), exitFailure)
	if f := refused["spec"]; f.Status != statusFail || !strings.Contains(f.Found, "refuses the key in env:CODEX_API_KEY (401)") {
		t.Errorf("%+v", f)
	}
	found := runDoctor(t, env.with("GITHUB_TOKEN", otherToken), exitFailure)
	if f := found["spec"]; f.Status != statusFail || !strings.Contains(f.Found, "refuses the token in env:GITHUB_TOKEN") {
		t.Errorf("%+v", f)
	}
}

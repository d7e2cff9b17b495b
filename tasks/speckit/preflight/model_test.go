package preflight

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// modelAPI answers as the API of a model.
type modelAPI struct {
	*httptest.Server
	mu sync.Mutex
	// answer answers a request for the list of models with an accepted key.
	answer http.HandlerFunc
	seen   []string
}

func newModelAPI(t *testing.T) *modelAPI {
	m := &modelAPI{answer: func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		fmt.Fprint(w, `{"object":"list","data":[]}`)
	}}
	m.Server = httptest.NewServer(m)
	t.Cleanup(m.Close)
	return m
}

func (m *modelAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	m.seen = append(m.seen, r.Method+" "+r.URL.String()+" "+r.Header.Get("Authorization"))
	answer := m.answer
	m.mu.Unlock()
	if r.Header.Get("Authorization") != "Bearer "+key {
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	answer(w, r)
}

func (m *modelAPI) requests() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]string(nil), m.seen...)
}

// status is an answer without a body.
func status(code int, header ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.WriteHeader(code)
	}
}

// home is a home of Codex with these files.
func (f *fixture) home(files map[string]string) {
	f.t.Helper()
	f.config.Home = f.t.TempDir()
	f.watch.Allow(filepath.Join(f.config.Home, "auth.json")) // Codex has its login there
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(f.config.Home, name), []byte(text), 0o600); err != nil {
			f.t.Fatal(err)
		}
	}
}

func (f *fixture) withKey(value string) {
	f.config.Codex = f.credential("Codex key", "env:CODEX_KEY", "CODEX_KEY="+value)
}

func providerAt(base, variable string) string {
	return fmt.Sprintf("model_provider = \"gateway\"\n[model_providers.gateway]\nname = \"Gateway\"\nbase_url = %q\nenv_key = %q\n", base, variable)
}

// The key is tried where Codex itself would use it, whatever its configuration says. The
// real Codex reads that.
func TestTheKeyIsTriedWhereCodexUsesIt(t *testing.T) {
	t.Parallel()
	program := devenv.Codex(t)
	const wrong = "sk-proj-wrong-0123456789abcdef"
	for name, test := range map[string]struct {
		change func(f *fixture, m *modelAPI)
		status Status
		wants  []string
		// asked is the request that the API gets, "" for none.
		asked string
	}{
		"the key is accepted": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": fmt.Sprintf("openai_base_url = %q\n", m.URL+"/v1")})
		}, Valid, []string{"codex-cli", "with the key in env:CODEX_KEY, which the model's API at http://127.0.0.1", "/v1 accepts"}, "GET /v1/models"},
		"the key is refused": {func(f *fixture, m *modelAPI) {
			f.withKey(wrong)
			f.home(map[string]string{"config.toml": fmt.Sprintf("openai_base_url = %q\n", m.URL+"/v1")})
		}, Invalid, []string{"/v1 refuses the key in env:CODEX_KEY (401)", "Make a new one"}, "GET /v1/models"},
		"a provider with this key": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": providerAt(m.URL+"/openai/v1/", "CODEX_API_KEY") + "query_params = { api-version = \"2025-04-01\" }\n"})
		}, Valid, []string{"/openai/v1 accepts"}, "GET /openai/v1/models?api-version=2025-04-01"},
		"a provider with a key of its own": {func(f *fixture, m *modelAPI) {
			f.withKey(wrong)
			f.home(map[string]string{"config.toml": providerAt(m.URL+"/v1", "GATEWAY_KEY")})
			f.config.Environ = append(f.config.Environ, "GATEWAY_KEY="+key)
		}, Valid, []string{"with the key in the variable GATEWAY_KEY, which the model's API"}, "GET /v1/models"},
		"a provider whose key is missing": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": providerAt(m.URL+"/v1", "GATEWAY_KEY")})
		}, Invalid, []string{"provider gateway takes its key from the variable GATEWAY_KEY, which Codex does not get", "MM_ORCHESTRATOR_CODEX_VARIABLES"}, ""},
		"no key for a provider": {func(f *fixture, m *modelAPI) {
			f.config.Codex = f.credential("Codex key", "env:CODEX_KEY")
			f.home(map[string]string{"config.toml": providerAt(m.URL+"/v1", "CODEX_API_KEY")})
		}, Invalid, []string{"takes its key from the variable CODEX_API_KEY", "put a key into env:CODEX_KEY"}, ""},
		"a provider without a key": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": fmt.Sprintf("model_provider = \"own\"\n[model_providers.own]\nname = \"Own\"\nbase_url = %q\n", m.URL)})
		}, Valid, []string{"provider own, whose login was not tried"}, ""},
		"a setting of the command line": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": "openai_base_url = \"http://127.0.0.1:1/v1\"\n"})
			f.config.Overrides = []string{fmt.Sprintf("openai_base_url=%q", m.URL+"/set")}
		}, Valid, []string{"/set accepts"}, "GET /set/models"},
		"a profile": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{
				"config.toml":      providerAt("http://127.0.0.1:1/v1", "CODEX_API_KEY"),
				"work.config.toml": fmt.Sprintf("[model_providers.gateway]\nname = \"Gateway\"\nbase_url = %q\n", m.URL+"/profile"),
			})
			f.config.Profile = "work"
		}, Valid, []string{"/profile accepts"}, "GET /profile/models"},
		"a part of a provider in a profile": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{
				"config.toml":      providerAt(m.URL+"/v1", "CODEX_API_KEY"),
				"work.config.toml": fmt.Sprintf("[model_providers.gateway]\nbase_url = %q\n", m.URL+"/profile"),
			})
			f.config.Profile = "work"
		}, Valid, []string{"which was not tried"}, ""},
		"no such profile": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": ""})
			f.config.Profile = "work"
		}, Invalid, []string{"there is no file", "work.config.toml", "unset CODEX_PROFILE"}, ""},
		"a configuration that Codex refuses": {func(f *fixture, m *modelAPI) {
			f.home(map[string]string{"config.toml": "model = \"gpt\nopenai_base_url = 1\n"})
		}, Invalid, []string{"codex refuses its configuration", "config.toml:1:"}, ""},
		"a login with a key": {func(f *fixture, m *modelAPI) {
			f.config.Codex = f.credential("Codex key", "env:CODEX_KEY")
			f.home(map[string]string{"config.toml": fmt.Sprintf("openai_base_url = %q\n", m.URL+"/v1"), "auth.json": `{"auth_mode":"apikey","OPENAI_API_KEY":"` + key + `"}`})
		}, Valid, []string{"with the key in", "auth.json, which the model's API"}, "GET /v1/models"},
		"a login with a refused key": {func(f *fixture, m *modelAPI) {
			f.config.Codex = f.credential("Codex key", "env:CODEX_KEY")
			f.home(map[string]string{"config.toml": fmt.Sprintf("openai_base_url = %q\n", m.URL+"/v1"), "auth.json": `{"auth_mode":"apikey","OPENAI_API_KEY":"` + wrong + `"}`})
		}, Invalid, []string{"refuses the key in", "auth.json (401)"}, "GET /v1/models"},
		"it is turned off": {func(f *fixture, m *modelAPI) {
			f.withKey(wrong)
			f.home(map[string]string{"config.toml": fmt.Sprintf("openai_base_url = %q\n", m.URL+"/v1")})
			f.config.TryKey = false
		}, Valid, []string{"with the key in env:CODEX_KEY"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, m := newFixture(t), newModelAPI(t)
			f.config.Program, f.config.TryKey, f.config.Model, f.config.Timeout = program, true, f.config.HTTP, 5*time.Minute
			f.withKey(key)
			test.change(f, m)
			before := listing(t, f.config.Home)
			found := f.check(Request{Repository: "octo/widgets", Codex: true}).Codex
			if found.Status != test.status {
				t.Errorf("found %s, want %s", found.Status, test.status)
			}
			for _, want := range test.wants {
				if !strings.Contains(found.Message, want) {
					t.Errorf("message %q, want %q in it", found.Message, want)
				}
			}
			for _, secret := range []string{key, wrong} {
				if strings.Contains(found.Message, secret) {
					t.Errorf("message %q has the key", found.Message)
				}
			}
			seen := m.requests()
			if test.asked == "" && len(seen) > 0 || test.asked != "" && (len(seen) != 1 || !strings.HasPrefix(seen[0], test.asked+" ")) {
				t.Errorf("the API got %q, want %q", seen, test.asked)
			}
			if after := listing(t, f.config.Home); after != before {
				t.Errorf("the check has changed Codex's home: %s, before %s", after, before)
			}
		})
	}
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(entries)
}

// What the model's API answers, and what follows from it.
func TestWhatTheModelsAPIAnswers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		answer http.HandlerFunc
		status Status
		wants  []string
		// limit is how long a request may take, 0 for no limit.
		limit time.Duration
	}{
		"too many requests":    {status(429, "Retry-After", "20"), Valid, []string{"valid but limited now", "answers 429, for 20s"}, 0},
		"a limit without time": {status(429, "Retry-After", "tomorrow"), Valid, []string{"valid but limited now", "answers 429. A run"}, 0},
		"a restricted key":     {status(403), Valid, []string{"may not list models", "(403)"}, 0},
		"no list of models":    {status(404), Valid, []string{"which was not tried", "has no list of models (404)"}, 0},
		"an outage":            {status(503, "Content-Type", "text/html"), Invalid, []string{"answers 503 Service Unavailable (text/html)", "MM_ORCHESTRATOR_CODEX_KEY_CHECK=false"}, 0},
		"a web page":           {status(200, "Content-Type", "text/html"), Invalid, []string{"answers 200 OK (text/html)", "correct the address of Codex's provider openai"}, 0},
		"another server": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "https://elsewhere.example/v1/models", http.StatusFound)
		}, Invalid, []string{"to elsewhere.example, another server, to which the token is not sent"}, 0},
		"a redirect without end": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/v1/models", http.StatusFound)
		}, Invalid, []string{"for the sixth time"}, 0},
		"a huge answer": {func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			for part := strings.Repeat(" ", 1<<20); r.Context().Err() == nil; {
				if _, err := fmt.Fprint(w, part); err != nil {
					return
				}
			}
		}, Valid, []string{"accepts"}, 0},
		"an answer that does not come": {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, Invalid, []string{"cannot be asked whether it accepts the key in env:CODEX_KEY", "no answer within"}, 200 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f, m := newFixture(t), newModelAPI(t)
			m.answer = test.answer
			f.withKey(key)
			f.config.TryKey, f.config.Timeout = true, 5*time.Minute
			f.config.Model = &http.Client{Transport: f.config.HTTP.Transport, Timeout: test.limit}
			f.config.Program = saying(t, fmt.Sprintf(`{"id":2,"result":{"config":{"model_provider":null,"openai_base_url":%q,"model_providers":{}}}}`, m.URL+"/v1"))
			found := f.check(Request{Repository: "octo/widgets", Codex: true}).Codex
			if found.Status != test.status {
				t.Errorf("found %s, want %s", found.Status, test.status)
			}
			for _, want := range test.wants {
				if !strings.Contains(found.Message, want) {
					t.Errorf("message %q, want %q in it", found.Message, want)
				}
			}
			if strings.Contains(found.Message, key) {
				t.Errorf("message %q has the key", found.Message)
			}
		})
	}
}

// saying is a codex whose app server answers with a line.
func saying(t *testing.T, answer string) string {
	return program(t, "case \"$*\" in --version) echo codex-cli 0.99.0;; *app-server) echo '{\"id\":1}'; echo '"+answer+"'; cat >/dev/null;; *) exit 2;; esac")
}

// A Codex that does not say where its model is, such as an old release or one that
// somebody has wrapped, still counts as usable.
func TestAKeyThatCannotBeTriedCounts(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ program, want string }{
		"no app server":      {`case "$1" in --version) echo codex-cli 0.99.0;; *) exit 2;; esac`, "exit status 2"},
		"another protocol":   {"", "unknown variant"},
		"an endless answer":  {`case "$1" in --version) echo codex-cli 0.99.0;; *) yes;; esac`, "its answer is longer than 4194304 bytes"},
		"no address":         {"", "only Codex knows the address"},
		"an address of sort": {"", "only Codex knows the address"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			f.withKey(key)
			f.config.TryKey, f.config.Timeout, f.config.Program = true, 5*time.Minute, program(t, test.program)
			switch name {
			case "another protocol":
				f.config.Program = saying(t, `{"id":2,"error":{"code":-32600,"message":"Invalid request: unknown variant config/read"}}`)
			case "no address":
				f.config.Program = saying(t, `{"id":2,"result":{"config":{"model_provider":"x","model_providers":{"x":{"env_key":"CODEX_API_KEY"}}}}}`)
			case "an address of sort":
				f.config.Program = saying(t, `{"id":2,"result":{"config":{"openai_base_url":"unix:///run/model.sock"}}}`)
			}
			found := f.check(Request{Repository: "octo/widgets", Codex: true}).Codex
			if found.Status != Valid || !strings.Contains(found.Message, "which was not tried") || !strings.Contains(found.Message, test.want) {
				t.Errorf("%+v", found)
			}
		})
	}
}

package artifacts_test

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"io"
	"os"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

// cleanLogs is output of go build, go test, apt, docker build and git, some of it behind
// the prefixes of BuildKit and docker compose, and program text with colours.
func cleanLogs(t testing.TB) []byte {
	t.Helper()
	file, err := os.Open("testdata/clean_logs.txt.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// Ten megabytes without a secret stay as they are.
func TestCleanLogsAreUnchanged(t *testing.T) {
	t.Parallel()
	environ := append(sampleSecrets(50), "GUEST_URL=amqp://guest:guest@rabbitmq//", "AUTH_PROVIDER=keycloak-oidc", "SSH_AUTH_SOCK=/run/user/1000/ssh-agent.sock")
	for name, secret := range leaktest.Secrets() {
		environ = append(environ, name+"="+secret)
	}
	r := artifacts.NewRedactor(environ)
	text := cleanLogs(t)
	before, after := sha256.New(), sha256.New()
	w := r.Writer(after)
	for size := 0; size < 10<<20; size += len(text) {
		before.Write(text)
		for rest := text; len(rest) > 0; {
			n := min(4093, len(rest)) // as pipes deliver it, with cuts anywhere
			if _, err := w.Write(rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(before.Sum(nil), after.Sum(nil)) {
		return
	}
	clean := bytes.Split([]byte(r.String(string(text))), []byte("\n"))
	for i, line := range bytes.Split(text, []byte("\n")) {
		if i < len(clean) && !bytes.Equal(line, clean[i]) {
			t.Fatalf("line %d: %q became %q", i+1, line, clean[i])
		}
	}
	t.Fatal("the text changed")
}

// What is secret by its place only, whether or not a variable has it.
func TestSecretsInNoVariable(t *testing.T) {
	t.Parallel()
	const key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQ\nAAAAMwAAAAtzc2gtZWQyNTUxOQAAACB\n-----END OPENSSH PRIVATE KEY-----\n"
	r := artifacts.NewRedactor(nil)
	for text, want := range map[string]string{
		"clone https://mm:Geheim99@git.example/x.git":         "clone https://mm:***@git.example/x.git",
		"redis://:pw@cache:6379/0":                            "redis://:***@cache:6379/0",
		`{"u": "https:\/\/mm:pw9@h\/x"}`:                      `{"u": "https:\/\/mm:***@h\/x"}`,
		"https://mm:p@ss@h/":                                  "https://mm:***@h/",
		"https://github_pat_11ABCDEFG0123456789@github.com/x": "https://***@github.com/x",
		"ssh://git@github.com/x":                              "ssh://git@github.com/x",
		"http://h:8080/a@b":                                   "http://h:8080/a@b",
		"https://${USER}:${PASS}@h/ https://u:***@h/":         "https://${USER}:${PASS}@h/ https://u:***@h/",
		"https://deploy:Ge(heim),99@git.example/x.git":        "https://deploy:***@git.example/x.git",
		"https://deploy:Ge'h;eim99@git.example/x.git":         "https://deploy:***@git.example/x.git",
		"https://deploy:$ecret-99@h/ https://d:$geheim@h/":    "https://deploy:***@h/ https://d:***@h/",
		"https://d:*Geheim99@h/ https://d:{Geheim99@h/":       "https://d:***@h/ https://d:***@h/",
		"https://d:[Geheim99@h/ https://d:${Geheim99@h/":      "https://d:***@h/ https://d:***@h/",
		"https://d:xxxGeheim99@h/ https://d:*****@h/":         "https://d:***@h/ https://d:*****@h/",
		"https://$USER:$PASS_1@h/ https://u:$${PASS:-x}@h/":   "https://$USER:$PASS_1@h/ https://u:$${PASS:-x}@h/",
		"https://u:{quote(pw)}@h/ https://u:[PASSWORD]@h/":    "https://u:{quote(pw)}@h/ https://u:[PASSWORD]@h/",
		"https://u:%s@h/ https://u:xxxxx@h/ https://u:...@h/": "https://u:%s@h/ https://u:xxxxx@h/ https://u:...@h/",
		"['http://h:8080','a@b'], (http://h:80),a@b":          "['http://h:8080','a@b'], (http://h:80),a@b",
		"'http://[::1]:80';a@b 'http://h:port','a@b'":         "'http://[::1]:80';a@b 'http://h:port','a@b'",
		"amqp://mm:pw9@h1,a@b mongodb://mm:pw9@h1:1,h2:2/x":   "amqp://mm:***@h1,a@b mongodb://mm:***@h1:1,h2:2/x",
		"https://github_pat_11ABCDEFG0123456789@h, a@b":       "https://***@h, a@b",
		"> Authorization: Bearer abc.DEF-123_x==\n":           "> Authorization: Bearer ***\n",
		"'authorization': 'Basic bW06R2VoZWlt'":               "'authorization': 'Basic ***'",
		"Authorization: required":                             "Authorization: required",
		`"Bearer eyJhbGciOiJIUzI1NiJ9.e30.abc"`:               `"Bearer ***"`,
		"a bearer of bad news, the bearer documentation":      "a bearer of bad news, the bearer documentation",
		"Set-Cookie: session=abc123; Path=/\r\nX":             "Set-Cookie: ***\r\nX",
		"cookie: none":                              "cookie: none",
		"a\n" + key + "b":                           "a\n-----BEGIN OPENSSH PRIVATE KEY-----***-----END OPENSSH PRIVATE KEY-----\nb",
		"-----BEGIN CERTIFICATE-----\nMIIB\n":       "-----BEGIN CERTIFICATE-----\nMIIB\n",
		"grep -----BEGIN PRIVATE KEY----- in files": "grep -----BEGIN PRIVATE KEY----- in files",
	} {
		for size := 1; size <= len(text); size++ {
			if got := inPieces(r, text, size); got != want {
				t.Errorf("%q by %d: %q, want %q", text, size, got, want)
				break
			}
		}
		if got := r.String(want); got != want {
			t.Errorf("%q, redacted again: %q", want, got)
		}
	}
}

// A common word is masked only as a value, if the operator wants that.
func TestCommonWords(t *testing.T) {
	t.Parallel()
	environ := []string{"AUTH_PROVIDER=disabled", "DB_PASSWORD=password", "API_TOKEN=passwordpassword"}
	guarded := artifacts.NewRedactor(environ, artifacts.Rules{CommonWords: artifacts.CommonWords})
	for text, want := range map[string]string{
		"IPv6 is disabled. Enter password: ": "IPv6 is disabled. Enter password: ",
		"AUTH_PROVIDER=disabled x":           "AUTH_PROVIDER=*** x",
		`{"password": "password"}`:           `{"password": "***"}`,
		"password=passwords":                 "password=passwords",
		"provider: disabled":                 "provider: ***",
		"passwordpassword":                   "***",
		"ZGlzYWJsZWQ=":                       "***",
	} {
		for size := 1; size <= len(text); size++ {
			if got := inPieces(guarded, text, size); got != want {
				t.Errorf("%q by %d: %q, want %q", text, size, got, want)
			}
		}
	}
	if got := artifacts.NewRedactor(environ).String("IPv6 is disabled"); got != "IPv6 is ***" {
		t.Errorf("without words: %q", got)
	}
}

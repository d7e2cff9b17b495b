package credential_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const token = "ghp_16C7e42F292c6912E7710c838347Ae178B4a"

func newCredential(t *testing.T, source string, change ...func(*credential.Config)) *credential.Credential {
	t.Helper()
	// Files of a test are the sources themselves. What the program of one source prints is
	// in no argument and no environment.
	leaktest.Guard(t, leaktest.State{Secrets: map[string]string{"token": token}, Files: []string{filepath.Dir(t.TempDir())}})
	parsed, err := credential.Parse(source)
	if err != nil {
		t.Fatal(err)
	}
	config := credential.Config{Name: "GitHub token", Setting: "SETTING", Source: parsed, CommandEnviron: []string{"PATH=" + os.Getenv("PATH")}}
	for _, c := range change {
		c(&config)
	}
	c, err := credential.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// script makes an executable file.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "helper")
	// A program that another test starts meanwhile would keep the file open for writing,
	// and it could not be executed.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestACredentialIsReadFromEachSource(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "a token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o400); err != nil {
		t.Fatal(err)
	}
	program := script(t, `printf '%s\nurl: https://example.com\n' `+token+`; test "$1" = "--field=password" || exit 3`)
	environ := []string{"GITHUB_TOKEN=", "OTHER=replaced-by-the-next-one", "OTHER=" + token, "THIRD=wrong"}
	for _, source := range []string{
		"env:OTHER", "env:GITHUB_TOKEN,OTHER", " env: UNSET , OTHER ", "file:" + file, "command:" + program + " --field=password", "command: '" + program + `' "--field=password" 'it is'`,
	} {
		value, err := newCredential(t, source, func(c *credential.Config) { c.Environ = environ }).Read(t.Context())
		if err != nil || value.Reveal() != token {
			t.Errorf("%s: %q, %v", source, value.Reveal(), err)
		}
		if printed := fmt.Sprintf("%v %+v %#v %q", value, value, value, value); strings.Contains(printed, token) {
			t.Errorf("it prints as %s", printed)
		}
	}
}

// docker replaces the file of a secret, kubernetes the link to the directory with it.
func TestARotatedCredentialIsReadAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	redactor := artifacts.NewRedactor(nil)
	c := newCredential(t, "file:"+filepath.Join(dir, "token"), func(c *credential.Config) { c.Redactors = []credential.Redactor{redactor} })
	if err := os.Symlink("..data/token", filepath.Join(dir, "token")); err != nil {
		t.Fatal(err)
	}
	tokens := []string{"first-token-0123456789", "second-token-0123456789", "third-token-0123456789"}
	for i, text := range tokens {
		version := fmt.Sprintf("..version%d", i)
		if err := os.Mkdir(filepath.Join(dir, version), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, version, "token"), []byte(text), 0o400); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(version, filepath.Join(dir, "..new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
		if value, err := c.Read(t.Context()); err != nil || value.Reveal() != text {
			t.Errorf("version %d: %q, %v", i, value.Reveal(), err)
		}
	}
	if got := redactor.String(strings.Join(tokens, " ")); got != "*** *** ***" {
		t.Errorf("the redactor leaves %q", got)
	}
}

type recorder struct {
	mu    sync.Mutex
	known []string
}

func (r *recorder) Add(secrets ...string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.known = append(r.known, secrets...)
}

// What the source has is secret even if it cannot be used, since an error of the
// program or a later line of the log may have it.
func TestRedactorsKnowTheValueFirst(t *testing.T) {
	t.Parallel()
	one, two := &recorder{}, &recorder{}
	for name, source := range map[string]string{
		"several lines": "file:" + func() string {
			path := filepath.Join(t.TempDir(), "secret")
			if err := os.WriteFile(path, []byte("line-one-is-secret\nline-two-is-secret\n"), 0o400); err != nil {
				t.Fatal(err)
			}
			return path
		}(),
		"a program that fails": "command:" + script(t, "echo printed-and-failed; echo failed with printed-and-failed >&2; exit 3"),
	} {
		_, err := newCredential(t, source, func(c *credential.Config) { c.Redactors = []credential.Redactor{one, two} }).Read(t.Context())
		if err == nil {
			t.Errorf("%s: no error", name)
		}
		for _, secret := range []string{"line-one", "line-two", "printed-and"} {
			if strings.Contains(fmt.Sprint(err), secret) {
				t.Errorf("%s: the error has the secret: %v", name, err)
			}
		}
	}
	for _, redactor := range []*recorder{one, two} {
		for _, secret := range []string{"line-one-is-secret", "line-two-is-secret", "printed-and-failed"} {
			if !slices.Contains(redactor.known, secret) {
				t.Errorf("a redactor does not know %s, only %q", secret, redactor.known)
			}
		}
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for source, wants := range map[string][]string{
		"env:GITHUB_TOKEN,OTHER":                                          {"the GitHub token cannot be read from env:GITHUB_TOKEN,OTHER", "not set", "set GITHUB_TOKEN or OTHER", "SETTING"},
		"file:" + filepath.Join(dir, "none"):                              {"none", "does not exist", "SETTING"},
		"file:" + dir:                                                     {"no regular file"},
		"file:" + pipe:                                                    {"no regular file"},
		"file:" + write("empty", " \n"):                                   {"is empty", "correct the source"},
		"file:" + write("short", "abc"):                                   {"has only 3 characters"},
		"file:" + write("long", strings.Repeat("a", 1<<20)):               {"more than 16384 bytes"},
		"file:" + write("header", "hidden-value\r\nX-Header: 1"):          {"several lines"},
		"file:" + write("spaced", "hidden-value two"):                     {"at position 13", "white space"},
		"file:" + write("binary", "hidden-value\x00\xff"):                 {"at position 13"},
		"command:no-such-program-anywhere --flag":                         {"there is no program no-such-program-anywhere"},
		"command:" + write("not-executable", "#!/bin/sh\necho no"):        {"must not be executed"},
		"command:" + script(t, "echo gpg: decryption failed >&2; exit 2"): {"exit status 2", "gpg: decryption failed"},
		"command:" + script(t, "exit 0"):                                  {"is empty"},
		// The end of a long text, without half of a word, which may be half of a credential.
		"command:" + script(t, "yes abcdefghij | head -50 >&2; exit 2"):                                {"It printed: … abcdefghij abcdefghij"},
		"command:" + script(t, "head -c 2000 /dev/zero | tr '\\0' x >&2; echo ' the end' >&2; exit 2"): {"It printed: … xxx", "xxx the end"},
	} {
		_, err := newCredential(t, source).Read(t.Context())
		for _, want := range wants {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("%s: %v, want %q in it", source, err, want)
			}
		}
		if strings.Contains(fmt.Sprint(err), "hidden-value") {
			t.Errorf("%s: the error has the value: %v", source, err)
		}
		if got := errors.Is(err, credential.ErrNotSet); got != strings.HasPrefix(source, "env:") {
			t.Errorf("%s: errors.Is(ErrNotSet) = %v", source, got)
		}
	}
}

// Half of a word may be half of a credential, which no redactor knows.
func TestErrorsQuoteWholeWords(t *testing.T) {
	t.Parallel()
	_, err := newCredential(t, "command:"+script(t, "yes abcdefghij | head -1000 >&2; exit 2")).Read(t.Context())
	_, printed, found := strings.Cut(fmt.Sprint(err), "It printed: … ")
	if words := strings.Fields(printed); !found || len(words) < 20 || slices.ContainsFunc(words, func(word string) bool { return word != "abcdefghij" }) {
		t.Errorf("error %v", err)
	}
}

func TestAProgramThatHangsIsEndedWithItsChildren(t *testing.T) {
	t.Parallel()
	started := filepath.Join(t.TempDir(), "child")
	c := newCredential(t, "command:"+script(t, "echo waits for a passphrase >&2\nsleep 1000 &\necho $! > "+started+"\nwait"),
		func(c *credential.Config) { c.CommandTimeout = 2 * time.Second })
	_, err := c.Read(t.Context())
	if text := fmt.Sprint(err); !strings.Contains(text, "did not end within 2s") || !strings.Contains(text, "waits for a passphrase") {
		t.Errorf("error %v", err)
	}
	text, err := os.ReadFile(started)
	var pid int
	if _, scanErr := fmt.Sscan(string(text), &pid); err != nil || scanErr != nil {
		t.Fatal(err, scanErr)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		// A zombie whose parent is a reaper elsewhere counts as ended.
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(status), ") Z ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the child %d still runs", pid)
		}
	}

	canceled, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("the worker stops")
	cancel(stopped)
	if _, err := c.Read(canceled); !errors.Is(err, stopped) {
		t.Errorf("after the end of the context: %v", err)
	}
}

// The program gets the variables that it is given, and not those of the worker.
func TestAProgramGetsItsOwnEnvironment(t *testing.T) {
	t.Setenv("POSTGRES_PASSWORD", "hunter2-hunter2")
	c := newCredential(t, "command:"+script(t, `echo "v-$POSTGRES_PASSWORD-$VAULT_ADDR"`), func(c *credential.Config) {
		c.CommandEnviron = append(c.CommandEnviron, "VAULT_ADDR=vault.example")
	})
	if value, err := c.Read(t.Context()); err != nil || value.Reveal() != "v--vault.example" {
		t.Errorf("%q, %v", value.Reveal(), err)
	}
	c = newCredential(t, "command:"+script(t, `echo "none-$POSTGRES_PASSWORD"`), func(c *credential.Config) { c.CommandEnviron = nil })
	if value, err := c.Read(t.Context()); err != nil || value.Reveal() != "none-" {
		t.Errorf("without variables: %q, %v", value.Reveal(), err)
	}
}

func TestSourcesThatAreRefused(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"":                                "not the credential itself",
		token:                             "not the credential itself",
		"ghp:" + token:                    "its beginning must be one of env:",
		"env:":                            "name of a variable",
		"env:" + token + "!":              "not the credential itself",
		"env:" + token:                    "not the credential itself",
		"env:GH_TOKEN,github_pat_11A_x":   "not the credential itself",
		"env:A,":                          "name of a variable",
		"file:relative/path":              "absolute path",
		"file:":                           "absolute path",
		"command:":                        "must have a program",
		"command:''":                      "must have a program",
		"command:pass show x | head -n 1": "character |",
		"command:echo $TOKEN":             "character $",
		"command:echo `id`":               "character `",
		"command:a && b":                  "character &",
		"command:a > b":                   "character >",
		"command:a 'b":                    "quote that is not closed",
		`command:a "b`:                    "quote that is not closed",
		`command:a \`:                     "ends with a backslash",
		"command:a\x00b":                  "NUL",
	} {
		source, err := credential.Parse(text)
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), token) {
			t.Errorf("Parse(%q) = %v, %v, want %q", text, source, err, want)
		}
	}
}

func TestACommandIsNoShellScript(t *testing.T) {
	t.Parallel()
	program := script(t, `printf '[%s]' "$@"`)
	c := newCredential(t, "command:"+program+` a\ b '$HOME|;' "x\"y\n"'z' --flag=*`)
	_, err := c.Read(t.Context())
	// The value has a space, so that it is refused at the position of that.
	if err == nil || !strings.Contains(err.Error(), "at position 3") {
		t.Errorf("error %v", err)
	}
	c = newCredential(t, "command:"+program+` a\\b '$HOME|;' "x\"y\n"'z' --flag=* ""`)
	if value, err := c.Read(t.Context()); err != nil || value.Reveal() != `[a\b][$HOME|;][x"y\nz][--flag=*][]` {
		t.Errorf("%q, %v", value.Reveal(), err)
	}
}

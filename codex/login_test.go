package codex_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/codex"
)

// added is a redactor that only notes what it is told.
type added []string

func (a *added) Add(secrets ...string) { *a = append(*a, secrets...) }

// Redactors know all secrets of a login before anybody uses one of them.
func TestALoginIsSecret(t *testing.T) {
	t.Parallel()
	const text = `{"auth_mode": "chatgpt", "OPENAI_API_KEY": "sk-proj-Vq7Rm2Xk4Wn9Jb3Lh", "last_refresh": "2026-01-01T00:00:00.000000Z",
		"tokens": {"id_token": "id.token.of-1234567", "access_token": "access.token.of-89", "refresh_token": "rt_Fz6Hs1Pd8Kw3Vb", "account_id": "account-of-more-than-16-bytes", "token_type": "bearer-of-more-than-16-bytes"},
		"agent_identity": {"agent_private_key": "MC4CAQAwBQYDK2Vw", "workspace": "workspace-of-more-than-16"}}`
	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, codex.LoginFile), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var one, two added
	tokens := codex.NewLogin(home, &one, &two).Read()
	if tokens.Key.Reveal() != "sk-proj-Vq7Rm2Xk4Wn9Jb3Lh" || tokens.Access.Reveal() != "access.token.of-89" || fmt.Sprint(tokens) != "{*** ***}" {
		t.Errorf("tokens are %v", tokens)
	}
	for _, known := range []added{one, two} {
		slices.Sort(known)
		if want := []string{"MC4CAQAwBQYDK2Vw", "access.token.of-89", "id.token.of-1234567", "rt_Fz6Hs1Pd8Kw3Vb"}; !slices.Equal(known, append(want, "sk-proj-Vq7Rm2Xk4Wn9Jb3Lh")) {
			t.Errorf("a redactor knows %q", []string(known))
		}
	}
}

// A login that is no file, or says anything, stops nobody, and makes redactors neither
// forget what they know nor mask what all texts have.
func TestALoginThatSaysAnything(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(path string) error{
		"none":      func(string) error { return nil },
		"pipe":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"no JSON":   func(path string) error { return os.WriteFile(path, []byte("sk-proj-Vq7Rm2Xk4Wn9Jb3Lh"), 0o600) },
		"a list":    func(path string) error { return os.WriteFile(path, []byte(`[["OPENAI_API_KEY"], 7, null]`), 0o600) },
		"words": func(path string) error {
			return os.WriteFile(path, []byte(`{"key": "function", "token": "return"}`), 0o600)
		},
	} {
		path := filepath.Join(t.TempDir(), codex.LoginFile)
		if err := prepare(path); err != nil {
			t.Fatal(err)
		}
		var known added
		if tokens := codex.NewLogin(filepath.Dir(path), &known).Read(); tokens != (codex.Tokens{}) && name != "words" || len(known) != 0 {
			t.Errorf("%s: tokens %v, known %q", name, tokens, known)
		}
	}
	var known added
	home := t.TempDir()
	var output bytes.Buffer
	w := codex.NewLogin(home, &known).Writer(&output)
	for round := range 100 {
		text := "{"
		for i := range 1000 {
			text += fmt.Sprintf(`"token%d": "value-%d-%d-%032d",`, i, round, i, 0)
		}
		if err := os.WriteFile(filepath.Join(home, codex.LoginFile), []byte(text+`"end": ""}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if len(known) == 0 || len(known) > 128 || output.Len() != 100 {
		t.Errorf("%d secrets, %d bytes of output", len(known), output.Len())
	}
}

func TestHome(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		home    string
		environ []string
		want    string
	}{
		{"/own", []string{"CODEX_HOME=/other"}, "/own"},
		{"", []string{"CODEX_HOME=/first", "HOME=/home/mm", "CODEX_HOME=/last"}, "/last"},
		{"", []string{"HOME=/home/mm"}, "/home/mm/.codex"},
		{"", nil, ""},
	} {
		if got := codex.Home(test.home, test.environ); got != test.want {
			t.Errorf("%q, %q: %q, want %q", test.home, test.environ, got, test.want)
		}
	}
	var login *codex.Login
	if codex.NewLogin("") != nil || login.Read() != (codex.Tokens{}) || login.Writer(os.Stdout) != os.Stdout {
		t.Error("a login without a home is none")
	}
}

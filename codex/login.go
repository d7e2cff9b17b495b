package codex

import (
	"encoding/json"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// LoginFile is the file with Codex's login in its home.
const LoginFile = "auth.json"

// Limits on that file, which a command of the model may write where no sandbox keeps it from
// that: the bytes that are read, how many secrets it can have, their least length, and how
// often it counts as renewed while codex works once. Redactors remember only so many.
const (
	maxLogin         = 1 << 20
	maxLoginSecrets  = 16
	minLoginSecret   = 16
	maxLoginRenewals = 8
)

// Home is the directory with Codex's login and configuration as codex finds it: home, a
// CODEX_HOME, and without one by the variables of environ. It is "" if that is not known.
func Home(home string, environ []string) string {
	if home != "" {
		return home
	}
	user := ""
	for _, variable := range environ { // the last one counts
		switch name, value, _ := strings.Cut(variable, "="); name {
		case "CODEX_HOME":
			home = value
		case "HOME":
			user = value
		}
	}
	if home == "" && user != "" {
		return filepath.Join(user, ".codex")
	}
	return home
}

// A Login is the login of codex itself, in a file of its home. Commands of the model can
// read that file, so that redactors have to know what is in it. Codex renews it while it
// works. A Login may be used by several goroutines; the nil Login knows no file.
type Login struct {
	path      string
	redactors []credential.Redactor

	mu sync.Mutex
	// state is that of the file when it was read last. Guarded by mu.
	state fileState
}

// A fileState tells versions of a file apart.
type fileState struct {
	size             int64
	inode            uint64
	modified, change syscall.Timespec
}

// NewLogin returns the login in a home, see [Home]. redactors are all of the process, and
// those that look for credentials in changes. It reads nothing.
func NewLogin(home string, redactors ...credential.Redactor) *Login {
	if home == "" {
		return nil
	}
	return &Login{path: filepath.Join(home, LoginFile), redactors: redactors}
}

// Tokens are what a login has. They are zero if it has no such thing.
type Tokens struct {
	// Key is a key of an API.
	Key secret.String
	// Access is the access token of an account.
	Access secret.String
}

// Read reads the login. All redactors know all its secrets before Read returns. What
// cannot be read is zero: Codex says what is wrong.
func (l *Login) Read() Tokens {
	if l == nil {
		return Tokens{}
	}
	text, state := l.text()
	l.mu.Lock()
	l.state = state
	l.mu.Unlock()
	var document any
	if json.Unmarshal(text, &document) != nil {
		return Tokens{}
	}
	var found []string
	secretsOf("", document, &found)
	if len(found) > 0 {
		for _, redactor := range l.redactors {
			redactor.Add(found...)
		}
	}
	var file struct {
		Key    string `json:"OPENAI_API_KEY"`
		Tokens struct {
			Access string `json:"access_token"`
		} `json:"tokens"`
	}
	if json.Unmarshal(text, &file) != nil {
		return Tokens{}
	}
	return Tokens{secret.New(file.Key), secret.New(file.Tokens.Access)}
}

// text is that of the file, nil if it cannot be read.
func (l *Login) text() ([]byte, fileState) {
	// Opening a pipe would block for ever without O_NONBLOCK.
	file, err := os.OpenFile(l.path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fileState{}
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, fileState{}
	}
	text, err := io.ReadAll(io.LimitReader(file, maxLogin))
	if err != nil {
		return nil, fileState{}
	}
	return text, stateOf(info)
}

func stateOf(info fs.FileInfo) fileState {
	state := fileState{size: info.Size()}
	if system, ok := info.Sys().(*syscall.Stat_t); ok {
		state.inode, state.modified, state.change = system.Ino, system.Mtim, system.Ctim
	}
	return state
}

// renewed reports whether the file has changed since it was read.
func (l *Login) renewed() bool {
	info, err := os.Stat(l.path)
	if err != nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state != stateOf(info)
}

// Writer passes on what codex prints, and looks before whether it has renewed its login: a
// command of the model may print the new one.
func (l *Login) Writer(next io.Writer) io.Writer {
	if l == nil {
		return next
	}
	return &loginWriter{login: l, next: next}
}

type loginWriter struct {
	login    *Login
	next     io.Writer
	renewals int
}

func (w *loginWriter) Write(p []byte) (int, error) {
	if w.renewals < maxLoginRenewals && w.login.renewed() {
		w.renewals++
		w.login.Read()
	}
	return w.next.Write(p)
}

// secretName matches the names of fields with a secret: OPENAI_API_KEY, access_token,
// refresh_token, id_token, and what further kinds of login have.
var secretName = regexp.MustCompile(`(?i)key|token|jwt|secret|password|assertion`)

// notSecret are fields whose names have such a word.
var notSecret = []string{"public_key", "token_type", "key_id"}

// secretsOf collects the secrets in a value of JSON.
func secretsOf(name string, value any, found *[]string) {
	switch value := value.(type) {
	case string:
		if len(value) >= minLoginSecret && len(*found) < maxLoginSecrets && secretName.MatchString(name) && !slices.Contains(notSecret, strings.ToLower(name)) {
			*found = append(*found, value)
		}
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(value)) {
			secretsOf(name, value[name], found)
		}
	case []any:
		for _, member := range value {
			secretsOf(name, member, found)
		}
	}
}

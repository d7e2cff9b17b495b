package preflight

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// checkCodex finds out whether Codex can be started and has a key or a login.
func (c *Checker) checkCodex(ctx context.Context, request Request) Finding {
	var key secret.String
	if c.config.Codex != nil {
		var err error
		if key, err = c.config.Codex.Read(ctx); err != nil && !errors.Is(err, credential.ErrNotSet) {
			return Finding{Invalid, err.Error()}
		}
	}
	if finding, has := remembered(c, c.codex, key, request.Fresh); has {
		return finding
	}
	return remember(c, c.codex, key, c.askCodex(ctx, key))
}

func (c *Checker) askCodex(ctx context.Context, key secret.String) Finding {
	version, err := c.program(ctx, "--version")
	if err != nil {
		return Finding{Invalid, err.Error()}
	}
	if version.code != 0 || version.summary() == "" {
		return Finding{Invalid, fmt.Sprintf("%s --version does not work (%s)%s: install Codex again, or set %s to another program",
			c.config.Program, version.ended, version.quote(), c.config.SettingName("MM_ORCHESTRATOR_CODEX_PROGRAM"))}
	}
	name := version.summary()
	if c.config.Profile != "" {
		// Codex itself goes on without a word.
		if file := filepath.Join(c.home(), codex.ProfileFile(c.config.Profile)); !fileExists(file) {
			return Finding{Invalid, fmt.Sprintf("there is no file %s with Codex's profile %s: make it, or unset %s", file, c.config.Profile, c.config.SettingName("CODEX_PROFILE"))}
		}
	}
	withKey := ""
	if !key.IsZero() {
		withKey = "the key in " + c.config.Codex.Source().String()
	}
	var m model
	if c.config.TryKey {
		switch m, err = c.findModel(ctx); {
		case errors.Is(err, errUnknown) && !key.IsZero():
			return Finding{Valid, fmt.Sprintf("%s, with %s, which was not tried: %v", name, withKey, err)}
		case errors.Is(err, errUnknown):
		case err != nil:
			return Finding{Invalid, err.Error()}
		case m.variable != "" && (m.variable != codex.KeyVariable || key.IsZero()):
			// Codex uses neither the credential nor its login.
			value := lastValue(c.config.Environ, m.variable)
			if value == "" {
				return Finding{Invalid, c.noVariable(m)}
			}
			return c.tryKey(ctx, m, secret.New(value), name, "the key in the variable "+m.variable)
		case m.variable == "" && !m.openAI:
			return Finding{Valid, fmt.Sprintf("%s, with its provider %s, whose login was not tried: only Codex knows it", name, m.provider)}
		case !key.IsZero():
			return c.tryKey(ctx, m, key, name, withKey)
		}
	}
	if !key.IsZero() {
		return Finding{Valid, name + ", with " + withKey}
	}
	status, err := c.program(ctx, "login", "status")
	switch {
	case err != nil:
		return Finding{Invalid, err.Error()}
	case status.code != 0:
		where := ""
		if home := c.home(); home != "" {
			where = " in " + home
		}
		text := fmt.Sprintf("%s has no login%s (%s)%s", c.config.Program, where, status.ended, status.quote())
		if c.config.Codex != nil {
			return Finding{Invalid, fmt.Sprintf("%s, and there is no key in %s: run `codex login` for the worker's user, or put a key there", text, c.config.Codex.Source())}
		}
		return Finding{Invalid, text + ": run `codex login` for the worker's user"}
	}
	login := c.readLogin()
	if m.openAI && !login.key.IsZero() {
		return c.tryKey(ctx, m, login.key, name, "the key in "+filepath.Join(c.home(), codex.LoginFile))
	}
	if !login.expires.IsZero() && login.expires.Sub(c.config.Now()) < loginWarning {
		return Finding{ExpiresSoon, fmt.Sprintf("%s: its login expires on %s, unless Codex can renew it: it must be able to write %s", name, login.expires.UTC().Format("2006-01-02 15:04 UTC"), filepath.Join(c.home(), codex.LoginFile))}
	}
	return Finding{Valid, name + ", with its login: " + status.summary()}
}

// noVariable says that Codex does not get the key that its provider needs.
func (c *Checker) noVariable(m model) string {
	text := fmt.Sprintf("Codex's provider %s takes its key from the variable %s, which Codex does not get: ", m.provider, m.variable)
	switch {
	case m.variable != codex.KeyVariable:
		return text + fmt.Sprintf("set it for the worker, and name it in %s", c.config.SettingName("MM_ORCHESTRATOR_CODEX_VARIABLES"))
	case c.config.Codex != nil:
		return text + "put a key into " + c.config.Codex.Source().String()
	}
	return text + "set " + c.config.SettingName("MM_ORCHESTRATOR_CODEX_CREDENTIAL")
}

// loginWarning is how long before its end a login expires soon. Codex renews it days
// before, so that this happens only where it cannot.
const loginWarning = 24 * time.Hour

// home is the directory with Codex's login, "" if that is not known.
func (c *Checker) home() string { return codex.Home(c.config.Home, c.config.Environ) }

// lastValue returns the value of a variable that a program would see, "" for none.
func lastValue(environ []string, name string) string {
	for _, variable := range slices.Backward(environ) {
		if own, value, _ := strings.Cut(variable, "="); own == name {
			return value
		}
	}
	return ""
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// A login is what codex.LoginFile has.
type login struct {
	// key is that of an API, zero if Codex is logged in otherwise.
	key secret.String
	// expires is when the access token ends, zero if that is not known.
	expires time.Time
}

// readLogin reads Codex's login. What cannot be read is zero: Codex says what is wrong.
func (c *Checker) readLogin() login {
	file := c.config.Login.Read()
	var found login
	if file.Access.IsZero() {
		found.key = file.Key
	}
	parts := strings.Split(file.Access.Reveal(), ".")
	if len(parts) != 3 {
		return found
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return found
	}
	var token struct {
		Expires int64 `json:"exp"`
	}
	if json.Unmarshal(claims, &token) == nil && token.Expires != 0 {
		found.expires = time.Unix(token.Expires, 0)
	}
	return found
}

// result is how a call of the program has ended. Its texts are redacted.
type result struct {
	code           int
	ended          string
	stdout, stderr string
}

// program calls Codex's program with no input.
func (c *Checker) program(ctx context.Context, args ...string) (result, error) {
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout/2) // one call must leave time for another one
	defer cancel()
	cmd := exec.Command(c.config.Program, args...)
	cmd.Env = append([]string{}, c.config.Environ...)
	if c.config.Home != "" {
		cmd.Env = append(cmd.Env, "CODEX_HOME="+c.config.Home)
	}
	cmd.Dir = os.TempDir() // not the workspace, whose files could configure it
	stdout, stderr := &excerpt.Head{Limit: 64 << 10}, &excerpt.Head{Limit: 64 << 10}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	// A Runner, because that of a step would end a program without a mark as an orphan.
	err := processes.Runner{Grace: time.Second}.Run(limited, processes.Owner{Step: "preflight"}, cmd, nil)
	var exit *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist):
		return result{}, fmt.Errorf("there is no program %s: install Codex where the worker runs (npm install -g @openai/codex), or set %s to its path", c.config.Program, c.config.SettingName("MM_ORCHESTRATOR_CODEX_PROGRAM"))
	case limited.Err() != nil:
		return result{}, fmt.Errorf("%s %s did not end within %s", c.config.Program, strings.Join(args, " "), c.config.Timeout/2)
	case err != nil && !errors.As(err, &exit):
		return result{}, fmt.Errorf("%s cannot be started: %w", c.config.Program, err)
	}
	return result{cmd.ProcessState.ExitCode(), cmd.ProcessState.String(), c.config.Redact(stdout.Words()), c.config.Redact(stderr.Words())}, nil
}

// summary is what the program has printed, in one line.
func (r result) summary() string { return oneLine(first(r.stdout, r.stderr), 200) }

// quote is what the program has printed on stderr, for an error.
func (r result) quote() string {
	if text := oneLine(first(r.stderr, r.stdout), 200); text != "" {
		return ": " + text
	}
	return ""
}

// first returns the first text that is not only white space.
func first(texts ...string) string {
	for _, text := range texts {
		if strings.TrimSpace(text) != "" {
			return text
		}
	}
	return ""
}

// oneLine collapses white space, and cuts at a number of characters.
func oneLine(text string, limit int) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(text, "\uFFFD")), " ")
	if runes := []rune(text); len(runes) > limit {
		text = string(runes[:limit-3]) + "..."
	}
	return text
}

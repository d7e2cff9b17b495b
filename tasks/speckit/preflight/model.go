package preflight

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A model is where Codex's model is and which key it gets, as Codex itself reads its
// configuration. The zero value is not known.
type model struct {
	// provider is the name in Codex's configuration.
	provider string
	// base is the base address of the API, "" if only Codex knows it.
	base string
	// query are parameters of every request.
	query map[string]string
	// variable is the one that has the key. It is "" if Codex uses CODEX_API_KEY or its
	// login (openAI), or nothing that this package knows.
	variable string
	openAI   bool
}

// settings is the part of Codex's configuration that says where the model is, as its app
// server writes it. What is not set is null there, which leaves a field as it is.
type settings struct {
	Provider  string               `json:"model_provider"`
	OpenAI    string               `json:"openai_base_url"`
	Providers map[string]*provider `json:"model_providers"`
}

type provider struct {
	Base     string            `json:"base_url"`
	Variable string            `json:"env_key"`
	Query    map[string]string `json:"query_params"`
	OpenAI   bool              `json:"requires_openai_auth"`
}

// over returns settings with those of a profile over them.
func (s settings) over(profile settings) settings {
	s.Provider, s.OpenAI = cmp.Or(profile.Provider, s.Provider), cmp.Or(profile.OpenAI, s.OpenAI)
	merged := map[string]*provider{}
	for _, list := range []map[string]*provider{s.Providers, profile.Providers} {
		for name, p := range list {
			if p == nil {
				continue
			}
			m := provider{}
			if before := merged[name]; before != nil {
				m = *before
			}
			m.Base, m.Variable, m.OpenAI = cmp.Or(p.Base, m.Base), cmp.Or(p.Variable, m.Variable), p.OpenAI || m.OpenAI
			if p.Query != nil {
				m.Query = p.Query
			}
			merged[name] = &m
		}
	}
	s.Providers = merged
	return s
}

// model says where the model is.
func (s settings) model() model {
	const openAI = "openai"
	name := cmp.Or(s.Provider, openAI)
	if name == openAI {
		return model{provider: name, base: cmp.Or(s.OpenAI, "https://api.openai.com/v1"), openAI: true}
	}
	p := s.Providers[name]
	if p == nil {
		return model{provider: name} // one that is built into Codex
	}
	return model{provider: name, base: p.Base, query: p.Query, variable: p.Variable, openAI: p.OpenAI && p.Variable == ""}
}

// errUnknown: this release of Codex does not say how it is configured.
var errUnknown = errors.New("codex does not say where its model is")

// findModel asks Codex where its model is. Codex reads its files itself, since it knows
// its rules: which file counts, what a release still accepts. The error wraps errUnknown,
// or is what Codex says about a configuration that it refuses.
func (c *Checker) findModel(ctx context.Context) (model, error) {
	found, err := c.readSettings(ctx, "config.toml")
	if err != nil {
		return model{}, err
	}
	if c.config.Profile != "" {
		// Settings of the command line count most: both answers have them.
		profile, err := c.readSettings(ctx, codex.ProfileFile(c.config.Profile))
		if err != nil {
			// What is refused alone, such as a part of a provider, may be right over the
			// other file.
			return model{}, fmt.Errorf("%w: %w", errUnknown, err)
		}
		found = found.over(profile)
	}
	return found.model(), nil
}

// questions are the requests to Codex's app server, one per line.
const questions = `{"id":1,"method":"initialize","params":{"clientInfo":{"name":"mm-orchestrator","version":"1"}}}
{"method":"initialized"}
{"id":2,"method":"config/read","params":{"includeLayers":false}}
`

// readSettings asks Codex's app server for what is in a file of Codex's home. The server
// has a home of its own, with that file only: it writes databases there, and a check
// changes nothing.
func (c *Checker) readSettings(ctx context.Context, file string) (settings, error) {
	dir, err := os.MkdirTemp("", "codex-preflight-")
	if err != nil {
		return settings{}, fmt.Errorf("%w: %w", errUnknown, err)
	}
	defer os.RemoveAll(dir)
	own := filepath.Join(c.home(), file)
	if fileExists(own) {
		if err := os.Symlink(own, filepath.Join(dir, "config.toml")); err != nil {
			return settings{}, fmt.Errorf("%w: %w", errUnknown, err)
		}
	}
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout/2)
	defer cancel()
	read, write, err := os.Pipe()
	if err != nil {
		return settings{}, fmt.Errorf("%w: %w", errUnknown, err)
	}
	defer read.Close()
	defer write.Close()
	if _, err := write.WriteString(questions); err != nil { // shorter than what a pipe holds
		return settings{}, fmt.Errorf("%w: %w", errUnknown, err)
	}
	var args []string
	for _, override := range c.config.Overrides {
		args = append(args, "--config", override)
	}
	cmd := exec.Command(c.config.Program, append(args, "app-server")...)
	cmd.Env = slices.Concat(c.config.Environ, []string{"CODEX_HOME=" + dir})
	cmd.Dir, cmd.Stdin = dir, read
	// The server ends at the end of its input, which must not come before the answer.
	answers := &answerReader{Head: excerpt.Head{Limit: maxAnswer, OnFull: cancel}, answered: func() { _ = write.Close() }}
	cmd.Stdout = answers
	err = processes.Runner{Grace: time.Second}.Run(limited, processes.Owner{Step: "preflight"}, cmd, nil)
	var answer struct {
		ID     int `json:"id"`
		Result struct {
			Config settings `json:"config"`
		} `json:"result"`
		Error struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"error"`
	}
	for line := range bytes.Lines(answers.Kept) {
		if json.Unmarshal(line, &answer) != nil || answer.ID != 2 {
			continue
		}
		// JSON-RPC's codes below -32600 are about the request, which an old release does
		// not know.
		const internalError = -32603
		message := c.config.Redact(answer.Error.Message)
		switch {
		case answer.Error.Code == internalError && strings.Contains(answer.Error.Message, "config"):
			return settings{}, fmt.Errorf("codex refuses its configuration: %s. Correct %s", oneLine(strings.ReplaceAll(message, dir, filepath.Dir(own)), 400), own)
		case answer.Error.Code != 0:
			return settings{}, fmt.Errorf("%w: %s", errUnknown, oneLine(message, 200))
		}
		return answer.Result.Config, nil
	}
	switch {
	case answers.Full:
		err = fmt.Errorf("its answer is longer than %d bytes", maxAnswer)
	case err != nil && ctx.Err() == nil && limited.Err() != nil:
		err = fmt.Errorf("no answer within %s", c.config.Timeout/2)
	}
	return settings{}, fmt.Errorf("%w: %w", errUnknown, cmp.Or(err, errors.New("no answer")))
}

// maxAnswer bounds what is read of the app server's answers, in bytes.
const maxAnswer = 4 << 20

// answerReader keeps what the app server prints, and tells when the answer is complete.
type answerReader struct {
	excerpt.Head
	read     int // the length of the lines that were looked at
	answered func()
}

func (a *answerReader) Write(p []byte) (int, error) {
	n, err := a.Head.Write(p)
	for {
		line, _, complete := bytes.Cut(a.Kept[a.read:], []byte("\n"))
		if !complete {
			return n, err
		}
		a.read += len(line) + 1
		var id struct {
			ID int `json:"id"`
		}
		if json.Unmarshal(line, &id) == nil && id.ID == 2 {
			a.answered()
		}
	}
}

// tryKey asks the model's API with a key for the list of models, which costs nothing. with
// says which key it is, name is Codex's version.
func (c *Checker) tryKey(ctx context.Context, m model, key secret.String, name, with string) Finding {
	base, err := url.Parse(m.base)
	if err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http" {
		return Finding{Valid, fmt.Sprintf("%s, with %s, which was not tried: only Codex knows the address of its provider %s", name, with, m.provider)}
	}
	shown := base.Scheme + "://" + base.Host + strings.TrimRight(base.EscapedPath(), "/")
	address := base.JoinPath("models")
	query := address.Query()
	for name, value := range m.query {
		query.Set(name, value)
	}
	address.RawQuery = query.Encode()
	a, err := c.send(ctx, c.model, address.String(), func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+key.Reveal()) })
	without := fmt.Sprintf("%s=false leaves this check out", c.config.SettingName("MM_ORCHESTRATOR_CODEX_KEY_CHECK"))
	switch kind, _, _ := mime.ParseMediaType(a.contentType); {
	case err != nil:
		return Finding{Invalid, fmt.Sprintf("the model's API at %s (Codex's provider %s) cannot be asked whether it accepts %s: %v. Try the run again once it answers; %s", shown, m.provider, with, err, without)}
	case a.status == http.StatusUnauthorized:
		return Finding{Invalid, fmt.Sprintf("the model's API at %s refuses %s (401): it was revoked, is not complete or is for another server. Make a new one and put it there", shown, with)}
	case a.status == http.StatusTooManyRequests:
		return Finding{Valid, fmt.Sprintf("%s, with %s, which is valid but limited now: the model's API at %s answers 429%s. A run may fail for that reason", name, with, shown, a.howLong())}
	case a.status == http.StatusForbidden:
		return Finding{Valid, fmt.Sprintf("%s, with %s, which may not list models at %s (403): only a run shows whether it may use one", name, with, shown)}
	case a.status == http.StatusOK && kind == "application/json":
		return Finding{Valid, fmt.Sprintf("%s, with %s, which the model's API at %s accepts", name, with, shown)}
	case a.status == http.StatusNotFound || a.status == http.StatusMethodNotAllowed || a.status == http.StatusNotImplemented:
		return Finding{Valid, fmt.Sprintf("%s, with %s, which was not tried: %s has no list of models (%d)", name, with, shown, a.status)}
	}
	return Finding{Invalid, fmt.Sprintf("%s answers %s (%s) and does not look like a model's API that works: correct the address of Codex's provider %s, or try the run again later; %s", shown, statusText(a.status), oneLine(cmp.Or(c.config.Redact(a.contentType), "no content type"), 60), m.provider, without)}
}

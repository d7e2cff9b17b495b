package preflight

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
)

// Containers runs a command in a container. [compose.Engine] implements it.
type Containers interface {
	RunOneOff(ctx context.Context, task compose.OneOff) (compose.OneOffResult, error)
}

// Config says what is checked, and how.
type Config struct {
	// GitHub is the token with which a run is published. Required.
	GitHub *credential.Credential
	// API is the base address of GitHub's REST API. Defaults to https://api.github.com.
	API string
	// Git is the base address of repositories: a push goes to <Git>/<owner>/<name>.git.
	// Defaults to https://github.com.
	Git string
	// HTTP is the client for both. Defaults to one that uses the proxy variables of the
	// process.
	HTTP *http.Client

	// Codex is the key for Codex's model, nil if Codex uses its login only.
	Codex *credential.Credential
	// TryKey says that the model's API is asked whether it accepts the key that Codex
	// uses. Where the API is, Codex says.
	TryKey bool
	// Model is the client for the model's API. Defaults to one that uses the proxy
	// variables of the process.
	Model *http.Client
	// Program is Codex's program, a name or a path. Defaults to codex.
	Program string
	// Environ are the variables of the program, without its key. Codex finds its login
	// by CODEX_HOME, else by HOME.
	Environ []string
	// Home is the directory with Codex's login, CODEX_HOME. Empty means that Codex finds
	// it itself.
	Home string
	// Login is Codex's login in that directory. Defaults to one that no redactor knows.
	Login *codex.Login
	// Profile is the name of Codex's profile, "" for none. Overrides are further settings
	// of Codex, as name=value in TOML.
	Profile   string
	Overrides []string

	// Volume is the volume with Codex's login for runs that name none, "" for none.
	Volume string
	// Image is the image in which `codex login status` is run for a volume. Defaults to
	// moonmind/spec-automation-job:latest.
	Image string
	// Containers runs it. nil means that there is no docker engine.
	Containers Containers
	// LoginTimeout is how long it may take. Defaults to 60 s.
	LoginTimeout time.Duration

	// Timeout is how long the other checks may take together. Defaults to 30 s.
	Timeout time.Duration
	// Keep is how long a finding without a fault counts for other tasks. Defaults to
	// 2 min; a negative value means that nothing is kept.
	Keep time.Duration

	// Redact removes secrets from what programs and servers say, before it is cut: half of
	// a secret is none that a redactor knows. Defaults to leaving it.
	Redact func(string) string
	// SettingName returns the name of a setting for what an operator reads. Defaults to
	// the variable itself.
	SettingName func(variable string) string
	// Now defaults to time.Now.
	Now func() time.Time
}

// WithDefaults returns a copy in which empty fields have their defaults.
func (c Config) WithDefaults() Config {
	for _, field := range []struct {
		text  *string
		value string
	}{
		{&c.API, "https://api.github.com"}, {&c.Git, "https://github.com"}, {&c.Program, "codex"}, {&c.Image, "moonmind/spec-automation-job:latest"},
	} {
		if *field.text == "" {
			*field.text = field.value
		}
	}
	for _, field := range []struct {
		duration *time.Duration
		value    time.Duration
	}{
		{&c.LoginTimeout, 60 * time.Second}, {&c.Timeout, 30 * time.Second}, {&c.Keep, 2 * time.Minute},
	} {
		if *field.duration == 0 {
			*field.duration = field.value
		}
	}
	if c.HTTP == nil {
		c.HTTP = &http.Client{}
	}
	if c.Model == nil {
		c.Model = &http.Client{}
	}
	if c.Login == nil {
		c.Login = codex.NewLogin(codex.Home(c.Home, c.Environ))
	}
	if c.Redact == nil {
		c.Redact = func(text string) string { return text }
	}
	if c.SettingName == nil {
		c.SettingName = func(variable string) string { return variable }
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

// Validate returns an error that names what is wrong.
func (c Config) Validate() error {
	if c.GitHub == nil {
		return errors.New("preflight: Config.GitHub is nil")
	}
	for _, field := range []struct{ name, address string }{{"API", c.API}, {"Git", c.Git}} {
		if _, err := address.ParseServer(field.address); err != nil {
			return fmt.Errorf("preflight: Config.%s: %w", field.name, err)
		}
	}
	if c.Home != "" && !filepath.IsAbs(c.Home) {
		return fmt.Errorf("preflight: Config.Home is %q, want an absolute path", c.Home)
	}
	return nil
}

// A Checker checks whether runs can work. It may be used by several goroutines.
type Checker struct {
	config Config
	// api asks GitHub's REST API, http the git server, model the model's API.
	api         *github.Client
	http, model *http.Client

	mu sync.Mutex
	// github and codex are findings without a fault, by what was checked. The token is
	// a part of the key: a new one is checked again.
	github map[githubKey]kept
	codex  map[secret.String]kept
}

type githubKey struct {
	repository string
	token      secret.String
}

// A kept finding counts until a time.
type kept struct {
	finding Finding
	until   time.Time
}

// New returns a Checker, or an error of Validate. It asks nobody.
func New(config Config) (*Checker, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	c := &Checker{config: config, github: map[githubKey]kept{}, codex: map[secret.String]kept{}}
	var err error
	if c.api, err = github.New(github.Config{
		API: config.API, Token: config.GitHub, HTTP: config.HTTP, Now: config.Now,
		// One try must leave time for another one. A limit is not waited for: a run fails
		// within seconds.
		Timeout: config.Timeout / 2, Patience: min(4*time.Second, config.Timeout),
	}); err != nil {
		return nil, fmt.Errorf("preflight: %w", err)
	}
	for _, client := range []struct{ to, from **http.Client }{{&c.http, &config.HTTP}, {&c.model, &config.Model}} {
		own := **client.from
		own.CheckRedirect = github.SameServer
		*client.to = &own
	}
	return c, nil
}

// Close closes idle connections.
func (c *Checker) Close() {
	c.http.CloseIdleConnections()
	c.model.CloseIdleConnections()
}

// Check finds out whether a run can work. The parts are checked at the same time.
//
//   - It changes nothing.
//   - What cannot be checked, because a server does not answer, is found invalid, with
//     that reason.
//   - The error is the context's cause.
//   - A finding without a fault counts for Config.Keep, unless the request is Fresh or
//     the credential is another one by now.
func (c *Checker) Check(ctx context.Context, request Request) (Report, error) {
	limited, cancel := context.WithTimeout(ctx, c.config.Timeout)
	defer cancel()
	report := Report{Login: Login{Status: LoginSkipped, Message: NoVolume}}
	var all sync.WaitGroup
	all.Go(func() { report.GitHub = c.checkGitHub(limited, request) })
	if request.Codex {
		all.Go(func() { report.Codex = c.checkCodex(limited, request) })
		if volume := request.volume(c.config.Volume); volume != "" {
			all.Go(func() { report.Login = c.checkLogin(ctx, volume) })
		}
	}
	all.Wait()
	if ctx.Err() != nil {
		return Report{}, context.Cause(ctx)
	}
	return report, nil
}

func (r Request) volume(configured string) string {
	if r.Volume != "" {
		return r.Volume
	}
	return configured
}

// remembered returns a finding that still counts.
func remembered[K comparable](c *Checker, findings map[K]kept, key K, fresh bool) (Finding, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k, has := findings[key]
	return k.finding, has && !fresh && c.config.Now().Before(k.until)
}

// remember keeps a finding without a fault. A fault ends what was found before, and of
// credentials that rotate, those that no longer count are dropped.
func remember[K comparable](c *Checker, findings map[K]kept, key K, finding Finding) Finding {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.config.Now()
	for other, k := range findings {
		if !now.Before(k.until) {
			delete(findings, other)
		}
	}
	if finding.Status.Fails() {
		delete(findings, key)
	} else {
		findings[key] = kept{finding, now.Add(c.config.Keep)}
	}
	return finding
}

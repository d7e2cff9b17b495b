package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

// serviceSettings are the settings of the services that the Spec workflow uses: Codex
// and GitHub.
type serviceSettings struct {
	// GitHubToken and CodexKey say where the credentials are.
	GitHubToken, CodexKey credential.Source
	// GitHubURL is the base address of repositories, GitHubAPI that of the REST API, ""
	// for the one that belongs to it.
	GitHubURL, GitHubAPI string
	CodexProgram         string
	CodexHome            string
	// CodexVolume is the volume with Codex's login, "" for none; LoginImage is the image
	// in which that is checked.
	CodexVolume, LoginImage string
}

var serviceSettingsTable = []setting{
	{
		flag: "github-credential", form: "source", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_GITHUB_CREDENTIAL"),
		def:  "env:GITHUB_TOKEN,SPEC_WORKFLOW_GITHUB_TOKEN",
		help: "Where the GitHub token is with which runs are published: env:NAME for a variable (of several names, separated by commas, the first that is set), file:/path for a file that docker or kubernetes mounts, or command:program and arguments for a program that prints it, " +
			"such as command:pass show github/token. The token is read each time it is used, so that a new one counts without a restart. A command is started without a shell, may take 20 s, and its first line counts. " +
			"A classic token needs the scope repo, a fine-grained one the permissions Contents and Pull requests for read and write.",
		read: readSource(func(c *configuration) *credential.Source { return &c.Services.GitHubToken }),
	},
	{
		flag: "codex-credential", form: "source", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_CREDENTIAL"),
		def:  "env:CODEX_API_KEY",
		help: "Where the key of Codex's model is, in the form of --github-credential. If it names a variable that is not set, Codex uses its login (`codex login`).",
		read: readSource(func(c *configuration) *credential.Source { return &c.Services.CodexKey }),
	},
	{
		flag: "github-url", form: "url", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_GITHUB_URL", "GITHUB_SERVER_URL"),
		def:  "https://github.com",
		help: "Where repositories are: a run's repository owner/name is cloned from and pushed to <url>/owner/name.git. For GitHub Enterprise its own address, such as https://github.example.com.",
		read: readAddress(func(c *configuration) *string { return &c.Services.GitHubURL }),
	},
	{
		flag: "github-api", form: "url", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_GITHUB_API", "GITHUB_API_URL"),
		defaultNote: "that of --github-url",
		help:        "The REST API of the same GitHub. For https://github.com that is https://api.github.com, for GitHub Enterprise <github-url>/api/v3.",
		read:        readAddress(func(c *configuration) *string { return &c.Services.GitHubAPI }),
		show:        func(c *configuration) string { return c.gitHubAPI() },
	},
	{
		flag: "codex-program", form: "file", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_PROGRAM"),
		def:  "codex",
		help: "Codex's program, a path or a name that is looked up in PATH. It is installed with npm install -g @openai/codex.",
		read: readText(func(c *configuration) *string { return &c.Services.CodexProgram }),
	},
	{
		flag: "codex-home", form: "directory", topic: topicSpec,
		vars:        names("CODEX_HOME", "CODEX_VOLUME_PATH"),
		defaultNote: ".codex in the home directory",
		help:        "The directory with Codex's login and configuration. Codex must be able to write it, because it renews its login there.",
		read: func(c *configuration, text string) (err error) {
			c.Services.CodexHome, err = filepath.Abs(text)
			return err
		},
	},
	{
		flag: "codex-volume", form: "name", topic: topicSpec,
		vars:        names("CODEX_VOLUME_NAME"),
		defaultNote: "none: the login of a volume is not checked",
		help:        "The docker volume with Codex's login, for runs whose row names none. Before Codex is used, `codex login status` is run in a container that has this volume, as MoonMind does; that needs a docker engine.",
		read:        readText(func(c *configuration) *string { return &c.Services.CodexVolume }),
	},
	{
		flag: "codex-login-image", form: "name", topic: topicSpec,
		vars: names("CODEX_LOGIN_CHECK_IMAGE", "JOB_IMAGE", "SPEC_AUTOMATION_JOB_IMAGE"),
		def:  "moonmind/spec-automation-job:latest",
		help: "The image of that container. It needs bash and codex, and is not pulled.",
		read: readText(func(c *configuration) *string { return &c.Services.LoginImage }),
	},
}

func readSource(field func(*configuration) *credential.Source) func(*configuration, string) error {
	return func(c *configuration, text string) (err error) {
		*field(c), err = credential.Parse(text)
		return err
	}
}

// readAddress reads the base address of an HTTP server, without a login.
func readAddress(field func(*configuration) *string) func(*configuration, string) error {
	return func(c *configuration, text string) error {
		base, err := url.Parse(strings.TrimSpace(text))
		switch {
		case err != nil || base.Host == "" || base.Scheme != "https" && base.Scheme != "http":
			return errors.New("it must be an address that begins with https://")
		case base.User != nil:
			return errors.New("it must not have a login: credentials have settings of their own")
		case base.RawQuery != "" || base.Fragment != "":
			return errors.New("it must not have a query or a fragment")
		case base.Scheme == "http" && base.Hostname() != "localhost" && base.Hostname() != "127.0.0.1" && base.Hostname() != "::1":
			return errors.New("it must begin with https://, because a token is sent there; http:// is for this machine only")
		}
		*field(c) = strings.TrimRight(base.String(), "/")
		return nil
	}
}

// gitHubAPI is the base address of the REST API.
func (c *configuration) gitHubAPI() string {
	switch {
	case c.Services.GitHubAPI != "":
		return c.Services.GitHubAPI
	case c.Services.GitHubURL == "https://github.com":
		return "https://api.github.com"
	}
	return c.Services.GitHubURL + "/api/v3"
}

// repositoryForm is owner/name with the characters that GitHub allows.
var repositoryForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+$`)

func checkRepository(text string) error {
	if !repositoryForm.MatchString(text) || strings.Contains(text, "..") {
		return errors.New("it must have the form owner/name")
	}
	return nil
}

// credentials are those of the Spec workflow. redactors are all of the process.
func (c *configuration) credentials(env environment, redactors ...credential.Redactor) (token, key *credential.Credential, err error) {
	variables := slices.Concat(c.Services.GitHubToken.Variables(), c.Services.CodexKey.Variables())
	config := credential.Config{
		Name: "GitHub token", Setting: c.name("MM_ORCHESTRATOR_GITHUB_CREDENTIAL"), Source: c.Services.GitHubToken,
		Environ: env, CommandEnviron: withoutSecrets(env, variables), Redactors: redactors,
	}
	if token, err = credential.New(config); err != nil {
		return nil, nil, &configError{err.Error()}
	}
	config.Name, config.Setting, config.Source = "key of Codex's model", c.name("MM_ORCHESTRATOR_CODEX_CREDENTIAL"), c.Services.CodexKey
	if key, err = credential.New(config); err != nil {
		return nil, nil, &configError{err.Error()}
	}
	return token, key, nil
}

// withoutSecrets is an environment without the variables with the credentials, and
// without the addresses and passwords of broker and database: a program that prints a
// credential needs none of them.
func withoutSecrets(env environment, variables []string) environment {
	for i := range settings {
		if s := &settings[i]; s.mask != nil {
			for _, v := range s.vars {
				variables = append(variables, v.name)
			}
		}
	}
	variables = append(variables, "POSTGRES_PASSWORD", "ENCRYPTION_MASTER_KEY", "PGPASSWORD", "RABBITMQ_PASSWORD")
	return slices.DeleteFunc(slices.Clone(env), func(entry string) bool {
		name, _, _ := strings.Cut(entry, "=")
		return slices.ContainsFunc(variables, func(v string) bool { return strings.EqualFold(v, name) })
	})
}

// preflight is what checks before a task of the Spec workflow whether it can work. engine
// is nil if there is no docker engine.
func (c *configuration) preflight(env environment, token, key *credential.Credential, engine preflight.Containers) (*preflight.Checker, error) {
	checker, err := preflight.New(preflight.Config{
		GitHub: token, API: c.gitHubAPI(), Git: c.Services.GitHubURL, HTTP: &http.Client{Transport: http.DefaultTransport.(*http.Transport).Clone()},
		Codex: key, Program: c.Services.CodexProgram, Home: c.Services.CodexHome, Environ: codex.Environment(env),
		Volume: c.Services.CodexVolume, Image: c.Services.LoginImage, Containers: engine, SettingName: c.name,
	})
	if err != nil {
		return nil, &configError{err.Error()}
	}
	return checker, nil
}

var specPreflightCommand = &command{
	name:     "preflight",
	synonyms: []string{"check", "verify", "test", "credentials"},
	summary:  "check whether a run of the Spec workflow can work",
	about: "Checks what a worker checks before it does anything for a run: that Codex can be started and has a key or a login, that GitHub accepts the token, that the token may push to the repository and open pull requests, and when it expires; " +
		"with a volume (CODEX_VOLUME_NAME) also Codex's login in it. Run it in the worker's environment. It changes nothing: to learn whether a token without scopes may open pull requests, it sends a request for one in which everything is missing.\n\n" +
		"Exit code 0: a run can work. 1: it cannot; each line says what to do.\n\n" +
		"With --json it prints {\"ok\", \"repository\", \"codex\": {\"status\", \"message\"}, \"github\": {…}, \"codex_login_check\": {…}}. status is valid, invalid, expires_soon or scope_missing, and of the login check passed, failed or skipped; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator spec preflight --repository octo/widgets", "can a run for this repository work?"},
		{"docker compose run --rm celery_codex_worker mm-orchestrator spec preflight", "in the worker's container"},
	},
	topics: topics,
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &specPreflightFlags{}
		fs.StringVar(&f.repository, "repository", "", "The repository, as `owner/name`. Default: that of --github-repository.")
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.run
	},
}

type specPreflightFlags struct {
	repository string
	json       bool
}

type specPreflightReport struct {
	OK         bool         `json:"ok"`
	Repository string       `json:"repository,omitempty"`
	Codex      specFinding  `json:"codex"`
	GitHub     specFinding  `json:"github"`
	Login      *specFinding `json:"codex_login_check"`
}

func (f *specPreflightFlags) run(ctx context.Context, p *program, in input) error {
	if f.repository != "" {
		if err := checkRepository(f.repository); err != nil {
			return &usageError{fmt.Sprintf("--repository is %q: %v", oneLine(maskedWord(f.repository), 80), err)}
		}
	}
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	if f.repository == "" {
		f.repository = c.Spec.Repository
	}
	report, err := c.checkServices(ctx, p.env, f.repository, p.redactor())
	if err != nil {
		return err
	}
	redact := p.redactor().String
	shown := specPreflightReport{
		OK: !report.Codex.Status.Fails() && !report.GitHub.Status.Fails() && report.Login.Status != preflight.LoginFailed, Repository: f.repository,
		Codex:  specFinding{string(report.Codex.Status), redact(report.Codex.Message)},
		GitHub: specFinding{string(report.GitHub.Status), redact(report.GitHub.Message)},
		Login:  &specFinding{string(report.Login.Status), redact(report.Login.Message)},
	}
	if f.json {
		if err := printJSON(p.stdout, shown); err != nil {
			return err
		}
	} else {
		for _, line := range []struct {
			name    string
			finding specFinding
		}{{"codex", shown.Codex}, {"github", shown.GitHub}, {"login check", *shown.Login}} {
			fmt.Fprintf(p.stdout, "%-13s  %-11s  %s\n", line.finding.Status, line.name, oneLine(line.finding.Message, 2000))
		}
	}
	if !shown.OK {
		return errors.New("a run cannot work in this environment: see above what to do")
	}
	return nil
}

// checkServices checks once, with a docker engine if a volume is configured.
func (c *configuration) checkServices(ctx context.Context, env environment, repository string, redactors ...credential.Redactor) (preflight.Report, error) {
	token, key, err := c.credentials(env, redactors...)
	if err != nil {
		return preflight.Report{}, err
	}
	var containers preflight.Containers
	if c.Services.CodexVolume != "" {
		engine, err := c.engine()
		if err != nil {
			return preflight.Report{}, err
		}
		defer engine.Close()
		containers = engine
	}
	checker, err := c.preflight(env, token, key, containers)
	if err != nil {
		return preflight.Report{}, err
	}
	defer checker.Close()
	return checker.Check(ctx, preflight.Request{Repository: repository, Codex: true, Fresh: true})
}

// engine is a client of the docker engine. It does not connect.
func (c *configuration) engine() (*compose.Engine, error) {
	engine, err := compose.NewEngine(c.EngineConfig())
	if err != nil {
		return nil, &configError{fmt.Sprintf("%s %q or %s %q cannot be used: %v", c.name("DOCKER_HOST"), address.MaskURL(c.DockerHost), c.name("DOCKER_CERT_PATH"), c.DockerCertPath, err)}
	}
	return engine, nil
}

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit"
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
	// CAFile has the certificates of GitHub's servers, "" for the machine's.
	CAFile string
	// BaseBranch is "" for the repository's default branch.
	BaseBranch string
	// Publish says what branches, commits and pull requests are like.
	Publish speckit.PublishConfig
	// CloneDir is where tasks make clones, "" for a directory of the system's for
	// temporary files.
	CloneDir string
	// CloneLimit is how much of the disk one of them may take, in MiB.
	CloneLimit int
	// Backend is exec or cloud. The other fields say how Codex is run.
	Backend           string
	CodexProgram      string
	CodexHome         string
	CodexModel        string
	CodexProfile      string
	CodexEnvironment  string
	CodexSandbox      string
	CodexConfig       []string
	CodexVariables    []string
	CodexInstructions string
	CodexLimit        time.Duration
	CodexStall        time.Duration
	// CodexKeyCheck says that the preflight tries the key at the model's API.
	CodexKeyCheck bool
	// CodexVolume is the volume with Codex's login, "" for none; LoginImage is the image
	// in which that is checked.
	CodexVolume, LoginImage string
}

var serviceSettingsTable = []setting{
	{
		flag: "github-credential", form: "source", mask: maskSource, topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_GITHUB_CREDENTIAL"),
		def:  "env:GITHUB_TOKEN,SPEC_WORKFLOW_GITHUB_TOKEN",
		help: "Where the GitHub token is with which runs are published: env:NAME for a variable (of several names, separated by commas, the first that is set), file:/path for a file that docker or kubernetes mounts, or command:program and arguments for a program that prints it, " +
			"such as command:pass show github/token. The token is read each time it is used, so that a new one counts without a restart. A command is started without a shell, may take 20 s, and its first line counts. " +
			"A classic token needs the scope repo, a fine-grained one the permissions Contents and Pull requests for read and write.",
		read: readSource(func(c *configuration) *credential.Source { return &c.Services.GitHubToken }),
	},
	{
		flag: "codex-credential", form: "source", mask: maskSource, topic: topicSpec,
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
		help:        "The REST API of the same GitHub. For https://github.com that is https://api.github.com, for https://NAME.ghe.com https://api.NAME.ghe.com, and for a GitHub Enterprise server <github-url>/api/v3.",
		read:        readAddress(func(c *configuration) *string { return &c.Services.GitHubAPI }),
		show:        func(c *configuration) string { return c.gitHubAPI() },
	},
	{
		flag: "github-ca-file", form: "file", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_GITHUB_CA_FILE"),
		defaultNote: "the machine's certificates",
		help:        "A file with the certificates, in PEM, with which GitHub's servers are trusted instead of the machine's: for GitHub Enterprise with a certificate authority of its own.",
		read: func(c *configuration, text string) (err error) {
			c.Services.CAFile, err = filepath.Abs(text)
			return err
		},
	},
	{
		flag: "base-branch", form: "name", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_BASE_BRANCH"),
		defaultNote: "the repository's default branch",
		help:        "The branch from which Codex starts and to which pull requests go.",
		read: func(c *configuration, text string) error {
			c.Services.BaseBranch = text
			return gitrepo.CheckBranch(text)
		},
	},
	{
		flag: "branch-prefix", form: "text", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_BRANCH_PREFIX"),
		def:  "speckit/",
		help: "How the names of the branches begin that are pushed. Feature and task follow, so that a task has the same branch each time. Only branches with this prefix are ever overwritten.",
		read: func(c *configuration, text string) error {
			c.Services.Publish.BranchPrefix = text
			return gitrepo.CheckBranch(text + "x")
		},
	},
	{
		flag: "commit-author", form: "text", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_COMMIT_AUTHOR"),
		def:  "mm-orchestrator <mm-orchestrator@noreply.invalid>",
		help: "Author and committer of commits, as Name <address>.",
		read: func(c *configuration, text string) (err error) {
			c.Services.Publish.Author, err = gitrepo.ParsePerson(text)
			return err
		},
	},
	{
		flag: "commit-trailers", form: "Key: value;…", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_COMMIT_TRAILERS"),
		defaultNote: "none",
		help:        "Lines at the end of each commit message, as Key: value, separated by semicolons, such as Signed-off-by: Name <address>.",
		read: func(c *configuration, text string) error {
			for line := range strings.SplitSeq(text, ";") {
				if line = strings.TrimSpace(line); line == "" {
					continue
				}
				c.Services.Publish.Trailers = append(c.Services.Publish.Trailers, line)
			}
			return speckit.CheckTrailers(c.Services.Publish.Trailers)
		},
	},
	{
		flag: "pr-draft", form: "true|false", boolean: true, topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_PR_DRAFT"),
		def:  "false",
		help: "Whether new pull requests are drafts.",
		read: readBool(func(c *configuration) *bool { return &c.Services.Publish.Draft }),
	},
	listSetting("pr-labels", "label,…", "MM_ORCHESTRATOR_PR_LABELS", "The labels of pull requests, separated by commas. GitHub makes those that the repository does not have.", func(c *configuration) *[]string { return &c.Services.Publish.Labels }),
	listSetting("pr-reviewers", "login,…", "MM_ORCHESTRATOR_PR_REVIEWERS", "Who is asked to review pull requests: logins, separated by commas.", func(c *configuration) *[]string { return &c.Services.Publish.Reviewers }),
	listSetting("pr-teams", "team,…", "MM_ORCHESTRATOR_PR_TEAMS", "The teams that are asked to review pull requests: their names in addresses, without the organisation, separated by commas.", func(c *configuration) *[]string { return &c.Services.Publish.Teams }),
	{
		flag: "clone-dir", form: "directory", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_CLONE_DIR"),
		defaultNote: "mm-orchestrator-clones in the directory for temporary files",
		help:        "Where each task makes its own clone of the run's repository. It is removed when the task ends. The disk must have room for a clone of each task that runs.",
		read: func(c *configuration, text string) (err error) {
			c.Services.CloneDir, err = filepath.Abs(text)
			return err
		},
	},
	{
		flag: "clone-limit", form: "number", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CLONE_LIMIT"),
		def:  "10240",
		help: "How much of the disk the clone of a task may take, in MiB: history, files, and what Codex and its commands write there. A run that needs more is ended and fails, so that neither a git server nor a model can fill the worker's disk.",
		read: readNumber(func(c *configuration) *int { return &c.Services.CloneLimit }, 1, 1<<20),
	},
	{
		flag: "codex-backend", form: "exec|cloud", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_BACKEND"),
		def:  "exec",
		help: "Where Codex works: exec runs `codex exec` on this machine in a clone of the repository, cloud gives the task to Codex Cloud (`codex cloud exec`), which needs Codex's login and an environment (--codex-environment).",
		read: readChoice(func(c *configuration) *string { return &c.Services.Backend }, "exec", "cloud"),
	},
	{
		flag: "codex-model", form: "name", topic: topicSpec,
		vars:        names("CODEX_MODEL"),
		defaultNote: "that of Codex's configuration",
		help:        "The model that Codex uses.",
		read:        readText(func(c *configuration) *string { return &c.Services.CodexModel }),
	},
	{
		flag: "codex-profile", form: "name", topic: topicSpec,
		vars:        names("CODEX_PROFILE"),
		defaultNote: "none",
		help:        "The profile that Codex uses (codex exec --profile): it lays the file <name>.config.toml in Codex's home over its config.toml. Codex itself ignores a profile without that file; the preflight refuses it. Used by the backend exec only.",
		read: func(c *configuration, text string) error {
			c.Services.CodexProfile = text
			return codex.CheckProfile(text)
		},
	},
	{
		flag: "codex-key-check", form: "true|false", boolean: true, topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_KEY_CHECK"),
		def:  "true",
		help: "Whether the preflight asks the model's API for its list of models, to find out whether it accepts Codex's key. The address is that of Codex's own configuration (openai_base_url or model_providers in config.toml), and the key is sent to no other server. " +
			"Set it to false if the worker cannot reach that address except by a proxy that only Codex knows. A login without a key (`codex login`) is not tried.",
		read: readBool(func(c *configuration) *bool { return &c.Services.CodexKeyCheck }),
	},
	{
		flag: "codex-environment", form: "name", topic: topicSpec,
		vars:        names("CODEX_ENVIRONMENT", "CODEX_ENV"),
		defaultNote: "none",
		help:        "The id or the name of the environment of Codex Cloud that has the repository. Used by the backend cloud only.",
		read:        readText(func(c *configuration) *string { return &c.Services.CodexEnvironment }),
	},
	{
		flag: "codex-sandbox", form: strings.Join(codex.Sandboxes, "|"), topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_SANDBOX"),
		def:  "workspace-write",
		help: "What commands that the model runs may do: workspace-write lets them write in the clone, and use no network. danger-full-access is for a worker whose container is the sandbox.",
		read: readChoice(func(c *configuration) *string { return &c.Services.CodexSandbox }, codex.Sandboxes...),
	},
	{
		flag: "codex-config", form: "name=value;…", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_CODEX_CONFIG"),
		defaultNote: "none",
		help:        "Further settings of Codex for its runs, as name=value in TOML, separated by semicolons, such as model_reasoning_effort=\"high\". They take precedence over its config.toml.",
		read: func(c *configuration, text string) error {
			for part := range strings.SplitSeq(text, ";") {
				if part = strings.TrimSpace(part); part == "" {
					continue
				}
				if name, _, found := strings.Cut(part, "="); !found || strings.TrimSpace(name) == "" {
					return errors.New("each part must have the form name=value")
				}
				c.Services.CodexConfig = append(c.Services.CodexConfig, part)
			}
			return nil
		},
	},
	{
		flag: "codex-variables", form: "NAME,…", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_CODEX_VARIABLES"),
		defaultNote: "none",
		help:        "Variables of the worker that Codex gets in addition to those that every program needs (PATH, HOME, the language, proxies, certificates), separated by commas. It gets no others, so that the model cannot print the worker's credentials.",
		read: func(c *configuration, text string) error {
			c.Services.CodexVariables = splitList(text)
			return nil
		},
	},
	{
		flag: "codex-instructions", form: "text", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_CODEX_INSTRUCTIONS"),
		defaultNote: "none",
		help:        "A text that is added to what Codex is asked to do, such as the commands with which it must test its change.",
		read:        readText(func(c *configuration) *string { return &c.Services.CodexInstructions }),
	},
	{
		flag: "codex-time-limit", form: "duration", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_TIME_LIMIT"),
		def:  "1h",
		help: "How long Codex may work on one task. Then it is ended with all its children, and the run fails.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.Services.CodexLimit }, time.Second),
	},
	{
		flag: "codex-stall-limit", form: "duration", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_CODEX_STALL_LIMIT"),
		def:  "20m",
		help: "How long Codex may print nothing. Then it is ended, and the run fails. Used by the backend exec only.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.Services.CodexStall }, time.Second),
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

// listSetting is a setting with a list of names.
func listSetting(flag, form, variable, help string, field func(*configuration) *[]string) setting {
	return setting{
		flag: flag, form: form, topic: topicSpec,
		vars:        names(variable),
		defaultNote: "none",
		help:        help,
		read: func(c *configuration, text string) error {
			*field(c) = splitList(text)
			return nil
		},
	}
}

// maskSource shows a source. What is none may be the credential itself.
func maskSource(text string) string {
	if _, err := credential.Parse(text); err != nil {
		return secret.Mask
	}
	return text
}

// withoutSources is an environment without the variables that say where credentials are.
// By their names a redactor would take their values for secrets, and errors could not
// say which source is at fault.
func withoutSources(env environment) environment {
	return slices.DeleteFunc(slices.Clone(env), func(entry string) bool {
		name, value, _ := strings.Cut(entry, "=")
		if !strings.EqualFold(name, "MM_ORCHESTRATOR_GITHUB_CREDENTIAL") && !strings.EqualFold(name, "MM_ORCHESTRATOR_CODEX_CREDENTIAL") {
			return false
		}
		_, err := credential.Parse(value)
		return err == nil
	})
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
		base, err := address.ParseServer(text)
		if err == nil {
			*field(c) = base.String()
		}
		return err
	}
}

// gitHubAPI is the base address of the REST API, "" if that of GitHub itself was refused.
func (c *configuration) gitHubAPI() string {
	if c.Services.GitHubAPI != "" {
		return c.Services.GitHubAPI
	}
	api, _ := github.API(c.Services.GitHubURL) // the error of a wrong address is that of --github-url
	return api
}

func checkRepository(text string) error {
	if github.CheckName(text) != nil {
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

// codexLogin is Codex's own login. redactors are all of the process.
func (c *configuration) codexLogin(env environment, redactors ...credential.Redactor) *codex.Login {
	return codex.NewLogin(codex.Home(c.Services.CodexHome, codex.Environment(env, c.Services.CodexVariables...)), redactors...)
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

// gitHubClient is the HTTP client for GitHub's servers.
func (c *configuration) gitHubClient() (*http.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	if c.Services.CAFile != "" {
		text, err := os.ReadFile(c.Services.CAFile)
		pool := x509.NewCertPool()
		if err != nil || !pool.AppendCertsFromPEM(text) {
			if err == nil {
				err = errors.New("it has no certificate in PEM")
			}
			return nil, &configError{fmt.Sprintf("%s is %q, which cannot be used: %v", c.name("MM_ORCHESTRATOR_GITHUB_CA_FILE"), c.Services.CAFile, err)}
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &http.Client{Transport: transport}, nil
}

// services are what the tasks of the Spec workflow use outside of test mode.
type services struct {
	token, key *credential.Credential
	checker    *preflight.Checker
	engine     *compose.Engine
	http       *http.Client
}

func (s *services) close() {
	s.checker.Close()
	s.http.CloseIdleConnections()
	if s.engine != nil {
		_ = s.engine.Close()
	}
}

// addServices makes the tasks use the real Codex and the real GitHub. redactors are all
// of the process.
func (c *configuration) addServices(config *speckit.Config, env environment, log *slog.Logger, redactors ...credential.Redactor) (s *services, err error) {
	// What a change must not have: the credentials, Codex's login among them, and nothing
	// that only looks like a secret.
	secrets := artifacts.NewRedactor(nil)
	s = &services{}
	if s.token, s.key, err = c.credentials(env, append(redactors, secrets)...); err != nil {
		return nil, err
	}
	if s.http, err = c.gitHubClient(); err != nil {
		return nil, err
	}
	var containers preflight.Containers
	// A run may name a volume too, but without one in the settings the worker needs no
	// engine: then such a run is told so.
	if c.Services.CodexVolume != "" {
		if s.engine, err = c.engine(); err != nil {
			return nil, err
		}
		containers = s.engine
	}
	login := c.codexLogin(env, append(redactors, secrets)...)
	if s.checker, err = c.preflight(env, config.Redactor.String, s.token, s.key, login, containers, s.http); err != nil {
		return nil, err
	}
	config.Preflight = s.checker
	git := gitrepo.Config{Environ: env, CAFile: c.Services.CAFile, Redact: config.Redactor.String, MaxClone: int64(c.Services.CloneLimit) << 20}
	if strings.HasPrefix(c.Services.GitHubURL, "http:") {
		git.Schemes = []string{"http"}
	}
	directory := c.Services.CloneDir
	if directory == "" {
		directory = filepath.Join(os.TempDir(), "mm-orchestrator-clones")
	}
	repositories := &speckit.Repositories{Server: c.Services.GitHubURL, Token: s.token, Base: c.Services.BaseBranch, Dir: directory}
	if repositories.Git, err = gitrepo.New(git); err != nil {
		return nil, &configError{err.Error()}
	}
	config.Repositories = repositories
	pulls, err := github.New(github.Config{API: c.gitHubAPI(), Token: s.token, HTTP: s.http, Logger: log})
	if err != nil {
		return nil, &configError{err.Error()}
	}
	config.Publish = c.Services.Publish
	config.Publish.PullRequests = pulls
	config.Codex = speckit.CodexConfig{Branch: c.Services.BaseBranch, Instructions: c.Services.CodexInstructions, Secrets: secrets, Login: login}
	environ := codex.Environment(env, c.Services.CodexVariables...)
	if c.Services.Backend == "cloud" {
		config.Codex.Cloud, err = codex.NewCloud(codex.CloudConfig{
			Program: c.Services.CodexProgram, Environ: environ, Home: c.Services.CodexHome, Environment: c.Services.CodexEnvironment,
			TimeLimit: c.Services.CodexLimit, Logger: log, SettingName: c.name,
		})
	} else {
		config.Codex.Exec, err = codex.NewExec(codex.ExecConfig{
			Program: c.Services.CodexProgram, Environ: environ, Home: c.Services.CodexHome, Key: s.key, Model: c.Services.CodexModel, Profile: c.Services.CodexProfile, Sandbox: c.Services.CodexSandbox,
			Overrides: c.Services.CodexConfig, TimeLimit: c.Services.CodexLimit, StallLimit: c.Services.CodexStall, KillGrace: splitGrace(c.ShutdownGrace).Kill, Logger: log, SettingName: c.name,
		})
	}
	if err != nil {
		return nil, &configError{err.Error()}
	}
	return s, nil
}

// checkServiceSettings validates combinations of settings.
func (c *configuration) checkServiceSettings() error {
	if c.Services.Backend == "cloud" && c.Services.CodexEnvironment == "" && !c.Spec.TestMode && c.Spec.Consume != nil {
		return &configError{fmt.Sprintf("%s is cloud, but %s is not set: set it to the environment of Codex Cloud that has the repository", c.name("MM_ORCHESTRATOR_CODEX_BACKEND"), c.name("CODEX_ENVIRONMENT"))}
	}
	return nil
}

// modelClient is the HTTP client for the API of Codex's model. Codex trusts these
// certificates in addition to the machine's, and has no setting for GitHub's.
func modelClient(env environment) (*http.Client, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	const variable = "CODEX_CA_CERTIFICATE"
	if _, file, _ := env.lookup(variable); file != "" {
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		text, err := os.ReadFile(file)
		if err == nil && !pool.AppendCertsFromPEM(text) {
			err = errors.New("it has no certificate in PEM")
		}
		if err != nil {
			return nil, &configError{fmt.Sprintf("%s is %q, which cannot be used: %v", variable, file, err)}
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool}
	}
	return &http.Client{Transport: transport}, nil
}

// preflight is what checks before a task of the Spec workflow whether it can work. redact
// is for what programs say, engine is nil if there is no docker engine, client asks GitHub.
func (c *configuration) preflight(env environment, redact func(string) string, token, key *credential.Credential, login *codex.Login, engine preflight.Containers, client *http.Client) (*preflight.Checker, error) {
	config := preflight.Config{
		GitHub: token, API: c.gitHubAPI(), Git: c.Services.GitHubURL, HTTP: client,
		Program: c.Services.CodexProgram, Home: c.Services.CodexHome, Login: login, Environ: codex.Environment(env, c.Services.CodexVariables...),
		Volume: c.Services.CodexVolume, Image: c.Services.LoginImage, Containers: engine, Redact: redact, SettingName: c.name,
	}
	if c.Services.Backend != "cloud" { // Codex Cloud takes a login only
		config.Codex, config.TryKey, config.Profile, config.Overrides = key, c.Services.CodexKeyCheck, c.Services.CodexProfile, c.Services.CodexConfig
	}
	var err error
	if config.Model, err = modelClient(env); err != nil {
		return nil, err
	}
	checker, err := preflight.New(config)
	if err != nil {
		return nil, &configError{err.Error()}
	}
	return checker, nil
}

var specPreflightCommand = &command{
	name:     "preflight",
	synonyms: []string{"check", "verify", "test", "credentials"},
	summary:  "check whether a run of the Spec workflow can work",
	about: "Checks what a worker checks before it does anything for a run: that Codex can be started and has a login, or a key that the model's API accepts, that GitHub accepts the token, that the token may push to the repository and open pull requests, and when it expires; " +
		"with a volume (CODEX_VOLUME_NAME) also Codex's login in it. Run it in the worker's environment. It changes nothing: to learn whether a token without scopes may open pull requests, it sends a request for one in which everything is missing.\n\n" +
		"Exit code 0: a run can work. 1: it cannot; each line says what to do.\n\n" +
		"With --json it prints {\"ok\", \"repository\", \"codex\": {\"status\", \"message\"}, \"github\": {…}, \"codex_login_check\": {…}}. status is valid, invalid, expires_soon or scope_missing, and of the login check passed, failed or skipped; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator spec preflight --repository octo/widgets", "can a run for this repository work?"},
		{"docker compose exec celery_codex_worker mm-orchestrator spec preflight", "in the worker's container"},
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

// checkServices checks once, with a docker engine if a volume is configured. redactor is
// for the texts of the report, and knows the credentials as the others do.
func (c *configuration) checkServices(ctx context.Context, env environment, repository string, redactor *artifacts.Redactor, others ...credential.Redactor) (preflight.Report, error) {
	redactors := append([]credential.Redactor{redactor}, others...)
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
	client, err := c.gitHubClient()
	if err != nil {
		return preflight.Report{}, err
	}
	checker, err := c.preflight(env, redactor.String, token, key, c.codexLogin(env, redactors...), containers, client)
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

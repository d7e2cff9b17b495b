package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/internal/secret"
	"github.com/moonladderstudios/mm-orchestrator/metrics"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

// configuration is the effective configuration: flags, environment and defaults.
type configuration struct {
	// Broker is the text from which Brokers was parsed.
	Broker      secret.String
	Brokers     []address.Broker
	Queue       string
	QueueType   string
	Exchange    string
	RoutingKey  string
	Concurrency int
	// DeadLetterQueue is "" for none.
	DeadLetterQueue string
	// Prefetch is the multiplier; see PrefetchCount.
	Prefetch int

	// Results is the database for Celery results; zero means that none are stored.
	Results        address.Database
	ResultEncoding string
	// ResultExpires is the age at which Celery results are removed, 0 for never.
	ResultExpires time.Duration

	Postgres    postgresSettings
	DatabaseURL address.Database
	AutoMigrate bool
	// MasterKey encrypts the tokens of approvals.
	MasterKey secret.String

	// Workspace is absolute.
	Workspace        string
	ArtifactBase     string
	ArtifactSubPath  string
	ArtifactMappings []artifacts.PrefixMapping

	DockerHost      string
	DockerTLSVerify string
	DockerCertPath  string
	ComposeProgram  string
	// Profiles is the path of the policy file, "" for the built-in policy; Policy is
	// what it says.
	Profiles        string
	Policy          *policy.Policy
	AllowedPrograms []string
	// HealthURLs replace the health URLs of plans, by service.
	HealthURLs map[string]string
	// QuietPeriod is how long a service has to stay well.
	QuietPeriod time.Duration
	// RunningIsEnough names services that need no health check.
	RunningIsEnough []string
	// AppChecks are commands that check a service, by the service.
	AppChecks map[string][]string
	StepLimit time.Duration
	MaxStarts int
	LostGrace time.Duration

	// Rollback is restore or commands.
	Rollback   string
	AllowDrift bool
	// KeepChanges is how long the record of an ended run's change is kept.
	KeepChanges time.Duration
	// KeepAudit is how long an audit trail is kept after its last record, 0 for ever.
	KeepAudit time.Duration
	// AuditDirectory is where copies of audit trails are written, "" for nowhere.
	AuditDirectory string
	// ApprovalWait is how long a run waits before verify for an approval.
	ApprovalWait time.Duration
	// HelperWindow is how long a helper waits for a new worker.
	HelperWindow time.Duration
	// PinDirectory is where images are saved, "" for nowhere.
	PinDirectory string
	// BaselineFileLimit and BaselineLimit are in MiB.
	BaselineFileLimit, BaselineLimit int

	// Spec is the Spec workflow; see spec.go.
	Spec specSettings
	// Services are Codex and GitHub; see specservices.go.
	Services serviceSettings

	// Redaction adds to what the redactor takes for secret.
	Redaction artifacts.Rules

	Node          string
	LogLevel      slog.Level
	LogFormat     string
	Wait          time.Duration
	ShutdownGrace time.Duration

	StatsD       metrics.StatsDConfig
	Listen       string
	ListenRemote bool
	// HealthLimit is how long a dependency may be unavailable before the worker is
	// unhealthy.
	HealthLimit time.Duration
	// DiskReserve is in MiB.
	DiskReserve int

	// values are all settings with their sources.
	values []effective
}

// EngineConfig is the address of the docker engine. TLS is used under the same
// condition as in the docker program.
func (c *configuration) EngineConfig() compose.EngineConfig {
	config := compose.EngineConfig{Host: c.DockerHost}
	if c.DockerTLSVerify != "" {
		config.CertPath = c.DockerCertPath
	}
	return config
}

// ChildEnvironment is the environment of the commands of plans: env, with the
// effective settings of the docker engine.
func (c *configuration) ChildEnvironment(env environment) environment {
	return env.with("DOCKER_HOST", c.DockerHost).with("DOCKER_TLS_VERIFY", c.DockerTLSVerify).with("DOCKER_CERT_PATH", c.DockerCertPath)
}

// PrefetchCount is AMQP's prefetch count: Celery's multiplier times concurrency.
func (c *configuration) PrefetchCount() int { return c.Prefetch * c.Concurrency }

// Database is the database of MoonMind's tables.
func (c *configuration) Database() address.Database {
	if !c.DatabaseURL.IsZero() {
		return c.DatabaseURL
	}
	return c.Postgres.address()
}

// loadPolicy reads the policy file, if there is one.
func (c *configuration) loadPolicy() error {
	if c.Profiles == "" {
		c.Policy = policy.Default()
		return nil
	}
	var err error
	if c.Policy, err = policy.Load(c.Profiles); err != nil {
		return c.policyError(err)
	}
	return nil
}

// environmentPolicy is the policy that the environment names, for commands that read no
// settings of steps. It is nil with an error.
func environmentPolicy(env environment) (*policy.Policy, error) {
	c := &configuration{}
	for i := range settings {
		if s := &settings[i]; s.name() == policy.VariableFile {
			v := find(s, env, nil)
			c.values = []effective{v}
			if !v.set {
				break
			}
			if err := s.read(c, v.text); err != nil {
				return nil, v.problem(err)
			}
		}
	}
	err := c.loadPolicy()
	return c.Policy, err
}

// policyError says what to do about a policy file that has mistakes.
func (c *configuration) policyError(err error) error {
	return &configError{fmt.Sprintf("the policy file that %s names cannot be used:\n%v\nCorrect it, and try it with: mm-orchestrator policy check %s", c.name(policy.VariableFile), err, c.Profiles)}
}

// policySettings are the settings for all services, for package policy.
func (c *configuration) policySettings() policy.Settings {
	return policy.Settings{
		Programs: c.AllowedPrograms, HealthURLs: c.HealthURLs, AppChecks: c.AppChecks, RunningIsEnough: c.RunningIsEnough,
		QuietPeriod: c.QuietPeriod, StepTimeLimit: c.StepLimit,
		Name: func(variable string) string {
			if value, _ := c.effective(variable); value.source == fromDefault {
				return variable + " (default)"
			}
			return c.name(variable)
		},
		Default: func(variable string) bool {
			value, found := c.effective(variable)
			return !found || value.source == fromDefault
		},
	}
}

// checkFiles reads the TLS files that the brokers' addresses name, so that a
// problem with them is reported before the first connection.
func (c *configuration) checkFiles() error {
	for _, b := range c.Brokers {
		if _, err := b.TLSConfig(); err != nil {
			return &configError{err.Error()}
		}
	}
	return nil
}

// parseResultBackend parses the address of a Celery result backend. Empty and
// "disabled" mean none.
func parseResultBackend(text string) (address.Database, error) {
	if noResults(text) {
		return address.Database{}, nil
	}
	scheme, _, found := strings.Cut(text, "://")
	if found && !strings.HasPrefix(strings.TrimLeft(scheme, " \t\r\n"), "db+postgres") && address.SchemeOnly(text) != secret.Mask {
		return address.Database{}, fmt.Errorf("result backend %s:// is not supported: use db+postgresql://, or disabled:// to store no results", scheme)
	}
	return address.ParseDatabase(text)
}

func noResults(text string) bool {
	text = strings.TrimSpace(text)
	return text == "" || text == "disabled" || text == "disabled://"
}

func maskResultBackend(text string) string {
	if noResults(text) {
		return text
	}
	return address.MaskDatabase(text)
}

// ignoredOptions lists options of the database addresses that have no effect.
func (c *configuration) ignoredOptions() []notice {
	var found []notice
	add := func(variable string, d address.Database) {
		for _, option := range d.Ignored() {
			found = append(found, notice{Variable: c.name(variable) + " (option " + option.Option + ")", Reason: option.Why})
		}
	}
	add("CELERY_RESULT_BACKEND", c.Results)
	add("MM_ORCHESTRATOR_DATABASE_URL", c.DatabaseURL)
	return found
}

// postgresSettings are the POSTGRES_* values. A host that begins with a slash
// is the directory of a Unix socket, as with libpq.
type postgresSettings struct {
	Host     string
	Port     int
	User     string
	Password secret.String
	Database string
}

func (p postgresSettings) address() address.Database {
	return address.NewDatabase(p.User, p.Password, p.Host, strconv.Itoa(p.Port), p.Database)
}

// settings is the table of all settings, by topic in the order of the help texts.
//
// Names and precedence are those of MoonMind's Python worker
// (docs/moonmind.md#configuration). Where MoonMind has several names for a value,
// the one that its code reads comes first, and those that only its documentation
// mentions after it. Settings that MoonMind does not have begin with
// MM_ORCHESTRATOR_.
var settings = slices.Concat(orchestratorSettings, specSettingsTable, serviceSettingsTable)

var orchestratorSettings = []setting{
	{
		flag: "broker-url", form: "url", mask: address.MaskBrokers, topic: topicBroker,
		vars: names("CELERY_BROKER_URL", "ORCHESTRATOR_BROKER_URL", "BROKER_URL", "SPEC_WORKFLOW_CELERY_BROKER_URL"),
		def:  "amqp://guest:guest@rabbitmq:5672//",
		help: "RabbitMQ, as amqp://user:password@host:port/vhost, or amqps:// for TLS. The address is parsed as kombu parses it: pyamqp:// is the same as amqp://, " +
			"missing parts are guest:guest@127.0.0.1:5672 and the virtual host / (which may also be written as //). Several URLs, separated by ;, are tried in turn. " +
			"In a password, percent-encode / ? # ; and any % before two hexadecimal digits; all other characters, including spaces and @, may be written as they are. " +
			"The TLS options ?ssl_ca_certs=, ssl_certfile= and ssl_keyfile= name files.",
		read: func(c *configuration, text string) (err error) {
			c.Broker = secret.New(text)
			c.Brokers, err = address.ParseBrokers(text)
			return err
		},
	},
	{
		flag: "queue", form: "name", topic: topicBroker,
		vars: []variable{{name: "ORCHESTRATOR_CELERY_QUEUE", emptyCounts: true}},
		def:  "orchestrator.run",
		help: "The queue from which the worker consumes, and to which it publishes the next step of a run.",
		read: readName(func(c *configuration) *string { return &c.Queue }),
	},
	{
		flag: "queue-type", form: "none|classic|quorum", topic: topicBroker,
		vars: names("MM_ORCHESTRATOR_QUEUE_TYPE", "ORCHESTRATOR_QUEUE_TYPE"),
		def:  "none",
		help: "The x-queue-type with which the worker declares the queue: none (no argument, as Python declares it), classic or quorum. " +
			"It must match the existing queue and every other program that declares it.",
		read: func(c *configuration, text string) error {
			err := readChoice(func(c *configuration) *string { return &c.QueueType }, "none", "classic", "quorum")(c, text)
			if c.QueueType == "none" {
				c.QueueType = ""
			}
			return err
		},
	},
	{
		flag: "exchange", form: "name", topic: topicBroker,
		vars: names("ORCHESTRATOR_CELERY_EXCHANGE", "WORKFLOW_DEFAULT_EXCHANGE", "CELERY_DEFAULT_EXCHANGE", "DEFAULT_EXCHANGE"),
		def:  "moonmind.jobs",
		help: "The direct exchange that the worker declares and binds the queue to. Earlier revisions of MoonMind used speckit; a binding to that exchange may stay. " +
			"No message goes through the exchange: producers and workers publish to the queue by name, through the default exchange.",
		read: readName(func(c *configuration) *string { return &c.Exchange }),
	},
	{
		flag: "routing-key", form: "key", topic: topicBroker,
		vars:        names("ORCHESTRATOR_CELERY_ROUTING_KEY"),
		defaultNote: "the name of the queue",
		help:        "The key with which the queue is bound to the exchange.",
		read:        readName(func(c *configuration) *string { return &c.RoutingKey }),
		show:        func(c *configuration) string { return c.RoutingKey },
	},
	{
		flag: "concurrency", form: "number", topic: topicBroker,
		vars: names("ORCHESTRATOR_CONCURRENCY"),
		def:  "1",
		help: "How many steps this worker runs at a time.",
		read: readNumber(func(c *configuration) *int { return &c.Concurrency }, 1, 100),
	},
	{
		flag: "prefetch", form: "number", topic: topicBroker,
		vars: names("ORCHESTRATOR_PREFETCH"),
		def:  "1",
		help: "How many messages the broker delivers to this worker at a time, as a multiple of the concurrency. With 1 no message waits at a busy worker while another worker is free. " +
			"0, which is no limit in Celery, is an error.",
		read: readNumber(func(c *configuration) *int { return &c.Prefetch }, 1, 100),
	},
	{
		flag: "dead-letter-queue", form: "name", topic: topicBroker,
		vars:        names("MM_ORCHESTRATOR_DEAD_LETTER_QUEUE"),
		defaultNote: "none: such messages are rejected, as in Celery",
		help: "A queue for messages that no worker can process, because they cannot be decoded or name an unknown task. The worker publishes them there unchanged, with the reason in the header " +
			"x-mm-orchestrator-reason. If the queue does not exist, the worker declares it as durable.",
		read: readName(func(c *configuration) *string { return &c.DeadLetterQueue }),
	},

	{
		flag: "result-backend", form: "url", mask: maskResultBackend, topic: topicResults,
		vars: []variable{
			{name: "CELERY_RESULT_BACKEND"},
			{name: "ORCHESTRATOR_RESULT_BACKEND", emptyCounts: true},
			{name: "RESULT_BACKEND", emptyCounts: true},
			{name: "SPEC_WORKFLOW_CELERY_RESULT_BACKEND", emptyCounts: true},
		},
		defaultNote: "none: no Celery results are stored",
		help: "Where the worker stores Celery results, for AsyncResult in Python: db+postgresql://user:password@host:port/database. Runs, steps and artifacts do not need it, " +
			"and MoonMind's API and UI never read it. Unlike Python, this program does not derive a default from POSTGRES_*. Empty or disabled:// means none. " +
			"The address is parsed as SQLAlchemy parses it. In a password, percent-encode @ and any % before two hexadecimal digits; all other characters, including spaces and / ? #, may be written as they are.",
		read: func(c *configuration, text string) (err error) {
			c.Results, err = parseResultBackend(text)
			return err
		},
		show: func(c *configuration) string {
			if c.Results.IsZero() {
				return "none"
			}
			return c.Results.Masked()
		},
	},
	{
		flag: "result-encoding", form: "pickle|json", topic: topicResults,
		vars: names("MM_ORCHESTRATOR_RESULT_ENCODING"),
		def:  "pickle",
		help: "The encoding of results in celery_taskmeta: pickle, which Celery 5.4 to 5.6 write and all versions read, or json, which Celery 5.7 writes. " +
			"Use json only if every reader has Celery 5.7 or later.",
		read: readChoice(func(c *configuration) *string { return &c.ResultEncoding }, "pickle", "json"),
	},
	{
		flag: "result-expires", form: "duration", topic: topicResults,
		vars: names("RESULT_EXPIRES", "CELERY_RESULT_EXPIRES"),
		def:  "168h",
		help: "The age at which Celery results are removed. The worker removes them when it receives the task celery.backend_cleanup, as a Python worker does: Celery's beat sends that once a day. " +
			"Without beat they stay. 0 means that they never expire.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.ResultExpires }, 0),
	},

	{
		flag: "postgres-host", form: "host", topic: topicDatabase,
		vars: names("POSTGRES_HOST"),
		def:  "api-db",
		help: "The host of the PostgreSQL server with MoonMind's tables, or the directory of its Unix socket.",
		read: readText(func(c *configuration) *string { return &c.Postgres.Host }),
	},
	{
		flag: "postgres-port", form: "number", topic: topicDatabase,
		vars: names("POSTGRES_PORT"),
		def:  "5432",
		help: "Its port.",
		read: readNumber(func(c *configuration) *int { return &c.Postgres.Port }, 1, 65535),
	},
	{
		flag: "postgres-user", form: "name", topic: topicDatabase,
		vars: names("POSTGRES_USER"),
		def:  "postgres",
		help: "The role to log in as.",
		read: readText(func(c *configuration) *string { return &c.Postgres.User }),
	},
	{
		form: "text", secret: true, topic: topicDatabase,
		vars: []variable{{name: "POSTGRES_PASSWORD", emptyCounts: true}},
		def:  "password",
		help: "Its password. Empty means none.",
		read: func(c *configuration, text string) error {
			c.Postgres.Password = secret.New(text)
			return nil
		},
	},
	{
		form: "text", secret: true, topic: topicDatabase,
		vars:        names("ENCRYPTION_MASTER_KEY"),
		defaultNote: "none: runs are approved by MoonMind's API only",
		help: "The key with which MoonMind's API encrypts the tokens of approvals. Only `mm-orchestrator runs approve` needs it, and it must be the value that the API has. " +
			"The worker never reads a token.",
		read: func(c *configuration, text string) error {
			c.MasterKey = secret.New(text)
			return nil
		},
	},
	{
		flag: "postgres-db", form: "name", topic: topicDatabase,
		vars: names("POSTGRES_DB"),
		def:  "moonmind",
		help: "The database.",
		read: readText(func(c *configuration) *string { return &c.Postgres.Database }),
	},
	{
		flag: "database-url", form: "url", mask: address.MaskDatabase, topic: topicDatabase,
		vars:        names("MM_ORCHESTRATOR_DATABASE_URL"),
		defaultNote: "made from POSTGRES_*",
		help: "The whole address, as postgresql://user:password@host:port/database?sslmode=verify-full. It overrides POSTGRES_*, and is parsed like the result backend. " +
			"It may have the options of libpq 18. Most have the same effect as in libpq (sslmode, sslcrl, keepalives, target_session_attrs, …); `mm-orchestrator config` and the log name those that have none. " +
			"A few are refused, with an error that says what to use instead. Other names are server parameters, such as search_path.",
		read: func(c *configuration, text string) error {
			var err error
			c.DatabaseURL, err = address.ParseDatabase(text)
			return err
		},
		show: func(c *configuration) string { return c.Database().Masked() },
	},
	{
		flag: "auto-migrate", form: "true|false", boolean: true, topic: topicDatabase,
		vars: names("MM_ORCHESTRATOR_AUTO_MIGRATE"),
		def:  "true",
		help: "Whether the worker, at its start, creates or upgrades its own schema mm_orchestrator and, with a result backend, Celery's table celery_taskmeta. " +
			"It never changes MoonMind's tables. With false, missing tables are an error that names `mm-orchestrator migrate`.",
		read: readBool(func(c *configuration) *bool { return &c.AutoMigrate }),
	},

	{
		flag: "workspace", form: "directory", topic: topicFiles,
		vars: names("WORKSPACE_ROOT"),
		def:  "/workspace",
		help: "The directory of the repository that runs repair. It must exist. Relative paths in plans and settings are relative to it.",
		read: func(c *configuration, text string) error {
			if text == "" {
				return errors.New("it must not be empty")
			}
			path, err := filepath.Abs(text)
			if err != nil {
				return errors.New("it is relative, and the working directory is unknown")
			}
			c.Workspace = path
			return nil
		},
		show: func(c *configuration) string { return c.Workspace },
	},
	{
		flag: "artifacts-root", form: "directory", topic: topicFiles,
		vars: names("WORKFLOW_ARTIFACTS_ROOT", "SPEC_WORKFLOW_ARTIFACT_ROOT", "SPEC_WORKFLOW_ARTIFACTS_ROOT", "ARTIFACTS_ROOT"),
		def:  "var/artifacts/spec_workflows",
		help: "The directory for artifacts of runs whose row has no artifact_root. Runs created by MoonMind's API have one, and use it.",
		read: readText(func(c *configuration) *string { return &c.ArtifactBase }),
	},
	{
		flag: "artifact-subpath", form: "directory", topic: topicFiles,
		vars:        names("ORCHESTRATOR_ARTIFACT_ROOT"),
		defaultNote: "the artifacts root itself",
		help:        "A directory inside the artifacts root for the runs of this worker, as relative or absolute path.",
		read:        readOptionalText(func(c *configuration) *string { return &c.ArtifactSubPath }),
		show:        func(c *configuration) string { return c.ArtifactSubPath },
	},
	{
		flag: "artifact-path-map", form: "from=to,…", topic: topicFiles,
		vars:        names("MM_ORCHESTRATOR_ARTIFACT_PATH_MAP"),
		defaultNote: "paths are used unchanged",
		help: "Maps the API's artifact paths to paths here, if the two mount the same volume at different paths: /app/var=/workspace/var. Separate several by commas; " +
			"the longest match is used. Rows keep the API's paths.",
		read: func(c *configuration, text string) error {
			mappings, err := artifacts.ParsePrefixMappings(text)
			if err != nil {
				return errors.New("it must have the form /path/of/the/api=/path/here, with absolute paths")
			}
			c.ArtifactMappings = mappings
			return nil
		},
	},

	{
		flag: "docker-host", mask: address.MaskURL, form: "url", topic: topicSteps,
		vars:        names("DOCKER_HOST", "ORCHESTRATOR_DOCKER_HOST"),
		defaultNote: "the local engine's socket",
		help: "The docker engine, as unix:///path or tcp://host:port. A proxy in between must allow POST and BUILD, and containers, images, networks and volumes. " +
			"Docker's other variables (DOCKER_CONFIG, COMPOSE_FILE, …) are passed to the docker program unchanged.",
		read: func(c *configuration, text string) error {
			if scheme, _, found := strings.Cut(text, "://"); !found || scheme == "" {
				return errors.New("it must have the form unix:///path or tcp://host:port")
			}
			if _, err := url.Parse(text); err != nil {
				// The text of err repeats parts of the address.
				return errors.New("it is not a valid URL; percent-encode special characters")
			}
			c.DockerHost = text
			return nil
		},
	},
	{
		flag: "docker-tls-verify", form: "text", topic: topicSteps,
		vars:        names("DOCKER_TLS_VERIFY"),
		defaultNote: "no TLS",
		help:        "Any value but the empty one enables TLS to the engine, as for the docker program, with the files in DOCKER_CERT_PATH.",
		read:        readOptionalText(func(c *configuration) *string { return &c.DockerTLSVerify }),
	},
	{
		flag: "docker-cert-path", form: "directory", topic: topicSteps,
		vars:        names("DOCKER_CERT_PATH"),
		defaultNote: "none; needed with DOCKER_TLS_VERIFY",
		help:        "The directory with ca.pem, cert.pem and key.pem for TLS to the engine.",
		read:        readText(func(c *configuration) *string { return &c.DockerCertPath }),
	},
	{
		flag: "compose", form: "file", topic: topicSteps,
		vars:        names("MM_ORCHESTRATOR_COMPOSE"),
		defaultNote: "docker compose; docker-compose if there is no docker program",
		help:        "The absolute path of a docker-compose program, version 2 or later, to run instead of `docker compose`.",
		read: func(c *configuration, text string) error {
			if !filepath.IsAbs(text) {
				return errors.New("it must be an absolute path")
			}
			c.ComposeProgram = text
			return nil
		},
	},
	{
		flag: "profiles", form: "file", topic: topicSteps,
		vars:        names(policy.VariableFile),
		defaultNote: "the built-in policy: MoonMind's three services",
		help: "The absolute path of the policy file: which services runs may repair, and for each the files, programs, limits and checks. What the file says about a service counts more than the settings for all services. " +
			"The file is read at the start; with a mistake in it the program ends with exit code 78 and names every mistake with its line. `mm-orchestrator policy check` does the same without a worker, docs/policy.md explains the fields.",
		read: func(c *configuration, text string) error {
			if !filepath.IsAbs(text) {
				return errors.New("it must be an absolute path")
			}
			c.Profiles = text
			return nil
		},
	},
	{
		flag: "allowed-programs", form: "name,…", topic: topicSteps,
		vars:        names("MM_ORCHESTRATOR_ALLOWED_PROGRAMS"),
		defaultNote: "no others",
		help: "Programs that plans may run besides git, docker, docker-compose and MoonMind's skill executor: names or absolute paths, separated by commas. " +
			"The worker never uses a shell, but a program that can run other programs allows as much as a shell.",
		read: func(c *configuration, text string) error {
			c.AllowedPrograms = splitList(text)
			for _, program := range c.AllowedPrograms {
				if strings.Contains(program, "/") && !filepath.IsAbs(program) {
					return fmt.Errorf("%s is neither a name nor an absolute path", program)
				}
			}
			return nil
		},
	},
	{
		flag: "health-url", form: "service=url,…", mask: address.MaskNamedURLs, topic: topicSteps,
		vars:        names("MM_ORCHESTRATOR_HEALTH_URL"),
		defaultNote: "the URL in the plan",
		help: "Health URLs that verify asks instead of the plan's: service=URL, several separated by commas. MoonMind's plans ask the service api for /health, which it answers with 404; " +
			"api=http://api:5000/healthz corrects that. HTTP_PROXY, HTTPS_PROXY and NO_PROXY apply.",
		read: func(c *configuration, text string) error {
			c.HealthURLs = map[string]string{}
			for _, entry := range splitList(text) {
				service, address, found := strings.Cut(entry, "=")
				u, err := url.Parse(address)
				if !found || service == "" || err != nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") {
					return errors.New("it must have the form service=http://host:port/path")
				}
				c.HealthURLs[strings.TrimSpace(service)] = address
			}
			return nil
		},
	},
	{
		flag: "quiet-period", form: "duration", topic: topicSteps,
		vars: names("MM_ORCHESTRATOR_QUIET_PERIOD"),
		def:  "10s",
		help: "How long a service has to stay as it is, with every check good, before verify calls it healthy. It counts from the start of the service's containers, or from the last check that failed; " +
			"so verify does not wait for a service that has been up longer. A service that ends and is started again within this time is not healthy. Docker itself considers a container to be up after 10 s.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.QuietPeriod }, 100*time.Millisecond),
	},
	{
		flag: "running-is-enough", form: "service,…", topic: topicSteps,
		vars: []variable{{name: "MM_ORCHESTRATOR_RUNNING_IS_ENOUGH", emptyCounts: true}},
		def:  "celery-worker,orchestrator",
		help: "Services that verify calls healthy when they run for the quiet period, although neither the plan nor the container has a health check. For any other service, such a run fails, because nothing proves that the service works. " +
			"A plan can say so too, by \"runningIsEnough\": true among the parameters of verify. Empty means none.",
		read: func(c *configuration, text string) error {
			c.RunningIsEnough = splitList(text)
			return nil
		},
	},
	{
		flag: "app-check", form: "JSON", topic: topicSteps,
		vars:        names("MM_ORCHESTRATOR_APP_CHECK"),
		defaultNote: "none",
		help: "Commands that check what a health check does not see, such as a login: a JSON object with one command for each service, as a list of words, " +
			"for example {\"api\": [\"docker\", \"compose\", \"-p\", \"moonmind\", \"exec\", \"-T\", \"api\", \"./check\"]}. verify runs it in the workspace when everything else is good, without a shell, for at most 30 s. " +
			"Exit code 0 means healthy; any other is tried again until the plan's timeout. The program must be one that plans may run.",
		read: func(c *configuration, text string) error {
			if text == "" {
				return nil
			}
			if err := json.Unmarshal([]byte(text), &c.AppChecks); err != nil {
				return errors.New(`it must have the form {"service": ["program", "argument"]}`)
			}
			for service, command := range c.AppChecks {
				if len(command) == 0 || command[0] == "" {
					return fmt.Errorf("the command of service %s is empty", service)
				}
			}
			return nil
		},
	},
	{
		flag: "step-time-limit", form: "duration", topic: topicSteps,
		vars:        names("MM_ORCHESTRATOR_STEP_TIME_LIMIT"),
		def:         "0s",
		defaultNote: "0s: no limit, as with Python",
		help:        "How long a step may take. At the limit all its processes are killed, the step fails, and the run is rolled back. 0 means no limit. A plan can set a shorter limit by a step's parameter timeoutSeconds.",
		read:        readDuration(func(c *configuration) *time.Duration { return &c.StepLimit }, 0),
	},
	{
		flag: "max-starts", form: "number", topic: topicSteps,
		vars: names("MM_ORCHESTRATOR_MAX_STARTS"),
		def:  "3",
		help: "How many workers may die while they run the same step before the step fails and the run is rolled back. Starts that a stopping worker gave up do not count.",
		read: readNumber(func(c *configuration) *int { return &c.MaxStarts }, 1, 100),
	},
	{
		flag: "lost-grace", form: "duration", topic: topicSteps,
		vars: names("MM_ORCHESTRATOR_LOST_GRACE"),
		def:  "3m",
		help: "A run that holds the workspace is lost if no worker has its message and the queue is empty, for example after a purge. After this time the run fails and is rolled back, and the next run gets the workspace. " +
			"The time does not start while a consumer that is not a worker of this program is on the queue. It must be longer than RabbitMQ takes to notice that a worker's machine has failed, which is up to 2 minutes.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.LostGrace }, time.Second),
	},

	{
		flag: "rollback", form: "restore|commands", topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_ROLLBACK"),
		def:  "restore",
		help: "What a rollback does. restore: it undoes what the run has changed, and nothing else: files go back to their content before the run, the service to its image before the run, without a build. " +
			"commands: it runs the commands of the plan, as the Python worker does. MoonMind's plans reset the repository to its last commit, which deletes uncommitted work, and build the image again.",
		read: readChoice(func(c *configuration) *string { return &c.Rollback }, "restore", "commands"),
	},
	{
		flag: "allow-drift", form: "true|false", boolean: true, topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_ALLOW_DRIFT"),
		def:  "false",
		help: "Whether a retry that begins after patch may use the workspace although somebody has edited files of the run's change since. With false the step fails and lists these files. " +
			"With true the retry builds and deploys them as they are.",
		read: readBool(func(c *configuration) *bool { return &c.AllowDrift }),
	},
	{
		flag: "keep-changes", form: "duration", topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_KEEP_CHANGES"),
		def:  "168h",
		help: "How long the worker keeps what is needed to take back the change of a run, after the run has ended: the record in the database, the content in git, and the container that keeps the old image. " +
			"A retry of a run that was rolled back needs it too. Work of somebody else that a rollback has set aside is kept until `mm-orchestrator changes remove`.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.KeepChanges }, time.Minute),
	},
	{
		flag: "keep-audit", form: "duration", topic: topicChanges,
		vars:        names("MM_ORCHESTRATOR_KEEP_AUDIT"),
		def:         "0s",
		defaultNote: "0s: for ever",
		help: "How long the audit trail of a run is kept after its last record, at least 24h. 0 means for ever. Of a trail that the worker has removed, its length, its last hash and the time of the removal are kept. " +
			"Copies, such as those in the directory of --audit-dir, are not removed.",
		read: readKeepAudit,
	},
	{
		flag: "audit-dir", form: "directory", topic: topicChanges,
		vars:        names("MM_ORCHESTRATOR_AUDIT_DIR"),
		defaultNote: "no copies are written",
		help: "A directory in which the worker writes a copy of the audit trail of each run that has ended, as RUN.jsonl. " +
			"Put it where the database's owner cannot write. Relative paths are relative to the workspace.",
		read: readText(func(c *configuration) *string { return &c.AuditDirectory }),
	},
	{
		flag: "approval-wait", form: "duration", topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_APPROVAL_WAIT"),
		def:  "1h",
		help: "How long a run whose gate requires pre-verify may wait before verify for its approval. Until then it keeps its workspace, with what it has deployed, and other runs of the workspace wait. " +
			"After that the run fails and is rolled back.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.ApprovalWait }, time.Second),
	},
	{
		flag: "helper-window", form: "duration", topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_HELPER_WINDOW"),
		def:  "2m",
		help: "A run whose command replaces the container that this worker runs in, as one for the service orchestrator does, leaves that to a helper container. This is how long the helper waits for the worker in the new container to take the step over, " +
			"before it puts the old container back. It must be longer than the worker takes to start and to reach broker and database. After that the helper watches the new container for the same time.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.HelperWindow }, 5*time.Second),
	},
	{
		flag: "pin-directory", form: "directory", topic: topicChanges,
		vars:        names("MM_ORCHESTRATOR_PIN_DIRECTORY"),
		defaultNote: "images are not saved as files",
		help: "A directory in which the images that a rollback needs are also saved as files, as with `docker save`. Before a run replaces an image, the worker creates a container from it that it never starts: so `docker image prune -a` does not remove the image. " +
			"`docker system prune -a` removes such containers first, and then the images: only a file survives it. Saving takes as long, and as much disk, as the image is large. Relative paths are relative to the workspace. The files are as confidential as the images, and only the worker's user can read them.",
		read: readText(func(c *configuration) *string { return &c.PinDirectory }),
	},
	{
		flag: "baseline-file-limit", form: "MiB", topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_BASELINE_FILE_LIMIT"),
		def:  "64",
		help: "The largest file, in MiB, that is copied before a run if git does not track it. Of a larger one only size, mode and modification time are recorded: a rollback notices that the run has changed it, and cannot restore it.",
		read: readNumber(func(c *configuration) *int { return &c.BaselineFileLimit }, 0, 1<<20),
	},
	{
		flag: "baseline-limit", form: "MiB", topic: topicChanges,
		vars: names("MM_ORCHESTRATOR_BASELINE_LIMIT"),
		def:  "512",
		help: "How much is copied before a run of all files together that git does not track, in MiB. Beyond that only size, mode and modification time are recorded, as for a file that is too large.",
		read: readNumber(func(c *configuration) *int { return &c.BaselineLimit }, 0, 1<<20),
	},

	{
		flag: "redact-names", form: "name,…", topic: topicSecrets,
		vars:        names("MM_ORCHESTRATOR_REDACT_NAMES"),
		defaultNote: "no others",
		help: "Variables whose values are secret although their names do not say so: names separated by commas, in which * and ? stand for other characters. " +
			"Values of secret variables are replaced by *** in logs, diffs, rows, results and in all that the commands print.",
		read: func(c *configuration, text string) error {
			c.Redaction.Names = splitList(text)
			for _, name := range c.Redaction.Names {
				if _, err := path.Match(name, ""); err != nil || strings.Contains(name, "=") {
					return fmt.Errorf("%q is no name of a variable; only * and ? stand for other characters", name)
				}
				if strings.Trim(name, "*?") == "" {
					return fmt.Errorf("%q would match every variable, and hide what the logs say", name)
				}
			}
			return nil
		},
	},
	{
		flag: "redact-files", form: "path,…", topic: topicSecrets,
		vars:        names("MM_ORCHESTRATOR_REDACT_FILES"),
		defaultNote: "no others",
		help: "Files with further secrets, as absolute paths separated by commas: each line is a secret, and of a line NAME=value the value is one too. The worker reads them again when they change, and ignores a file that is missing. " +
			"It also reads .env and .env.* in the workspace, files that variables such as POSTGRES_PASSWORD_FILE, PGPASSFILE and GOOGLE_APPLICATION_CREDENTIALS name, and the logins of docker, git, curl, psql and the AWS tools in HOME.",
		read: func(c *configuration, text string) error {
			c.Redaction.Files = splitList(text)
			for _, file := range c.Redaction.Files {
				if !filepath.IsAbs(file) {
					return fmt.Errorf("%s is not an absolute path", file)
				}
			}
			return nil
		},
	},
	{
		flag: "redact-common-words", form: "mask|guard", topic: topicSecrets,
		vars: names("MM_ORCHESTRATOR_REDACT_COMMON_WORDS"),
		def:  "mask",
		help: "What happens to common words such as disabled, password or guest that a secret variable has as its value: mask replaces them wherever they stand, as MoonMind does; guard only where they stand as a value, after = or :. " +
			"docs/operations.md has the list of words.",
		read: func(c *configuration, text string) error {
			switch text {
			case "mask":
				c.Redaction.CommonWords = nil
			case "guard":
				c.Redaction.CommonWords = artifacts.CommonWords
			default:
				return errors.New("it must be mask or guard")
			}
			return nil
		},
	},
	{
		flag: "wait", form: "duration", topic: topicStart,
		vars: names("MM_ORCHESTRATOR_WAIT"),
		def:  "30s",
		help: "How long to wait at start for an unreachable broker or database before the program ends with exit code 69. Errors that waiting cannot resolve, such as a wrong password, " +
			"end it at once. After the start it reconnects without a limit.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.Wait }, 0),
	},

	{
		flag: "hostname", form: "name@host", topic: topicProcess,
		vars: names("ORCHESTRATOR_HOSTNAME"),
		def:  "orchestrator@%h",
		help: "The name of this worker in results, claims and logs, as name@host. %h is the host name, %n its part before the first dot, %d the rest, %% a percent sign. " +
			"Workers that run at the same time need different names.",
		read: func(c *configuration, text string) error {
			host, err := os.Hostname()
			if err != nil || host == "" {
				host = "localhost"
			}
			node, err := nodeName(text, host)
			c.Node = node
			return err
		},
		show: func(c *configuration) string { return c.Node },
	},
	{
		flag: "shutdown-grace", form: "duration", topic: topicProcess,
		vars: names("MM_ORCHESTRATOR_SHUTDOWN_GRACE"),
		def:  "1h",
		help: "How long the worker may take to stop after SIGTERM or SIGINT. Running steps may continue until the last quarter of this time (at most the last ten seconds); then the worker kills their processes " +
			"and returns their messages to the queue, and the next worker continues these steps. A second signal has the same effect at once. " +
			"In a container, stop_grace_period must be longer, or the engine kills the worker earlier.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.ShutdownGrace }, 0),
	},
	{
		flag: "log-level", form: "debug|info|warning|error", topic: topicProcess,
		vars: names("ORCHESTRATOR_LOG_LEVEL"),
		def:  "info",
		help: "The lowest level that is logged: debug, info, warning or error. Celery's critical and fatal are the same as error.",
		read: func(c *configuration, text string) error {
			level, known := logLevels[strings.ToLower(strings.TrimSpace(text))]
			if !known {
				return errors.New("it must be debug, info, warning or error")
			}
			c.LogLevel = level
			return nil
		},
	},
	{
		flag: "log-format", form: "auto|text|json", topic: topicProcess,
		vars: names("MM_ORCHESTRATOR_LOG_FORMAT"),
		def:  "auto",
		help: "The format of the log: text, json, or auto, which is text on a terminal and JSON otherwise.",
		read: readChoice(func(c *configuration) *string { return &c.LogFormat }, "auto", "text", "json"),
	},

	{
		flag: "listen", form: "host:port", topic: topicMetrics,
		vars: []variable{{name: "MM_ORCHESTRATOR_LISTEN", emptyCounts: true}},
		def:  metrics.DefaultAddress,
		help: "The address, as host:port, at which the worker serves Prometheus metrics (/metrics) and health checks (/healthz, /readyz) over HTTP. Empty disables them. " +
			"If the default address is in use, for example by another worker, the worker listens on a free port and logs it.",
		read: func(c *configuration, text string) error {
			if text != "" {
				if err := metrics.CheckAddress(text); err != nil {
					return errors.New("it must have the form host:port")
				}
			}
			c.Listen = text
			return nil
		},
	},
	{
		flag: "listen-remote", form: "true|false", boolean: true, topic: topicMetrics,
		vars: names("MM_ORCHESTRATOR_LISTEN_REMOTE"),
		def:  "false",
		help: "Allow a listen address that other machines can reach, such as 0.0.0.0:9808. The endpoints require no password, and show names of hosts and queues.",
		read: readBool(func(c *configuration) *bool { return &c.ListenRemote }),
	},
	{
		flag: "health-limit", form: "duration", topic: topicMetrics,
		vars: names("MM_ORCHESTRATOR_HEALTH_LIMIT"),
		def:  "60s",
		help: "How long the consumer, the database or the docker engine may be unavailable before /healthz reports the worker as unhealthy. The worker itself waits for them without a limit. " +
			"The same time applies to a worker that makes no progress itself, because of a deadlock or a call that does not return; commands of steps may take any time. The docker engine counts only after it has answered once.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.HealthLimit }, 0),
	},
	{
		flag: "disk-reserve", form: "MiB", topic: topicMetrics,
		vars: names("MM_ORCHESTRATOR_DISK_RESERVE"),
		def:  "64",
		help: "/healthz reports the worker as unhealthy if the file system of the artifact root has less free space than this, in MiB. A run is refused before it changes anything if that, or the file system of the workspace, of saved images or of the docker engine on this machine, has less. 0 disables the check.",
		read: readNumber(func(c *configuration) *int { return &c.DiskReserve }, 0, 1<<30),
	},
	{
		flag: "statsd-host", form: "host", topic: topicMetrics,
		vars:        append(names("ORCHESTRATOR_STATSD_HOST"), variable{name: "STATSD_HOST", shared: true}),
		defaultNote: "StatsD is off",
		help:        "The StatsD server to which the worker sends MoonMind's metrics, over IPv4 UDP.",
		read:        readOptionalText(func(c *configuration) *string { return &c.StatsD.Host }),
	},
	{
		flag: "statsd-port", form: "number", topic: topicMetrics,
		vars: append(names("ORCHESTRATOR_STATSD_PORT"), variable{name: "STATSD_PORT", shared: true}),
		def:  "8125",
		help: "Its port.",
		read: readNumber(func(c *configuration) *int { return &c.StatsD.Port }, 1, 65535),
	},
	{
		flag: "metrics-prefix", form: "name", topic: topicMetrics,
		vars: names("ORCHESTRATOR_METRICS_PREFIX"),
		def:  "moonmind.orchestrator",
		help: "The prefix of the names of StatsD metrics. Dots at its end are removed.",
		read: func(c *configuration, text string) error {
			c.StatsD.Prefix = strings.TrimRight(text, ".")
			if c.StatsD.Prefix == "" || strings.ContainsAny(text, ":|@# \t\r\n") {
				return errors.New("it must be a name without spaces and without any of : | @ #")
			}
			return nil
		},
	},
}

// logLevels maps Celery's names. slog has no level for Python's critical.
var logLevels = map[string]slog.Level{
	"debug": slog.LevelDebug, "info": slog.LevelInfo, "warning": slog.LevelWarn, "warn": slog.LevelWarn,
	"error": slog.LevelError, "critical": slog.LevelError, "fatal": slog.LevelError,
}

var validNode = regexp.MustCompile(`^[^@\s]+@[^@\s]+$`)

// nodeName expands Celery's placeholders in a node name. As in Celery, a name
// without @ is the host part.
func nodeName(pattern, host string) (string, error) {
	if !strings.Contains(pattern, "@") {
		pattern = "celery@" + pattern
	}
	short, domain, _ := strings.Cut(host, ".")
	var out strings.Builder
	for i := 0; i < len(pattern); i++ {
		if pattern[i] != '%' {
			out.WriteByte(pattern[i])
			continue
		}
		i++
		if i == len(pattern) {
			return "", errors.New("it ends with a single %")
		}
		switch pattern[i] {
		case 'h':
			out.WriteString(host)
		case 'n':
			out.WriteString(short)
		case 'd':
			out.WriteString(domain)
		case '%':
			out.WriteByte('%')
		default:
			return "", fmt.Errorf("%%%c is not a placeholder; use %%h, %%n, %%d or %%%%", pattern[i])
		}
	}
	if !validNode.MatchString(out.String()) {
		return "", fmt.Errorf("it expands to %q, which is not of the form name@host", out.String())
	}
	return out.String(), nil
}

// check validates combinations of settings.
func (c *configuration) check() error {
	if c.RoutingKey == "" {
		c.RoutingKey = c.Queue
	}
	if err := c.checkSpec(); err != nil {
		return err
	}
	if c.DockerTLSVerify != "" && c.DockerCertPath == "" {
		return &configError{Text: fmt.Sprintf("%s is set, but %s is not: set it to the directory with ca.pem, cert.pem and key.pem",
			c.name("DOCKER_TLS_VERIFY"), c.name("DOCKER_CERT_PATH"))}
	}
	if c.Listen != "" && !c.ListenRemote && !metrics.Loopback(c.Listen) {
		return &configError{Text: fmt.Sprintf("%s is %q, which other machines can reach: set %s to allow that, or use 127.0.0.1",
			c.name("MM_ORCHESTRATOR_LISTEN"), c.Listen, c.assign("MM_ORCHESTRATOR_LISTEN_REMOTE", "true"))}
	}
	return nil
}

// withoutEffect is a group of MoonMind's variables that have no effect here, with
// the reason. The command config names those that are set.
type withoutEffect struct {
	vars []string
	why  string
}

var withoutEffects = []withoutEffect{
	{[]string{"DEFAULT_ROUTING_KEY", "CELERY_DEFAULT_ROUTING_KEY"}, "the queues of the Spec workflow are bound by their names"},
	{[]string{"WORKER_PREFETCH_MULTIPLIER", "CELERY_WORKER_PREFETCH_MULTIPLIER"}, "the orchestrator reads ORCHESTRATOR_PREFETCH instead"},
	{[]string{"TASK_SERIALIZER", "CELERY_TASK_SERIALIZER", "RESULT_SERIALIZER", "CELERY_RESULT_SERIALIZER", "ACCEPT_CONTENT", "CELERY_ACCEPT_CONTENT"},
		"the orchestrator's messages are always JSON; MM_ORCHESTRATOR_RESULT_ENCODING sets the encoding of results"},
	{[]string{"TASK_ACKS_LATE", "CELERY_TASK_ACKS_LATE", "TASK_REJECT_ON_WORKER_LOST", "CELERY_TASK_REJECT_ON_WORKER_LOST"},
		"messages are always acknowledged after their work is recorded, and the step of a dead worker is always continued"},
	{[]string{"CELERY_WORKER_MAX_TASKS_PER_CHILD"}, "works around a defect of the Python worker that this program does not have"},
	{[]string{"ORCHESTRATOR_CELERY_APP", "ORCHESTRATOR_CELERY_CONFIG", "ORCHESTRATOR_AUTO_INSTALL"}, "says what the Python worker loads or installs"},
	{[]string{"DEFAULT_FEATURE_KEY", "SPEC_WORKFLOW_DEFAULT_FEATURE_KEY"}, "a run's message or row always names its feature"},
	{[]string{"SPEC_AUTOMATION_WORKSPACE_ROOT"}, "MM_ORCHESTRATOR_CLONE_DIR says where tasks make their clones"},
	{[]string{"SKILLS_FALLBACK_ENABLED", "SPEC_WORKFLOW_SKILLS_FALLBACK_ENABLED"}, "no task of the Spec workflow fails here in a way after which MoonMind would fall back"},
}

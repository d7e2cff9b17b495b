package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/metrics"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit"
	"github.com/moonladderstudios/mm-orchestrator/worker"
)

// specSettings are the settings of the Spec workflow (docs/spec-workflow.md).
type specSettings struct {
	// Consume are the queues that the worker consumes, nil for none: then it does not
	// run the tasks.
	Consume []string
	// Only: the worker does not consume the orchestrator's queue.
	Only bool
	// RepoRoot is "" for the workspace.
	RepoRoot, TasksRoot string
	DefaultQueue        string
	CodexQueue          string
	Shards              int
	Repository          string
	TestMode            bool
	Skills              speckit.SkillsPolicy
	// AllowList says that only the skills in Allowed may be selected.
	AllowList bool
	Allowed   []string
	StatsD    metrics.StatsDConfig
	// StuckAfter is how long nothing may be seen of an active run.
	StuckAfter time.Duration
}

// allQueues stands for all queues of the chain.
const allQueues = "all"

var specSettingsTable = []setting{
	{
		flag: "spec-queues", form: "all|name,…", topic: topicSpec,
		vars:        names("MM_ORCHESTRATOR_SPEC_QUEUES"),
		defaultNote: "none: the worker does not run the Spec workflow",
		help: "The queues of MoonMind's Spec workflow that the worker consumes, in addition to that of the orchestrator: names separated by commas, or all. all is the queue of discover_next_phase and every Codex queue, " +
			"also the shards if a fixed Codex queue is set, because retries by MoonMind's API go there.",
		read: func(c *configuration, text string) error {
			c.Spec.Consume = splitList(text)
			if len(c.Spec.Consume) == 0 {
				return errors.New("it must be all, or names of queues separated by commas")
			}
			if slices.ContainsFunc(c.Spec.Consume, func(name string) bool { return len(name) > maxName }) {
				return errLongName
			}
			return nil
		},
	},
	{
		flag: "spec-only", form: "true|false", boolean: true, topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_SPEC_ONLY"),
		def:  "false",
		help: "Whether the worker runs only the Spec workflow, and leaves the orchestrator's queue to other workers. It then needs no workspace and no docker engine.",
		read: readBool(func(c *configuration) *bool { return &c.Spec.Only }),
	},
	{
		flag: "spec-repo-root", form: "directory", topic: topicSpec,
		vars:        names("REPO_ROOT", "WORKFLOW_REPO_ROOT", "SPEC_WORKFLOW_REPO_ROOT"),
		defaultNote: "the workspace",
		help:        "The directory from which relative paths of the Spec workflow start: the tasks root, and the artifact directories in the rows of runs. MoonMind's workers have /app.",
		read: func(c *configuration, text string) (err error) {
			c.Spec.RepoRoot, err = filepath.Abs(text)
			return err
		},
	},
	{
		flag: "spec-tasks-root", form: "directory", topic: topicSpec,
		vars: names("TASKS_ROOT", "WORKFLOW_TASKS_ROOT", "SPEC_WORKFLOW_TASKS_ROOT"),
		def:  "specs",
		help: "The directory with one directory per feature, each with its tasks.md.",
		read: readText(func(c *configuration) *string { return &c.Spec.TasksRoot }),
	},
	{
		flag: "spec-default-queue", form: "name", topic: topicSpec,
		vars: names("DEFAULT_QUEUE", "WORKFLOW_DEFAULT_QUEUE", "CELERY_DEFAULT_QUEUE"),
		def:  "speckit",
		help: "The queue of discover_next_phase, the first task of the chain.",
		read: readName(func(c *configuration) *string { return &c.Spec.DefaultQueue }),
	},
	{
		flag: "codex-queue", form: "name", topic: topicSpec,
		vars:        names("CODEX_QUEUE", "SPEC_WORKFLOW_CODEX_QUEUE"),
		defaultNote: "one of the shards codex-0, codex-1, …",
		help:        "One fixed queue for submit_codex_job and apply_and_publish. MoonMind's compose file sets SPEC_WORKFLOW_CODEX_QUEUE, which its Python never reads.",
		read:        readName(func(c *configuration) *string { return &c.Spec.CodexQueue }),
	},
	{
		flag: "codex-shards", form: "number", topic: topicSpec,
		vars: names("CODEX_SHARDS"),
		def:  "3",
		help: "How many queues codex-0, codex-1, … there are. The tasks of one feature go to one of them, chosen by a hash. All workers and MoonMind's API need the same number.",
		read: readNumber(func(c *configuration) *int { return &c.Spec.Shards }, 1, 64),
	},
	{
		flag: "github-repository", form: "owner/name", topic: topicSpec,
		vars:        names("GITHUB_REPOSITORY", "SPEC_WORKFLOW_GITHUB_REPOSITORY"),
		defaultNote: "none",
		help:        "The repository of runs whose row names none.",
		read: func(c *configuration, text string) error {
			c.Spec.Repository = text
			return checkRepository(text)
		},
	},
	{
		flag: "spec-test-mode", form: "true|false", boolean: true, topic: topicSpec,
		vars: names("TEST_MODE", "WORKFLOW_TEST_MODE", "SPEC_WORKFLOW_TEST_MODE"),
		def:  "false",
		help: "Whether Codex and GitHub are simulated: the tasks write the same rows and files as MoonMind's Python in its test mode, and send nothing.",
		read: readBool(func(c *configuration) *bool { return &c.Spec.TestMode }),
	},
	{
		flag: "use-skills", form: "true|false", boolean: true, topic: topicSpec,
		vars: names("SKILLS_ENABLED", "SPEC_WORKFLOW_USE_SKILLS"),
		def:  "true",
		help: "Whether the tasks record that they were carried out by a skill (executionPath skill) or directly (direct_only). The worker carries out every task itself in both cases, as MoonMind does for its skill speckit.",
		read: func(c *configuration, text string) error {
			var use bool
			err := readBool(func(*configuration) *bool { return &use })(c, text)
			c.Spec.Skills.Disabled = !use
			return err
		},
	},
	{
		flag: "skills-canary-percent", form: "number", topic: topicSpec,
		vars: names("SKILLS_CANARY_PERCENT", "SPEC_WORKFLOW_SKILLS_CANARY_PERCENT"),
		def:  "100",
		help: "The percentage of runs and tasks that use skills, chosen by a hash.",
		read: readNumber(func(c *configuration) *int { return &c.Spec.Skills.Canary }, 0, 100),
	},
	{
		flag: "skills-shadow-mode", form: "true|false", boolean: true, topic: topicSpec,
		vars: names("SKILLS_SHADOW_MODE", "SPEC_WORKFLOW_SKILLS_SHADOW_MODE"),
		def:  "false",
		help: "The value of shadowModeRequested in the rows.",
		read: readBool(func(c *configuration) *bool { return &c.Spec.Skills.Shadow }),
	},
	{
		flag: "default-skill", form: "name", topic: topicSpec,
		vars: names("WORKFLOW_DEFAULT_SKILL", "SPEC_WORKFLOW_DEFAULT_SKILL", "MOONMIND_DEFAULT_SKILL", "DEFAULT_SKILL"),
		def:  "speckit",
		help: "The skill of tasks for which no other is selected.",
		read: readText(func(c *configuration) *string { return &c.Spec.Skills.Default }),
	},
	stageSkill("discover-skill", "DISCOVER", store.SpecDiscover),
	stageSkill("submit-skill", "SUBMIT", store.SpecSubmit),
	stageSkill("publish-skill", "PUBLISH", store.SpecPublish),
	{
		flag: "skill-policy-mode", form: "permissive|allowlist", topic: topicSpec,
		vars: names("WORKFLOW_SKILL_POLICY_MODE", "SPEC_WORKFLOW_SKILL_POLICY_MODE", "MOONMIND_SKILL_POLICY_MODE", "SKILL_POLICY_MODE"),
		def:  "permissive",
		help: "Whether any skill may be selected, or only the allowed ones.",
		read: func(c *configuration, text string) error {
			var mode string
			err := readChoice(func(*configuration) *string { return &mode }, "permissive", "allowlist")(c, text)
			c.Spec.AllowList = mode == "allowlist"
			return err
		},
	},
	{
		flag: "allowed-skills", form: "name,…", topic: topicSpec,
		vars: names("WORKFLOW_ALLOWED_SKILLS", "SPEC_WORKFLOW_ALLOWED_SKILLS", "MOONMIND_ALLOWED_SKILLS", "ALLOWED_SKILLS"),
		def:  "speckit",
		help: "The skills that may be selected in the mode allowlist, separated by commas. Any other is replaced by the default skill.",
		read: func(c *configuration, text string) error {
			c.Spec.Allowed = splitList(text)
			return nil
		},
	},
	{
		flag: "spec-stuck-after", form: "duration", topic: topicSpec,
		vars: names("MM_ORCHESTRATOR_SPEC_STUCK_AFTER"),
		def:  "1h",
		help: "How long nothing may be seen of an active run before it counts as lost: no row has changed, no live worker has a task of it, and the queues of the chain are empty. " +
			"Then a worker fails it with that reason, so that it no longer blocks its feature. It must be longer than any task of a Python worker on these queues takes.",
		read: readDuration(func(c *configuration) *time.Duration { return &c.Spec.StuckAfter }, time.Second),
	},
	{
		flag: "spec-statsd-host", form: "host", topic: topicSpec,
		vars:        append(names("SPEC_WORKFLOW_METRICS_HOST"), variable{name: "STATSD_HOST", shared: true}),
		defaultNote: "StatsD is off for the Spec workflow",
		help:        "The StatsD server for the metrics of the Spec workflow, which have DogStatsD tags.",
		read:        readOptionalText(func(c *configuration) *string { return &c.Spec.StatsD.Host }),
	},
	{
		flag: "spec-statsd-port", form: "number", topic: topicSpec,
		vars: append(names("SPEC_WORKFLOW_METRICS_PORT"), variable{name: "STATSD_PORT", shared: true}),
		def:  "8125",
		help: "Its port.",
		read: readNumber(func(c *configuration) *int { return &c.Spec.StatsD.Port }, 1, 65535),
	},
	{
		flag: "spec-metrics-prefix", form: "name", topic: topicSpec,
		vars: names("SPEC_WORKFLOW_METRICS_PREFIX"),
		def:  "moonmind.spec_workflow",
		help: "The prefix of the names of these metrics. Dots at its end are removed.",
		read: func(c *configuration, text string) error {
			c.Spec.StatsD.Prefix = strings.TrimRight(text, ".")
			if c.Spec.StatsD.Prefix == "" || strings.ContainsAny(text, ":|@# \t\r\n") {
				return errors.New("it must be a name without spaces and without any of : | @ #")
			}
			return nil
		},
	},
}

// stageSkill is the setting of the skill of one task.
func stageSkill(flag, stage string, task store.SpecTask) setting {
	return setting{
		flag: flag, form: "name", topic: topicSpec,
		vars:        names("WORKFLOW_"+stage+"_SKILL", "SPEC_WORKFLOW_"+stage+"_SKILL", "MOONMIND_"+stage+"_SKILL", stage+"_SKILL"),
		defaultNote: "the default skill",
		help:        fmt.Sprintf("The skill of %s.", task),
		read: func(c *configuration, text string) error {
			if c.Spec.Skills.Stages == nil {
				c.Spec.Skills.Stages = map[store.SpecTask]string{}
			}
			c.Spec.Skills.Stages[task] = text
			return nil
		},
	}
}

// checkSpec validates combinations of settings of the Spec workflow, and finds the
// queues to consume.
func (c *configuration) checkSpec() error {
	s := &c.Spec
	if s.Only && s.Consume == nil {
		return &configError{fmt.Sprintf("%s is set, but %s is not: set it to the queues to consume", c.name("MM_ORCHESTRATOR_SPEC_ONLY"), c.name("MM_ORCHESTRATOR_SPEC_QUEUES"))}
	}
	if slices.Equal(s.Consume, []string{allQueues}) {
		s.Consume = c.speckit().Queues()
	}
	slices.Sort(s.Consume)
	s.Consume = slices.Compact(s.Consume)
	if !s.Only && slices.Contains(s.Consume, c.Queue) {
		return &configError{fmt.Sprintf("%s has the queue %s, which is the orchestrator's (%s): they need different queues", c.name("MM_ORCHESTRATOR_SPEC_QUEUES"), c.Queue, c.name("ORCHESTRATOR_CELERY_QUEUE"))}
	}
	return c.checkServiceSettings()
}

// specRoot is the directory from which relative paths of the Spec workflow start.
func (c *configuration) specRoot() string {
	if c.Spec.RepoRoot != "" {
		return c.Spec.RepoRoot
	}
	return c.Workspace
}

// speckit is the configuration of the tasks as far as settings give it.
func (c *configuration) speckit() speckit.Config {
	s := c.Spec
	tasks := s.TasksRoot
	if !filepath.IsAbs(tasks) {
		tasks = filepath.Join(c.specRoot(), tasks)
	}
	if s.AllowList {
		s.Skills.Allowed = s.Allowed
	}
	return speckit.Config{
		TasksRoot:  tasks,
		Artifacts:  artifacts.DirectoryConfig{WorkingDir: c.specRoot(), Base: c.ArtifactBase, Mappings: c.ArtifactMappings},
		Repository: s.Repository, DefaultQueue: s.DefaultQueue, CodexQueue: s.CodexQueue, CodexShards: s.Shards,
		TestMode: s.TestMode, Skills: s.Skills, MaxStarts: c.MaxStarts, StuckAfter: s.StuckAfter, SettingName: c.name,
	}
}

// consumed are the queues that the worker consumes.
func (c *configuration) consumed() []string {
	if c.Spec.Only {
		return c.Spec.Consume
	}
	return append([]string{c.Queue}, c.Spec.Consume...)
}

// addSpec makes a worker consume the queues of the Spec workflow.
func (c *configuration) addSpec(w *worker.Config) {
	if c.Spec.Consume == nil {
		return
	}
	w.Queues = c.consumed()
	if c.Spec.Only {
		w.DefaultQueue = c.Spec.DefaultQueue
	}
	declared := slices.Concat(c.speckit().Queues(), c.Spec.Consume)
	slices.Sort(declared)
	for _, name := range slices.Compact(declared) {
		if name != c.Queue {
			w.TaskQueues = append(w.TaskQueues, worker.Queue{Name: name, Exchange: c.Exchange, RoutingKey: name})
		}
	}
	w.TaskRoutes = append(w.TaskRoutes, worker.Route{Task: "spec_workflow_runs.*", Queue: c.Spec.DefaultQueue})
}

// specParts are the parts of a worker that belong to the Spec workflow.
type specParts struct {
	// statsd sends its metrics.
	statsd *metrics.StatsD
	// sweep fails runs that are stuck, until its context ends.
	sweep func(context.Context)
	// tasks are those that the worker runs.
	tasks *speckit.Speckit
	// close releases what the tasks use, after the worker has ended.
	close func()
}

// registerSpec makes a worker run the tasks of the Spec workflow.
func (p *program) registerSpec(c *configuration, w *worker.Worker, db *store.Store, registry prometheus.Registerer, redactor *artifacts.Redactor, log *slog.Logger) (parts specParts, err error) {
	sink := c.Spec.StatsD
	sink.Logger = log
	if parts.statsd, err = metrics.NewStatsD(sink); err != nil {
		return parts, &configError{err.Error()}
	}
	config := c.speckit()
	config.Runs, config.Logger, config.Redactor = db, log, redactor
	if config.Metrics, err = metrics.NewSpecRecorder(parts.statsd, registry); err != nil {
		return parts, err
	}
	parts.close = func() {}
	if !c.Spec.TestMode {
		used, err := c.addServices(&config, p.env, log, redactor, p.redactor())
		if err != nil {
			return parts, err
		}
		parts.close = used.close
	}
	tasks, err := speckit.New(config)
	if err != nil {
		parts.close()
		return parts, &configError{err.Error()}
	}
	tasks.Register(w)
	parts.tasks = tasks
	parts.sweep = func(ctx context.Context) { tasks.Sweep(ctx, db, w) }
	log.Info("runs the Spec workflow", "queues", strings.Join(c.Spec.Consume, " "), "tasks_root", config.TasksRoot, "test_mode", c.Spec.TestMode, "statsd", c.Spec.StatsD.Host)
	return parts, nil
}

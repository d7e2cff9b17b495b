package policy

import "strings"

// everyStep is the key of the limits for every step.
const everyStep = "everyStep"

// steps are the keys under limits that name a step.
var steps = []string{"analyze", "patch", "build", "restart", "verify", "rollback"}

// A Field is a field of the file, for its reader, for messages and for
// docs/policy.md.
type Field struct {
	// Path is from the top of the file, with NAME for the name of a service and STEP
	// for a step.
	Path string
	// Form says how the value is written, "" for a field that has fields.
	Form string
	Help string
}

// Forms of values.
const (
	formText     = "text"
	formName     = "name"
	formList     = "[text, …]"
	formBool     = "true or false"
	formDuration = "duration: 90s, 15m, 1h30m"
	formSize     = "size: 500KiB, 100MiB, 2GiB"
	formLimitDur = "duration, or none"
	formLimitSiz = "size, or none"
	formURL      = "http://… or https://…"
	formDay      = "2027-01-31, or 2027-01-31T06:00:00Z"
)

// Fields are all fields, in the order in which docs/policy.md explains them. An
// override has the fields of a service that are given here under overrides.
var Fields = []Field{
	{"services", "", "The services that runs may repair, by the target service of runs. A service that is not here keeps what is built in."},
	{"services.NAME", "", "One service. Of a built-in one, write only what differs. A service of your own needs at least allowList."},
	{"services.NAME.enabled", formBool, "false refuses runs for the service. Defaults to true."},
	{"services.NAME.compose", "", "Where the service is in docker compose, for plans that have no command of their own."},
	{"services.NAME.compose.service", formName, "The service in the compose file. Defaults to NAME."},
	{"services.NAME.compose.project", formName, "The compose project. Defaults to moonmind."},
	{"services.NAME.allowList", formList, "Globs of the files that a patch may change, relative to the workspace. * and ? match a slash too. A file has to match this list and the plan's list. For a built-in service it can only leave out globs: those that it adds belong under overrides."},
	{"services.NAME.programs", formList, "The programs that plans may start: names or absolute paths. Defaults to docker, docker-compose, git. For a built-in service it can only leave out programs: those that it adds belong under overrides."},
	{"services.NAME.limits", "", "What ends a step, or a run, that takes too much."},
	{"services.NAME.limits.everyStep", "", "Limits of each step that has none of its own."},
	{"services.NAME.limits.STEP", "", "Limits of one step: analyze, patch, build, restart, verify or rollback. none lifts a limit that everyStep has."},
	{"services.NAME.limits.STEP.time", formLimitDur, "How long the step may take, from 1s."},
	{"services.NAME.limits.STEP.idle", formLimitDur, "How long the step's commands may be without output, from 1s."},
	{"services.NAME.limits.STEP.output", formLimitSiz, "How much output the step's commands may write."},
	{"services.NAME.limits.STEP.disk", formLimitSiz, "How much the step may add to the workspace."},
	{"services.NAME.limits.run", "", "Limits of all steps of a run together."},
	{"services.NAME.limits.run.time", formLimitDur, "How long the run's steps may take together, from 1s. Waiting does not count."},
	{"services.NAME.limits.run.output", formLimitSiz, "How much output they may write together."},
	{"services.NAME.limits.run.disk", formLimitSiz, "How much they may add to the workspace together."},
	{"services.NAME.verify", "", "What the step verify asks for."},
	{"services.NAME.verify.quietPeriod", formDuration, "How long the service has to stay well, from 100ms."},
	{"services.NAME.verify.runningIsEnough", formBool, "true: a service without a health check is healthy when it has run for the quiet period."},
	{"services.NAME.verify.healthURL", formURL, "The URL that verify asks instead of the plan's. Logs and rows show it without its password and without the values in its query."},
	{"services.NAME.verify.appCheck", formList, "A command that checks what a health check does not see, as a list of words. Its program must be one that plans may start."},
	{"services.NAME.approval", "", "How runs wait for an approval."},
	{"services.NAME.approval.wait", formDuration, "How long a run may hold the workspace while it waits for an approval before verify, from 1s."},
	{"services.NAME.overrides", "", "Exceptions for this service, as a list. Each has a reason, and a worker logs it at its start."},
	{"services.NAME.overrides.reason", formText, "Why: a sentence or a ticket. Required."},
	{"services.NAME.overrides.until", formDay, "The last day (UTC) or the moment at which the exception ends. Without it, the exception has no end."},
	{"services.NAME.overrides.allowList", formList, "Globs that are added to the service's list and to the plan's."},
	{"services.NAME.overrides.programs", formList, "Programs that are added."},
	{"services.NAME.overrides.command", formText, "A command that may do more than the rules for git and docker allow: a program, or one with its subcommand, such as docker build. A refusal names the entry that permits what was refused."},
	{"services.NAME.overrides.options", formList, "The options and arguments of command that are permitted. An option that takes a value ends in =. \"*\" permits all."},
	{"services.NAME.overrides.directories", formList, "Absolute paths of other workspaces in which command may run."},
	{"services.NAME.overrides.limits", "", "Limits that replace the service's, with the same fields."},
	{"services.NAME.overrides.verify", "", "What replaces the service's verify, with the same fields."},
	{"services.NAME.overrides.approval", "", "What replaces the service's approval, with the same fields."},
	{"redaction", "", "What is masked in logs, rows and files besides what is always masked."},
	{"redaction.commonWords", "guard or mask", "What happens to a secret that is a common word, such as password. guard masks it only where it stands as a value, mask everywhere. Defaults to MM_ORCHESTRATOR_REDACT_COMMON_WORDS."},
	{"redaction.words", formList, "The common words, instead of the built-in list."},
	{"redaction.add", formList, "Names of environment variables whose values are secret, besides those that the worker knows by their names and those in MM_ORCHESTRATOR_REDACT_NAMES."},
}

// children are the names of the fields directly below a path of Fields.
func children(path string) []string {
	var names []string
	for _, f := range Fields {
		name, below := strings.CutPrefix(f.Path, path+".")
		if path == "" {
			name, below = f.Path, true
		}
		if below && !strings.Contains(name, ".") && name != "STEP" {
			names = append(names, name)
		}
		if below && name == "STEP" {
			names = append(names, steps...)
		}
	}
	return names
}

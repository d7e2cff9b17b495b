package main

import (
	"fmt"
	"io"
	"strings"
)

// writeConfigurationPage generates docs/configuration.md. A test compares the
// output with the file in the repository.
func writeConfigurationPage(w io.Writer) {
	fmt.Fprint(w, `# Configuration

<!-- Generated from cmd/mm-orchestrator/settings.go: go test ./cmd/mm-orchestrator -run TestConfigurationPage -update -->

`+"`mm-orchestrator`"+` reads flags and environment variables, among them those of MoonMind's Python worker. `+"`mm-orchestrator config`"+` shows
each effective value and its source, with passwords masked. `+"`mm-orchestrator help settings NAME`"+` explains a setting in the terminal.

- A flag overrides the environment, the environment overrides the default. Passwords have no flag, because every user of a machine can see
  command lines.
- Where several variables are listed, the first that is set wins. The first is the one that MoonMind's Python code reads; names that only its
  documentation mentions come after it.
- Names are case-insensitive. If a name is set in several spellings, the spelling given here wins.
- An empty variable counts as unset. For variables marked ¹, empty is a value.
- Durations are written as 90s, 15m, 1h30m, or as a number of seconds, booleans as true and false.
- `+"`.env`"+` files are not read. Docker compose reads one for its own variables; list what the container needs under `+"`environment:`"+` or `+"`env_file:`"+`.
- An invalid value ends the program with exit code 78 and a line that names the variable and the value.
`)
	for _, t := range topics {
		fmt.Fprintf(w, "\n## %s\n\n| variable | flag | default | meaning |\n|---|---|---|---|\n", t)
		for _, s := range settings {
			if s.topic == t {
				fmt.Fprintf(w, "| %s | %s | %s | %s |\n", s.varsMarkdown(), s.flagMarkdown(), s.defaultMarkdown(), cell(s.help))
			}
		}
	}
	fmt.Fprint(w, `
¹ Empty is a value.

## Decisions

- **Celery results.** If no result backend is set, MoonMind's Python worker derives one from `+"`POSTGRES_*`"+`. This program does not: without `+"`CELERY_RESULT_BACKEND`"+`
  or one of its other names it stores no results, because nothing in MoonMind reads them. MoonMind's own compose file sets the variable, so a replaced container still
  stores them. The tables of runs, steps and artifacts are always found through `+"`POSTGRES_*`"+` or `+"`MM_ORCHESTRATOR_DATABASE_URL`"+`.
- **Exchange.** The default is that of MoonMind's last Celery revision. If the queue is also bound to the older exchange, that binding is kept.
- **Queue name.** In Python, an empty `+"`ORCHESTRATOR_CELERY_QUEUE`"+` means a queue with an empty name. Here it is an error.
- **Waiting at start.** A worker waits for an unreachable broker or database, so that containers can start in any order. The wait is limited, so that a supervisor notices.
  Errors that waiting cannot resolve, such as a wrong password, end the program at once.

## Variables without effect

These MoonMind variables have no effect here. `+"`mm-orchestrator config`"+` lists those that are set. It also lists variables that begin with `+"`MM_ORCHESTRATOR_`"+` and are no setting,
such as mistyped names; the worker logs them at its start.

| variables | reason |
|---|---|
`)
	for _, entry := range withoutEffects {
		fmt.Fprintf(w, "| %s | %s |\n", code(entry.vars...), cell(entry.why))
	}
	fmt.Fprint(w, `
## Output of `+"`mm-orchestrator config --json`"+`

`+"```json"+`
{
  "settings": [
    {
      "name": "CELERY_BROKER_URL",
      "topic": "Broker",
      "value": "amqp://guest:***@rabbitmq:5672//",
      "source": "environment",
      "origin": "ORCHESTRATOR_BROKER_URL"
    }
  ],
  "without_effect": [{"variable": "TEST_MODE", "reason": "…"}]
}
`+"```"+`

`+"`name` is the preferred variable. `source` is `flag`, `environment` or `default`; `origin` is the flag or variable that was used, or empty.\n"+
		"`value` is the effective value, as text. Fields may be added, none is renamed.\n"+`
## Exit codes

| code | meaning |
|---|---|
`)
	for _, e := range exitCodes {
		fmt.Fprintf(w, "| %d | %s |\n", e.code, cell(e.meaning))
	}
}

func (s setting) varsMarkdown() string {
	var out []string
	for _, v := range s.vars {
		text := code(v.name)
		if v.emptyCounts {
			text += "¹"
		}
		out = append(out, text)
	}
	return strings.Join(out, ", else ")
}

func (s setting) flagMarkdown() string {
	if s.flag == "" {
		return "–"
	}
	return code("--" + s.flag)
}

func (s setting) defaultMarkdown() string {
	if s.defaultNote != "" || s.def == "" {
		return cell(s.defaultNote)
	}
	return code(s.def)
}

// code formats names as code, separated by commas.
func code(words ...string) string {
	quoted := make([]string, len(words))
	for i, word := range words {
		quoted[i] = "`" + word + "`"
	}
	return strings.Join(quoted, ", ")
}

// cell escapes a text for a table cell.
func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

package main

import (
	"fmt"
	"io"
	"strings"
)

// writeConfigurationPage writes docs/configuration.md. A test compares it with
// the file in the repository.
func writeConfigurationPage(w io.Writer) {
	fmt.Fprint(w, `# Configuration

<!-- Made from cmd/mm-orchestrator/settings.go: go test ./cmd/mm-orchestrator -run TestConfigurationPage -update -->

`+"`mm-orchestrator`"+` is configured by environment variables, those of MoonMind's Python worker, and by flags. `+"`mm-orchestrator config`"+` shows
every value in effect and where it comes from, with passwords masked, and `+"`mm-orchestrator help settings NAME`"+` explains one in the terminal.

- A flag wins over the environment, the environment over the default. Flags have the names given below; passwords have none,
  because everybody on a machine can see command lines.
- Where several variables stand in a row, the first that is set wins. The one that MoonMind's Python really reads comes first, names that only its
  documents give come after it.
- The case of letters in a name does not matter; if a name is there in several spellings, the one given here wins.
- A variable that is set to the empty text counts as unset, except where a variable is marked ¹: there empty is a value.
- Times are written as 90s, 15m, 1h30m, or as a number of seconds. Yes and no are written as true and false.
- `+"`.env`"+` files are not read. Docker compose reads one for its own variables; list what the container needs under `+"`environment:`"+` or `+"`env_file:`"+`.
- A value that cannot be used ends the program with exit code 78 and a line that names the variable and the value.
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
¹ Empty is a value of this variable.

## Decisions

- **Celery results.** MoonMind's Python derives a result backend from `+"`POSTGRES_*`"+` when none is named. This program does not: without `+"`CELERY_RESULT_BACKEND`"+`
  or one of its other names no results are kept, because nothing in MoonMind reads them. MoonMind's own compose file names it, so that a swapped container keeps
  writing them. The tables of runs, steps and artifacts are always found by `+"`POSTGRES_*`"+` or `+"`MM_ORCHESTRATOR_DATABASE_URL`"+`.
- **Exchange.** The default is that of MoonMind's last Celery revision. The queue may be bound to the older exchange as well; such a binding stays as it is.
- **Queue name.** An empty `+"`ORCHESTRATOR_CELERY_QUEUE`"+` names a queue called "" in Python. Here it is an error.
- **Waiting at start.** A broker or database that cannot be reached is waited for, so that the order in which containers start does not matter, but not for ever, so that a
  supervisor notices. What waiting cannot mend is told at once.

## Variables without effect

These are variables of MoonMind that an environment may hold and that change nothing here. `+"`mm-orchestrator config`"+` lists those that are set.

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
		"`value` is what is in effect, as text. Fields may be added, none is renamed.\n"+`
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

// code sets names in code type, with commas between them.
func code(words ...string) string {
	quoted := make([]string, len(words))
	for i, word := range words {
		quoted[i] = "`" + word + "`"
	}
	return strings.Join(quoted, ", ")
}

// cell makes a text fit for a table's cell.
func cell(text string) string { return strings.ReplaceAll(text, "|", `\|`) }

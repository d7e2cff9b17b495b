package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/pflag"
)

var configCommand = &command{
	name:     "config",
	synonyms: []string{"env", "show-config", "details"},
	summary:  "show the effective configuration and where each value comes from",
	about: "Prints every setting with its source and with the value that a worker would use in this environment with these flags. " +
		"Passwords are shown as ***. If an address is invalid or ambiguous, only its scheme is shown. The command opens no connection.\n\n" +
		"The last lines name variables that are set but have no effect here: some of MoonMind's, and mistyped MM_ORCHESTRATOR_ names. If a value is invalid, it is reported on stderr and the exit code is 78.",
	examples: []example{
		{"mm-orchestrator config", "show what a worker in this environment would use"},
		{"docker compose run --rm orchestrator config --json | jq -r '.settings[] | select(.source != \"default\")'", "show only what is not a default"},
	},
	topics: topics,
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &configFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON: {\"settings\": [{\"name\", \"value\", \"source\", \"origin\"}], \"without_effect\": [{\"variable\", \"reason\"}]}. "+
			"source is flag, environment or default; origin is the flag or variable that was used.")
		return f.run
	},
}

type configFlags struct{ json bool }

func (f *configFlags) run(_ context.Context, p *program, in input) error {
	c, values, problem := resolve(p.env, in.settings)
	report := configReport{Settings: []configLine{}, WithoutEffect: []notice{}}
	for _, v := range values {
		line := configLine{Name: v.setting.name(), Topic: v.setting.topic, Source: v.source, Origin: v.origin}
		if problem == nil {
			line.Value = v.show(c)
		} else {
			// Effective values cannot be derived from an invalid configuration.
			line.Value = v.setting.redact(v.text)
		}
		line.Value = p.redactor().String(line.Value) // a secret in the wrong setting
		report.Settings = append(report.Settings, line)
	}
	report.WithoutEffect = append(report.WithoutEffect, unused(p.env)...)
	if problem == nil {
		report.WithoutEffect = append(report.WithoutEffect, c.ignoredOptions()...)
	}

	if f.json {
		enc := json.NewEncoder(p.stdout)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		if err := enc.Encode(report); err != nil {
			return err
		}
		return problem
	}
	if err := report.write(p.stdout); err != nil {
		return err
	}
	return problem
}

// configReport is the JSON output. Scripts rely on it: fields may be added, none
// is renamed.
type configReport struct {
	Settings      []configLine `json:"settings"`
	WithoutEffect []notice     `json:"without_effect"`
}

type configLine struct {
	// Name is the preferred variable of the setting.
	Name   string `json:"name"`
	Topic  topic  `json:"topic"`
	Value  string `json:"value"`
	Source source `json:"source"`
	// Origin is the flag or variable that was used, or "" for a default.
	Origin string `json:"origin"`
}

func (r configReport) write(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	var last topic
	for _, line := range r.Settings {
		if line.Topic != last {
			fmt.Fprintf(table, "%s\n", line.Topic)
			last = line.Topic
		}
		value, from := line.Value, string(line.Source)
		if value == "" {
			value = "-"
		}
		if line.Origin != "" {
			from += " " + line.Origin
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\n", line.Name, value, from)
	}
	if len(r.WithoutEffect) > 0 {
		fmt.Fprintf(table, "Set, but without effect here\n")
		for _, n := range r.WithoutEffect {
			fmt.Fprintf(table, "  %s\t%s\n", n.Variable, n.Reason)
		}
	}
	return table.Flush()
}

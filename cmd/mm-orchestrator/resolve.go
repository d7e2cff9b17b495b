package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// environment is the process's environment, as NAME=value strings.
type environment []string

// lookup finds a variable by its case-insensitive name, as MoonMind's settings
// do. The exact spelling wins over others. It returns the spelling that was found.
func (e environment) lookup(name string) (spelling, value string, found bool) {
	for _, entry := range e {
		n, v, ok := strings.Cut(entry, "=")
		switch {
		case !ok || !strings.EqualFold(n, name):
		case n == name:
			return n, v, true
		case !found || n < spelling:
			spelling, value, found = n, v, true
		}
	}
	return spelling, value, found
}

// with returns a copy with a variable set to value. If value is empty, it returns
// e unchanged.
func (e environment) with(name, value string) environment {
	if value == "" {
		return e
	}
	changed := slices.DeleteFunc(slices.Clone(e), func(entry string) bool {
		n, _, _ := strings.Cut(entry, "=")
		return n == name
	})
	return append(changed, name+"="+value)
}

// source is where a value comes from.
type source string

const (
	fromFlag        source = "flag"
	fromEnvironment source = "environment"
	fromDefault     source = "default"
)

// effective is a setting with its value and the value's source.
type effective struct {
	setting *setting
	source  source
	// origin is the flag or variable that was used, or "" for a default.
	origin string
	// text is the unparsed value, unredacted.
	text string
	// set is false for a setting that has neither a value nor a default.
	set bool
}

// configError is a configuration error: exit code 78.
type configError struct{ Text string }

func (e *configError) Error() string { return e.Text }

// settingFlags are the flags of the settings of some topics.
type settingFlags struct {
	topics []topic
	given  map[*setting]string
}

// addSettingFlags declares the flags of all settings of the topics.
func addSettingFlags(fs *pflag.FlagSet, topics ...topic) *settingFlags {
	f := &settingFlags{topics: topics, given: map[*setting]string{}}
	for i := range settings {
		s := &settings[i]
		if s.flag == "" || !slices.Contains(topics, s.topic) {
			continue
		}
		declared := fs.VarPF(&flagValue{set: s, into: f.given}, s.flag, "", s.help)
		if s.boolean {
			declared.NoOptDefVal = "true"
		}
	}
	return f
}

// flagValue stores the text of a flag. resolve parses it, so that flags and
// variables give the same errors.
type flagValue struct {
	set  *setting
	into map[*setting]string
}

func (v *flagValue) Set(text string) error { v.into[v.set] = text; return nil }
func (v *flagValue) String() string        { return "" }
func (v *flagValue) Type() string          { return v.set.form }

// resolve reads the settings of the flags' topics: a flag overrides the
// environment, the environment overrides the default. The error names all
// problems, one per line.
func resolve(env environment, flags *settingFlags) (*configuration, []effective, error) {
	var (
		c        = &configuration{}
		values   []effective
		problems []error
	)
	for i := range settings {
		s := &settings[i]
		if !slices.Contains(flags.topics, s.topic) {
			continue
		}
		value := find(s, env, flags.given)
		values = append(values, value)
		if !value.set {
			continue
		}
		if err := s.read(c, value.text); err != nil {
			problem := value.problem(err)
			// Two settings may share a variable.
			if !slices.ContainsFunc(problems, func(known error) bool { return known.Error() == problem.Error() }) {
				problems = append(problems, problem)
			}
		}
	}
	c.values = values
	problems = append(problems, ineffectiveFlags(values)...)
	if len(problems) == 0 {
		if err := c.check(); err != nil {
			problems = append(problems, err)
		}
	}
	return c, values, errors.Join(problems...)
}

// ineffectiveFlags reports --postgres-… flags beside a database URL in the
// environment: the URL is the whole address, and ignoring a flag silently would
// mislead.
func ineffectiveFlags(values []effective) []error {
	var databaseURL effective
	for _, v := range values {
		if v.setting.flag == "database-url" {
			databaseURL = v
		}
	}
	var problems []error
	for _, v := range values {
		if strings.HasPrefix(v.setting.flag, "postgres-") && v.source == fromFlag && databaseURL.source == fromEnvironment {
			problems = append(problems, &configError{Text: fmt.Sprintf("%s has no effect while %s is set, which is the whole address: use --database-url instead", v.origin, databaseURL.origin)})
		}
	}
	return problems
}

// flagSecrets returns secrets that were given by flags, as NAME=value strings like
// those of the environment, for the redactor.
func flagSecrets(values []effective) []string {
	var found []string
	for _, v := range values {
		if v.source == fromFlag && (v.setting.secret || v.setting.mask != nil) {
			found = append(found, v.setting.name()+"="+v.text)
		}
	}
	return found
}

// find finds the value of one setting.
func find(s *setting, env environment, given map[*setting]string) effective {
	if text, ok := given[s]; ok {
		return effective{setting: s, source: fromFlag, origin: "--" + s.flag, text: text, set: true}
	}
	for _, v := range s.vars {
		if spelling, text, ok := env.lookup(v.name); ok && (text != "" || v.emptyCounts) {
			return effective{setting: s, source: fromEnvironment, origin: spelling, text: text, set: true}
		}
	}
	return effective{setting: s, source: fromDefault, text: s.def, set: s.def != ""}
}

// problem adds the setting's name and its redacted value to an error.
func (e effective) problem(err error) error {
	name := e.origin
	if e.source == fromDefault {
		name = e.setting.name()
	}
	return &configError{Text: fmt.Sprintf("%s is %q: %v", name, e.setting.redact(e.text), err)}
}

// show returns the effective value, redacted.
func (e effective) show(c *configuration) string {
	if e.setting.show != nil {
		return e.setting.show(c)
	}
	return e.setting.redact(e.text)
}

// unused lists MoonMind's variables that are set and have no effect here.
func unused(env environment) []notice {
	var found []notice
	for _, entry := range withoutEffects {
		for _, name := range entry.vars {
			if spelling, _, ok := env.lookup(name); ok {
				found = append(found, notice{Variable: spelling, Reason: entry.why})
			}
		}
	}
	return append(found, unknown(env)...)
}

// ownPrefix begins the names of this program's own variables.
const ownPrefix = "MM_ORCHESTRATOR_"

// unknown lists variables with this program's prefix that no setting has: their
// names are mistyped, or belong to another version.
func unknown(env environment) []notice {
	var known []string
	for _, s := range settings {
		for _, v := range s.vars {
			known = append(known, v.name)
		}
	}
	var found []notice
	for _, entry := range env {
		name, _, _ := strings.Cut(entry, "=")
		upper := strings.ToUpper(name)
		if !strings.HasPrefix(upper, ownPrefix) || upper == processes.Variable || slices.Contains(known, upper) {
			continue
		}
		reason := "there is no such setting"
		if meant := nearest(name, known); meant != "" {
			reason += "; did you mean " + meant + "?"
		}
		found = append(found, notice{Variable: name, Reason: reason})
	}
	return found
}

// notice is a variable without effect, and the reason.
type notice struct {
	Variable string `json:"variable"`
	Reason   string `json:"reason"`
}

package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"
)

// environment is what the process was started with, as NAME=value strings.
type environment []string

// lookup finds a variable by name. Case does not matter, as for MoonMind's
// settings; the exact spelling wins over others. It returns the spelling that
// was found.
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

// with returns a copy in which a variable has this value; an empty value
// changes nothing.
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

// source says where a value comes from.
type source string

const (
	fromFlag        source = "flag"
	fromEnvironment source = "environment"
	fromDefault     source = "default"
)

// effective is a setting with its value and where that comes from.
type effective struct {
	setting *setting
	source  source
	// origin is the flag or variable as it was given, or "".
	origin string
	// text is what was read, unredacted; it is empty for a setting without
	// value and default.
	text string
	set  bool
}

// configError is a mistake in the configuration: exit code 78.
type configError struct{ Text string }

func (e *configError) Error() string { return e.Text }

// settingFlags are the flags of the settings of some topics.
type settingFlags struct {
	topics []topic
	given  map[*setting]string
}

// addSettingFlags defines the flags of all settings of the topics.
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

// flagValue keeps the text of a flag; resolve reads it, so that flags and
// variables are judged by the same words.
type flagValue struct {
	set  *setting
	into map[*setting]string
}

func (v *flagValue) Set(text string) error { v.into[v.set] = text; return nil }
func (v *flagValue) String() string        { return "" }
func (v *flagValue) Type() string          { return v.set.form }

// resolve reads the settings of the flags' topics: a flag wins over the
// environment, the environment over the default. The error names everything
// that is wrong, one line each.
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
			problems = append(problems, value.problem(err))
		}
	}
	c.values = values
	problems = append(problems, flagsInVain(values)...)
	if len(problems) == 0 {
		if err := c.check(); err != nil {
			problems = append(problems, err)
		}
	}
	return c, values, errors.Join(problems...)
}

// flagsInVain tells of --postgres-… flags beside a database URL in the
// environment: the URL is the whole address, and a flag must not be ignored.
func flagsInVain(values []effective) []error {
	var whole effective
	for _, v := range values {
		if v.setting.flag == "database-url" {
			whole = v
		}
	}
	var problems []error
	for _, v := range values {
		if strings.HasPrefix(v.setting.flag, "postgres-") && v.source == fromFlag && whole.source == fromEnvironment {
			problems = append(problems, &configError{Text: fmt.Sprintf("%s has no effect while %s is set, which is the whole address: use --database-url instead", v.origin, whole.origin)})
		}
	}
	return problems
}

// flagSecrets are passwords that were given by flags, in the form of
// variables, for a redactor that knows those of the environment.
func flagSecrets(values []effective) []string {
	var found []string
	for _, v := range values {
		if v.source == fromFlag && (v.setting.secret || v.setting.mask != nil) {
			found = append(found, v.setting.name()+"="+v.text)
		}
	}
	return found
}

// find looks for the value of one setting.
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

// problem names the setting and its value. A secret is not shown, and neither
// is a password in a URL.
func (e effective) problem(err error) error {
	name := e.origin
	if e.source == fromDefault {
		name = e.setting.name()
	}
	return &configError{Text: fmt.Sprintf("%s is %q: %v", name, e.setting.redact(e.text), err)}
}

// show is the effective value as it may be seen by everybody.
func (e effective) show(c *configuration) string {
	if e.setting.show != nil {
		return e.setting.show(c)
	}
	return e.setting.redact(e.text)
}

// unused lists variables of MoonMind that are set and have no effect here.
func unused(env environment) []notice {
	var found []notice
	for _, entry := range withoutEffects {
		for _, name := range entry.vars {
			if spelling, _, ok := env.lookup(name); ok {
				found = append(found, notice{Variable: spelling, Reason: entry.why})
			}
		}
	}
	return found
}

// notice says why a variable has no effect.
type notice struct {
	Variable string `json:"variable"`
	Reason   string `json:"reason"`
}

package policy

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// Settings are values for all services. The operator's file wins for the services
// for which it says the same.
type Settings struct {
	// Programs are those that plans may start besides the service's.
	Programs []string
	// HealthURLs and AppChecks are by compose service, RunningIsEnough has compose
	// services.
	HealthURLs      map[string]string
	AppChecks       map[string][]string
	RunningIsEnough []string
	QuietPeriod     time.Duration
	StepTimeLimit   time.Duration
	// Name returns the flag or variable with which a setting was set, for origins;
	// nil means the variable itself. Default says that a setting has its default
	// value, which is no conflict with the file; nil means that none has.
	Name    func(variable string) string
	Default func(variable string) bool
}

// The variables of Settings.
const (
	VariableFile            = "MM_ORCHESTRATOR_PROFILES"
	VariablePrograms        = "MM_ORCHESTRATOR_ALLOWED_PROGRAMS"
	VariableHealthURL       = "MM_ORCHESTRATOR_HEALTH_URL"
	VariableAppCheck        = "MM_ORCHESTRATOR_APP_CHECK"
	VariableRunningIsEnough = "MM_ORCHESTRATOR_RUNNING_IS_ENOUGH"
	VariableQuietPeriod     = "MM_ORCHESTRATOR_QUIET_PERIOD"
	VariableStepTimeLimit   = "MM_ORCHESTRATOR_STEP_TIME_LIMIT"
)

// A Conflict is a setting that does not count for a service, because the file says
// something else.
type Conflict struct {
	Service, Field string
	Origin         Origin
	// Setting is the flag or variable.
	Setting string
}

func (c Conflict) String() string {
	return fmt.Sprintf("%s does not count for service %s: the file has %s (%s)", c.Setting, c.Service, c.Field, c.Origin)
}

// With returns a copy in which services have the values of the settings, where the
// file does not say otherwise.
func (p *Policy) With(settings Settings) *Policy {
	result := *p
	result.settings = settings
	result.Services = make(map[string]*Service, len(p.Services))
	for name, s := range p.Services {
		c := s.clone()
		for _, v := range settings.forService(&c) {
			if !v.isSet || c.Origins[v.field].IsFile() {
				continue
			}
			v.apply()
			c.Origins[v.field] = Origin{Setting: settings.name(v.variable)}
		}
		result.Services[name] = &c
	}
	return &result
}

// Conflicts are the settings that do not count for services. A setting with its
// default value is none.
func (p *Policy) Conflicts(settings Settings) []Conflict {
	var found []Conflict
	for _, name := range slices.Sorted(maps.Keys(p.Services)) {
		c := p.Services[name].clone()
		for _, v := range settings.forService(&c) {
			isDefault := settings.Default != nil && settings.Default(v.variable)
			if v.isSet && !isDefault && c.Origins[v.field].IsFile() && v.differs {
				found = append(found, Conflict{name, v.field, c.Origins[v.field], settings.name(v.variable)})
			}
		}
	}
	return found
}

func (s Settings) name(variable string) string {
	if s.Name == nil {
		return variable
	}
	return s.Name(variable)
}

// A settingValue is what a setting says about a service.
type settingValue struct {
	field, variable string
	// isSet says that the setting says something about this service, differs that it
	// is not what the service has already.
	isSet, differs bool
	apply          func()
}

func (s Settings) forService(to *Service) []settingValue {
	url, check := s.HealthURLs[to.ComposeService], s.AppChecks[to.ComposeService]
	enough := slices.Contains(s.RunningIsEnough, to.ComposeService)
	every := to.Limits.Step[""]
	lacks := slices.ContainsFunc(s.Programs, func(name string) bool { return !slices.Contains(to.Programs, Program{name}) })
	return []settingValue{
		{"programs", VariablePrograms, len(s.Programs) > 0, lacks, func() {
			for _, name := range s.Programs {
				to.Programs = merged(to.Programs, []Program{{name}}, true)
			}
		}},
		{"verify.quietPeriod", VariableQuietPeriod, s.QuietPeriod != 0, s.QuietPeriod != to.Verify.QuietPeriod, func() { to.Verify.QuietPeriod = s.QuietPeriod }},
		{"verify.runningIsEnough", VariableRunningIsEnough, true, enough != to.Verify.RunningIsEnough, func() { to.Verify.RunningIsEnough = enough }},
		{"verify.healthURL", VariableHealthURL, url != "", url != to.Verify.HealthURL, func() { to.Verify.HealthURL = url }},
		{"verify.appCheck", VariableAppCheck, len(check) > 0, !slices.Equal(check, to.Verify.AppCheck), func() { to.Verify.AppCheck = check }},
		{"limits.everyStep.time", VariableStepTimeLimit, s.StepTimeLimit != 0, s.StepTimeLimit != every.Time, func() {
			every.Time = s.StepTimeLimit
			if to.Limits.Step == nil {
				to.Limits.Step = map[string]StepLimits{}
			}
			to.Limits.Step[""] = every
		}},
	}
}

package policy

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// DefaultProject is the compose project of services whose entry names none.
const DefaultProject = "moonmind"

// A Policy says what runs may do. It does not change once it is made, and is for use
// by several goroutines.
type Policy struct {
	// File is the operator's file as it was named, "" if there is only the built-in one.
	File string
	// Services are by the target service of runs, in lower case.
	Services map[string]*Service
	// Redaction says what is masked besides the values that are always masked.
	Redaction Redaction

	// settings are those of With.
	settings Settings
}

// A Service is what runs for one target service may do. One that Find returned has
// the overrides that were valid then.
type Service struct {
	// Name is the key in the file, in lower case.
	Name string
	// Disabled says that the file refuses runs for this service.
	Disabled bool
	// ComposeService and ComposeProject are for plans without a command of their own.
	ComposeService, ComposeProject string
	// AllowList has globs of the files that a patch may change
	// (docs/moonmind.md#allow-list).
	AllowList []string
	// Programs are those that plans may start, besides MoonMind's skill executor.
	Programs []Program
	Limits   Limits
	Verify   Verify
	// ApprovalWait is how long a run may hold the workspace while it waits for an
	// approval before verify. Zero means the setting for all services.
	ApprovalWait time.Duration
	// Overrides are in the order of the file. Those of a service that Find returned
	// are valid.
	Overrides []Override
	// Origins say where values come from, by their field, such as
	// "verify.quietPeriod". A field without an entry is not set. Values of the
	// lists that an override has added are in the override.
	Origins map[string]Origin

	// listed and ownPrograms are AllowList and Programs without overrides, nil before
	// Find.
	listed      []string
	ownPrograms []Program
}

// A Program is one that plans may start.
type Program struct {
	// Name is a name, to be found on the PATH, or an absolute path.
	Name string
}

// Limits end what takes too much.
type Limits struct {
	// Step has limits by the name of the step; those of "" are for every step that
	// does not have its own. Use For.
	Step map[string]StepLimits
	Run  RunLimits
}

// StepLimits are for one step. Zero means no limit.
type StepLimits struct {
	// Time is how long the step may take, Idle how long without any output.
	Time, Idle time.Duration
	// Output and Disk are in bytes.
	Output, Disk int64
}

// RunLimits are for all steps of a run together. Zero means no limit.
type RunLimits struct {
	Time time.Duration
	// Output and Disk are in bytes.
	Output, Disk int64
}

// none is a step's limit that the file has as "none", to lift that of every step.
const none = -1

// For returns the limits of a step.
func (l Limits) For(step string) StepLimits {
	own, every := l.Step[step], l.Step[""]
	return StepLimits{
		Time: max(0, cmp.Or(own.Time, every.Time)), Idle: max(0, cmp.Or(own.Idle, every.Idle)),
		Output: max(0, cmp.Or(own.Output, every.Output)), Disk: max(0, cmp.Or(own.Disk, every.Disk)),
	}
}

// Verify is what the step verify asks for.
type Verify struct {
	// QuietPeriod is how long the service has to stay well. Zero means that it is
	// not set.
	QuietPeriod time.Duration
	// RunningIsEnough says that the service needs no health check.
	RunningIsEnough bool
	// HealthURL replaces the URL of plans, "" for not.
	HealthURL string
	// AppCheck is a command that checks the service, nil for none.
	AppCheck []string
}

// Redaction says what is masked in everything that is written.
type Redaction struct {
	// CommonWords is GuardCommonWords or MaskCommonWords: what happens to a secret
	// that is a common word. "" leaves it to the setting for all workers.
	CommonWords string
	// Words are the common words, nil for those of package artifacts.
	Words []string
	// Add are names of variables whose values are secrets too.
	Add []string
	// Origins are as in Service.
	Origins map[string]Origin
}

// Values of Redaction.CommonWords.
const (
	// GuardCommonWords masks a common word only as a value after its name.
	GuardCommonWords = "guard"
	// MaskCommonWords masks it everywhere.
	MaskCommonWords = "mask"
)

// An Override is an entry that departs from what the service otherwise has, with the
// reason for it.
type Override struct {
	// Reason is why, in the operator's words. It is never empty.
	Reason string
	// Until is the end of its validity; zero means no end.
	Until time.Time
	// Origin is where it begins in the file.
	Origin Origin
	// Command, Options and Directories permit a command line that the rules of package
	// policy/programs refuse. They have the meaning of its type Permission.
	Command     string
	Options     []string
	Directories []string

	// values has what it adds or replaces, by its Origins.
	values Service
}

// AllowList are the globs that the override adds.
func (o Override) AllowList() []string { return o.values.AllowList }

// Programs are the programs that the override adds.
func (o Override) Programs() []Program { return o.values.Programs }

// Valid says whether the override counts at a moment.
func (o Override) Valid(now time.Time) bool { return o.Until.IsZero() || now.Before(o.Until) }

// Fields are the fields that it sets, sorted.
func (o Override) Fields() []string {
	fields := slices.Collect(maps.Keys(o.values.Origins))
	if o.Command != "" {
		fields = append(fields, "command")
	}
	slices.Sort(fields)
	return fields
}

// String says which override it is and why it is there, for logs.
func (o Override) String() string { return fmt.Sprintf("%s (%s)", o.Reason, o.Origin) }

// An Origin is where a value comes from. The zero Origin is the built-in policy.
type Origin struct {
	// File and Line are of the operator's file.
	File string
	Line int
	// Setting is the flag or variable of a value that is for all services.
	Setting string
}

// IsFile says that the value comes from the operator's file.
func (o Origin) IsFile() bool { return o.File != "" }

func (o Origin) String() string {
	switch {
	case o.File != "":
		return fmt.Sprintf("%s:%d", o.File, o.Line)
	case o.Setting != "":
		return o.Setting
	}
	return "built-in"
}

// Find returns the service that runs call target, with the overrides that are valid
// at now. Case and blanks around the name do not count, as in MoonMind.
func (p *Policy) Find(target string, now time.Time) (Service, bool) {
	s, found := p.Services[strings.ToLower(strings.TrimSpace(target))]
	if !found {
		return Service{}, false
	}
	return s.at(now), true
}

// Names are the names of the services for which runs are not refused, sorted.
func (p *Policy) Names() []string {
	var names []string
	for name, s := range p.Services {
		if !s.Disabled {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Projects are the compose projects of these services, sorted.
func (p *Policy) Projects() []string {
	var projects []string
	for _, name := range p.Names() {
		projects = append(projects, p.Services[name].ComposeProject)
	}
	slices.Sort(projects)
	return slices.Compact(projects)
}

// RunningIsEnough says that a compose service needs no health check. It may be one
// that a run restarts beside its target.
func (p *Policy) RunningIsEnough(composeService string, now time.Time) bool {
	for _, name := range slices.Sorted(maps.Keys(p.Services)) {
		if p.Services[name].ComposeService == composeService {
			return p.Services[name].at(now).Verify.RunningIsEnough
		}
	}
	return slices.Contains(p.settings.RunningIsEnough, composeService)
}

// Bounds says that the operator's file has an allow-list for the service. A patch may
// then change a file only if both that list and the plan's match it.
func (s Service) Bounds() bool { return s.Origins["allowList"].IsFile() }

// Listed is the allow-list without what overrides add.
func (s Service) Listed() []string {
	if s.listed != nil {
		return s.listed
	}
	return s.AllowList
}

// OverrideOfProgram returns the override without which plans could not start a
// program.
func (s Service) OverrideOfProgram(name string) (Override, bool) {
	if slices.Contains(s.ownPrograms, Program{name}) {
		return Override{}, false
	}
	for _, o := range s.Overrides {
		if slices.Contains(o.Programs(), Program{name}) {
			return o, true
		}
	}
	return Override{}, false
}

// ProgramNames are the names of its programs.
func (s Service) ProgramNames() []string {
	names := make([]string, len(s.Programs))
	for i, p := range s.Programs {
		names[i] = p.Name
	}
	return names
}

// at returns a copy with what the overrides valid at now change.
func (s *Service) at(now time.Time) Service {
	result := s.clone()
	result.Overrides, result.listed, result.ownPrograms = nil, s.AllowList, s.Programs
	for _, o := range s.Overrides {
		if !o.Valid(now) {
			continue
		}
		result.Overrides = append(result.Overrides, o)
		bounded := result.Origins["allowList"]
		programs := result.Origins["programs"]
		result.take(&o.values, true)
		result.Origins["allowList"], result.Origins["programs"] = bounded, programs
	}
	return result
}

func (s *Service) clone() Service {
	c := *s
	c.AllowList, c.Programs, c.Overrides = slices.Clone(s.AllowList), slices.Clone(s.Programs), slices.Clone(s.Overrides)
	c.Verify.AppCheck = slices.Clone(s.Verify.AppCheck)
	c.Limits.Step, c.Origins = maps.Clone(s.Limits.Step), maps.Clone(s.Origins)
	if c.Origins == nil {
		c.Origins = map[string]Origin{}
	}
	return c
}

// take takes the values over that from has by its Origins, with these. Lists replace
// those of s, or are added to them.
func (s *Service) take(from *Service, addLists bool) {
	for key, origin := range from.Origins {
		s.Origins[key] = origin
		switch key {
		case "enabled":
			s.Disabled = from.Disabled
		case "compose.service":
			s.ComposeService = from.ComposeService
		case "compose.project":
			s.ComposeProject = from.ComposeProject
		case "allowList":
			s.AllowList = merged(s.AllowList, from.AllowList, addLists)
		case "programs":
			s.Programs = merged(s.Programs, from.Programs, addLists)
		case "verify.quietPeriod":
			s.Verify.QuietPeriod = from.Verify.QuietPeriod
		case "verify.runningIsEnough":
			s.Verify.RunningIsEnough = from.Verify.RunningIsEnough
		case "verify.healthURL":
			s.Verify.HealthURL = from.Verify.HealthURL
		case "verify.appCheck":
			s.Verify.AppCheck = from.Verify.AppCheck
		case "approval.wait":
			s.ApprovalWait = from.ApprovalWait
		default:
			s.takeLimit(from, key)
		}
	}
}

// takeLimit is take for a field limits.STEP.NAME.
func (s *Service) takeLimit(from *Service, key string) {
	parts := strings.Split(key, ".")
	if parts[1] == "run" {
		switch parts[2] {
		case "time":
			s.Limits.Run.Time = from.Limits.Run.Time
		case "output":
			s.Limits.Run.Output = from.Limits.Run.Output
		case "disk":
			s.Limits.Run.Disk = from.Limits.Run.Disk
		}
		return
	}
	step := parts[1]
	if step == everyStep {
		step = ""
	}
	if s.Limits.Step == nil {
		s.Limits.Step = map[string]StepLimits{}
	}
	limits, given := s.Limits.Step[step], from.Limits.Step[step]
	switch parts[2] {
	case "time":
		limits.Time = given.Time
	case "idle":
		limits.Idle = given.Idle
	case "output":
		limits.Output = given.Output
	case "disk":
		limits.Disk = given.Disk
	}
	s.Limits.Step[step] = limits
}

func merged[T comparable](have, given []T, add bool) []T {
	if !add {
		return slices.Clone(given)
	}
	for _, value := range given {
		if !slices.Contains(have, value) {
			have = append(have, value)
		}
	}
	return have
}

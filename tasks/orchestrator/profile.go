package orchestrator

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// findProfile looks up the target service of a run in the policy. The API copies the
// values of MoonMind's profiles into plans (docs/moonmind.md#service-profiles); for a
// plan that lacks one, the value of the policy is used.
func (o *Orchestrator) findProfile(target string) (policy.Service, *Failure) {
	found, known := o.policy.Find(target, o.config.Now())
	switch {
	case !known:
		return policy.Service{}, keyError("Service '" + target + "' is not managed by the orchestrator")
	case found.Disabled:
		return policy.Service{}, keyError("Service '" + target + "' is not managed by the orchestrator: the policy has enabled: false (" + found.Origins["enabled"].String() + ")")
	}
	return found, nil
}

// permissions are what the operator permits beyond the rules for command lines,
// without the override of this index; -1 leaves none out.
func (s *stepRun) permissions(without int) []programs.Permission {
	permitted := slices.Clone(s.config.Permissions)
	for i, o := range s.profile.Overrides {
		if i != without && o.Command != "" {
			permitted = append(permitted, programs.Permission{Command: o.Command, Options: o.Options, Directories: o.Directories})
		}
	}
	return permitted
}

// logPermissions says in the step's log which overrides permit a command line that the
// rules would refuse.
func (s *stepRun) logPermissions(workspace string, command []string, to io.Writer) {
	line := s.runner.target
	line.Argv, line.Dir = command, workspace
	for i, o := range s.profile.Overrides {
		if o.Command == "" {
			continue
		}
		line.Permit = s.permissions(i)
		if refusal := programs.Judge(line); refusal != nil {
			s.log.Warn("override of the policy used", "rule", refusal.Rule, "reason", o.Reason, "at", o.Origin.String())
			fmt.Fprintf(to, "[The command may run against the rule %s by an override of the policy, %s]\n", refusal.Rule, o)
		}
	}
}

// noteOverrides adds a line to the step's log for each override that alters limits of
// this step, or what verify asks for. Files and programs are noted when they are used.
func (s *stepRun) noteOverrides() {
	for _, o := range s.profile.Overrides {
		var altered []string
		for _, v := range o.Values() {
			first, rest, _ := strings.Cut(v.Field, ".")
			step, _, _ := strings.Cut(rest, ".")
			if first == "limits" && (step == string(s.step) || step == "everyStep" || step == "run") ||
				first == "verify" && s.step == store.StepVerify && v.Field != "verify.healthURL" {
				altered = append(altered, v.Field+": "+v.Text)
			}
			if v.Field == "verify.healthURL" && s.step == store.StepVerify {
				altered = append(altered, v.Field)
			}
		}
		if len(altered) > 0 {
			s.notes = append(s.notes, "["+s.clean("Altered by an override of the policy, "+o.String()+": "+strings.Join(altered, ", "))+"]")
			s.log.Warn("override of the policy used", "fields", altered, "reason", o.Reason, "at", o.Origin.String())
		}
	}
}

// effectivePolicy is the policy of a configuration with the settings for all services.
func (c Config) effectivePolicy() *policy.Policy { return c.Policy.With(c.policySettings()) }

// policySettings are the settings that count where the policy's file says nothing.
func (c Config) policySettings() policy.Settings {
	return policy.Settings{
		Programs: c.Programs, HealthURLs: c.HealthURLs, AppChecks: c.AppChecks, RunningIsEnough: c.RunningIsEnough,
		QuietPeriod: c.QuietPeriod, StepTimeLimit: c.StepTimeLimit, Name: c.SettingName,
	}
}

// LogPolicy logs each override that is valid, and when it ends: who reads the log
// should see what departs from the rule, and why.
func (o *Orchestrator) LogPolicy() {
	now := o.config.Now()
	for _, name := range o.policy.Names() {
		service, _ := o.policy.Find(name, now)
		for _, override := range service.Overrides {
			attributes := []any{"service", name, "fields", override.Fields(), "reason", override.Reason, "at", override.Origin.String()}
			if !override.Until.IsZero() {
				attributes = append(attributes, "until", override.Until)
			}
			o.log.Warn("policy has an override", attributes...)
		}
	}
}

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

var policyCommand = &command{
	name:     "policy",
	synonyms: []string{"policies", "profile", "profiles", "rules"},
	summary:  "say what runs may do: check the policy file, or show what counts for a service",
	about: "The policy says which services runs may repair, and for each the files that a patch may change, the programs that plans may start, limits, and what verify asks for. " +
		"It is built in; a file that --profiles or MM_ORCHESTRATOR_PROFILES names changes it. docs/policy.md explains the fields.\n\n" +
		"`policy check` finds every mistake in a file before a worker reads it, `policy show` what counts for one service.",
	examples: []example{
		{"mm-orchestrator policy check /etc/mm-orchestrator/profiles.yaml", "is the file right?"},
		{"mm-orchestrator policy show api", "what may runs for the service api do, and who says so?"},
	},
	subcommands: []*command{checkPolicyCommand, showPolicyCommand},
	setup: func(*pflag.FlagSet) runFunc {
		return func(_ context.Context, _ *program, in input) error {
			return &usageError{"give policy check or policy show; " + seeHelp(in.parsed)}
		}
	},
}

var checkPolicyCommand = &command{
	name:     "check",
	synonyms: []string{"validate", "lint", "test"},
	args:     "[FILE]",
	words:    1,
	summary:  "check a policy file, and say what it means",
	about: "Reads FILE, or the file that --profiles or MM_ORCHESTRATOR_PROFILES names, or else the built-in policy, as a worker does at its start. It prints every mistake with file, line and column, what is wrong and how to correct it. " +
		"Of a file without mistakes it prints what it means: the services, the overrides with their reasons, settings that do not count because the file says something else, and what else is worth a look. " +
		"If a database is configured, it also says which approval gates there belong to no service of the policy, as after a service was renamed. Otherwise it opens no connection.\n\n" +
		"Exit code 0: a worker would start with it. 78: it would not.\n\n" +
		"With --json it prints {\"file\", \"ok\", \"errors\": [{\"line\", \"column\", \"field\", \"problem\", \"cure\"}], \"services\", \"notes\"}; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator policy check /etc/mm-orchestrator/profiles.yaml", "before the worker is restarted"},
		{"docker compose run --rm --no-deps orchestrator policy check", "the file that the worker's container would read"},
	},
	topics: []topic{topicFiles, topicSteps, topicDatabase},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &policyFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.check
	},
}

var showPolicyCommand = &command{
	name:     "show",
	synonyms: []string{"get", "describe", "explain"},
	args:     "[SERVICE]",
	words:    1,
	summary:  "show what counts for a service, and where each value comes from",
	about: "Prints what runs for SERVICE may do now: each value with its origin, which is built-in, a line of the policy file, or a flag or variable; then the overrides with their reasons. " +
		"Without SERVICE it prints this of all services. It opens no connection.\n\n" +
		"Exit code 0: shown. 1: there is no such service. 78: the policy file or a setting has a mistake.\n\n" +
		"With --json it prints {\"name\", \"enabled\", \"values\": [{\"field\", \"value\", \"origin\"}], \"overrides\": [{\"reason\", \"until\", \"valid\", \"origin\", \"fields\", \"values\"}]}, without SERVICE an array of these; fields may be added, none is renamed.",
	examples: []example{
		{"mm-orchestrator policy show api", "what may runs for the service api do?"},
		{"mm-orchestrator policy show --json | jq '.[] | select(.overrides != [])'", "which services have exceptions?"},
	},
	topics: []topic{topicFiles, topicSteps},
	setup: func(fs *pflag.FlagSet) runFunc {
		f := &policyFlags{}
		fs.BoolVar(&f.json, "json", false, "Print JSON.")
		return f.show
	},
}

type policyFlags struct{ json bool }

// policyReport is what `policy check --json` prints. Scripts rely on it: fields may
// be added, none is renamed.
type policyReport struct {
	// File is "" for the built-in policy.
	File     string          `json:"file"`
	OK       bool            `json:"ok"`
	Errors   []policyFault   `json:"errors"`
	Services []policyService `json:"services"`
	Notes    []string        `json:"notes"`
}

type policyFault struct {
	Line    int    `json:"line"`
	Column  int    `json:"column"`
	Field   string `json:"field"`
	Problem string `json:"problem"`
	Cure    string `json:"cure"`
}

// policyService is what `policy show --json` prints of a service.
type policyService struct {
	Name      string           `json:"name"`
	Enabled   bool             `json:"enabled"`
	Values    []policyValue    `json:"values"`
	Overrides []policyOverride `json:"overrides"`
}

type policyValue struct {
	Field  string `json:"field"`
	Value  string `json:"value"`
	Origin string `json:"origin"`
}

type policyOverride struct {
	Reason string     `json:"reason"`
	Until  *time.Time `json:"until,omitempty"`
	Valid  bool       `json:"valid"`
	Origin string     `json:"origin"`
	Fields []string   `json:"fields"`
	Values []string   `json:"values"`
}

func (f *policyFlags) check(ctx context.Context, p *program, in input) error {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	if len(in.words) == 1 {
		c.Profiles = in.words[0]
	}
	report := policyReport{File: c.Profiles, Errors: []policyFault{}, Services: []policyService{}, Notes: []string{}}
	loaded, err := policy.Default(), error(nil)
	if c.Profiles != "" {
		loaded, err = policy.Load(c.Profiles)
	}
	var faults policy.Errors
	if errors.As(err, &faults) {
		for _, e := range faults {
			report.Errors = append(report.Errors, policyFault{e.Line, e.Column, e.Field, p.shown(e.Problem), p.shown(e.Cure)})
			if !f.json {
				fmt.Fprintln(p.stdout, p.shown(e.Error()))
			}
		}
		if f.json {
			if err := (runPrinter{out: p.stdout, redactor: p.redactor()}).json(report); err != nil {
				return err
			}
		}
		return &configError{fmt.Sprintf("%s has %s: a worker would not start with it", c.Profiles, counted(len(faults), "mistake"))}
	}
	if err != nil {
		return err
	}
	c.Policy = loaded
	now := time.Now()
	effective := loaded.With(c.policySettings())
	for _, name := range slices.Sorted(maps.Keys(effective.Services)) {
		report.Services = append(report.Services, p.policyService(effective.Services[name], now))
	}
	report.OK, report.Notes = true, append(report.Notes, c.policyNotes(now)...)
	report.Notes = append(report.Notes, p.gateNotes(ctx, c, effective)...)
	if f.json {
		return runPrinter{out: p.stdout, redactor: p.redactor()}.json(report)
	}
	return p.printPolicy(effective, report, now)
}

// shown makes a text fit for the terminal: a file that an operator gives may be any.
func (p *program) shown(text string) string { return oneLine(p.redactor().String(text), 2000) }

func (p *program) printPolicy(effective *policy.Policy, report policyReport, now time.Time) error {
	fmt.Fprintf(p.stdout, "%s: no mistakes\n\n", cmp.Or(report.File, "built-in policy"))
	table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "SERVICE\tCOMPOSE\tFILES\tPROGRAMS\tSTEP LIMIT\tVERIFY\tOVERRIDES")
	for _, s := range report.Services {
		of, _ := effective.Find(s.Name, now)
		if of.Disabled {
			fmt.Fprintf(table, "%s\truns are refused\n", s.Name)
			continue
		}
		limits := map[string]bool{}
		for _, step := range []string{"analyze", "patch", "build", "restart", "verify", "rollback"} {
			limits[none(shortDuration(of.Limits.For(step).Time))] = true
		}
		verify := "health check"
		switch {
		case of.Verify.RunningIsEnough:
			verify = "running is enough"
		case of.Verify.HealthURL != "":
			verify = "health URL"
		}
		if len(of.Verify.AppCheck) > 0 {
			verify += ", check"
		}
		fmt.Fprintf(table, "%s\t%s/%s\t%s\t%s\t%s\t%s\t%d\n", s.Name, of.ComposeProject, of.ComposeService, counted(len(of.AllowList), "glob"),
			strings.Join(of.ProgramNames(), " "), strings.Join(slices.Sorted(maps.Keys(limits)), ", "), verify, len(of.Overrides))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, s := range report.Services {
		for _, o := range s.Overrides {
			fmt.Fprintf(p.stdout, "\noverride of %s (%s): %s\n  %s\n", s.Name, o.Origin, o.Reason, o.describe())
			for _, value := range o.Values {
				fmt.Fprintf(p.stdout, "  %s\n", value)
			}
		}
	}
	if len(report.Notes) > 0 {
		fmt.Fprintln(p.stdout)
	}
	for _, text := range report.Notes {
		fmt.Fprintln(p.stdout, "note: "+p.shown(text))
	}
	return nil
}

func none(limit string) string {
	if limit == "0s" {
		return "none"
	}
	return limit
}

// describe says how long an override counts.
func (o policyOverride) describe() string {
	switch {
	case o.Until == nil:
		return "it has no end"
	case !o.Valid:
		return "it ended at " + clock(o.Until)
	}
	return "it ends at " + clock(o.Until)
}

// policyNotes says what is worth a look in a policy without mistakes.
func (c *configuration) policyNotes(now time.Time) []string {
	var notes []string
	for _, conflict := range c.Policy.Conflicts(c.policySettings()) {
		notes = append(notes, conflict.String())
	}
	for _, name := range slices.Sorted(maps.Keys(c.Policy.Services)) {
		for _, o := range c.Policy.Services[name].Overrides {
			if !o.Valid(now) {
				notes = append(notes, fmt.Sprintf("the override %s of service %s has ended and does nothing: remove it", o, name))
			}
		}
		if service, _ := c.Policy.Find(name, now); c.alterable(service) {
			notes = append(notes, fmt.Sprintf("runs for service %s may change the policy file itself: put it outside of the workspace %s", name, c.Workspace))
		}
	}
	return notes
}

// gateWait bounds how long `policy check` waits for the database.
const gateWait = 5 * time.Second

// gateNotes says which approval gates belong to no service of the policy, if a database
// is configured. A policy is right without a database that answers.
func (p *program) gateNotes(ctx context.Context, c *configuration, effective *policy.Policy) []string {
	host, _ := c.effective("POSTGRES_HOST")
	if c.DatabaseURL.IsZero() && host.source == fromDefault {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, gateWait)
	defer cancel()
	db, err := openStore(ctx, store.Config{URL: c.Database().URL(), RetryFor: interactiveRetry, Redact: p.redactor().String}, c.tablesDatabase(), 0, p.reportWait)
	var gates []store.Gate
	if err == nil {
		defer db.Close()
		gates, err = db.ListGates(ctx)
	}
	if err != nil {
		return []string{fmt.Sprintf("the approval gates in the database were not checked: %v", err)}
	}
	return strayGates(effective, gates)
}

// strayGates says in words which gates belong to no service of a policy.
func strayGates(effective *policy.Policy, gates []store.Gate) []string {
	var composed, gated, notes []string
	for _, s := range effective.Services {
		composed = append(composed, s.ComposeService)
	}
	for _, g := range gates {
		gated = append(gated, g.Service)
	}
	for _, g := range gates {
		if slices.Contains(composed, g.Service) {
			continue
		}
		note := fmt.Sprintf("no run needs the approval (%s) of the gate for %q in approval_gates: no service of the policy has that compose service", g.Requirement, g.Service)
		switch s, renamed := effective.Services[strings.ToLower(g.Service)]; {
		case renamed && !slices.Contains(gated, s.ComposeService):
			note += fmt.Sprintf(". That of service %s is %s: set the gate's service_name to %[2]s, or runs for %[1]s go without an approval", s.Name, s.ComposeService)
		case renamed:
			note += fmt.Sprintf(". That of service %s is %s, which has a gate of its own: remove this one", s.Name, s.ComposeService)
		default:
			note += ". Correct its service_name"
			if meant := nearest(g.Service, composed); meant != "" {
				note += ": did you mean " + meant + "?"
			}
		}
		notes = append(notes, note)
	}
	return notes
}

// alterable says that a patch of a service may change the policy file.
func (c *configuration) alterable(s policy.Service) bool {
	path, err := filepath.Abs(c.Profiles)
	if c.Profiles == "" || err != nil {
		return false
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	workspace := c.Workspace
	if real, err := filepath.EvalSymlinks(workspace); err == nil {
		workspace = real
	}
	relative, err := filepath.Rel(workspace, path)
	return err == nil && filepath.IsLocal(relative) && change.NewAllowList(s.AllowList).Matches(relative)
}

func (f *policyFlags) show(_ context.Context, p *program, in input) error {
	c, _, err := resolve(p.env, in.settings)
	if err != nil {
		return err
	}
	if err := c.loadPolicy(); err != nil {
		return err
	}
	now := time.Now()
	effective := c.Policy.With(c.policySettings())
	names := slices.Sorted(maps.Keys(effective.Services))
	if len(in.words) == 1 {
		wanted := strings.ToLower(strings.TrimSpace(in.words[0]))
		if _, known := effective.Services[wanted]; !known {
			hint := "there are " + strings.Join(names, ", ")
			if meant := nearest(wanted, names); meant != "" {
				hint = "did you mean " + meant + "?"
			}
			return fmt.Errorf("the policy has no service %q; %s", maskedWord(in.words[0]), hint)
		}
		names = []string{wanted}
	}
	list := []policyService{}
	for _, name := range names {
		list = append(list, p.policyService(effective.Services[name], now))
	}
	if f.json {
		if len(in.words) == 1 {
			return runPrinter{out: p.stdout, redactor: p.redactor()}.json(list[0])
		}
		return runPrinter{out: p.stdout, redactor: p.redactor()}.json(list)
	}
	for i, s := range list {
		if i > 0 {
			fmt.Fprintln(p.stdout)
		}
		if err := p.printPolicyService(s); err != nil {
			return err
		}
	}
	return nil
}

func (p *program) printPolicyService(s policyService) error {
	state := ""
	if !s.Enabled {
		state = ": runs are refused"
	}
	fmt.Fprintf(p.stdout, "service %s%s\n", s.Name, state)
	table := tabwriter.NewWriter(p.stdout, 0, 0, 2, ' ', 0)
	for _, v := range s.Values {
		fmt.Fprintf(table, "  %s\t%s\t%s\n", v.Field, dash(v.Value), v.Origin)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, o := range s.Overrides {
		fmt.Fprintf(p.stdout, "  override (%s): %s\n    %s\n", o.Origin, o.Reason, o.describe())
		for _, value := range o.Values {
			fmt.Fprintf(p.stdout, "    %s\n", value)
		}
	}
	return nil
}

// policyService describes a service as it is now. Overrides that have ended are
// listed too.
func (p *program) policyService(s *policy.Service, now time.Time) policyService {
	of, _ := (&policy.Policy{Services: map[string]*policy.Service{s.Name: s}}).Find(s.Name, now)
	line := policyService{Name: s.Name, Enabled: !of.Disabled, Values: []policyValue{}, Overrides: []policyOverride{}}
	add := func(field, value string) {
		// A list has one line for each value: globs have no common form.
		line.Values = append(line.Values, policyValue{field, p.shown(value), of.Origins[field].String()})
	}
	add("compose.service", of.ComposeService)
	add("compose.project", of.ComposeProject)
	for _, glob := range of.AllowList {
		origin := of.Origins["allowList"].String()
		for _, o := range of.Overrides {
			if !slices.Contains(of.Listed(), glob) && slices.Contains(o.AllowList(), glob) {
				origin = o.Origin.String()
			}
		}
		line.Values = append(line.Values, policyValue{"allowList", p.shown(glob), origin})
	}
	for _, program := range of.ProgramNames() {
		origin := of.Origins["programs"].String()
		if !of.Origins["programs"].IsFile() && slices.Contains([]string{"docker", "docker-compose", "git"}, program) {
			origin = policy.Origin{}.String()
		}
		if o, found := of.OverrideOfProgram(program); found {
			origin = o.Origin.String()
		}
		line.Values = append(line.Values, policyValue{"programs", p.shown(program), origin})
	}
	for _, value := range policy.Values(of) {
		add(value.Field, maskedURL(value))
	}
	for _, o := range s.Overrides {
		shown := policyOverride{Reason: p.shown(o.Reason), Valid: o.Valid(now), Origin: o.Origin.String(), Fields: o.Fields(), Values: []string{}}
		if !o.Until.IsZero() {
			until := o.Until
			shown.Until = &until
		}
		for _, value := range o.Values() {
			shown.Values = append(shown.Values, p.shown(value.Field+": "+maskedURL(value)))
		}
		line.Overrides = append(line.Overrides, shown)
	}
	return line
}

// maskedURL is a value without the password of a URL.
func maskedURL(v policy.Value) string {
	if v.Field == "verify.healthURL" {
		return address.MaskURL(v.Text)
	}
	return v.Text
}

// policy checks the policy file.
func (d *doctor) policy(context.Context) []verdict {
	var faults policy.Errors
	if err := d.policyErr; err != nil {
		if _, loadErr := policy.Load(d.config.Profiles); errors.As(loadErr, &faults) {
			var list []verdict
			for _, e := range faults {
				list = append(list, fail(e.Cure, "%s", (&policy.Error{File: e.File, Line: e.Line, Column: e.Column, Field: e.Field, Problem: e.Problem}).Error())...)
			}
			return list
		}
		return failed(err)
	}
	now := time.Now()
	overrides := 0
	for _, name := range d.config.Policy.Names() {
		service, _ := d.config.Policy.Find(name, now)
		overrides += len(service.Overrides)
	}
	list := ok("%s: services %s; %s", cmp.Or(d.config.Profiles, "built-in"), strings.Join(d.config.Policy.Names(), ", "), counted(overrides, "override"))
	for _, text := range d.config.policyNotes(now) {
		list = append(list, note("", "%s", text)...)
	}
	return list
}

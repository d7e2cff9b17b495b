package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// upstream are the service profiles of MoonMind (docs/moonmind.md#service-profiles).
var upstream = map[string][]string{
	"api": {
		"api_service/Dockerfile", "api_service/Dockerfile.*", "api_service/pyproject.toml", "api_service/poetry.lock",
		"api_service/requirements*.txt", "pyproject.toml", "poetry.lock",
	},
	"celery-worker": {
		"celery_worker/Dockerfile", "celery_worker/Dockerfile.*", "celery_worker/requirements*.txt", "celery_worker/pyproject.toml", "celery_worker/poetry.lock",
	},
	"orchestrator": {
		"services/orchestrator/**", "moonmind/workflows/orchestrator/**", "docker-compose*.y*ml", "pyproject.toml", "poetry.lock",
	},
}

func TestBuiltInPolicyIsUpstreams(t *testing.T) {
	t.Parallel()
	copied := filepath.Join(t.TempDir(), "profiles.yaml")
	if err := os.WriteFile(copied, []byte(BuiltInText()), 0o600); err != nil {
		t.Fatal(err)
	}
	asFile, err := Load(copied)
	if err != nil {
		t.Fatalf("the built-in file as an operator's file: %v", err)
	}
	for kind, p := range map[string]*Policy{"built in": Default(), "as a file": asFile} {
		if got, want := p.Names(), []string{"api", "celery-worker", "orchestrator"}; !reflect.DeepEqual(got, want) {
			t.Errorf("%s: services %q, want %q", kind, got, want)
		}
		for name, globs := range upstream {
			s, found := p.Find(" "+strings.ToUpper(name)+" ", time.Now())
			if !found {
				t.Fatalf("%s: no service %s", kind, name)
			}
			if s.ComposeService != name || s.ComposeProject != "moonmind" || !reflect.DeepEqual(s.AllowList, globs) {
				t.Errorf("%s: %s is %s/%s with %q", kind, name, s.ComposeProject, s.ComposeService, s.AllowList)
			}
			if got := s.ProgramNames(); !reflect.DeepEqual(got, []string{"docker", "docker-compose", "git"}) {
				t.Errorf("%s: programs of %s: %q", kind, name, got)
			}
			if s.Limits.Step != nil || s.Limits.Run != (RunLimits{}) || !reflect.DeepEqual(s.Verify, Verify{}) || s.Overrides != nil || s.Disabled {
				t.Errorf("%s: %s has more than upstream: %+v", kind, name, s)
			}
			if s.Bounds() != (kind == "as a file") {
				t.Errorf("%s: Bounds of %s is %v", kind, name, s.Bounds())
			}
		}
	}
}

func TestTheExampleInTheBuiltInFileIsValid(t *testing.T) {
	t.Parallel()
	var example strings.Builder
	for line := range strings.Lines(BuiltInText()) {
		if text, is := strings.CutPrefix(line, "#     "); is && !strings.Contains(line, "mm-orchestrator policy check") {
			example.WriteString(text)
		}
	}
	if p, err := Parse("example", example.String()); err != nil || len(p.Services["api"].Overrides) != 1 {
		t.Errorf("%v\n%s", err, example.String())
	}
}

// Each case is one mistake; the error has to name place, field, problem and cure.
func TestErrors(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ text, want string }{
		"misspelled field":         {"services:\n  api:\n    allow_list: [a]\n", `p.yaml:3:5: services.api: there is no field "allow_list". Did you mean allowList? Known here: enabled, compose, allowList, programs, limits, verify, approval, overrides`},
		"misspelled top":           {"service: {}\n", `p.yaml:1:1: there is no field "service". Did you mean services? Known here: services, redaction`},
		"field one level too high": {"services:\n  api:\n    quietPeriod: 3s\n", `p.yaml:3:5: services.api: there is no field "quietPeriod". quietPeriod belongs under services.NAME.verify. Known here: enabled, compose, allowList, programs, limits, verify, approval, overrides`},
		"misspelled step":          {"services: {api: {limits: {biuld: {time: 1m}}}}\n", `p.yaml:1:27: services.api.limits: there is no field "biuld". Did you mean build? Known here: everyStep, analyze, patch, build, restart, verify, rollback, run`},
		"no unit":                  {"services:\n  api:\n    verify:\n      quietPeriod: 30\n", `p.yaml:4:20: services.api.verify.quietPeriod: "30" has no unit. Write 30s for seconds, 30m for minutes or 30h for hours`},
		"no duration":              {"services: {api: {verify: {quietPeriod: soon}}}\n", `p.yaml:1:40: services.api.verify.quietPeriod: "soon" is no duration. Write it as 90s, 15m, 1h30m or 48h`},
		"too short":                {"services: {api: {verify: {quietPeriod: 1ms}}}\n", `p.yaml:1:40: services.api.verify.quietPeriod: "1ms" is too short. The least is 100ms`},
		"negative":                 {"services: {api: {limits: {build: {time: -5m}}}}\n", `p.yaml:1:41: services.api.limits.build.time: "-5m" is too short. The least is 1s`},
		"too long":                 {"services: {api: {limits: {build: {time: 99999h}}}}\n", `p.yaml:1:41: services.api.limits.build.time: "99999h" is too long. The most is 87600h`},
		"not a boolean":            {"services: {api: {enabled: yes}}\n", `p.yaml:1:27: services.api.enabled: it must be true or false, not the text "yes". Write true or false, without quotes`},
		"not a list":               {"services:\n  web:\n    allowList: web/**\n", `p.yaml:3:16: services.web.allowList: it must be a list, not the text "web/**". Write [one, two], or one on each line after a dash`},
		"not a text":               {"services:\n  web:\n    allowList:\n      - [a]\n", `p.yaml:4:9: services.web.allowList: it must be a text, not a list. Write one value after the colon; put it in quotes if it begins with [`},
		"not fields":               {"services:\n  api: 5\n", `p.yaml:2:8: services.api: it must be fields, not the number 5. Write each field on a line of its own, indented, as name: value`},
		"list of services":         {"services:\n  - api\n", `p.yaml:2:3: services: it must be services by their names, not a list. Write each field on a line of its own, indented, as name: value`},
		"no value":                 {"services:\n  api:\n    verify:\n      healthURL:\n", `p.yaml:4:7: services.api.verify.healthURL: it has no value. Write a value after the colon, or remove the field`},
		"no fields":                {"services:\n  api:\n", `p.yaml:2:3: services.api: it has no fields. Write what differs from the built-in policy, or remove the service`},
		"an alias":                 {"services:\n  web:\n    allowList:\n      - *.toml\n", `p.yaml:4:9: services.web.allowList: a text that begins with * has a meaning in YAML. Put it in quotes: "*…"`},
		"an anchor":                {"services:\n  web: &w\n    allowList: [a]\n", `p.yaml:2:8: services.web: a value that begins with & has a meaning in YAML, which is not supported here. Put it in quotes, or write the value out where it is needed`},
		"a tag":                    {"services:\n  web: {allowList: [!a b]}\n", `p.yaml:2:21: services.web.allowList: a value that begins with ! has a meaning in YAML, which is not supported here. Put it in quotes`},
		"a field twice":            {"services:\n  api: {enabled: true}\n  API: {enabled: false}\n", `p.yaml:3:3: services: "API" is there twice, first in line 2. Keep one`},
		"a value twice":            {"services: {web: {allowList: [a, b, a]}}\n", `p.yaml:1:36: services.web.allowList: "a" is there twice. Keep one`},
		"an absolute glob":         {"services: {web: {allowList: [/etc/*]}}\n", `p.yaml:1:30: services.web.allowList: "/etc/*": it begins with a slash. Write the path from the top of the workspace`},
		"a glob that leaves":       {"services: {web: {allowList: [a/../../b]}}\n", `p.yaml:1:30: services.web.allowList: "a/../../b": it has ... Runs can only change files of the workspace`},
		"a relative program":       {"services: {web: {allowList: [a], programs: [bin/x]}}\n", `p.yaml:1:45: services.web.programs: "bin/x": it is neither a name nor an absolute path. Write the name, or the path from /`},
		"a command as program":     {"services: {web: {allowList: [a], programs: [git push]}}\n", `p.yaml:1:45: services.web.programs: "git push": it has a blank. Write only the program; options are those of plans`},
		"more without a reason":    {"services:\n  api:\n    allowList:\n      - pyproject.toml\n      - secrets/*\n", `p.yaml:5:9: services.api.allowList: "secrets/*" is more than the built-in service has, and needs a reason. Put it under services.api.overrides: - {reason: why it is needed, allowList: ["secrets/*"]}`},
		"a program more":           {"services: {api: {programs: [git, make]}}\n", `p.yaml:1:34: services.api.programs: "make" is more than the built-in service has, and needs a reason. Put it under services.api.overrides: - {reason: why it is needed, programs: ["make"]}`},
		"override without reason":  {"services:\n  api:\n    overrides:\n      - allowList: [a]\n", `p.yaml:4:9: services.api.overrides[1]: reason is missing. Say why this service needs an exception: reason: a sentence or a ticket`},
		"override, empty reason":   {"services: {api: {overrides: [{reason: \"  \", allowList: [a]}]}}\n", `p.yaml:1:39: services.api.overrides[1].reason: it is empty. Write a value, or remove the field`},
		"options without command":  {"services: {api: {overrides: [{reason: x, options: [a]}]}}\n", `p.yaml:1:30: services.api.overrides[1]: options and directories need a command. Add the command that they belong to, such as command: docker build`},
		"no command with rules":    {"services: {api: {overrides: [{reason: x, command: make all}]}}\n", `p.yaml:1:51: services.api.overrides[1].command: "make all" is no command with rules. Write git, docker, docker-compose, or one of them with a subcommand, such as docker build. Other programs belong under programs`},
		"a relative directory":     {"services: {api: {overrides: [{reason: x, command: git, directories: [a]}]}}\n", `p.yaml:1:70: services.api.overrides[1].directories: "a": it is no absolute path. Write the path from /`},
		"override of nothing":      {"services: {api: {overrides: [{reason: x}]}}\n", `p.yaml:1:30: services.api.overrides[1]: it changes nothing. Add what it allows: allowList, programs, command, limits or verify`},
		"override, no list":        {"services: {api: {overrides: {reason: x}}}\n", `p.yaml:1:29: services.api.overrides: it must be a list, not fields. Begin each override with a dash: - reason: …`},
		"no such day":              {"services: {api: {overrides: [{reason: x, until: 2027-02-30, allowList: [a]}]}}\n", `p.yaml:1:49: services.api.overrides[1].until: "2027-02-30" is no day. Write it as 2027-01-31 (to the end of that day, UTC) or as 2027-01-31T06:00:00Z`},
		"another order of a day":   {"services: {api: {overrides: [{reason: x, until: 31.01.2027, allowList: [a]}]}}\n", `p.yaml:1:49: services.api.overrides[1].until: "31.01.2027" is no day. Write it as 2027-01-31 (to the end of that day, UTC) or as 2027-01-31T06:00:00Z`},
		"new service, no list":     {"services:\n  web:\n    enabled: true\n", `p.yaml:2:3: services.web: allowList is missing. Add the globs of the files that its patches may change: allowList: ["web/**"]`},
		"misspelled service":       {"services:\n  celery_worker:\n    enabled: true\n", `p.yaml:2:3: services.celery_worker: allowList is missing. Did you mean celery-worker? A service of your own needs the globs of the files that its patches may change`},
		"a name of a service":      {"services:\n  a b: {allowList: [a]}\n", `p.yaml:2:3: services: "a b" is no name: it may have letters, digits, dots, dashes and underscores. Write the target service of runs, such as api`},
		"a compose option":         {"services: {api: {compose: {project: --help}}}\n", `p.yaml:1:37: services.api.compose.project: "--help" is no name: it may have letters, digits, dots, dashes and underscores. Write the name that docker compose has`},
		"no URL":                   {"services: {api: {verify: {healthURL: api/healthz}}}\n", `p.yaml:1:38: services.api.verify.healthURL: it is no URL that verify can ask. Write http://host:port/path`},
		"an empty check":           {"services: {api: {verify: {appCheck: []}}}\n", `p.yaml:1:37: services.api.verify.appCheck: the command is empty. Write the program and its arguments, or remove the field`},
		"a check that cannot run":  {"services:\n  api:\n    programs: [git]\n    verify: {appCheck: [docker, ps]}\n", `p.yaml:2:3: services.api.verify.appCheck: "docker" is no program that plans may start. Use one of git, or add it under overrides`},
		"several documents":        {"services: {api: {enabled: true}}\n---\nservices: {}\n", `p.yaml:3:1: the file has more than one document. Remove the line ---`},
		"a tab":                    {"services:\n\tapi: {}\n", `p.yaml:2:1: a tab in the indentation. Use spaces`},
		"a control character":      {"services:\n  api: \x01\n", `p.yaml:2:8: a control character (U+0001). Remove it`},
		"not UTF-8":                {"services:\n  \xff: 1\n", `p.yaml:2:1: a character that is not UTF-8. Save the file as UTF-8`},
		"too large":                {strings.Repeat("# comment\n", 7000), `p.yaml: it is larger than 64 KiB. Is it the right file? A policy needs a few KiB`},
		"too deep":                 {"services: " + strings.Repeat("[", 5000), `p.yaml:1:1: it is nested too deeply. No field is more than 6 levels deep`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := Parse("p.yaml", test.text)
			if err == nil {
				t.Fatalf("no error; api: %+v", p.Services["api"])
			}
			if got := err.Error(); got != test.want {
				t.Errorf("\ngot:  %s\nwant: %s", got, test.want)
			}
		})
	}
}

func TestSyntaxErrorsHaveALine(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		"services:\n  api\n    enabled: true\n", "services:\n  api:\n    allowList: [a, b\n", "services:\n  api: {enabled: \"true}\n",
		"services:\n  api:\n   enabled: true\n  compose: {}\n bad: 1\n",
	} {
		_, err := Parse("p.yaml", text)
		var list Errors
		if !errors.As(err, &list) || list[0].Line == 0 || list[0].Cure == "" {
			t.Errorf("%q: %v", text, err)
		}
	}
}

func TestAllErrorsAreToldInTheOrderOfLines(t *testing.T) {
	t.Parallel()
	_, err := Parse("p.yaml", "services:\n  web: {limits: 5}\n  api:\n    verify: {quietPeriod: 1, runningIsEnough: no}\n    overrides: [{until: x}]\nredact: {}\n")
	var list Errors
	if !errors.As(err, &list) {
		t.Fatalf("%v", err)
	}
	var got []string
	for _, e := range list {
		got = append(got, fmt.Sprintf("%d:%s", e.Line, e.Field))
	}
	want := []string{"2:services.web", "2:services.web.limits", "4:services.api.verify.quietPeriod", "4:services.api.verify.runningIsEnough", "5:services.api.overrides[1]", "5:services.api.overrides[1].until", "6:"}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %q\nwant %q\n%v", got, want, err)
	}
	var many strings.Builder
	many.WriteString("services:\n")
	for i := range 500 {
		fmt.Fprintf(&many, "  s%d: {x: 1, allowList: [a]}\n", i)
	}
	if _, err := Parse("p.yaml", many.String()); strings.Count(err.Error(), "\n") != maxErrors || !strings.HasSuffix(err.Error(), "p.yaml: 400 more errors") {
		t.Errorf("%d lines, %s", strings.Count(err.Error(), "\n"), err.Error()[len(err.Error())-60:])
	}
}

func TestAnUnreadableFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "none: it cannot be read: no such file or directory. Correct the path, or mount the file there",
		dir:                        "it is a directory. If it is a mount, the file is missing at its source",
		"/dev/null":                "/dev/null: it is not a regular file",
	} {
		if _, err := Load(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

const wholeFile = `
services:
  web:
    enabled: true
    compose: {service: frontend, project: shop}
    allowList: ["web/**", "*.toml"]
    programs: [docker, git, /usr/local/bin/check]
    limits:
      everyStep: {time: 20m}
      build: {time: 1h30m}
      verify: {time: none}
    verify:
      quietPeriod: 5s
      runningIsEnough: true
      healthURL: http://web:8080/healthz
      appCheck: [/usr/local/bin/check, --all, --all]
  API:
    overrides:
      - reason: INC-1, one more file
        until: 2027-01-31
        allowList: [api_service/x.toml]
      - reason: slow registry
        until: 2027-01-31T06:00:00+01:00
        programs: [make]
        limits: {build: {time: 2h}}
        verify: {quietPeriod: 1m}
`

func TestWholeFile(t *testing.T) {
	t.Parallel()
	for _, text := range []string{wholeFile, strings.ReplaceAll(wholeFile, "\n", "\r\n"), "\ufeff" + wholeFile, "---\n" + wholeFile + "...\n"} {
		p, err := Parse("p.yaml", text)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Date(2027, 1, 31, 4, 59, 0, 0, time.UTC)
		web, _ := p.Find("web", now)
		if web.ComposeService != "frontend" || web.ComposeProject != "shop" || len(web.AllowList) != 2 || len(web.Programs) != 3 || !web.Bounds() {
			t.Errorf("web: %+v", web)
		}
		if got := web.Limits.For("build").Time; got != 90*time.Minute {
			t.Errorf("build: %s", got)
		}
		if a, b := web.Limits.For("patch").Time, web.Limits.For("verify").Time; a != 20*time.Minute || b != 0 {
			t.Errorf("patch %s, verify %s", a, b)
		}
		if v := web.Verify; v.QuietPeriod != 5*time.Second || !v.RunningIsEnough || v.HealthURL == "" || len(v.AppCheck) != 3 {
			t.Errorf("verify of web: %+v", v)
		}
		api, _ := p.Find("api", now)
		if !contains(api.AllowList, "api_service/x.toml") || !contains(api.AllowList, "poetry.lock") || len(api.Overrides) != 2 || api.Bounds() {
			t.Errorf("api: %+v", api)
		}
		if api.Limits.For("build").Time != 2*time.Hour || api.Verify.QuietPeriod != time.Minute {
			t.Errorf("limits of api: %+v %+v", api.Limits, api.Verify)
		}
		later, _ := p.Find("api", now.Add(time.Minute))
		if len(later.Overrides) != 1 || later.Limits.For("build").Time != 0 || !contains(later.AllowList, "api_service/x.toml") {
			t.Errorf("api, one override over: %+v", later)
		}
		last, _ := p.Find("api", time.Date(2027, 2, 1, 0, 0, 0, 0, time.UTC))
		if len(last.Overrides) != 0 || !reflect.DeepEqual(last.AllowList, upstream["api"]) {
			t.Errorf("api, all overrides over: %+v", last)
		}
		if got := api.Origins["verify.quietPeriod"].String(); !strings.HasPrefix(got, "p.yaml:2") {
			t.Errorf("origin %s", got)
		}
		if o := api.Overrides[0]; !reflect.DeepEqual(api.Listed(), upstream["api"]) || !strings.HasPrefix(o.String(), "INC-1, one more file (p.yaml:1") && !strings.HasPrefix(o.String(), "INC-1, one more file (p.yaml:2") {
			t.Errorf("listed %q, override %s", api.Listed(), o)
		}
		if o, found := api.OverrideOfProgram("make"); !found || o.Reason != "slow registry" {
			t.Errorf("make: %v %v", o, found)
		}
	}
}

func contains(list []string, text string) bool {
	for _, one := range list {
		if one == text {
			return true
		}
	}
	return false
}

func TestSettingsAndTheFile(t *testing.T) {
	t.Parallel()
	p, err := Parse("p.yaml", wholeFile)
	if err != nil {
		t.Fatal(err)
	}
	settings := Settings{
		Programs: []string{"make"}, HealthURLs: map[string]string{"api": "http://a/", "frontend": "http://f/"}, QuietPeriod: 3 * time.Second,
		RunningIsEnough: []string{"celery-worker", "sidecar"}, AppChecks: map[string][]string{"api": {"git", "status"}}, StepTimeLimit: time.Hour,
		Name: func(variable string) string { return "--" + variable },
	}
	with := p.With(settings)
	now := time.Date(2027, 3, 1, 0, 0, 0, 0, time.UTC)
	api, _ := with.Find("api", now)
	if !contains(api.ProgramNames(), "make") || api.Verify.HealthURL != "http://a/" || api.Verify.QuietPeriod != 3*time.Second || api.Limits.For("build").Time != time.Hour || api.Verify.RunningIsEnough {
		t.Errorf("api: %+v", api)
	}
	if got := api.Origins["verify.quietPeriod"].String(); got != "--MM_ORCHESTRATOR_QUIET_PERIOD" {
		t.Errorf("origin %s", got)
	}
	web, _ := with.Find("web", now)
	if contains(web.ProgramNames(), "make") || web.Verify.HealthURL != "http://web:8080/healthz" || web.Verify.QuietPeriod != 5*time.Second || web.Limits.For("patch").Time != 20*time.Minute {
		t.Errorf("web: %+v", web)
	}
	for service, want := range map[string]bool{"celery-worker": true, "sidecar": true, "frontend": true, "api": false, "other": false} {
		if got := with.RunningIsEnough(service, now); got != want {
			t.Errorf("RunningIsEnough(%s) is %v", service, got)
		}
	}
	var fields []string
	for _, c := range p.Conflicts(settings) {
		fields = append(fields, c.Service+" "+c.Field)
	}
	if want := []string{"web programs", "web verify.quietPeriod", "web verify.runningIsEnough", "web verify.healthURL", "web limits.everyStep.time"}; !reflect.DeepEqual(fields, want) {
		t.Errorf("conflicts %q", fields)
	}
	settings.Default = func(string) bool { return true }
	if c := p.Conflicts(settings); c != nil {
		t.Errorf("conflicts of default values: %v", c)
	}
	if before, _ := p.Find("api", now); before.Verify.HealthURL != "" {
		t.Error("With has changed the policy that it was called on")
	}
}

// A field of the table that no reader knows would do nothing.
func TestEveryFieldIsRead(t *testing.T) {
	t.Parallel()
	values := map[string]string{
		formText: "x", formName: "x", formList: "[git]", formBool: "false", formDuration: "5m", formSize: "5MiB", formLimitDur: "5m", formLimitSiz: "5MiB", formURL: "http://x/", formDay: "2027-01-31",
		"guard or mask": "mask",
	}
	for _, f := range Fields {
		if f.Form == "" || f.Path == "services.NAME.overrides.reason" || f.Path == "services.NAME.overrides.until" {
			continue
		}
		value, known := values[f.Form]
		switch {
		case strings.HasSuffix(f.Path, ".command"):
			value = "git push"
		case strings.HasSuffix(f.Path, ".options"):
			value = "[a], command: git"
		case strings.HasSuffix(f.Path, ".directories"):
			value = "[/a], command: git"
		}
		if !known {
			t.Errorf("%s: no value for the form %q", f.Path, f.Form)
		}
		path := strings.ReplaceAll(strings.ReplaceAll(f.Path, "NAME", "web"), "STEP", "build")
		text, closing := "", ""
		for _, part := range strings.Split(path, ".") {
			text, closing = text+"{"+part+": ", closing+"}"
			switch {
			case part == "overrides":
				text, closing = text+"[{reason: x, ", closing+"]"
			}
		}
		text = strings.ReplaceAll(text, "[{reason: x, {", "[{reason: x, ")
		text += value + reverse(closing)
		if !strings.Contains(path, "redaction") {
			text = strings.Replace(text, "{web: {", "{web: {allowList: [a], ", 1)
			if f.Path == "services.NAME.allowList" {
				text = strings.Replace(text, "allowList: [a], ", "", 1)
			}
		}
		p, err := Parse("p.yaml", text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		parts := strings.SplitN(path, ".", 3)
		if strings.HasPrefix(path, "redaction") {
			if _, set := p.Redaction.Origins[parts[1]]; !set {
				t.Errorf("%s is not set", path)
			}
			continue
		}
		s := p.Services["web"]
		if field, is := strings.CutPrefix(parts[2], "overrides."); is {
			if len(s.Overrides) != 1 || !contains(s.Overrides[0].Fields(), field) && !(field == "options" && s.Overrides[0].Options != nil) && !(field == "directories" && s.Overrides[0].Directories != nil) {
				t.Errorf("%s is not set: %+v", path, s.Overrides)
			}
		} else if _, set := s.Origins[parts[2]]; !set {
			t.Errorf("%s is not set", path)
		}
	}
}

func reverse(text string) string {
	var out strings.Builder
	for i := len(text) - 1; i >= 0; i-- {
		out.WriteByte(text[i])
	}
	return out.String()
}

func TestSizes(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{"1KiB": 1024, "1.5 MiB": 1572864, "2GiB": 2 << 30} {
		r := &reader{}
		if got, good := r.size(textEntry(text), ""); !good || got != want {
			t.Errorf("%s: %d, %v", text, got, r.errs)
		}
	}
	for text, cure := range map[string]string{"10MB": "Write 10MiB", "10 gb": "Write 10GiB", "5k": "Write 5KiB", "many": "Write it as", "-1MiB": "Write", "9999999TiB": "Write", "NaNMiB": "Write it as"} {
		r := &reader{}
		if _, good := r.size(textEntry(text), ""); good || !strings.Contains(r.errs.Error(), cure) {
			t.Errorf("%s: %v", text, r.errs)
		}
	}
}

// FuzzParse: whatever the text, there is a policy or errors with a place and a cure,
// and never a panic. What every service has stays within bounds.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{wholeFile, builtIn, "services:\n  web: &a\n    allowList: [*a]\n", "a: &a [*a, *a]\n", "? [a]\n: b\n", "%YAML 1.2\n---\n", "- - - a\n", "services: {<<: {api: {}}}\n", "x: !!binary a\n", "services: {api: {overrides: [null, 5]}}\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		// The fuzzer itself does not notice a call that does not return.
		defer time.AfterFunc(5*time.Second, func() { panic(fmt.Sprintf("no end: %q", text)) }).Stop()
		p, err := Parse("p.yaml", text)
		var list Errors
		switch {
		case err == nil:
			for name, s := range p.Services {
				for _, o := range s.Overrides {
					if o.Reason == "" {
						t.Errorf("service %s has an override without a reason", name)
					}
				}
				if builtIn, is := Default().Services[name]; is {
					for _, glob := range s.AllowList {
						if !contains(builtIn.AllowList, glob) {
							t.Errorf("service %s allows %q without a reason", name, glob)
						}
					}
				}
			}
		case !errors.As(err, &list) || len(list) == 0:
			t.Fatalf("%T %v", err, err)
		default:
			for _, e := range list {
				if strings.ContainsAny(e.Error(), "\n\x00") {
					t.Errorf("an error of several lines: %q", e.Error())
				}
			}
		}
	})
}

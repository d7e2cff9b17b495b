package main

import (
	"bytes"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

const someRun = "6f1c2f0e-8a5b-4f2e-9f63-0d6c0c6e5a11"

// Flags may be anywhere, with one dash or two. A valid command line fails with 69,
// because the database refuses connections.
func TestCommandLines(t *testing.T) {
	t.Parallel()
	env := environment{"MM_ORCHESTRATOR_DATABASE_URL=postgres://u:s3cret@127.0.0.1:1/d"}
	for _, tt := range []struct {
		line string
		code int
		// want is a part of stdout or stderr.
		want string
	}{
		// Flags before, between and after words.
		{"runs", 69, "connection refused"},
		{"runs --json", 69, "connection refused"},
		{"runs RUN --json", 69, "connection refused"},
		{"runs --json RUN", 69, "connection refused"},
		{"runs RUN --status=failed --json", 2, "--status applies only to the list of runs: remove it, or the id RUN"},
		{"runs -L 5", 69, "connection refused"},
		{"runs -L5", 69, "connection refused"},
		{"runs -s failed", 69, "connection refused"},
		{"runs --limit 5 --service api", 69, "connection refused"},
		{"runs revoke RUN --reason x --wait 5s", 69, "connection refused"},
		{"runs revoke --reason x RUN --wait 5", 69, "connection refused"},
		{"runs revoke --wait=5s --reason=x RUN", 69, "connection refused"},
		{"runs --database-url postgres://127.0.0.1:1/d revoke RUN", 69, "connection refused"},
		{"config --json", 0, `"settings"`},
		{"migrate -n", 69, "connection refused"},

		// One dash, as package flag took it.
		{"runs -json RUN", 69, "connection refused"},
		{"runs RUN -json", 69, "connection refused"},
		{"runs -limit 5", 69, "connection refused"},
		{"runs -limit=5", 69, "connection refused"},
		{"config -json", 0, `"settings"`},
		{"config -queue other -json", 0, `"value": "other"`},
		{"config -listen-remote -json", 0, `"origin": "--listen-remote"`},
		{"config -listen-remote=false -json", 0, `"origin": "--listen-remote"`},
		{"config --queue -json", 0, "ORCHESTRATOR_CELERY_QUEUE           -json"}, // a value, as before
		{"config --queue=-json", 0, "ORCHESTRATOR_CELERY_QUEUE           -json"},
		{"-version", 0, "mm-orchestrator "},
		{"-help", 0, "Usage: mm-orchestrator COMMAND"},
		{"runs -help", 0, "Usage: mm-orchestrator runs"},
		{"migrate -dry-run", 69, "connection refused"},

		// -- ends flags.
		{"runs -- RUN", 69, "connection refused"},
		{"runs --json -- RUN", 69, "connection refused"},
		{"runs revoke -- RUN", 69, "connection refused"},
		{"runs -- --json", 2, `"--json" is not the id of a run`},
		{"runs -- -json", 2, `"-json" is not the id of a run`},

		// Ids are parsed before the database is opened.
		{"runs 6f1c", 69, "connection refused"},
		{"runs 6F1C2F0E-8A", 69, "connection refused"},
		{"runs {RUN}", 69, "connection refused"},
		{"runs urn:uuid:RUN", 69, "connection refused"},
		{"runs revoke 6f1c2f0e", 69, "connection refused"},
		{"runs 6f1", 2, `"6f1" is too short for the id of a run: give at least 4 digits; see mm-orchestrator runs --help`},
		{"runs not-an-id", 2, `"not-an-id" is not the id of a run, nor the beginning of one: ids are UUIDs; see mm-orchestrator runs --help`},
		{"runs RUNx", 2, `"RUNx" is not the id of a run`},
		{"runs revoke x", 2, `"x" is not the id of a run, nor the beginning of one: ids are UUIDs; see mm-orchestrator runs revoke --help`},
		{"runs revok", 2, "did you mean mm-orchestrator runs revoke?"},
		{"runs list", 2, "`mm-orchestrator runs` lists runs"},
		{"runs view RUN", 2, "`mm-orchestrator runs RUN` shows one"},

		// Help, wherever the flag is.
		{"--help", 0, "Usage: mm-orchestrator COMMAND"},
		{"-h", 0, "Usage: mm-orchestrator COMMAND"},
		{"help", 0, "Usage: mm-orchestrator COMMAND"},
		{"runs RUN -h", 0, "Usage: mm-orchestrator runs [RUN]"},
		{"-h runs", 0, "Usage: mm-orchestrator runs [RUN]"},
		{"runs --nonsense -h", 0, "Usage: mm-orchestrator runs [RUN]"},
		{"runs --limit many --help", 0, "Usage: mm-orchestrator runs [RUN]"},
		{"runs revoke --help", 0, "Usage: mm-orchestrator runs revoke RUN"},
		{"runs revoke -h RUN", 0, "Usage: mm-orchestrator runs revoke RUN"},
		{"help runs revoke", 0, "Usage: mm-orchestrator runs revoke RUN"},
		{"help help", 0, "Usage: mm-orchestrator help"},
		{"help settings", 0, "CELERY_BROKER_URL   --broker-url url"},
		{"help settings database", 0, "POSTGRES_HOST   --postgres-host host"},
		{"help settings workspace_root", 0, "WORKSPACE_ROOT   --workspace directory"},
		{"version", 0, "mm-orchestrator "},
		{"--version", 0, "mm-orchestrator "},
		{"-v", 0, "mm-orchestrator "},

		// Mistakes, with suggestions.
		{"", 2, "give a command"},
		{"wroker", 2, `there is no command "wroker"; did you mean worker?`},
		{"Runs", 2, `there is no command "Runs"; did you mean runs?`},
		{"run", 2, `did you mean runs?`},
		{"mig", 2, `did you mean migrate?`},
		{"cancel", 2, `there is no command "cancel"; did you mean runs revoke?`},
		{"check", 2, `there is no command "check"; did you mean doctor?`},
		{"status", 2, `there is no command "status"; did you mean runs?`},
		{"docs", 2, `did you mean help settings?`},
		{"init", 2, `did you mean migrate?`},
		{"rollback", 2, `did you mean runs rollback?`},
		{"settings", 2, `there is no command "settings"; did you mean help settings?`},
		{"frobnicate", 2, `there is no command "frobnicate"; there are worker, doctor,`},
		{"--jsno runs", 2, "there is no flag --jsno; see mm-orchestrator --help"},
		{"runs --jsno", 2, "there is no flag --jsno; did you mean --json?"},
		{"runs -jsno", 2, "there is no flag -jsno; did you mean --json?"},
		{"runs --states failed", 2, "there is no flag --states; did you mean --status?"},
		{"runs --database-ulr=x", 2, "there is no flag --database-ulr; did you mean --database-url?"},
		{"runs --frobnicate", 2, "there is no flag --frobnicate; see mm-orchestrator runs --help"},
		{"runs -x", 2, "there is no flag -x; see mm-orchestrator runs --help"},
		{"runs ---json", 2, "see mm-orchestrator runs --help"},
		{"runs -=x", 2, "there is no flag -"},
		{"runs -", 2, `"-" is not the id of a run`},
		{"runs --limit", 2, "--limit needs a value; see mm-orchestrator runs --help"},
		{"runs --limit many", 2, `--limit is "many": it must be a whole number; see mm-orchestrator runs --help`},
		{"runs --limit 0", 2, "--limit is 0; it must be from 1 to 1000"},
		{"runs --json=perhaps", 2, `--json is "perhaps": it must be true or false`},
		{"runs --status faild", 2, `--status is "faild"; it must be pending,`},
		{"runs revoke", 2, "runs revoke needs the id of a run; see mm-orchestrator runs revoke --help"},
		{"runs revoke RUN --wait soon", 2, `--wait is "soon": it must be a duration such as 90s, 15m or 2h; see mm-orchestrator runs revoke --help`},
		{"runs revoke RUN --wait=-5s", 2, `--wait is "-5s": it must be 0s or more`},
		{"runs revok RUN", 2, `runs does not take "RUN"; did you mean mm-orchestrator runs revoke?`},
		{"runs cancel RUN", 2, `runs does not take "RUN"; did you mean mm-orchestrator runs revoke?`},
		{"runs RUN RUN", 2, `runs does not take "RUN"; see mm-orchestrator runs --help`},
		{"worker now", 2, `worker does not take "now"; see mm-orchestrator worker --help`},
		{"help rusn", 2, `there is no command "rusn"; did you mean runs?`},
		{"help runs revok", 2, `runs has no command "revok"`},
		{"help setings", 2, `did you mean help settings?`},
		{"help settings worksapce", 2, `there is no setting "worksapce"; did you mean workspace?`},
		{"help settings workspace database", 2, `help settings does not take "database"`},
		{"help settings frobnicate", 2, "`mm-orchestrator help settings` lists them"},
		{"completion", 2, "completion needs the name of a shell: bash, zsh or fish"},
		{"completion tcsh", 2, `no completion for "tcsh"`},
	} {
		t.Run(tt.line, func(t *testing.T) {
			t.Parallel()
			named := strings.NewReplacer("RUN", someRun)
			got := invoke(t, env, strings.Fields(named.Replace(tt.line))...)
			if tt.code == exitOK && got.stderr != "" {
				t.Errorf("stderr:\n%s", got.stderr)
			}
			// Usage lines say RUN themselves.
			if all := got.stdout + got.stderr; got.code != tt.code || !strings.Contains(all, tt.want) && !strings.Contains(all, named.Replace(tt.want)) {
				t.Errorf("exit %d, want %d and %s:\n%s", got.code, tt.code, tt.want, all)
			}
		})
	}
}

// A flag means the same in every command that has it.
func TestFlagsHaveOneType(t *testing.T) {
	t.Parallel()
	types := map[string]string{}
	var walk func(list []*command)
	walk = func(list []*command) {
		for _, cmd := range list {
			fs := pflag.NewFlagSet(cmd.name, pflag.ContinueOnError)
			cmd.setup(fs)
			addSettingFlags(fs, cmd.topics...) // panics when a setting has the name too
			walk(cmd.subcommands)
			fs.VisitAll(func(f *pflag.Flag) {
				if first, there := types[f.Name]; there && first != f.Value.Type() {
					t.Errorf("--%s is a %s in %s and a %s elsewhere", f.Name, f.Value.Type(), cmd.name, first)
				}
				types[f.Name] = f.Value.Type()
			})
		}
	}
	walk(commands())
}

// Choices that the help lists for a value are accepted.
func TestForms(t *testing.T) {
	t.Parallel()
	for _, s := range settings {
		if s.form == "" {
			t.Errorf("%s does not say what its value looks like", s.name())
		}
		if s.boolean && s.form != "true|false" {
			t.Errorf("%s is boolean, and says %s", s.name(), s.form)
		}
		if !strings.Contains(s.form, "|") {
			continue
		}
		for choice := range strings.SplitSeq(s.form, "|") {
			if err := s.read(&configuration{}, choice); err != nil {
				t.Errorf("%s=%s: %v", s.name(), choice, err)
			}
		}
	}
}

func TestNearest(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ word, want string }{
		{"worker", "worker"}, {"wroker", "worker"}, {"WORKER", "worker"}, {"workers", "worker"}, {"wrk", ""}, {"wor", "worker"},
		{"doc", "doctor"}, {"x", ""}, {"", ""}, {"confg", "config"}, {"conf", "config"}, {"gifnoc", ""},
	} {
		if got := nearest(tt.word, []string{"worker", "doctor", "config", "runs"}); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.word, got, tt.want)
		}
	}
}

// Shell completion gets its words from the program.
func TestCompletion(t *testing.T) {
	t.Parallel()
	for line, want := range map[string][]string{
		"__complete w":                    {"worker"},
		"__complete runs r":               {"revoke"},
		"__complete runs --st":            {"--status"},
		"__complete runs --status f":      {"failed"},
		"__complete runs revoke X --re":   {"--reason"},
		"__complete config --log-level d": {"debug"},
		"__complete help set":             {"settings"},
		"__complete help runs r":          {"revoke"},
		"__complete completion f":         {"fish"},
	} {
		got := invoke(t, nil, strings.Fields(line)...)
		lines := strings.Split(got.stdout, "\n")
		for _, word := range want {
			found := false
			for _, l := range lines {
				found = found || l == word || strings.HasPrefix(l, word+"\t")
			}
			if !found || got.code != exitOK {
				t.Errorf("%s: exit %d, no %q in\n%s%s", line, got.code, word, got.stdout, got.stderr)
			}
		}
	}
	for _, shell := range shells {
		got := invoke(t, nil, "completion", shell)
		if got.code != exitOK || !strings.Contains(got.stdout, "__complete") {
			t.Errorf("%s: exit %d: %s", shell, got.code, got.stderr)
		}
		path, err := exec.LookPath(shell)
		if err != nil {
			continue // a shell that this machine does not have
		}
		check := exec.CommandContext(t.Context(), path, "-n")
		check.Stdin = strings.NewReader(got.stdout)
		if out, err := check.CombinedOutput(); err != nil {
			t.Errorf("%s does not take it: %v\n%s", shell, err, out)
		}
	}
}

// A file of variables from Windows leaves a carriage return at the end of a path. On a
// terminal it would hide what stands before it.
func TestErrorsShowControlCharacters(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/nowhere/at/all\r":           `mm-orchestrator: workspace /nowhere/at/all\r does not exist. Mount the repository there, or set WORKSPACE_ROOT to its directory`,
		"/nowhere/\x1b[2J\u009b2J/at": `mm-orchestrator: workspace /nowhere/\x1b[2J\u009b2J/at does not exist. Mount the repository there, or set WORKSPACE_ROOT to its directory`,
		"/nowhere/\tat":               "mm-orchestrator: workspace /nowhere/\tat does not exist. Mount the repository there, or set WORKSPACE_ROOT to its directory",
	} {
		var stderr bytes.Buffer
		p := &program{env: environment{"WORKSPACE_ROOT=" + path}, stdout: io.Discard, stderr: &stderr}
		if code := p.main(t.Context(), []string{"worker"}); code != exitConfig || stderr.String() != want+"\n" {
			t.Errorf("exit code %d: %q", code, stderr.String())
		}
	}
}

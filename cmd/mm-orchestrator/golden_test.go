package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"
)

var update = flag.Bool("update", false, "write golden files and docs/configuration.md instead of comparing with them")

// golden compares got with a file, or writes it.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; if the change is meant, run: go test ./cmd/mm-orchestrator -update\n%s", path, firstDifference(string(got), string(want)))
	}
}

func firstDifference(got, want string) string {
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range max(len(g), len(w)) {
		var a, b string
		if i < len(g) {
			a = g[i]
		}
		if i < len(w) {
			b = w[i]
		}
		if a != b {
			return "got:  " + a + "\nwant: " + b
		}
	}
	return ""
}

// output is the result of running the program.
type output struct {
	stdout, stderr string
	code           int
}

// invoke runs the program within the test.
func invoke(t *testing.T, env environment, args ...string) output {
	t.Helper()
	var stdout, stderr bytes.Buffer
	p := &program{env: env, stdout: &stdout, stderr: &stderr}
	code := p.main(t.Context(), args)
	return output{stdout.String(), stderr.String(), code}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	check := func(path ...string) {
		name := strings.Join(path, " ")
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := invoke(t, nil, append(path, "--help")...)
			if got.code != exitOK || got.stderr != "" {
				t.Errorf("exit %d, stderr %q", got.code, got.stderr)
			}
			golden(t, filepath.Join("testdata", "help", strings.Join(path, "-")+".txt"), []byte(got.stdout))
			if again := invoke(t, nil, append([]string{"help"}, path...)...); again != got {
				t.Errorf("help %s differs from %s --help", name, name)
			}
			checkWidth(t, got.stdout)
		})
	}
	var walk func(above []string, list []*command)
	walk = func(above []string, list []*command) {
		for _, cmd := range list {
			path := append(slices.Clone(above), cmd.name)
			check(path...)
			walk(path, cmd.subcommands)
		}
	}
	walk(nil, commands())
	overview := invoke(t, nil, "--help")
	golden(t, filepath.Join("testdata", "help", "overview.txt"), []byte(overview.stdout))
	settings := invoke(t, nil, "help", "settings")
	checkWidth(t, settings.stdout)
	golden(t, filepath.Join("testdata", "help", "settings.txt"), []byte(settings.stdout))
	one := invoke(t, nil, "help", "settings", "workspace")
	if one.code != exitOK || one.stdout == "" {
		t.Errorf("help settings workspace: exit %d, stderr %q", one.code, one.stderr)
	}
	golden(t, filepath.Join("testdata", "help", "settings-workspace.txt"), []byte(one.stdout))
}

func checkWidth(t *testing.T, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if utf8.RuneCountInString(line) > 140 {
			t.Errorf("line of %d columns: %s", len(line), line)
		}
	}
}

func TestConfigurationPage(t *testing.T) {
	t.Parallel()
	var page bytes.Buffer
	writeConfigurationPage(&page)
	golden(t, filepath.Join("..", "..", "docs", "configuration.md"), page.Bytes())
}

func TestConfigOutput(t *testing.T) {
	t.Parallel()
	env := environment{
		"ORCHESTRATOR_HOSTNAME=orchestrator@box",
		"CELERY_BROKER_URL=amqp://mm:s3cret@one//;amqps://mm:s3cret@two/prod",
		"SPEC_WORKFLOW_CELERY_RESULT_BACKEND=db+postgresql+psycopg2://mm:s3cret@db/moonmind",
		"postgres_password=s3cret",
		"POSTGRES_HOST=db",
		"ORCHESTRATOR_PREFETCH=2",
		"MM_ORCHESTRATOR_HEALTH_URL=api=http://u:s3cret@api:5000/healthz",
		"GITHUB_TOKEN=s3cret",
		"Codex_Profile=s3cret",
	}
	for name, args := range map[string][]string{
		"config.txt":  {"config", "--queue", "other.run", "--listen="},
		"config.json": {"config", "--queue", "other.run", "--listen=", "--json"},
	} {
		got := invoke(t, env, args...)
		if got.code != exitOK || got.stderr != "" {
			t.Errorf("exit %d, stderr %q", got.code, got.stderr)
		}
		if strings.Contains(got.stdout, "s3cret") {
			t.Errorf("a secret was printed:\n%s", got.stdout)
		}
		golden(t, filepath.Join("testdata", name), []byte(got.stdout))
	}
}

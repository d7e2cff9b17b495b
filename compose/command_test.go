package compose_test

import (
	"errors"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
)

func TestCommandLines(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		got  []string
		want string
	}{
		{compose.BuildCommand("moonmind", "api"), "docker compose --project-name moonmind build api"},
		{compose.UpCommand("moonmind", "api"), "docker compose --project-name moonmind up -d --no-deps api"},
	} {
		if got := strings.Join(test.got, " "); got != test.want {
			t.Errorf("%s, want %s", got, test.want)
		}
	}
}

func TestTargetsAreRead(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{
		"docker compose --project-name p build api":           "p build api",
		"docker compose --project-name=p up -d --no-deps w":   "p up w",
		"docker-compose -p p -f a.yaml --progress plain up w": "p up w",
		"docker compose build":                                " build ",
		"docker compose --project-name p":                     "none",
		"docker ps":                                           "none",
		"git status --short":                                  "none",
		"docker compose -p p up -d":                           "p up ",
	} {
		got := "none"
		if target, ok := compose.ParseTarget(strings.Fields(line)); ok {
			got = target.Project + " " + target.Subcommand + " " + target.Service
		}
		if got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	target, _ := compose.ParseTarget(strings.Fields("docker compose -f x.yaml -p p build api"))
	if got := strings.Join(target.ServicesCommand(), " "); got != "docker compose -f x.yaml -p p config --services" {
		t.Error(got)
	}
	if got := compose.ParseServices("web\nother\n"); !reflect.DeepEqual(got, []string{"other", "web"}) {
		t.Error(got)
	}
}

func TestComposeIsFoundWhereItIs(t *testing.T) {
	t.Parallel()
	has := func(programs ...string) func(string) (string, error) {
		return func(name string) (string, error) {
			for _, program := range programs {
				if program == name {
					return "/bin/" + name, nil
				}
			}
			return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
		}
	}
	for _, test := range []struct {
		program compose.Program
		line    string
		want    string
	}{
		{compose.Program{LookPath: has("docker", "docker-compose")}, "docker compose up", "docker compose up"},
		{compose.Program{LookPath: has("docker-compose")}, "docker compose up", "/bin/docker-compose up"},
		{compose.Program{LookPath: has()}, "docker compose up", "docker compose up"},
		{compose.Program{Standalone: "/opt/c", LookPath: has("docker")}, "docker compose up", "/opt/c up"},
		{compose.Program{Standalone: "/opt/c", LookPath: has()}, "docker-compose up", "/opt/c up"},
		{compose.Program{Standalone: "/opt/c", LookPath: has()}, "docker ps", "docker ps"},
		{compose.Program{LookPath: func(string) (string, error) { return "", errors.New("other") }}, "docker compose up", "docker compose up"},
	} {
		if got := strings.Join(test.program.Resolve(strings.Fields(test.line)), " "); got != test.want {
			t.Errorf("%s: %s, want %s", test.line, got, test.want)
		}
	}
}

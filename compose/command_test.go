package compose_test

import (
	"errors"
	"os/exec"
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
		{compose.Program{Standalone: "/opt/c"}, "docker -D -c far --host tcp://h:1 --tlsverify=false compose -p p up", "/opt/c -D --context far --host tcp://h:1 -p p up"},
		{compose.Program{Standalone: "/opt/c"}, "docker --config /x compose up", "docker --config /x compose up"},
		{compose.Program{LookPath: func(string) (string, error) { return "", errors.New("other") }}, "docker compose up", "docker compose up"},
	} {
		if got := strings.Join(test.program.Resolve(strings.Fields(test.line)), " "); got != test.want {
			t.Errorf("%s: %s, want %s", test.line, got, test.want)
		}
	}
}

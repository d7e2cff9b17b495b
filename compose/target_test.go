package compose_test

import (
	"fmt"
	"os/exec"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// targetLines are command lines with what they act on: project, subcommand,
// services, and the number of words before the subcommand.
var targetLines = map[string]string{
	"docker compose --project-name p build api":                                   "p build api 4",
	"docker compose --project-name=p up -d --no-deps w":                           "p up w 3",
	"docker-compose -p p -f a.yaml --progress plain up w":                         "p up w 7",
	"docker compose build":                                                        " build  2",
	"docker compose -p p up -d":                                                   "p up  4",
	"docker compose up -d --no-deps --timeout 30 web":                             " up web 2",
	"docker compose up -d --no-deps web --timeout 30":                             " up web 2",
	"docker compose up web -d --no-deps -t 30":                                    " up web 2",
	"docker compose up -dt 30 web":                                                " up web 2",
	"docker compose up -dt30 web":                                                 " up web 2",
	"docker compose up -t=30 -d web":                                              " up web 2",
	"docker compose up --detach=true --timeout=30 web":                            " up web 2",
	"docker compose up -dV web":                                                   " up web 2",
	"docker compose up -d --scale web=2 --pull never --wait-timeout 9 web db":     " up web,db 2",
	"docker compose up -d web db web":                                             " up web,db 2",
	"docker compose up -d -- web db":                                              " up web,db 2",
	"docker compose up -d web -- -odd":                                            " up web,-odd 2",
	"docker compose up --attach db --no-attach x --exit-code-from y web":          " up web 2",
	"docker compose up --build -y --wait web":                                     " up web 2",
	"docker --context far compose -p p up -d web":                                 "p up web 6",
	"docker -c far compose up web":                                                " up web 4",
	"docker -H tcp://h:2375 compose up web":                                       " up web 4",
	"docker -Htcp://h:2375 --tls --log-level=error compose up web":                " up web 5",
	"docker --host=unix:///x compose -pp up web":                                  "p up web 4",
	"docker --config /c -D compose up web":                                        " up web 5",
	"docker-compose --context far -p p up web":                                    "p up web 5",
	"docker-compose -H tcp://h -fa up web":                                        " up web 4",
	"docker compose -f a -f b --profile x --env-file .e --project-directory d up": " up  12",
	"docker compose --workdir d --ansi never --parallel 3 --all-resources up web": " up web 9",
	"docker compose -p a -p b up web":                                             "b up web 6",
	"docker compose build --build-arg A=b -m 1g --no-cache web other":             " build web,other 2",
	"docker compose build --ssh default --progress plain web":                     " build web 2",
	"docker compose build -q web":                                                 " build web 2",
	"docker compose restart -t 5 web":                                             " restart web 2",
	"docker compose run --rm -e A=b -v /x:/y web sh -c ls":                        " run web 2",
	"docker compose exec -u root web rm -rf x":                                    " exec web 2",
	"docker compose scale web=2 db=1":                                             " scale web,db 2",
	"docker compose create --scale web=2 web":                                     " create web 2",
	"docker compose --dry-run up web":                                             " up web 3 dry",
	"docker compose up web --dry-run":                                             " up web 2 dry",
	"docker compose --dry-run=false up web":                                       " up web 3",
	"docker compose --project-name p":                                             "none",
	"docker compose -- up":                                                        "none",
	"docker compose":                                                              "none",
	"docker ps":                                                                   "none",
	"docker --context compose ps":                                                 "none",
	"docker":                                                                      "none",
	"docker-compose":                                                              "none",
	"git status --short":                                                          "none",
}

func TestTargetsAreRead(t *testing.T) {
	t.Parallel()
	for line, want := range targetLines {
		got := "none"
		if target, ok := compose.ParseTarget(strings.Fields(line)); ok {
			got = fmt.Sprintf("%s %s %s %d", target.Project, target.Subcommand, strings.Join(target.Services, ","), len(target.Prefix))
			if target.DryRun {
				got += " dry"
			}
		}
		if got != want {
			t.Errorf("%s: %q, want %q", line, got, want)
		}
	}
	if _, ok := compose.ParseTarget(nil); ok {
		t.Error("no command line is a target")
	}
	target, _ := compose.ParseTarget(strings.Fields("docker compose -f x.yaml -p p build api"))
	if got := strings.Join(target.ServicesCommand(), " "); got != "docker compose -f x.yaml -p p config --services" {
		t.Error(got)
	}
	if got := compose.ParseServices("web\nother\n"); !reflect.DeepEqual(got, []string{"other", "web"}) {
		t.Error(got)
	}
}

// TestTargetsKnowTheOptionsOfCompose compares with the help of the compose program:
// a value that is taken for a service, or a service that is taken for a value,
// would make the worker watch the wrong containers.
func TestTargetsKnowTheOptionsOfCompose(t *testing.T) {
	t.Parallel()
	program := devenv.Compose(t)
	option := regexp.MustCompile(`(?m)^ +(?:(-[A-Za-z]), )? *(--[a-z-]+)(?: ([A-Za-z0-9]+))?(?:  |\n|$)`)
	for _, subcommand := range []string{"", "build", "config", "create", "down", "exec", "kill", "logs", "ps", "pull", "restart", "run", "start", "stop", "up"} {
		help, err := exec.CommandContext(t.Context(), program, append(strings.Fields(subcommand), "--help")...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", subcommand, err, help)
		}
		_, options, _ := strings.Cut(string(help), "Options:\n")
		options, _, _ = strings.Cut(options, "\n\n")
		all := option.FindAllStringSubmatch(options, -1)
		if len(all) < 2 {
			t.Fatalf("%s: no options found in %s", subcommand, help)
		}
		for _, found := range all {
			for _, name := range found[1:3] {
				if name == "" {
					continue
				}
				line := []string{"docker", "compose", subcommand, name, "value", "service"}
				if subcommand == "" {
					line = []string{"docker", "compose", name, "value", "service"}
				}
				target, ok := compose.ParseTarget(line)
				got := target.Services
				if subcommand == "" {
					got = append([]string{target.Subcommand}, got...)
				}
				want := []string{"value", "service"}
				if found[3] != "" {
					want = want[1:]
				}
				if subcommand == "exec" || subcommand == "run" {
					want = want[:1]
				}
				if !ok || !reflect.DeepEqual(got, want) {
					t.Errorf("%s %s (value %q): services %q, want %q", subcommand, name, found[3], got, want)
				}
			}
		}
	}
}

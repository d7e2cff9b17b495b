package compose

import (
	"slices"
	"strconv"
	"strings"
)

// A Target says which project and services a compose command line acts on.
type Target struct {
	// Prefix is the command line before the subcommand: program and global
	// options.
	Prefix []string
	// Project is the value of --project-name, or "" if there is none. Compose then
	// derives the name from its environment, its files and its folder: ask it with
	// ConfigCommand.
	Project string
	// Subcommand is build, up, and so on.
	Subcommand string
	// Services are the services that the command line names, in its order and
	// each once. With none, compose acts on all services of the project.
	Services []string
	// DryRun says that compose only prints what it would do.
	DryRun bool
}

// Service is the service of a command line that names exactly one, otherwise "".
func (t Target) Service() string {
	if len(t.Services) != 1 {
		return ""
	}
	return t.Services[0]
}

// dockerValues are the global options of the docker program that take a value.
var dockerValues = []string{"--config", "-c", "--context", "-H", "--host", "-l", "--log-level", "--tlscacert", "--tlscert", "--tlskey"}

// standaloneValues are those of them that the docker-compose program accepts, and
// standaloneFlags its global options of docker without a value.
var (
	standaloneValues = []string{"-H", "--host", "--context", "--log-level", "--tlscacert", "--tlscert", "--tlskey"}
	standaloneFlags  = []string{"-D", "--debug", "--tls", "--tlsverify"}
)

// globalValues are compose's options before the subcommand that take a value.
var globalValues = []string{"-p", "--project-name", "-f", "--file", "--env-file", "--profile", "--project-directory", "--workdir",
	"--progress", "--ansi", "--parallel", "--insecure-registry"}

// commandValues are the options after the subcommand that take a value.
var commandValues = map[string][]string{
	"build":   {"--build-arg", "--builder", "-m", "--memory", "--progress", "--provenance", "--sbom", "--ssh"},
	"config":  {"--format", "--hash", "-o", "--output"},
	"create":  {"--pull", "--scale"},
	"down":    {"--rmi", "-t", "--timeout"},
	"kill":    {"-s", "--signal"},
	"logs":    {"--index", "--since", "-n", "--tail", "--until"},
	"ps":      {"--filter", "--format", "--status"},
	"pull":    {"--policy"},
	"restart": {"-t", "--timeout"},
	"run": {"--cap-add", "--cap-drop", "--entrypoint", "-e", "--env", "--env-from-file", "-l", "--label", "--name", "-p", "--publish", "--pull",
		"-u", "--user", "-v", "--volume", "-w", "--workdir"},
	"exec":  {"-e", "--env", "--index", "-u", "--user", "-w", "--workdir"},
	"start": {"--wait-timeout"},
	"stop":  {"-t", "--timeout"},
	"up":    {"--attach", "--exit-code-from", "--no-attach", "--pull", "--scale", "-t", "--timeout", "--wait-timeout"},
}

// ParseTarget parses a `docker compose …` or `docker-compose …` command line. It
// returns false for every other program, and for a line without a subcommand.
func ParseTarget(argv []string) (Target, bool) {
	at, isCompose := composeOptions(argv)
	if !isCompose {
		return Target{}, false
	}
	var target Target
	values := globalValues
	if argv[0] == "docker-compose" {
		values = append(slices.Clone(values), standaloneValues...)
	}
	at = eachOption(argv, at, values, func(name, value string) {
		switch name {
		case "-p", "--project-name":
			target.Project = value
		case "--dry-run":
			target.DryRun = isTrue(value)
		}
	})
	if at >= len(argv) || argv[at] == "--" {
		return Target{}, false
	}
	target.Prefix, target.Subcommand = argv[:at:at], argv[at]
	values = commandValues[target.Subcommand]
	for at++; at < len(argv); at++ {
		at = eachOption(argv, at, values, func(name, value string) {
			if name == "--dry-run" {
				target.DryRun = isTrue(value)
			}
		})
		if at < len(argv) && argv[at] == "--" {
			target.addServices(argv[at+1:]...)
			break
		}
		if at < len(argv) {
			target.addServices(argv[at])
		}
		if target.Subcommand == "run" || target.Subcommand == "exec" {
			break // What follows is the command to run in the service's container.
		}
	}
	if (target.Subcommand == "run" || target.Subcommand == "exec") && len(target.Services) > 1 {
		target.Services = target.Services[:1]
	}
	return target, true
}

// ActsOnDependencies says that a compose command line also replaces and starts the
// services on which those that it names depend.
func ActsOnDependencies(argv []string) bool {
	target, isCompose := ParseTarget(argv)
	return isCompose && (target.Subcommand == "up" || target.Subcommand == "create") && !target.DryRun && !noDeps(argv)
}

func noDeps(argv []string) bool {
	return slices.Contains(argv, "--no-deps") || slices.Contains(argv, "--no-deps=true")
}

func (t *Target) addServices(names ...string) {
	for _, name := range names {
		if t.Subcommand == "scale" {
			name, _, _ = strings.Cut(name, "=")
		}
		if !slices.Contains(t.Services, name) {
			t.Services = append(t.Services, name)
		}
	}
}

// composeOptions returns where compose's own global options begin.
func composeOptions(argv []string) (int, bool) {
	if len(argv) == 0 {
		return 0, false
	}
	switch argv[0] {
	case "docker-compose":
		return 1, true
	case "docker":
		at := eachOption(argv, 1, dockerValues, func(string, string) {})
		return at + 1, at < len(argv) && argv[at] == "compose"
	}
	return 0, false
}

// eachOption calls found for each option from argv[at] on, and returns where the
// first word is that is none. values are the names of options that take a value.
// An option without a value has "". The options have the forms of POSIX and GNU:
// --name=value, --name value, -n value, -nvalue, -n=value, and -dn value for two
// in one word.
func eachOption(argv []string, at int, values []string, found func(name, value string)) int {
	for ; at < len(argv); at++ {
		word := argv[at]
		if len(word) < 2 || word[0] != '-' || word == "--" {
			return at
		}
		if strings.HasPrefix(word, "--") {
			name, value, joined := strings.Cut(word, "=")
			if !joined && slices.Contains(values, name) && at+1 < len(argv) {
				at++
				value = argv[at]
			}
			found(name, value)
			continue
		}
		for i := 1; i < len(word); i++ {
			name, rest := "-"+word[i:i+1], word[i+1:]
			if !slices.Contains(values, name) {
				if strings.HasPrefix(rest, "=") { // -d=false
					found(name, rest[1:])
					break
				}
				found(name, "")
				continue
			}
			value := strings.TrimPrefix(rest, "=")
			if rest == "" && at+1 < len(argv) {
				at++
				value = argv[at]
			}
			found(name, value)
			break
		}
	}
	return at
}

// isTrue says that an option without a value, or with this one, is set.
func isTrue(value string) bool {
	set, err := strconv.ParseBool(value)
	return value == "" || err == nil && set
}

// standaloneOptions returns docker's global options in the form that the
// docker-compose program takes. It returns false if there is one that it does not
// take.
func standaloneOptions(options []string) ([]string, bool) {
	var taken []string
	all := true
	eachOption(options, 0, dockerValues, func(name, value string) {
		switch name {
		case "-c":
			name = "--context"
		case "-l":
			name = "--log-level"
		}
		switch {
		case slices.Contains(standaloneValues, name):
			taken = append(taken, name, value)
		case slices.Contains(standaloneFlags, name) && isTrue(value):
			taken = append(taken, name)
		case !slices.Contains(standaloneFlags, name):
			all = false
		}
	})
	return taken, all
}

// ServicesCommand returns the command line that lists the services of the
// target's project, one per line.
func (t Target) ServicesCommand() []string { return t.with("config", "--services") }

// AllServicesCommand is ServicesCommand with the services of all profiles.
func (t Target) AllServicesCommand() []string {
	return t.with("--profile", "*", "config", "--services")
}

// with returns a command line with the target's global options.
func (t Target) with(words ...string) []string { return append(slices.Clone(t.Prefix), words...) }

// ParseServices parses the output of [Target.ServicesCommand] and returns the
// services in sorted order.
func ParseServices(output string) []string {
	services := strings.Fields(output)
	slices.Sort(services)
	return services
}

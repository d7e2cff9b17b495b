package compose

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"strings"
)

// BuildCommand returns the command line that builds a service's image.
func BuildCommand(project, service string) []string {
	return []string{"docker", "compose", "--project-name", project, "build", service}
}

// UpCommand returns the command line that replaces a service's container and
// no other.
func UpCommand(project, service string) []string {
	return []string{"docker", "compose", "--project-name", project, "up", "-d", "--no-deps", service}
}

// A Target says which project and service a compose command line acts on.
type Target struct {
	// Prefix is the command line before the subcommand: program and global
	// options.
	Prefix []string
	// Project is the value of --project-name, or "" if there is none.
	Project string
	// Subcommand is build, up, and so on.
	Subcommand string
	// Service is the last argument, or "" if that is an option.
	Service string
}

// globalValues are compose's global options that take a value as a separate
// argument.
var globalValues = []string{"-p", "--project-name", "-f", "--file", "--env-file", "--profile", "--project-directory", "--progress", "--ansi", "--parallel"}

// ParseTarget parses a `docker compose …` or `docker-compose …` command line.
// It returns false for every other program.
func ParseTarget(argv []string) (Target, bool) {
	rest, prefix := argv, 0
	switch {
	case len(argv) > 2 && argv[0] == "docker" && argv[1] == "compose":
		prefix = 2
	case len(argv) > 1 && argv[0] == "docker-compose":
		prefix = 1
	default:
		return Target{}, false
	}
	var target Target
	for i := prefix; i < len(argv); i++ {
		word := argv[i]
		if !strings.HasPrefix(word, "-") {
			target.Prefix, target.Subcommand, rest = argv[:i:i], word, argv[i+1:]
			break
		}
		name, value, joined := strings.Cut(word, "=")
		if slices.Contains(globalValues, name) && !joined && i+1 < len(argv) {
			i++
			value = argv[i]
		}
		if name == "-p" || name == "--project-name" {
			target.Project = value
		}
	}
	if target.Subcommand == "" {
		return Target{}, false
	}
	if len(rest) > 0 && !strings.HasPrefix(rest[len(rest)-1], "-") {
		target.Service = rest[len(rest)-1]
	}
	return target, true
}

// ServicesCommand returns the command line that lists the services of the
// target's project, one per line.
func (t Target) ServicesCommand() []string {
	return append(slices.Clone(t.Prefix), "config", "--services")
}

// ParseServices parses the output of [Target.ServicesCommand] and returns the
// services in sorted order.
func ParseServices(output string) []string {
	services := strings.Fields(output)
	slices.Sort(services)
	return services
}

// Program says how to start compose on this machine.
type Program struct {
	// Standalone is the path of a docker-compose program to use in place of
	// `docker compose`, for machines without the docker CLI or without its
	// compose plugin. If it is empty, command lines run as they are written,
	// and `docker-compose` from PATH is used if there is no `docker`.
	Standalone string
	// LookPath finds a program in PATH. Defaults to exec.LookPath.
	LookPath func(string) (string, error)
}

// Resolve returns the command line to start in place of argv: with another
// compose program as the fields say, otherwise argv itself.
func (p Program) Resolve(argv []string) []string {
	if len(argv) < 2 || argv[0] != "docker" || argv[1] != "compose" {
		if len(argv) > 0 && argv[0] == "docker-compose" && p.Standalone != "" {
			return append([]string{p.Standalone}, argv[1:]...)
		}
		return argv
	}
	standalone := p.Standalone
	if standalone == "" {
		lookPath := p.LookPath
		if lookPath == nil {
			lookPath = exec.LookPath
		}
		if _, err := lookPath("docker"); !errors.Is(err, exec.ErrNotFound) {
			return argv
		}
		var err error
		if standalone, err = lookPath("docker-compose"); err != nil {
			return argv
		}
	}
	return append([]string{standalone}, argv[2:]...)
}

// A State reads the state of containers. [Engine] implements it.
type State interface {
	// Containers lists the containers of a service in a project, sorted by
	// name. An empty service means all services.
	Containers(ctx context.Context, project, service string) ([]Container, error)
	// LogTail returns the last lines of the log of the container with this id.
	LogTail(ctx context.Context, id string, lines int) (string, error)
}

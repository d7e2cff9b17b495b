package compose

import (
	"context"
	"errors"
	"os/exec"
	"slices"
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
	at, isCompose := composeOptions(argv)
	if !isCompose {
		return argv
	}
	if argv[0] == "docker-compose" {
		if p.Standalone == "" {
			return argv
		}
		return append([]string{p.Standalone}, argv[1:]...)
	}
	options, taken := standaloneOptions(argv[1 : at-1])
	if !taken {
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
	return slices.Concat([]string{standalone}, options, argv[at:])
}

// A State reads the state of containers. [Engine] implements it.
type State interface {
	// Containers lists the containers of a service in a project, sorted by
	// name. An empty service means all services.
	Containers(ctx context.Context, project, service string) ([]Container, error)
	// LogTail returns the last lines of the log of the container with this id.
	LogTail(ctx context.Context, id string, lines int) (string, error)
	// Neighbourhood lists all running containers, and where they can be reached.
	Neighbourhood(ctx context.Context) (Neighbourhood, error)
}

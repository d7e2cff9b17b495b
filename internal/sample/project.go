// Package sample creates the compose project that the demo and the end-to-end
// tests repair: a git work tree with the services api and other, whose images
// need no registry.
//
// It manages the project's files, images and containers, and removes them and
// nothing else. The files come from testdata/projects/repair; the program in the
// containers is the folder service next to this file.
package sample

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// Label is set on every image of a sample project. Its value is the project's
// name.
const Label = "mm-orchestrator.sample"

// Dependency is the line in requirements.txt without which service api does
// not start.
const Dependency = "flask==3.1.0"

// Config configures [Create].
type Config struct {
	// Module is the root folder of this module, which has the project's files.
	Module string
	// Dir is the work tree to create. It must not exist, or be empty.
	Dir string
	// Name is the compose project's name: lower case letters, digits, hyphens.
	Name string
	// Service is the path of the program for the containers, which BuildService
	// builds.
	Service string
	// Compose is the path of a docker-compose program.
	Compose string
	// Healthy adds the dependency to the first commit.
	Healthy bool
}

// Project is a compose project on disk and, between Up and Remove, in the
// docker engine.
type Project struct {
	// Name is the name of the compose project, Dir its work tree.
	Name, Dir string
	// Port is the port on 127.0.0.1 at which service api is published.
	Port int

	compose string
	// dockerConfig is a DOCKER_CONFIG folder with which `docker compose` runs
	// that program.
	dockerConfig string
}

// ServicePackage is the package of the containers' program, relative to the
// module's root. The program must be linked statically.
const ServicePackage = "internal/sample/service"

// BuildService builds the containers' program and writes it to the file out.
func BuildService(ctx context.Context, module, out string) error {
	command := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, "./"+ServicePackage)
	command.Dir = module
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("building the sample service: %w: %s", err, bytes.TrimSpace(text))
	}
	return nil
}

// Create copies the project's files to cfg.Dir and commits them. It starts
// nothing. It also creates the folder cfg.Dir + ".docker".
func Create(ctx context.Context, cfg Config) (*Project, error) {
	// A fixed port: one that docker chooses changes whenever the container is
	// recreated.
	ports, err := devenv.FreePorts(1)
	if err != nil {
		return nil, err
	}
	p := &Project{Name: cfg.Name, Dir: cfg.Dir, Port: ports[0], compose: cfg.Compose, dockerConfig: cfg.Dir + ".docker"}
	if err := os.CopyFS(cfg.Dir, os.DirFS(filepath.Join(cfg.Module, "testdata", "projects", "repair"))); err != nil {
		return nil, fmt.Errorf("copying the sample project: %w", err)
	}
	for _, service := range []string{"api_service", "other"} {
		if err := copyProgram(cfg.Service, filepath.Join(cfg.Dir, service, "service")); err != nil {
			return nil, err
		}
		name := strings.NewReplacer(baseName+":PROJECT", baseName+":"+cfg.Name, "=PROJECT ", "="+cfg.Name+" ").Replace
		if err := p.rewrite(filepath.Join(service, "Dockerfile"), name); err != nil {
			return nil, err
		}
	}
	environment := fmt.Sprintf("API_PORT=%d\n", p.Port)
	if err := os.WriteFile(filepath.Join(cfg.Dir, ".env"), []byte(environment), 0o644); err != nil {
		return nil, err
	}
	plugins := filepath.Join(p.dockerConfig, "cli-plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		return nil, err
	}
	if err := os.Symlink(cfg.Compose, filepath.Join(plugins, "docker-compose")); err != nil {
		return nil, err
	}
	if cfg.Healthy {
		if err := p.Require(Dependency); err != nil {
			return nil, err
		}
	}
	if _, err := p.Git(ctx, "init", "--quiet", "--initial-branch=main"); err != nil {
		return nil, err
	}
	return p, p.Commit(ctx, "the project as it is deployed")
}

// Environment returns variables for the process that runs a plan's commands:
// with them `docker compose` finds the compose program.
func (p *Project) Environment() []string { return []string{"DOCKER_CONFIG=" + p.dockerConfig} }

// HealthURL returns the URL at which a healthy service api answers.
func (p *Project) HealthURL() string { return fmt.Sprintf("http://127.0.0.1:%d/health", p.Port) }

// Requirements is the path of the file that decides whether api starts,
// relative to Dir.
const Requirements = "api_service/requirements.txt"

// Require appends a line to requirements.txt and leaves it uncommitted.
func (p *Project) Require(line string) error {
	return p.rewrite(Requirements, func(text string) string { return text + line + "\n" })
}

// Drop removes the lines of requirements.txt that begin with prefix.
func (p *Project) Drop(prefix string) error {
	lines := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(prefix) + `.*\n`)
	return p.rewrite(Requirements, func(text string) string { return lines.ReplaceAllString(text, "") })
}

// Append adds a line to any file of the work tree, uncommitted.
func (p *Project) Append(name, line string) error {
	return p.rewrite(name, func(text string) string { return text + line + "\n" })
}

func (p *Project) rewrite(name string, change func(string) string) error {
	path := filepath.Join(p.Dir, name)
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return os.WriteFile(path, []byte(change(string(text))), 0o644)
}

// Commit commits all changes in the work tree.
func (p *Project) Commit(ctx context.Context, message string) error {
	if _, err := p.Git(ctx, "add", "--all"); err != nil {
		return err
	}
	_, err := p.Git(ctx, "-c", "user.name=sample", "-c", "user.email=sample@localhost", "commit", "--quiet", "--message", message)
	return err
}

// Git runs git in the work tree, without the user's own configuration, and
// returns its output.
func (p *Project) Git(ctx context.Context, args ...string) (string, error) {
	return p.run(ctx, "git", args, "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null")
}

// baseName is the repository of the projects' base images; the tag is the
// project's name.
const baseName = "mm-orchestrator-sample"

// Up builds the images and starts both services. It does not wait for health.
func (p *Project) Up(ctx context.Context) error {
	if err := ImportBase(ctx, baseName+":"+p.Name, Label+"="+p.Name); err != nil {
		return err
	}
	_, err := p.Compose(ctx, "up", "--build", "--detach")
	return err
}

// Compose runs the compose program for this project and returns its output.
func (p *Project) Compose(ctx context.Context, args ...string) (string, error) {
	return p.run(ctx, p.compose, append([]string{"--project-name", p.Name, "--project-directory", p.Dir}, args...))
}

// Container is the state of a service's container.
type Container struct {
	ID    string
	Image string
	State struct {
		Status string
		Health *struct{ Status string }
	}
	RestartCount int
}

// Health returns the health that docker reports, or "" without a health check.
func (c Container) Health() string {
	if c.State.Health == nil {
		return ""
	}
	return c.State.Health.Status
}

// ErrNoContainer says that a service has no container.
var ErrNoContainer = errors.New("the service has no container")

// Container returns the state of the only container of a service.
func (p *Project) Container(ctx context.Context, service string) (Container, error) {
	text, err := p.run(ctx, "docker", []string{"ps", "--all", "--quiet", "--no-trunc",
		"--filter", "label=com.docker.compose.project=" + p.Name, "--filter", "label=com.docker.compose.service=" + service})
	if err != nil {
		return Container{}, err
	}
	ids := strings.Fields(text)
	if len(ids) == 0 {
		return Container{}, fmt.Errorf("%s: %w", service, ErrNoContainer)
	}
	text, err = p.run(ctx, "docker", []string{"inspect", ids[0]})
	if err != nil {
		return Container{}, err
	}
	var containers []Container
	if err := json.Unmarshal([]byte(text), &containers); err != nil {
		return Container{}, fmt.Errorf("docker inspect: %w", err)
	}
	return containers[0], nil
}

// Remove stops and removes the containers, the network and the images of this
// project, and what runs have pinned of them. The files stay.
func (p *Project) Remove(ctx context.Context) error {
	_, down := p.Compose(ctx, "down", "--timeout", "1", "--volumes", "--remove-orphans")
	pins, pinned := p.run(ctx, "docker", []string{"container", "ls", "--all", "--quiet", "--filter", "label=mm-orchestrator.project=" + p.Name})
	if ids := strings.Fields(pins); len(ids) > 0 {
		_, pinned = p.run(ctx, "docker", append([]string{"container", "rm", "--force", "--volumes"}, ids...))
	}
	text, list := p.run(ctx, "docker", []string{"image", "ls", "--all", "--quiet", "--no-trunc", "--filter", "label=" + Label + "=" + p.Name})
	if ids := strings.Fields(text); len(ids) > 0 {
		// Removing an image also removes its untagged parents, for which docker
		// then reports "no such image".
		_, _ = p.run(ctx, "docker", append([]string{"image", "rm", "--force"}, ids...))
	}
	return errors.Join(down, pinned, list)
}

func (p *Project) run(ctx context.Context, program string, args []string, environment ...string) (string, error) {
	command := exec.CommandContext(ctx, program, args...)
	command.Dir = p.Dir
	command.Env = append(append(os.Environ(), p.Environment()...), environment...)
	command.WaitDelay = 5 * time.Second
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	if err := command.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s in %s: %w: %s", filepath.Base(program), strings.Join(args, " "), p.Dir, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return stdout.String(), nil
}

func copyProgram(from, to string) error {
	program, err := os.ReadFile(from)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("the sample service is not built: %w", err)
	}
	if err != nil {
		return err
	}
	return os.WriteFile(to, program, 0o755)
}

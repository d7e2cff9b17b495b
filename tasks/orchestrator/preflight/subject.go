package preflight

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/excerpt"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// Names of looks. Most are those of the doctor's checks too.
const (
	lookEngine        = "docker"
	lookWorkspace     = "workspace"
	lookGit           = "git"
	lookGitLock       = "git-lock"
	lookGitState      = "git-state"
	lookTrust         = "git-trust"
	lookCompose       = "compose"
	lookComposeEngine = "compose-engine"
	lookServices      = "services"
	lookTarget        = "target"
	lookArtifacts     = "artifacts"
	lookDisk          = "disk"
)

// An Engine is the docker engine as this process reaches it. [compose.Engine]
// implements it.
type Engine interface {
	// Place is the engine's address as messages show it.
	Place() string
	// Ping returns nil if the engine answers.
	Ping(ctx context.Context) error
	// RootDirectory is where the engine has images and containers, as it names it.
	RootDirectory(ctx context.Context) (string, error)
	// FindTargets lists the containers of services.
	FindTargets(ctx context.Context, project string, services []string) (compose.Targets, error)
}

// A Project is a compose project that the looks are about.
type Project struct {
	// Target has the program, and the options before the subcommand.
	Target compose.Target
	// Dir is where the command line runs.
	Dir string
	// Services are those that must exist.
	Services []string
}

// A Subject is what looks look at. A field that is empty is not looked at, unless
// it says something else.
type Subject struct {
	// Workspace is the absolute path of the directory that runs change.
	Workspace string
	// Environ is the environment of plans' commands.
	Environ []string
	// Find returns the path of a program in the PATH of Environ, "" for none.
	// Required.
	Find func(program string) string
	// Compose says how compose is started.
	Compose compose.Program
	// Projects are the compose projects; none means that no command uses compose.
	Projects []Project
	// Engine may be nil: then only compose is asked.
	Engine Engine
	// Removable says that the step itself removes a lock file of git, as one that a
	// killed git of the same run has left. Nil means none.
	Removable func(change.GitLock) bool
	// LockPatience is how long a lock that a git uses may stay. Zero means that such
	// a lock is no fault: it ends by itself.
	LockPatience time.Duration
	// ArtifactDirectory is where artifacts go; it need not exist.
	ArtifactDirectory string
	// PinDirectory is where images are saved, "" for nowhere.
	PinDirectory string
	// DiskReserve is how many bytes each file system must have free.
	DiskReserve uint64
	// Redact removes secrets from what programs print, before it is cut: half of a
	// secret is none that a redactor knows. Defaults to leaving it.
	Redact func(string) string
	// SettingName returns how the operator has set the setting of a variable.
	// Required.
	SettingName func(variable string) string
	// Answers remembers what git has said, nil for not.
	Answers *change.Answers
	// Owner and Logger are for the programs that looks start.
	Owner  processes.Owner
	Logger *slog.Logger
}

// programGrace is the time between SIGTERM and SIGKILL for a program of a look.
// All of them only read.
const programGrace = 100 * time.Millisecond

// outputLimit bounds the output that is kept, in bytes.
const outputLimit = 256 << 10

// errNotFound says that there is no such program.
var errNotFound = errors.New("not installed, or not on the PATH")

// run runs a program. The error has the text of stderr.
func (s Subject) run(ctx context.Context, dir string, environ, argv []string) (string, error) {
	path := s.Find(argv[0])
	if path == "" {
		return "", fmt.Errorf("%s is %w", argv[0], errNotFound)
	}
	if info, err := os.Stat(dir); err != nil || !info.IsDir() {
		// Another look says so. Not this process's own directory, in which programs
		// would find files of their own.
		dir = "/"
	}
	stdout, stderr := &excerpt.Head{Limit: outputLimit}, &excerpt.Head{Limit: outputLimit}
	// Never nil: package exec would use this process's own environment.
	cmd := &exec.Cmd{Path: path, Args: argv, Dir: dir, Env: append([]string{}, environ...), Stdout: stdout, Stderr: stderr}
	err := processes.Runner{Grace: programGrace, Logger: s.Logger}.Run(ctx, s.Owner, cmd, nil)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return "", cause
		}
		if text := strings.TrimSpace(stderr.Words()); text != "" {
			err = errors.New(text)
		}
		return "", err
	}
	return strings.TrimSpace(string(stdout.Kept)), nil
}

// git runs a git command of our own in the workspace.
func (s Subject) git(ctx context.Context, args ...string) (string, error) {
	return s.run(ctx, s.Workspace, change.GitEnviron(s.Environ, "*"), append([]string{"git"}, args...))
}

// oneLine shortens what another program has printed, for the middle of a
// sentence.
func (s Subject) oneLine(text string) string {
	if s.Redact != nil {
		text = s.Redact(text)
	}
	text = strings.Join(strings.Fields(text), " ")
	const most = 500
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + " …"
	}
	return strings.TrimRight(text, ".?! ")
}

// Looks are those that need no run: at all that a worker needs for any run.
func (s Subject) Looks() []Look {
	looks := append(s.LooksAtGit(), s.LookAtWorkspace(), s.LookAtTrust(),
		s.LookAtComposeVersion(), s.LookAtComposeEngine(), s.LookAtAllServices(), s.LookAtDisk())
	if s.Engine != nil {
		looks = append(looks, s.LookAtEngine())
	}
	if s.ArtifactDirectory != "" {
		looks = append(looks, s.LookAtArtifacts())
	}
	return looks
}

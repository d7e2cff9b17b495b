package speckit

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/github"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// Repositories says where the repositories of runs are, and how they are cloned.
type Repositories struct {
	// Git clones and pushes. Required.
	Git *gitrepo.Git
	// Server is the base address: the repository owner/name is at Server/owner/name.git.
	// Defaults to https://github.com.
	Server string
	// Token is sent to the server, nil for none.
	Token gitrepo.Token
	// Base is the branch from which changes start and to which pull requests go. Empty
	// means the repository's default branch.
	Base string
	// Dir is the absolute path of the directory in which tasks make their clones. It is
	// emptied of a run's when its task ends. Required.
	Dir string
}

func (r Repositories) withDefaults() Repositories {
	if r.Server == "" {
		r.Server = "https://github.com"
	}
	return r
}

func (r Repositories) validate() error {
	switch {
	case r.Git == nil:
		return errors.New("speckit: Config.Repositories.Git is nil")
	case !filepath.IsAbs(r.Dir):
		return fmt.Errorf("speckit: Config.Repositories.Dir is %q, want an absolute path", r.Dir)
	case r.Base != "":
		if err := gitrepo.CheckBranch(r.Base); err != nil {
			return fmt.Errorf("speckit: Config.Repositories.Base: %w", err)
		}
	}
	_, err := r.Git.Remote(github.RepositoryURL(r.withDefaults().Server, "owner/name"), nil)
	return err
}

// repository is the name of the run's repository, as owner/name.
func (a *attempt) repository() (string, error) {
	name := cmp.Or(a.context.text("repository"), a.run.Repository, a.config.Repository)
	switch {
	case name == "":
		return "", valueError("the run names no repository: set %s, or submit the run with one", a.config.SettingName("GITHUB_REPOSITORY"))
	case github.CheckName(name) != nil:
		return "", valueError("the repository %.100q does not have the form owner/name: correct %s, or submit the run with another one", name, a.config.SettingName("GITHUB_REPOSITORY"))
	}
	return name, nil
}

// remote is the run's repository on the server, and git for it, whose programs end with
// the task.
func (a *attempt) remote() (*gitrepo.Git, *gitrepo.Remote, error) {
	r := a.config.Repositories.withDefaults()
	name, err := a.repository()
	if err != nil {
		return nil, nil, err
	}
	runner := processes.Runner{Logger: a.log}
	git := r.Git.WithRun(func(ctx context.Context, cmd *exec.Cmd) error {
		if end, has := ctx.Deadline(); has { // of the command
			defer waitAtMost(ctx, time.Until(end))()
		}
		return runner.Run(ctx, a.owner(), cmd, nil)
	})
	remote, err := git.Remote(github.RepositoryURL(r.Server, name), r.Token)
	if err != nil {
		return nil, nil, valueError("%v", err)
	}
	return git, remote, nil
}

// pauses are the waits before git tries again what a server that could not be reached has
// not done.
var pauses = []time.Duration{time.Second, 4 * time.Second}

// retried calls do again if the git server could not be reached.
func (a *attempt) retried(ctx context.Context, what string, do func() error) error {
	for try := 0; ; try++ {
		err := do()
		var refused *gitrepo.RemoteError
		if !errors.As(err, &refused) || refused.Refusal != gitrepo.Unreachable || try == len(pauses) || ctx.Err() != nil {
			return err
		}
		a.log.Warn("the git server could not be used, and is tried again", "what", what, "error", err)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pauses[try]):
		}
	}
}

// cloneDir is the directory of this task for a clone. A run has its own, and so has each
// task of it.
func (a *attempt) cloneDir() string {
	return filepath.Join(a.config.Repositories.Dir, a.run.ID, string(a.task))
}

// owner names the task for the programs that it starts.
func (a *attempt) owner() processes.Owner {
	return processes.Owner{Run: a.run.ID, Step: string(a.task)}
}

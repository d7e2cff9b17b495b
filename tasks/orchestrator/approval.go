package orchestrator

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// GateService returns a function that names the service whose approval gate applies to
// a run: the compose service of its target. With a nil policy the built-in one counts.
func GateService(p *policy.Policy) func(store.Run) string {
	if p == nil {
		p = policy.Default()
	}
	return func(run store.Run) string {
		if service, known := p.Services[strings.ToLower(strings.TrimSpace(run.TargetService))]; known {
			return service.ComposeService
		}
		return strings.ToLower(strings.TrimSpace(run.TargetService))
	}
}

func (o *Orchestrator) gateService(run store.Run) string { return GateService(o.policy)(run) }

// checkApproval asks whether the run's approval covers what the step is about to do.
// Call it immediately before the first effect. After a failure the step must do
// nothing more; if s.refused is set then, it ends without an outcome.
//
// While the database is unavailable it waits, as the act must not come first. The wait
// ends with ctx.
func (s *stepRun) checkApproval(ctx context.Context, acts bool) *Failure {
	switch a := s.approval; {
	case a == nil || s.step == store.StepRollback:
		return nil
	case a.Violation != "":
		return commandError(a.Violation)
	case !a.Check:
		return nil
	}
	check := store.ApprovalCheck{Acts: acts, Wait: cmp.Or(s.profile.ApprovalWait, s.config.ApprovalWait), Service: s.gateService(s.run)}
	var failure *Failure
	if check.Files, check.Images, failure = s.effects(ctx, s.step == store.StepVerify); failure != nil {
		return failure
	}
	var err error
	logged := false
	retryWrite(ctx, maxRecordPause, func() bool {
		attempt, cancel := context.WithTimeout(ctx, s.config.FinishTimeout)
		defer cancel()
		s.refused, err = s.config.Steps.CheckApproval(attempt, s.journal.claim, check)
		if !mayRecover(err) || ctx.Err() != nil {
			return true
		}
		if !logged {
			s.log.Error("the run's approval cannot be checked yet, waiting for the database before the step goes on", "error", err)
			logged = true
		}
		return false
	})
	switch cause := context.Cause(ctx); {
	case s.refused != nil:
		failure = commandError(s.refused.Message)
		if s.refused.Violation {
			s.refused = nil
		}
		return failure
	case err == nil && cause == nil:
		s.approval.Check = !acts && s.step != store.StepVerify
		return nil
	case errors.Is(err, store.ErrClaimLost):
		s.log.Warn("step was taken over by another worker, ending it here", "error", err)
		s.journal.endWork(endCause{takenOver, err})
		return recordEnded(err)
	case cause != nil:
		return recordEnded(cause)
	}
	return unexpected(fmt.Errorf("the run's approval cannot be checked, so that the step changes nothing: %w", err))
}

// effects returns what the run would deploy, or has deployed: its workspace and, with
// images, what the service's containers run.
func (s *stepRun) effects(ctx context.Context, images bool) (*store.Files, []string, *Failure) {
	files, err := s.workspaceFiles(ctx, s.plan.workspace(artifacts.Resolve(s.config.Workspace)))
	if err != nil {
		return nil, nil, recordEnded(err)
	}
	if !images || s.config.Engine == nil {
		return files, nil, nil
	}
	project, service := s.plan.target(s.profile)
	services := []string{service}
	if image := s.record.Image; image != nil && image.EngineSeen {
		project = image.Project
		if len(image.Services) > 0 {
			services = image.Services
		}
	}
	var found []string
	look := func() error {
		now, err := s.config.Engine.Project(ctx, project)
		if err != nil {
			return err
		}
		found = []string{}
		for _, c := range change.ProjectOf(now).Containers {
			if text := c.Service + " " + c.ImageID; slices.Contains(services, c.Service) && !slices.Contains(found, text) {
				found = append(found, text)
			}
		}
		slices.Sort(found)
		return nil
	}
	if image := s.record.Image; image == nil || !image.EngineSeen {
		// The run is not carried out by this engine, if there is one at all: do not
		// wait for it.
		if err := look(); err != nil {
			found = nil
		}
		return files, found, nil
	}
	err = s.untilEngineAnswers(ctx, look)
	switch cause := context.Cause(ctx); {
	case cause != nil:
		return nil, nil, recordEnded(cause)
	case err != nil:
		found = []string{"unknown, as the docker engine does not answer"}
	}
	return files, found, nil
}

// leaveBehind returns what a step has left that changes something, for the next look
// at the run's approval. It is nil for a run that needs none, and if the worker cannot
// look now: then a later change would go unseen, but none that follows it.
func (s *stepRun) leaveBehind(ctx context.Context) *store.Effects {
	changes := s.step == store.StepPatch || s.step == store.StepBuild || s.step == store.StepRestart
	if s.approval == nil || !changes || s.refused != nil || context.Cause(ctx) != nil {
		return nil
	}
	// Without files, if the worker cannot look: what an earlier step has left is of no use.
	files, images, _ := s.effects(ctx, s.step == store.StepRestart)
	return &store.Effects{Files: files, Images: images}
}

// workspaceFiles returns the files of a workspace that differ from the commit that is
// checked out, as git sees them, with a digest of each. The error is the cause of ctx;
// what else goes wrong is in the result, which then equals no workspace that could be
// read.
//
// It works on a copy of the index: git's own would be locked for the commands of
// another run, and has flags that hide edits.
func (s *stepRun) workspaceFiles(ctx context.Context, workspace string) (*store.Files, error) {
	look := workspaceLook{stepRun: s, isArtifact: s.artifactFilter()}
	files, err := look.files(ctx, workspace, 0)
	if cause := context.Cause(ctx); cause != nil {
		return nil, cause
	}
	if err != nil {
		return &store.Files{Problem: s.clean(firstLine(err.Error()))}, nil
	}
	return files, nil
}

func firstLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return cut(line)
}

type workspaceLook struct {
	*stepRun
	isArtifact func(path string) bool
}

// maxNesting is how deep repositories inside of the workspace are looked at.
const maxNesting = 3

func (l workspaceLook) files(ctx context.Context, dir string, depth int) (*store.Files, error) {
	paths, err := l.text(ctx, dir, nil, "rev-parse", "--show-toplevel", "--git-path", "index")
	if err != nil {
		return nil, err
	}
	top, index, _ := strings.Cut(paths, "\n")
	if !filepath.IsAbs(index) {
		index = filepath.Join(dir, index)
	}
	scratch, err := os.MkdirTemp("", "mm-orchestrator-index-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	copied := filepath.Join(scratch, "index")
	if err := copyIndex(copied, index); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	own := []string{"GIT_INDEX_FILE=" + copied}
	head, err := l.text(ctx, top, nil, "rev-parse", "--verify", "--quiet", "HEAD^{tree}")
	base := head
	if err != nil {
		head = ""
		if base, err = l.text(ctx, top, nil, "hash-object", "-t", "tree", "/dev/null"); err != nil {
			return nil, err
		}
	}
	// It exits with 1 if files differ.
	if _, err := l.git(ctx, top, own, "update-index", "-q", "--really-refresh"); err != nil && context.Cause(ctx) != nil {
		return nil, err
	}
	changed, err := l.git(ctx, top, own, "diff-index", "--name-only", "-z", "--no-renames", "--ignore-submodules=untracked", base)
	if err != nil {
		return nil, err
	}
	listed, err := l.git(ctx, top, own, "ls-files", "-t", "-z", "--cached", "--others", "--exclude-standard")
	if err != nil {
		return nil, err
	}
	tracked, others := map[string]string{}, map[string]string{}
	add := func(edits map[string]string, from, name string) error {
		path := filepath.Join(from, name)
		if name == "" || l.isArtifact(path) {
			return nil
		}
		digest, err := l.digest(ctx, path, depth)
		if err != nil {
			return err
		}
		if relative, err := filepath.Rel(dir, path); err == nil {
			path = relative
		}
		edits[l.clean(printable(path))] = digest
		return nil
	}
	for name := range strings.SplitSeq(string(changed), "\x00") {
		if err := add(tracked, top, name); err != nil {
			return nil, err
		}
	}
	for entry := range strings.SplitSeq(string(listed), "\x00") {
		tag, name, _ := strings.Cut(entry, " ")
		switch path := filepath.Join(top, name); tag {
		case "?":
			if !change.Below(artifacts.Resolve(dir), path) {
				continue
			}
			err = add(others, top, name)
		case "S":
			// A file with the flag skip-worktree is never compared.
			if _, missing := os.Lstat(path); missing == nil {
				err = add(tracked, top, name)
			}
		}
		if err != nil {
			return nil, err
		}
	}
	return store.NewFiles(head, tracked, others), nil
}

// copyIndex copies git's index with its time: git compares a file's content, in place of
// size and time, if the file is not older than the index. A copy that looks newer would
// hide an edit that was made in the moment in which git wrote the index.
func copyIndex(to, from string) error {
	info, err := os.Stat(from) // before the content: an older time only costs comparisons
	if err != nil {
		return err
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		return err
	}
	return os.Chtimes(to, time.Time{}, info.ModTime())
}

// digest returns what identifies an entry of the workspace. An entry that is gone, or
// that cannot be read, has a digest too.
func (l workspaceLook) digest(ctx context.Context, path string, depth int) (string, error) {
	if cause := context.Cause(ctx); cause != nil {
		return "", cause
	}
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "absent", nil
	case err != nil:
		return "unreadable", nil
	}
	sum := sha256.New()
	fmt.Fprintf(sum, "%s %t\x00", info.Mode().Type(), info.Mode()&0o100 != 0)
	switch {
	case info.IsDir():
		if depth >= maxNesting {
			return "folder", nil
		}
		nested, err := l.files(ctx, path, depth+1)
		if err != nil {
			return "folder", context.Cause(ctx)
		}
		commit, _ := l.text(ctx, path, nil, "rev-parse", "--verify", "--quiet", "HEAD")
		io.WriteString(sum, nested.Digest+commit)
	case info.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(path)
		if err != nil {
			return "unreadable", nil
		}
		io.WriteString(sum, target)
	case info.Mode().IsRegular():
		file, err := os.Open(path)
		if err != nil {
			return "unreadable", nil
		}
		defer file.Close()
		if _, err := io.Copy(sum, file); err != nil {
			return "unreadable", nil
		}
	}
	return base64.RawStdEncoding.EncodeToString(sum.Sum(nil)), nil
}

func (l workspaceLook) text(ctx context.Context, dir string, env []string, args ...string) (string, error) {
	out, err := l.git(ctx, dir, env, args...)
	return strings.TrimSpace(string(out)), err
}

func (l workspaceLook) git(ctx context.Context, dir string, env []string, args ...string) ([]byte, error) {
	var out, problem bytes.Buffer
	code, err := l.runner.git(ctx, change.GitCommand{Dir: dir, Args: args, Env: append(env, "GIT_OPTIONAL_LOCKS=0"), Stdout: &out, Stderr: &problem})
	if err == nil && code != 0 {
		err = fmt.Errorf("git %s exits with %d: %s", args[0], code, firstLine(problem.String()))
	}
	return out.Bytes(), err
}

// approvals is what a sweep does for runs that wait for an approval.
type approvals struct {
	// next is when it looks at workspaces again, looked what it saw last, by workspace.
	next   time.Time
	looked map[string]*store.Files
}

const (
	// lookInterval is the time between two looks at the workspaces of waiting runs.
	lookInterval = 2 * time.Second
	// lookShare bounds the share of time that the looks take.
	lookShare = 20
)

// sweepApprovals records what waiting runs would do, and ends those that have waited
// before verify for too long.
func (s *sweeper) sweepApprovals(ctx context.Context) error {
	began := time.Now()
	fresh := !began.Before(s.approvals.next)
	if fresh || s.approvals.looked == nil {
		s.approvals.looked = map[string]*store.Files{}
	}
	look := func(ctx context.Context, run store.Run) *store.Files {
		stall.FromContext(ctx).Progress("")
		plan, failure := parsePlan(run.Steps)
		if failure != nil {
			return nil
		}
		workspace := plan.workspace(artifacts.Resolve(s.config.Workspace))
		if known, found := s.approvals.looked[workspace]; found || !fresh {
			return known
		}
		r := &stepRun{Orchestrator: s.Orchestrator, log: s.log, runID: run.ID, runner: s.runner.of(processes.Owner{Run: run.ID, Step: "approval"})}
		if place, err := s.config.Artifacts.ForRun(run.ArtifactRoot, run.ID); err == nil {
			r.place = place
		}
		files, err := r.workspaceFiles(ctx, workspace)
		if err != nil {
			return nil
		}
		s.approvals.looked[workspace] = files
		return files
	}
	err := s.config.Steps.PresentAwaiting(ctx, s.config.Queue, s.gateService, look)
	if fresh {
		took := time.Since(began)
		s.approvals.next = time.Now().Add(max(lookInterval, lookShare*took))
	}
	ended, endErr := s.config.Steps.EndUnapproved(ctx, s.config.Queue, s.rollbackMessage)
	for _, run := range ended {
		s.log.Error("run has ended while it waited for its approval", "run_id", run.RunID, "step", string(run.Step), "rollback", run.RollbackSent, "error", run.Message)
		s.config.Metrics.StepFinished(string(run.Step), false, 0)
		if run.Finished.RunEnded {
			s.writeTrail(ctx, s.log, run.RunID)
			s.config.Metrics.RunFinished(string(run.Finished.Status), run.Finished.Duration)
		} else {
			s.config.Metrics.RunStatus(string(run.Finished.Status))
		}
	}
	if len(ended) > 0 {
		endErr = errors.Join(endErr, s.publishParked(ctx))
	}
	return errors.Join(err, endErr)
}

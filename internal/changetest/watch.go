package changetest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest/command"
)

// artifactsInside is the artifact root within the work tree, which no state has.
const artifactsInside = "var/artifacts"

// A Watch is what a project was before a run, to compare with what it is after.
type Watch struct {
	project *Project
	kind    WorkspaceKind
	subject Subject
	// head is the state without the edits that the run deploys, before the one with
	// them. after is what TakenBack or Changed has seen.
	head, before, after State
	// changed are the paths of the run's own change.
	changed []string
}

// Watch makes the work tree for a kind of workspace, and takes the state. change is
// what the run is to deploy: for Deployed, Watch makes it as the operator's edits.
func (p *Project) Watch(ctx context.Context, kind WorkspaceKind, random *rand.Rand, change []command.Act) (*Watch, error) {
	if err := p.prepare(ctx, kind, random); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(p.Workspace, artifactsInside), 0o755); err != nil {
		return nil, err
	}
	w := &Watch{project: p, kind: kind, subject: p.subject(artifactsInside)}
	for _, act := range change {
		w.changed = append(w.changed, act.Path)
	}
	var err error
	if w.head, err = Take(ctx, w.subject); err != nil {
		return nil, err
	}
	if kind == Deployed {
		for _, act := range change {
			if err := act.In(p.Workspace); err != nil {
				return nil, fmt.Errorf("the operator's edits: %w", err)
			}
		}
		if random.IntN(2) == 0 {
			if _, err := Git(ctx, p.Workspace, "add", "--update"); err != nil {
				return nil, err
			}
		}
	}
	w.before, err = Take(ctx, w.subject)
	return w, err
}

// Before returns the state before the run: without the edits that it deploys, and with
// them.
func (w *Watch) Before() (head, before State) { return w.head, w.before }

// After returns what TakenBack or Changed has seen.
func (w *Watch) After() State { return w.after }

// Look takes the state now.
func (w *Watch) Look(ctx context.Context) (State, error) { return Take(ctx, w.subject) }

// Target is the name of the target's container.
func (w *Watch) Target() string { return w.target() }

// An End says how far a run has come.
type End struct {
	// Built and Restarted say that the step has begun.
	Built, Restarted bool
	// Artifacts is the run's directory.
	Artifacts string
}

// EndOf reads an End from the steps of a run and their status, "build:failed
// restart:pending".
func EndOf(summary, artifacts string) End {
	begun := func(step string) bool {
		return strings.Contains(summary, step+":succeeded") || strings.Contains(summary, step+":failed")
	}
	return End{Built: begun("build"), Restarted: begun("restart"), Artifacts: artifacts}
}

// target is the name of the target's container.
func (w *Watch) target() string { return w.project.Name + "-api-1" }

// TakenBack returns what is not as it was before a run that was rolled back: all
// must be, but the identity of a container that was made again, and edits that the
// run has deployed. These must be set aside, and the command in the run's log must
// bring them back.
func (w *Watch) TakenBack(ctx context.Context, end End) (differences []string, err error) {
	if w.after, err = Take(ctx, w.subject); err != nil {
		return nil, err
	}
	want, aside := w.before, w.kind == Deployed && end.Built
	if aside {
		want = w.head
	}
	differences = Differences(want, w.after, func(name string) bool {
		// Until a restart has begun, it is the same container.
		return end.Restarted && identity(name, w.target())
	})
	if aside {
		differences = append(differences, w.bringBack(ctx, end.Artifacts)...)
	}
	return differences, nil
}

// bringBack runs the commands of the log that bring back what was set aside.
func (w *Watch) bringBack(ctx context.Context, artifacts string) []string {
	commands, err := restoreCommands(artifacts)
	if err != nil || len(commands) == 0 {
		return []string{fmt.Sprintf("the operator's deployed edits are lost: rollback.log has no command that brings them back (%v)", err)}
	}
	var differences []string
	for _, line := range commands {
		shell := exec.CommandContext(ctx, "sh", "-c", line)
		shell.Dir = w.subject.Workspace
		shell.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1")
		if text, err := shell.CombinedOutput(); err != nil {
			differences = append(differences, fmt.Sprintf("the command that brings the operator's edits back fails: %s: %v: %s", line, err, text))
		}
	}
	again, err := Take(ctx, w.subject)
	if err != nil {
		return append(differences, err.Error())
	}
	for _, line := range Differences(w.before, again, func(name string) bool {
		return !strings.HasPrefix(name, "file ") || strings.HasPrefix(name, "file .git")
	}) {
		differences = append(differences, "after the command that brings the operator's edits back: "+line)
	}
	return differences
}

// Changed returns what a run that has succeeded has changed besides its files, the
// target's container and image.
func (w *Watch) Changed(ctx context.Context) (differences []string, err error) {
	if w.after, err = Take(ctx, w.subject); err != nil {
		return nil, err
	}
	return Differences(w.before, w.after, func(name string) bool {
		return strings.HasPrefix(name, "container "+w.target()+" ") || strings.HasPrefix(name, "image "+w.project.Name+"-api:") ||
			slices.ContainsFunc(w.changed, func(path string) bool { return name == "file "+path || name == "git . status "+path })
	}), nil
}

// restoring is a command that brings back what was set aside, in a log of the run.
var restoring = regexp.MustCompile("git [^\n`\\]]*refs/mm-orchestrator/[^\n`\\]]*")

// restoreCommands returns the commands of the run's rollback log that bring back
// what was set aside.
func restoreCommands(artifacts string) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(artifacts, "rollback.log"))
	if err != nil {
		return nil, err
	}
	var commands []string
	for _, line := range restoring.FindAllString(string(text), -1) {
		line = strings.TrimSpace(strings.TrimRight(line, ". "))
		if !slices.Contains(commands, line) {
			commands = append(commands, line)
		}
	}
	return commands, nil
}

package orchestrator

import (
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// workspaceOf names the workspace of a run, which only one run at a time may
// change: the queue and the path. The queue is part of it because hosts share the
// database and each has a queue of its own. A path below the repository's root
// counts as that root, because a rollback resets all of it. A directory elsewhere
// is a workspace of its own.
func workspaceOf(queue, root string, run store.Run) string {
	root = artifacts.Resolve(root)
	path := root
	if plan, failure := parsePlan(run.Steps); failure == nil {
		path = plan.workspace(root)
	}
	if path == root || strings.HasPrefix(path, strings.TrimSuffix(root, "/")+"/") {
		path = root
	}
	return queue + ":" + path
}

// workspace returns the directory that a plan changes: that of the first of these
// steps that names one, else root.
func (p plan) workspace(root string) string {
	for _, step := range []store.Step{store.StepPatch, store.StepRollback, store.StepBuild, store.StepRestart} {
		found, failure := p.find(step)
		if failure != nil {
			continue
		}
		if text, failure := found.text("workspace", ""); failure == nil && text != "" {
			return artifacts.Resolve(resolveIn(filepath.Clean(root), text))
		}
	}
	return root
}

// workspace returns the directory of the step's workspace parameter, which is
// absolute or relative to the configured workspace (docs/moonmind.md#service-profiles).
func (s *stepRun) workspace() (string, *Failure) {
	text, failure := s.params.text("workspace", ".")
	if failure != nil {
		return "", failure
	}
	return resolveIn(artifacts.Resolve(s.config.Workspace), text), nil
}

// resolveIn returns path if it is absolute, and otherwise path below dir with
// symbolic links resolved.
func resolveIn(dir, path string) string {
	if filepath.IsAbs(path) {
		return filepath.Clean(path)
	}
	return artifacts.Resolve(filepath.Join(dir, path))
}

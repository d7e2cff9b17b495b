package orchestrator

import (
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// workspaceOf names what only one run at a time may change: the queue, because
// hosts have one each and share the database, and the path of the workspace.
// Everything below the repository's root is the repository: a rollback resets
// all of it. A plan that names a directory elsewhere has that to itself.
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

// workspace is the directory that a plan changes: that of the first of these
// steps that names one.
func (p plan) workspace(root string) string {
	for _, step := range []store.Step{store.StepPatch, store.StepRollback, store.StepBuild, store.StepRestart} {
		found, failure := p.find(step)
		if failure != nil {
			continue
		}
		if text, failure := found.text("workspace", ""); failure == nil && text != "" {
			return artifacts.Resolve(within(filepath.Clean(root), text))
		}
	}
	return root
}

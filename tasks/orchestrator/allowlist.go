package orchestrator

import (
	"path/filepath"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/change"
)

// An allowlist says which files of a workspace a patch may touch
// (docs/moonmind.md#allow-list).
type allowlist struct {
	// workspace is resolved.
	workspace string
	globs     change.AllowList
}

func newAllowlist(workspace string, globs []string) *allowlist {
	return &allowlist{workspace: artifacts.Resolve(workspace), globs: change.NewAllowList(globs)}
}

// allows says whether a patch may change a path, which is absolute or relative to
// the workspace. What counts is where its folder really is; a link is judged by
// its own name and not by what it points to.
func (l *allowlist) allows(path string) bool {
	if !filepath.IsAbs(path) {
		path = filepath.Join(l.workspace, path)
	}
	return l.allowsReal(filepath.Join(artifacts.Resolve(filepath.Dir(path)), filepath.Base(path)))
}

// allowsReal is allows for an absolute path whose folder has no links.
func (l *allowlist) allowsReal(path string) bool {
	relative, err := filepath.Rel(l.workspace, path)
	return err == nil && filepath.IsLocal(relative) && l.globs.Matches(relative)
}

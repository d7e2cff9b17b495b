package orchestrator

import (
	"path/filepath"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

// An allowlist says which files of a workspace a patch may touch
// (docs/moonmind.md#allow-list, docs/policy.md#files).
type allowlist struct {
	// workspace is resolved.
	workspace string
	// lists all have to match a path. extra are overrides of the policy: one of them
	// is enough.
	lists []change.AllowList
	extra []allowedExtra
}

// An allowedExtra is an override that adds globs.
type allowedExtra struct {
	override policy.Override
	globs    change.AllowList
}

func newAllowlist(workspace string, globs []string) *allowlist {
	return &allowlist{workspace: artifacts.Resolve(workspace), lists: []change.AllowList{change.NewAllowList(globs)}}
}

// newAllowlist returns the list of a plan with what the policy says about it.
func (s *stepRun) newAllowlist(workspace string, planned []string) *allowlist {
	l := newAllowlist(workspace, planned)
	if s.profile.Bounds() {
		l.lists = append(l.lists, change.NewAllowList(s.profile.Listed()))
	}
	for _, o := range s.profile.Overrides {
		if globs := o.AllowList(); len(globs) > 0 {
			l.extra = append(l.extra, allowedExtra{o, change.NewAllowList(globs)})
		}
	}
	return l
}

// allows says whether a patch may change a path, which is absolute or relative to
// the workspace. What counts is where its folder really is; a link is judged by
// its own name and not by what it points to.
func (l *allowlist) allows(path string) bool { return l.allowsReal(l.real(path)) }

// real returns the absolute path with the links of its folder followed.
func (l *allowlist) real(path string) string {
	if !filepath.IsAbs(path) {
		path = filepath.Join(l.workspace, path)
	}
	return filepath.Join(artifacts.Resolve(filepath.Dir(path)), filepath.Base(path))
}

// allowsReal is allows for an absolute path whose folder has no links.
func (l *allowlist) allowsReal(path string) bool {
	relative, err := filepath.Rel(l.workspace, path)
	if err != nil || !filepath.IsLocal(relative) {
		return false
	}
	return l.listed(relative) || l.extraFor(relative) != nil
}

func (l *allowlist) listed(relative string) bool {
	for _, list := range l.lists {
		if !list.Matches(relative) {
			return false
		}
	}
	return true
}

func (l *allowlist) extraFor(relative string) *policy.Override {
	for _, extra := range l.extra {
		if extra.globs.Matches(relative) {
			return &extra.override
		}
	}
	return nil
}

// override returns the override without which a path would not be allowed, nil if
// there is none.
func (l *allowlist) override(path string) *policy.Override {
	relative, err := filepath.Rel(l.workspace, l.real(path))
	if err != nil || l.listed(relative) {
		return nil
	}
	return l.extraFor(relative)
}

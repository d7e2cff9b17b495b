package orchestrator

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// changes are the files that differ from HEAD according to git, relative to the
// workspace.
type changes struct {
	unstaged, staged, untracked []string
}

// all returns the union in the order of docs/moonmind.md#patch, without duplicates.
func (c changes) all() []string {
	seen := map[string]bool{}
	all := []string{}
	for _, path := range slices.Concat(c.unstaged, c.staged, c.untracked) {
		if !seen[path] {
			seen[path] = true
			all = append(all, path)
		}
	}
	return all
}

// patchPayload has the keys of docs/moonmind.md#patch, in its order.
type patchPayload struct {
	Unstaged  []string `json:"unstagedFiles"`
	Staged    []string `json:"stagedFiles"`
	Untracked []string `json:"untrackedFiles"`
	Validated []string `json:"validatedFiles"`
	Log       string   `json:"log"`
}

// messageLimit bounds a message, in bytes; the list of files in it may be long.
const messageLimit = 16 << 10

// patch runs the plan's commands, writes the difference to HEAD into an artifact,
// and checks the changed files against the allow-list (docs/moonmind.md#patch).
func (s *stepRun) patch(ctx context.Context) (success, *Failure) {
	workspace, failure := s.workspace()
	if failure != nil {
		return success{}, failure
	}
	listed, failure := s.params.list("commands")
	if failure != nil {
		return success{}, failure
	}
	var commands [][]string
	for _, value := range listed {
		command, failure := parseCommand(value)
		if failure != nil {
			return success{}, failure
		}
		commands = append(commands, command)
	}
	patterns, failure := s.allowedPatterns()
	if failure != nil {
		return success{}, failure
	}
	name, failure := s.params.text("logArtifact", "patch.log")
	if failure != nil {
		return success{}, failure
	}
	diffName, failure := s.params.text("diffArtifact", "patch.diff")
	if failure != nil {
		return success{}, failure
	}

	log, failure := s.startLog(name, workspace, commands)
	if failure != nil {
		return success{}, failure
	}
	defer log.Discard()
	if failure := s.preflight(ctx, log, workspace); failure != nil {
		return success{}, s.attachLog(log, failure)
	}
	for _, command := range commands {
		if failure := s.runInLog(ctx, log, workspace, formatCommand(command), command); failure != nil {
			return success{}, s.attachLog(log, failure)
		}
	}
	diff, failure := s.writeDiff(ctx, workspace, diffName)
	if failure != nil {
		return success{}, failure
	}
	changed, failure := s.listChanges(ctx, workspace)
	if failure != nil {
		return success{}, failure
	}
	validated := changed.all()
	allowed := newAllowlist(workspace, patterns)
	var violations []string
	for _, path := range validated {
		if !allowed.allows(path) {
			violations = append(violations, printable(path)+" is not allow-listed")
		}
	}
	if len(violations) > 0 {
		return success{}, allowListViolation(cut(strings.Join(violations, "; ")))
	}
	faultpoint.Hit(faultpoint.ArtifactBefore, s.runID, string(s.step))
	file, err := log.Finish()
	if err != nil {
		return success{}, artifactError(err)
	}
	faultpoint.Hit(faultpoint.ArtifactWritten, s.runID, string(s.step))
	message := "Patched files: none"
	if len(validated) > 0 {
		message = cut("Patched files: " + strings.Join(s.shown(validated), ", "))
	}
	return success{message: message, files: []artifacts.File{diff, file}, payload: patchPayload{
		Unstaged: s.shown(changed.unstaged), Staged: s.shown(changed.staged), Untracked: s.shown(changed.untracked),
		Validated: s.shown(validated), Log: file.Path,
	}}, nil
}

// allowedPatterns returns the plan's allow-list, or the profile's if the plan has
// none.
func (s *stepRun) allowedPatterns() ([]string, *Failure) {
	listed, failure := s.params.list("allowlist")
	if failure != nil || len(listed) == 0 {
		return s.profile.allowlist, failure
	}
	var patterns []string
	for _, value := range listed {
		pattern, isText := value.(string)
		if !isText {
			return nil, typeError("Plan parameter allowlist must contain only texts")
		}
		patterns = append(patterns, pattern)
	}
	return patterns, nil
}

// shown makes paths fit for a row, see clean.
func (s *stepRun) shown(paths []string) []string {
	shown := make([]string, 0, len(paths))
	for _, path := range paths {
		shown = append(shown, s.clean(path))
	}
	return shown
}

func printable(path string) string { return strings.ToValidUTF8(path, "\uFFFD") }

// cut shortens a text to messageLimit.
func cut(text string) string {
	if len(text) <= messageLimit {
		return text
	}
	end := messageLimit
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + " … and more"
}

// writeDiff makes the diff artifact: all changes of tracked files since HEAD, or
// since the index if there is no commit yet.
func (s *stepRun) writeDiff(ctx context.Context, workspace, name string) (artifacts.File, *Failure) {
	document, failure := s.diffInto(ctx, workspace, name, []string{"git", "diff", "HEAD"})
	if failure != nil && (strings.Contains(failure.output, "unknown revision") || strings.Contains(failure.output, "ambiguous argument 'HEAD'")) {
		document, failure = s.diffInto(ctx, workspace, name, []string{"git", "diff"})
	}
	if failure != nil {
		return artifacts.File{}, failure
	}
	file, err := document.Finish()
	if err == nil && file.SizeBytes == 0 {
		file, err = s.dir.Write(name, "# No changes generated")
	}
	if err != nil {
		return artifacts.File{}, artifactError(err)
	}
	return file, nil
}

func (s *stepRun) diffInto(ctx context.Context, workspace, name string, command []string) (*artifacts.Document, *Failure) {
	document, err := s.dir.Document(name)
	if err != nil {
		return nil, artifactError(err)
	}
	errors := artifacts.NewCapture(s.config.Redactor)
	code, failure := s.runner.runOwnGit(ctx, workspace, command, document, errors.Stderr)
	text := errors.Close().Text("")
	if failure == nil && code != 0 {
		failure = exitFailure(command, code, text)
	}
	if failure != nil {
		document.Discard()
		return nil, failure
	}
	return document, nil
}

// listLimit bounds git's list of changed files, in bytes.
const listLimit = 16 << 20

// listChanges asks git which files differ from HEAD. It returns unquoted names
// (docs/moonmind.md#c5) relative to the workspace, even if that lies below the
// top of the repository. It leaves out the runs' artifacts
// (docs/moonmind.md#f6).
func (s *stepRun) listChanges(ctx context.Context, workspace string) (changes, *Failure) {
	_, inside := repository(workspace)
	isArtifact := s.artifactFilter()
	var found changes
	for _, query := range []struct {
		into    *[]string
		command []string
		// fromTop says that names are relative to the top of the repository.
		fromTop bool
	}{
		{&found.unstaged, []string{"git", "diff", "--name-only", "-z"}, true},
		{&found.staged, []string{"git", "diff", "--cached", "--name-only", "-z"}, true},
		{&found.untracked, []string{"git", "ls-files", "--others", "--exclude-standard", "-z"}, false},
	} {
		names, failure := s.listFiles(ctx, workspace, query.command)
		if failure != nil {
			return changes{}, failure
		}
		for _, name := range names {
			if query.fromTop && inside != "." {
				relative, err := filepath.Rel(inside, name)
				if err != nil {
					return changes{}, unexpected(err)
				}
				name = relative
			}
			if !isArtifact(filepath.Join(workspace, name)) {
				*query.into = append(*query.into, name)
			}
		}
	}
	return found, nil
}

func (s *stepRun) listFiles(ctx context.Context, workspace string, command []string) ([]string, *Failure) {
	list := limitedBuffer{limit: listLimit}
	errors := artifacts.NewCapture(s.config.Redactor)
	code, failure := s.runner.runOwnGit(ctx, workspace, command, &list, errors.Stderr)
	text := errors.Close().Text("")
	switch {
	case failure != nil:
		return nil, failure
	case code != 0:
		return nil, exitFailure(command, code, text)
	case list.full:
		return nil, commandError("Command " + formatCommand(command) + " lists more changed files than can be checked")
	}
	var names []string
	for name := range strings.SplitSeq(string(list.kept), "\x00") {
		if name != "" {
			names = append(names, name)
		}
	}
	return names, nil
}

// artifactFilter returns a function that says whether a file is an artifact: it
// lies in the configured artifact root, or in a run's directory beside this
// run's. The artifact root of a database row is not enough for that: otherwise a
// row could hide any file of the workspace from the allow-list.
func (s *stepRun) artifactFilter() func(path string) bool {
	workspace := artifacts.Resolve(s.config.Workspace)
	runs := filepath.Dir(s.place.Dir)
	root, err := s.config.Artifacts.Root()
	if err != nil || below(root, workspace) {
		root = ""
	}
	return func(path string) bool {
		path = artifacts.Resolve(filepath.Dir(path))
		if root != "" && below(root, path) {
			return true
		}
		relative, err := filepath.Rel(runs, path)
		if err != nil || !filepath.IsLocal(relative) {
			return false
		}
		first, _, _ := strings.Cut(filepath.ToSlash(relative), "/")
		id, err := store.ParseRunID(first)
		return err == nil && id == first
	}
}

// below says whether path is dir or lies in it.
func below(dir, path string) bool {
	relative, err := filepath.Rel(dir, path)
	return err == nil && filepath.IsLocal(relative)
}

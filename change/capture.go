package change

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// Ref returns the name of a run's ref. These refs point to trees, so that no list
// of commits shows them, and so that git gc keeps what they need.
func Ref(run, name string) string { return runRefs + run + "/" + name }

// Capture stores the state of the repository as git objects, and returns it with
// the id of its description, which Load takes.
//
//   - The ref NAME points to a tree with the files of the work tree, for
//     git restore --source and git show.
//   - The ref NAME-state points to a tree with the description and all content that
//     the first tree does not have, such as hooks.
//   - A repeated call replaces both.
func (r *Repository) Capture(ctx context.Context, run, name string) (*State, string, error) {
	state, err := r.Observe(ctx, nil)
	if err != nil {
		return nil, "", err
	}
	var paths []string
	for _, e := range state.Entries {
		paths = append(paths, e.Path)
	}
	id, err := r.store(ctx, state, paths, Ref(run, name))
	if err == nil {
		err = r.keepCommits(state, Ref(run, name))
	}
	return state, id, err
}

// keepCommits makes git gc keep what the references and stashes name, should the
// run remove them. The ref's log does that: a ref to a commit would show up in git
// log --all.
func (r *Repository) keepCommits(state *State, ref string) error {
	var ids []string
	add := func(id string) {
		if len(id) == 2*idBytes(r.format) && !slices.Contains(ids, id) && strings.Trim(id, "0") != "" {
			ids = append(ids, id)
		}
	}
	for _, dir := range state.GitDirs {
		if path := r.absolute(dir.Path); path != r.commonDir && path != r.gitDir {
			continue
		}
		for _, id := range dir.Refs {
			add(id)
		}
	}
	if stashes, err := os.ReadFile(filepath.Join(r.commonDir, "logs/refs/stash")); err == nil {
		for line := range strings.Lines(string(stashes)) {
			if fields := strings.Fields(line); len(fields) > 1 {
				add(fields[1])
			}
		}
	}
	if len(ids) == 0 {
		return nil
	}
	slices.Sort(ids)
	var log strings.Builder
	previous := strings.Repeat("0", 2*idBytes(r.format))
	for _, id := range ids {
		fmt.Fprintf(&log, "%s %s mm-orchestrator <mm-orchestrator@localhost> %d +0000\tkept for a rollback\n", previous, id, state.TakenAt.Unix())
		previous = id
	}
	path := filepath.Join(r.commonDir, "logs", ref)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(log.String()), 0o644)
}

// storedName is the name of a description in the tree of a NAME-state ref.
const storedName = "state.json"

// store stores the state with the content of these paths, and sets the refs.
func (r *Repository) store(ctx context.Context, state *State, paths []string, ref string) (string, error) {
	shown, others, err := r.storeContent(ctx, state, paths)
	if err != nil {
		return "", err
	}
	// What is staged must survive a git gc, too, after the index is altered.
	shownIDs := map[string]bool{}
	for _, item := range shown {
		shownIDs[item.id] = true
	}
	var staged []string
	for _, dir := range state.GitDirs {
		for _, e := range dir.index {
			if e.Mode != gitlinkMode && !shownIDs[e.ID] {
				staged = append(staged, e.ID)
			}
		}
	}
	if staged, err = r.present(ctx, staged); err != nil {
		return "", err
	}
	others = append(others, staged...)
	trees := buildTrees(r.format, shown)
	state.Tree = trees[len(trees)-1].id
	if _, err := r.writeTrees(ctx, trees); err != nil {
		return "", err
	}
	description, err := json.Marshal(state)
	if err != nil {
		return "", err
	}
	id, err := r.storeDescription(ctx, description, storedName, others, ref+"-state")
	if err != nil {
		return "", err
	}
	return id, r.setRefs(ctx, map[string]string{ref: state.Tree})
}

// storeDescription stores a text, and a tree with it and these objects, under a
// ref. It returns the text's id.
func (r *Repository) storeDescription(ctx context.Context, text []byte, name string, objects []string, ref string) (string, error) {
	w, err := r.newObjectWriter()
	if err != nil {
		return "", err
	}
	id, err := w.writeBytes("blob", text)
	if err != nil {
		return "", fmt.Errorf("git's objects cannot be written: %w", err)
	}
	items := []treeItem{{name, "100644", id}}
	slices.Sort(objects)
	for _, object := range slices.Compact(objects) {
		items = append(items, treeItem{"content/" + object, "100644", object})
	}
	top, err := r.writeTrees(ctx, buildTrees(r.format, items))
	if err != nil {
		return "", err
	}
	return id, r.setRefs(ctx, map[string]string{ref: top})
}

// setRefs points refs to trees.
func (r *Repository) setRefs(ctx context.Context, refs map[string]string) error {
	var input strings.Builder
	for ref, id := range refs {
		if r.setRef(ref, id) == nil {
			continue
		}
		fmt.Fprintf(&input, "update %s %s\n", ref, id)
	}
	if input.Len() == 0 {
		return nil
	}
	return r.run(ctx, GitCommand{Dir: r.Top, Args: []string{"-c", "core.logAllRefUpdates=false", "update-ref", "--no-deref", "--stdin"}, Stdin: strings.NewReader(input.String())})
}

// storeContent stores the content of the state's files and links at these paths.
// It returns the items of a tree that shows them, and the ids of content that
// such a tree cannot have.
func (r *Repository) storeContent(ctx context.Context, state *State, paths []string) (shown []treeItem, others []string, err error) {
	var wanted []string
	seen := map[string]bool{}
	var stored []*Entry
	for _, path := range paths {
		e := state.find(path)
		if e == nil || e.Blob == "" {
			continue
		}
		stored = append(stored, e)
		if !seen[e.Blob] {
			seen[e.Blob] = true
			wanted = append(wanted, e.Blob)
		}
	}
	missing, err := r.missing(ctx, wanted)
	if err != nil {
		return nil, nil, err
	}
	absent := map[string]bool{}
	for _, id := range missing {
		absent[id] = true
	}
	w, err := r.newObjectWriter()
	if err != nil {
		return nil, nil, err
	}
	folders := r.folders()
	defer folders.close()
	for _, e := range stored {
		if absent[e.Blob] {
			if ctx.Err() != nil {
				return nil, nil, context.Cause(ctx)
			}
			old := e.Blob
			if err := r.storeFile(w, folders, e); err != nil {
				return nil, nil, err
			}
			delete(absent, old)
			delete(absent, e.Blob)
		}
		if item, fits := r.treeItem(e); fits {
			shown = append(shown, item)
		} else {
			others = append(others, e.Blob)
		}
	}
	return shown, others, nil
}

const gitlinkMode = 0o160000

// storeFile stores the content of a file or link. If that has changed since it was
// observed, the entry gets the id of the new content.
func (r *Repository) storeFile(w *objectWriter, folders *folders, e *Entry) error {
	fail := func(err error) error {
		return fmt.Errorf("%s cannot be stored: %w", r.absolute(e.Path), err)
	}
	if e.Kind == Link {
		if _, err := w.writeBytes("blob", []byte(e.Target)); err != nil {
			return fail(err)
		}
		return nil
	}
	root, name, err := folders.at(e.Path)
	if err != nil {
		return fail(err)
	}
	for attempt := 0; ; attempt++ {
		file, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		if err != nil {
			return fail(err)
		}
		id := ""
		info, err := file.Stat()
		if err == nil {
			id, err = w.write("blob", file, info.Size())
		}
		_ = file.Close()
		if errors.Is(err, errChanging) && attempt < 5 {
			continue
		}
		if err != nil {
			return fail(err)
		}
		if id != e.Blob {
			e.Blob, e.Size, e.ModTime, e.ChangeTime = id, info.Size(), info.ModTime().UnixNano(), 0
		}
		return nil
	}
}

// treeItem returns the item of a tree that shows an entry. Not all entries fit: git
// refuses trees with names such as .git.
func (r *Repository) treeItem(e *Entry) (treeItem, bool) {
	item := treeItem{path: e.Path, mode: "100644", id: e.Blob}
	switch {
	case e.Kind == Link:
		item.mode = linkMode
	case e.Mode&0o100 != 0:
		item.mode = "100755"
	}
	if filepath.IsAbs(e.Path) || slices.ContainsFunc(strings.Split(e.Path, "/"), isDotGit) {
		return treeItem{}, false
	}
	return item, true
}

// Load returns the state that Capture has stored.
func (r *Repository) Load(ctx context.Context, id string) (*State, error) {
	text, err := r.readObject(ctx, id)
	if err != nil {
		return nil, err
	}
	state := new(State)
	if err := json.Unmarshal(text, state); err != nil {
		return nil, fmt.Errorf("the stored state %s cannot be read: %w", id, err)
	}
	if state.Version != stateVersion {
		return nil, fmt.Errorf("the stored state %s has the version %d; this program reads %d", id, state.Version, stateVersion)
	}
	for i := range state.GitDirs {
		dir := &state.GitDirs[i]
		if index := state.find(dir.Path + "/index"); index != nil && index.Blob != "" {
			data, err := r.readObject(ctx, index.Blob)
			if err != nil {
				return nil, err
			}
			r.setIndex(ctx, dir, data)
		}
	}
	return state, nil
}

package change

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A Patch is what a diff makes of a state.
type Patch struct {
	before, after *State
}

// PlanPatch returns what a unified diff makes of a captured state. Names in the diff
// are relative to the top of the repository. It alters neither the work tree nor the
// index, and fails if one part of the diff does not fit.
//
// A diff that git has made has LF where git gives files CRLF only in the work tree. If it
// does not fit as it is, it is applied to these files as they are for git, and they keep
// CRLF.
func (r *Repository) PlanPatch(ctx context.Context, before *State, diff string) (*Patch, error) {
	after, err := r.applyToTree(ctx, before.Tree, diff)
	if err != nil {
		var crlfErr error
		if after, crlfErr = r.applyToText(ctx, before.Tree, diff); crlfErr != nil || after == "" {
			return nil, err
		}
	}
	return r.patchTo(ctx, before, after)
}

// applyToTree returns the tree that a diff makes of one.
func (r *Repository) applyToTree(ctx context.Context, tree, diff string) (string, error) {
	index, err := os.CreateTemp(r.gitDir, "mm-orchestrator-index-*.lock")
	if err != nil {
		return "", err
	}
	_ = index.Close()
	defer os.Remove(index.Name())
	// git takes an empty file for an index that is broken.
	if err := os.Remove(index.Name()); err != nil {
		return "", err
	}
	defer os.Remove(index.Name() + ".lock")
	env := []string{"GIT_INDEX_FILE=" + index.Name()}
	run := func(stdin string, args ...string) (string, error) {
		var out strings.Builder
		err := r.run(ctx, GitCommand{Dir: r.Top, Args: args, Env: env, Stdin: strings.NewReader(stdin), Stdout: &out})
		return strings.TrimSpace(out.String()), err
	}
	if _, err := run("", "read-tree", tree); err != nil {
		return "", err
	}
	if _, err := run(diff, "-c", "apply.ignoreWhitespace=no", "-c", "core.autocrlf=false", "apply", "--cached", "--whitespace=nowarn", "-"); err != nil {
		return "", err
	}
	return run("", "write-tree")
}

// applyToText is applyToTree for a diff with LF of files that have CRLF in the work tree
// only. It returns "" if the diff has no such file. No filter of the repository is run.
func (r *Repository) applyToText(ctx context.Context, tree, diff string) (string, error) {
	endings, err := r.lineEndings(ctx, diff)
	if err != nil {
		return "", err
	}
	items, err := r.listTree(ctx, tree)
	if err != nil {
		return "", err
	}
	w, err := r.newObjectWriter()
	if err != nil {
		return "", err
	}
	known, original := map[string]string{}, map[string]string{} // ids, by path
	for i, item := range items {
		known[item.path] = item.id
		if !endings[item.path].isText || item.mode == linkMode {
			continue
		}
		content, err := r.readObject(ctx, item.id)
		if err != nil {
			return "", err
		}
		lines := bytes.Count(content, []byte("\n"))
		if lines == 0 || bytes.Count(content, []byte("\r\n")) != lines || bytes.IndexByte(content, 0) >= 0 {
			continue
		}
		if items[i].id, err = w.writeBytes("blob", bytes.ReplaceAll(content, []byte("\r\n"), []byte("\n"))); err != nil {
			return "", err
		}
		known[item.path], original[item.path] = items[i].id, item.id
	}
	if len(original) == 0 {
		return "", nil
	}
	before, err := r.writeTrees(ctx, buildTrees(r.format, items))
	if err != nil {
		return "", err
	}
	after, err := r.applyToTree(ctx, before, diff)
	if err != nil {
		return "", err
	}
	if items, err = r.listWholeTree(ctx, after); err != nil {
		return "", err
	}
	for i, item := range items {
		was, existed := known[item.path]
		switch {
		case existed && was == item.id:
			if id := original[item.path]; id != "" {
				items[i].id = id
			}
		case item.mode == linkMode || item.mode == submoduleMode:
		case original[item.path] != "" || !existed && endings[item.path].makesCRLF:
			content, err := r.readObject(ctx, item.id)
			if err != nil {
				return "", err
			}
			content = bytes.ReplaceAll(bytes.ReplaceAll(content, []byte("\r\n"), []byte("\n")), []byte("\n"), []byte("\r\n"))
			if items[i].id, err = w.writeBytes("blob", content); err != nil {
				return "", err
			}
		}
	}
	return r.writeTrees(ctx, buildTrees(r.format, items))
}

// lineEnding says what git does with the lines of a file.
type lineEnding struct {
	// isText says that CRLF in the work tree is LF for git, makesCRLF that git writes CRLF
	// into the work tree.
	isText, makesCRLF bool
}

// lineEndings returns it for the files of a diff, by their paths.
func (r *Repository) lineEndings(ctx context.Context, diff string) (map[string]lineEnding, error) {
	var names strings.Builder
	// Of a renamed file, git prints the new name only, and the old one in reverse.
	for _, args := range [][]string{{"apply", "--numstat", "-z", "-"}, {"apply", "-R", "--numstat", "-z", "-"}} {
		var out strings.Builder
		if err := r.run(ctx, GitCommand{Dir: r.Top, Args: args, Stdin: strings.NewReader(diff), Stdout: &out}); err != nil {
			return nil, err
		}
		for line := range strings.SplitSeq(out.String(), "\x00") {
			if fields := strings.SplitN(line, "\t", 3); len(fields) == 3 {
				names.WriteString(fields[2] + "\x00")
			}
		}
	}
	var out strings.Builder
	if err := r.run(ctx, GitCommand{
		Dir: r.Top, Args: []string{"check-attr", "-z", "--stdin", "text", "eol", "ident", "filter", "working-tree-encoding"}, Stdin: strings.NewReader(names.String()), Stdout: &out,
	}); err != nil {
		return nil, err
	}
	attributes := map[string]map[string]string{}
	fields := strings.Split(out.String(), "\x00")
	for i := 0; i+2 < len(fields); i += 3 {
		if attributes[fields[i]] == nil {
			attributes[fields[i]] = map[string]string{}
		}
		attributes[fields[i]][fields[i+1]] = fields[i+2]
	}
	automatic, _ := r.output(ctx, r.Top, "config", "--get", "core.autocrlf") // an error: not set
	native, _ := r.output(ctx, r.Top, "config", "--get", "core.eol")
	endings := map[string]lineEnding{}
	for name, is := range attributes {
		var e lineEnding
		isSet := func(attribute string) bool { return is[attribute] != "unspecified" && is[attribute] != "unset" }
		switch {
		case isSet("ident") || isSet("filter") || isSet("working-tree-encoding"): // more than the ends of lines differs
		case is["text"] == "unset":
		case isSet("text"), isSet("eol"), automatic == "true", automatic == "input":
			e.isText = true
			e.makesCRLF = is["eol"] == "crlf" || !isSet("eol") && (automatic == "true" || automatic != "input" && isSet("text") && native == "crlf")
		}
		endings[name] = e
	}
	return endings, nil
}

// patchTo returns the patch from a captured state to a tree.
func (r *Repository) patchTo(ctx context.Context, before *State, tree string) (*Patch, error) {
	old, err := r.listTree(ctx, before.Tree)
	if err != nil {
		return nil, err
	}
	items, err := r.listWholeTree(ctx, tree)
	if err != nil {
		return nil, err
	}
	after := *before
	entries := map[string]Entry{}
	for _, e := range before.Entries {
		entries[e.Path] = e
	}
	have := map[string]treeItem{}
	for _, item := range old {
		have[item.path] = item
	}
	for _, item := range items {
		if item.mode == submoduleMode {
			return nil, fmt.Errorf("%s would become a submodule", item.path)
		}
		was, found := have[item.path]
		delete(have, item.path)
		if found && was == item {
			continue
		}
		e, known := entries[item.path]
		if !known {
			e = r.madeIn(entries, item.path)
			e.Mode = 0o644
		}
		e.Kind, e.Blob, e.ModTime, e.Inode, e.Names, e.Size, e.Unread = File, item.id, time.Now().UnixNano(), 0, 1, 0, ""
		switch {
		case item.mode == linkMode:
			target, err := r.readObject(ctx, item.id)
			if err != nil {
				return nil, err
			}
			e.Kind, e.Mode, e.Target = Link, 0o777, string(target)
		case item.mode == "100755" && (!found || was.mode != item.mode):
			e.Mode |= e.Mode & 0o444 >> 2
		case item.mode == "100644" && (!found || was.mode != item.mode):
			e.Mode &^= 0o111
			if found && was.mode == linkMode {
				e.Mode = 0o644
			}
		}
		entries[item.path] = e
	}
	for removed := range have {
		delete(entries, removed)
	}
	// git removes folders that it has made empty.
	for removed := range have {
		for dir := path.Dir(removed); dir != "."; dir = path.Dir(dir) {
			inside := false
			for name := range entries {
				inside = inside || strings.HasPrefix(name, dir+"/")
			}
			if inside {
				break
			}
			delete(entries, dir)
		}
	}
	after.Entries = nil
	for _, e := range entries {
		after.Entries = append(after.Entries, e)
	}
	slices.SortFunc(after.Entries, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	return &Patch{before, &after}, nil
}

// madeIn returns a new entry with the owner of its folder, and adds the folders
// that it needs.
func (r *Repository) madeIn(entries map[string]Entry, name string) Entry {
	e := Entry{Path: name, UID: os.Geteuid(), GID: os.Getegid()}
	dir := path.Dir(name)
	folder, known := entries[dir]
	if !known && dir != "." {
		folder = r.madeIn(entries, dir)
		folder.Kind, folder.Mode = Folder, 0o755
		entries[dir] = folder
	}
	if dir == "." {
		folder = entries["."]
	}
	if os.Geteuid() == 0 {
		e.UID, e.GID = folder.UID, folder.GID
	}
	return e
}

// Judge returns what the patch alters, as the function Judge does.
func (p *Patch) Judge(rules Rules) []Difference { return Judge(p.before, p.after, rules) }

// Apply makes the patch's files. now is the state as observed just now. It can be
// repeated after a kill at any point. If somebody has altered one of the files since
// the patch was planned, it alters nothing and says so.
func (r *Repository) Apply(ctx context.Context, p *Patch, now *State) error {
	var list []Difference
	for _, d := range Compare(p.before, p.after) {
		current := now.find(d.Path)
		if !sameEntry(current, d.Before) && !sameEntry(current, d.After) {
			return fmt.Errorf("%s was altered by somebody else meanwhile", filepath.Join(r.Top, d.Path))
		}
		list = append(list, Difference{Kind: d.Kind, Path: d.Path, GitDir: d.GitDir, Before: d.After, After: d.Before})
	}
	_, err := r.Restore(ctx, p.after, now, list)
	return err
}

package speckit

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

// maxTasksFile is the largest tasks.md that is read, in bytes. The largest of a
// real project has some 100 kB.
const maxTasksFile = 8 << 20

// openTask is a task of a tasks.md that is not done.
type openTask struct {
	id, title string
	// phase is the text of the heading above, "" for none.
	phase string
	line  int
}

// object is the task as the context and the payload of the row have it.
func (t openTask) object() *object {
	o := newObject()
	o.set("taskId", t.id)
	o.set("title", t.title)
	if t.phase == "" {
		o.set("phase", nil)
	} else {
		o.set("phase", t.phase)
	}
	o.set("lineNumber", t.line)
	return o
}

// nextTask returns the first open task of a tasks.md, nil if there is none, by the
// rules of docs/spec-workflow.md#tasksmd. unread are the numbers of the lines before
// it that look like open tasks and that these rules skip.
func nextTask(text string) (next *openTask, unread []int) {
	phase := ""
	for i, line := range lines(text) {
		line = artifacts.Trim(line)
		if strings.HasPrefix(line, "## ") {
			phase = strings.TrimLeft(line, "# ")
			continue
		}
		body, isOpen := strings.CutPrefix(line, "- [ ] ")
		if id, title := cutWord(body); isOpen && id != "" {
			return &openTask{id: id, title: artifacts.Trim(title), phase: phase, line: i + 1}, unread
		}
		if looksOpen(line) {
			unread = append(unread, i+1)
		}
	}
	return nil, unread
}

// lines splits a text as Python's universal newlines do.
func lines(text string) []string {
	text = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(text)
	return strings.Split(text, "\n")
}

// cutWord returns what stands before the first white space, and the rest.
func cutWord(text string) (word, rest string) {
	for i, r := range text {
		if artifacts.Trim(string(r)) == "" {
			return text[:i], text[i:]
		}
	}
	return text, ""
}

// looksOpen says that a person may have meant the line as an open task.
func looksOpen(line string) bool {
	rest := strings.TrimLeft(line, "-*+0123456789.")
	rest = strings.TrimLeft(rest, " \t")
	if rest == line {
		return false
	}
	for _, box := range []string{"[ ]", "[]"} {
		if after, found := strings.CutPrefix(rest, box); found {
			return artifacts.Trim(after) != ""
		}
	}
	return false
}

// traversal is the text of MoonMind's ValueError.
const traversal = "Invalid feature_key leading to path traversal"

// readTasks reads tasks.md of a feature. It reads nothing outside of root, whatever
// the names and links below it are.
func readTasks(root, feature string) (string, error) {
	name := filepath.Join(feature, "tasks.md")
	if strings.ContainsRune(feature, 0) || filepath.IsAbs(feature) || !filepath.IsLocal(name) {
		return "", &failure{class: "ValueError", text: traversal}
	}
	place := artifacts.Resolve(filepath.Join(root, name))
	missing := &failure{class: "FileNotFoundError", text: "Spec task file not found: " + place}
	directory, err := os.OpenRoot(root)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return "", missing
		}
		return "", &failure{class: "OSError", text: fmt.Sprintf("the tasks root %s cannot be read: %v", root, cause(err))}
	}
	defer directory.Close()
	// O_NONBLOCK: opening a pipe must not wait for a writer.
	file, err := directory.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", missing
	case err != nil && escapes(root, place):
		return "", &failure{class: "ValueError", text: traversal}
	case err != nil:
		return "", &failure{class: "OSError", text: fmt.Sprintf("%s cannot be read: %v", place, cause(err))}
	}
	defer file.Close()
	info, err := file.Stat()
	switch {
	case err != nil:
		return "", &failure{class: "OSError", text: fmt.Sprintf("%s cannot be read: %v", place, cause(err))}
	case !info.Mode().IsRegular():
		return "", &failure{class: "OSError", text: place + " is not a regular file"}
	}
	text, err := io.ReadAll(io.LimitReader(bufio.NewReader(file), maxTasksFile+1))
	switch {
	case err != nil:
		return "", &failure{class: "OSError", text: fmt.Sprintf("%s cannot be read: %v", place, cause(err))}
	case len(text) > maxTasksFile:
		return "", &failure{class: "ValueError", text: fmt.Sprintf("%s is larger than %d MiB: split it, or move what is done to another file", place, maxTasksFile>>20)}
	case !utf8.Valid(text):
		return "", &failure{class: "ValueError", text: place + " is not UTF-8: convert it"}
	}
	return string(text), nil
}

// escapes says whether a resolved path is outside of a directory.
func escapes(root, place string) bool {
	inside, err := filepath.Rel(artifacts.Resolve(root), place)
	return err != nil || !filepath.IsLocal(inside)
}

// cause is the error without the name of the file, which the caller gives.
func cause(err error) error {
	var path *fs.PathError
	if errors.As(err, &path) {
		return path.Err
	}
	return err
}

package programs

import (
	"path/filepath"
	"strings"
)

// A kind says what an option's value or an argument may be.
type kind int

const (
	flag       kind = iota // an option without a value
	optional               // an option whose value, if any, is joined to it; judged as plain
	plain                  // a word, and a path only below the workspace
	text                   // any text: the program uses it as neither a path nor a name
	free                   // what an operator has permitted
	path                   // a file or folder below the workspace
	project                // the name of the run's compose project
	setting                // name=value of a git setting
	assignment             // name=value, whatever the value is
	network                // a network of a build
	none                   // no arguments
	services               // names of services
	target                 // the name of the service that the run is for: the command changes it
	scale                  // a service that the run is for, = and a number
	container              // the name of a container of the project
	folder                 // the context of a build
)

// value judges an option's value.
func (j *judge) value(is kind, name, value string) *Refusal {
	if is == free {
		return nil
	}
	if j.style == gitStyle {
		if refusal := j.startsFromValue(name, value); refusal != nil {
			return refusal
		}
	}
	switch is {
	case text:
		return nil
	case path:
		return j.path(value)
	case setting:
		return j.setting(value)
	case scale:
		name, _, _ := strings.Cut(value, "=")
		if j.permits(j.command, name) {
			return nil
		}
		return j.argument(target, name)
	case project:
		if j.Project == "" || j.AnyProject || value == j.Project {
			return nil
		}
		refusal := j.refuse("other-project", value, "the run is for project %s, not for %s", j.Project, value)
		refusal.Option = name + "="
		return refusal
	case assignment:
		if variable, _, _ := strings.Cut(value, "="); strings.HasPrefix(strings.ToUpper(variable), "BUILDKIT_") && variable != "BUILDKIT_INLINE_CACHE" {
			return j.refuse("frontend", value, "%s %s changes the builder itself: BUILDKIT_SYNTAX names an image whose program reads the Dockerfile", name, variable)
		}
		if strings.Contains(value, "=") {
			return nil
		}
		return j.refuse("build-reads", value, "without a value, %s %s takes that of the worker's environment", name, value)
	case network:
		if value == "none" || value == "default" {
			return nil
		}
		return j.refuse("network", value, "a build may use the networks none and default, not %s", value)
	}
	return j.word(value)
}

// startsFromValue refuses values with which a harmless option of git starts a program.
func (j *judge) startsFromValue(name, value string) *Refusal {
	refused := ""
	switch {
	case name != "--format" && name != "--pretty" && name != "--sort" && name != "--submodule":
	case strings.Contains(value, "%G"), strings.Contains(value, "signature"):
		refused = "checks signatures, for which git starts the program that the repository's settings name"
	case name == "--submodule" && value == "diff":
		refused = "makes git run in the submodules, with the programs that their settings name"
	}
	if refused == "" {
		return nil
	}
	refusal := j.refuse("runs", value, "%s=%s %s", name, value, refused)
	refusal.Option = name + "="
	return refusal
}

// argument judges a word that is neither an option nor its value.
func (j *judge) argument(is kind, word string) *Refusal {
	switch is {
	case none:
		return j.refuse("argument", word, "%s takes no arguments in plans", j.command)
	case services, target:
		if is == target && j.Service != "" && word != j.Service {
			refusal := j.refuse("other-service", word, "the run is for service %s, not for %s", j.Service, word)
			refusal.Option = word
			return refusal
		}
		if strings.ContainsAny(word, "/\\~: ") {
			return j.refuse("argument", word, "%s is not the name of a service", word)
		}
		return nil
	case container:
		if j.Project == "" || strings.HasPrefix(word, j.Project+"-") || strings.HasPrefix(word, j.Project+"_") {
			return j.word(word)
		}
		return j.refuse("other-container", word, "%s is not the name of a container of project %s", word, j.Project)
	case path:
		return j.path(word)
	case folder:
		if strings.ContainsAny(word, ":@") || strings.HasPrefix(word, "github.com/") {
			return j.refuse("remote-context", word, "%s is not a folder of the workspace", word)
		}
		return j.path(word)
	}
	return j.word(word)
}

// word judges a word that may be a path or anything else: where it is a path, it must
// be one below the workspace.
func (j *judge) word(word string) *Refusal {
	for rest := word; ; {
		if refusal := j.below(rest, word); refusal != nil {
			return refusal
		}
		_, after, found := strings.Cut(rest, "=")
		if !found {
			return nil
		}
		rest = after
	}
}

// path judges the path of a file or a folder. Programs take some texts for addresses.
func (j *judge) path(word string) *Refusal {
	if word == "-" {
		return j.refuse("path.stdin", word, "plans have no standard input")
	}
	if strings.Contains(word, "://") || strings.HasPrefix(word, "git@") || strings.HasPrefix(word, "oci:") {
		return j.refuse("path.remote", word, "%s is an address, not a path below the workspace", word)
	}
	return j.below(word, word)
}

// below judges a path, which is word or a part of it.
func (j *judge) below(path, word string) *Refusal {
	if strings.HasPrefix(path, "~") {
		return j.refuse("path.outside", word, "%s may be a path in a home directory", path)
	}
	for part := range strings.SplitSeq(path, "/") {
		switch {
		case part == "..":
			// Also where it would stay below: after a symbolic link, programs do not
			// agree where .. leads.
			return j.refuse("path.outside", word, "%s leads out of a folder: without .., it is a path below the workspace", path)
		case strings.EqualFold(part, ".git"):
			return j.refuse("path.git", word, "%s is in git's own folder", path)
		}
	}
	full := path
	if !filepath.IsAbs(full) {
		full = filepath.Join(j.Dir, full)
	}
	if !isBelow(j.Workspace, full) {
		return j.refuse("path.outside", word, "%s is not below the workspace %s", path, j.Workspace)
	}
	if j.Resolve != nil && path != "" {
		if real := j.Resolve(full); !isBelow(j.Resolve(j.Workspace), real) {
			return j.refuse("path.link", word, "%s leads to %s, which is not below the workspace", path, real)
		}
	}
	return nil
}

// directory judges the directory that the command line runs in, and finds the
// workspace that it is in.
func (j *judge) directory() *Refusal {
	resolve := j.Resolve
	if resolve == nil {
		resolve = filepath.Clean
	}
	dir := resolve(j.Dir)
	if isBelow(resolve(j.Workspace), dir) {
		return nil
	}
	program, _, _ := strings.Cut(j.command, " ")
	for _, p := range j.Permit {
		of, _, _ := strings.Cut(canonical(p.Command), " ")
		for _, other := range p.Directories {
			if of == program && isBelow(resolve(other), dir) {
				j.Workspace = other
				return nil
			}
		}
	}
	refusal := j.refuse("path.directory", j.Dir, "it would run in %s, which is not below the workspace %s", dir, j.Workspace)
	refusal.Directory = dir
	return refusal
}

// isBelow says that a path is a folder, or lies in it.
func isBelow(dir, path string) bool {
	dir, path = filepath.Clean(dir), filepath.Clean(path)
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

// settings are the settings that `git -c` may set, with the only value, or "" for any.
var settings = map[string]string{
	"user.name": "", "user.email": "",
	"core.quotepath": "", "color.ui": "",
	"core.hookspath": "/dev/null", "commit.gpgsign": "false",
}

// setting judges the value of `git -c`.
func (j *judge) setting(word string) *Refusal {
	name, value, _ := strings.Cut(word, "=")
	only, listed := settings[strings.ToLower(name)]
	if listed && (only == "" || value == only) {
		return nil
	}
	refusal := j.refuse("setting", word, "setting %s can make git start a program or work elsewhere", name)
	refusal.Option = "-c="
	return refusal
}

package programs

import (
	"cmp"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// A Line is a command line of a plan, and what it is for.
type Line struct {
	// Argv is the command line, from the program on.
	Argv []string
	// Workspace is the absolute path of the folder that it may work in: paths in the
	// command line must lie below it. Dir is the directory that it runs in; it defaults
	// to Workspace.
	Workspace, Dir string
	// Project and Service are those of compose that it is for. Empty means any.
	Project, Service string
	// AnyProject lets compose act on other projects too. Containers that docker starts
	// and stops by name must still be those of Project.
	AnyProject bool
	// Resolve returns a path with its symbolic links followed, as far as it exists.
	// Nil means that links are not followed.
	Resolve func(path string) string
	// Permit is what an operator permits in addition.
	Permit []Permission
}

// A Permission allows more than the rules do.
type Permission struct {
	// Command is a program ("git", "docker"), or one with a subcommand: "git commit",
	// "docker run", "docker compose exec". The last one is also for docker-compose.
	Command string
	// Options are options that Command may have in addition to those of the rules:
	// for a program, before the subcommand. One that ends in "=" takes a value. The
	// values are not examined. A word that is no option is an argument that Command may
	// have: the name of another service, for instance. "*" means every option and every
	// argument after Command: nothing of the command line is examined.
	Options []string
	// Directories are other workspaces that Command may run in, as absolute paths.
	Directories []string
}

// A Refusal says why a command line may not run.
type Refusal struct {
	// Rule is the name of the rule that refuses, see [Describe].
	Rule string
	// Word is the word of the command line that it refuses.
	Word string
	// Why is a sentence without a full stop.
	Why string
	// Command, Option and Directory are what a [Permission] needs to allow Word.
	Command, Option, Directory string
}

// String says why the command line is refused.
func (r *Refusal) String() string { return r.Why }

// Entry returns the permission as it stands in a policy file.
func (r *Refusal) Entry() string {
	switch {
	case r.Directory != "":
		return fmt.Sprintf("{command: %s, directories: [%q], reason: …}", r.Command, r.Directory)
	case r.Option == "":
		return fmt.Sprintf("{command: %s, reason: …}", r.Command)
	}
	return fmt.Sprintf("{command: %s, options: [%q], reason: …}", r.Command, r.Option)
}

// Judged says that there are rules for a program: its name without a folder is git,
// docker or docker-compose.
func Judged(program string) bool {
	_, known := byName[filepath.Base(program)]
	return known
}

// Judge returns nil if a plan may run the command line, otherwise why not. It allows
// every program without rules, see [Judged].
func Judge(line Line) *Refusal {
	if len(line.Argv) == 0 {
		return nil
	}
	p, known := byName[filepath.Base(line.Argv[0])]
	if !known {
		return nil
	}
	line.Workspace = cmp.Or(line.Workspace, "/")
	line.Dir = cmp.Or(line.Dir, line.Workspace)
	j := &judge{Line: line, words: line.Argv[1:], command: p.name}
	return j.program(p)
}

// A judge reads one command line.
type judge struct {
	Line
	style style
	// words are those that are not read yet.
	words []string
	// command is what has been read, in the form of [Permission.Command].
	command string
	// help says that the program prints its help, and does nothing else.
	help bool
}

// program judges what follows a program's name.
func (j *judge) program(p *program) *Refusal {
	j.command, j.style = p.name, p.style
	if j.permits(j.command, "*") {
		return nil
	}
	if refusal := j.directory(); refusal != nil {
		return refusal
	}
	if refusal := j.options(p.globals, nil); refusal != nil {
		return refusal
	}
	if len(j.words) == 0 {
		return nil // it prints its help
	}
	name := j.words[0]
	j.words = j.words[1:]
	if plugin, found := p.plugins[name]; found {
		return j.program(plugin)
	}
	if group, found := p.groups[name]; found {
		if len(j.words) == 0 {
			return nil // it prints the group's help
		}
		name += " " + j.words[0]
		j.words = j.words[1:]
		if _, word, _ := strings.Cut(name, " "); group[word] != "" {
			name = group[word]
		}
	}
	return j.subcommand(p, cmp.Or(p.aliases[name], name))
}

// subcommand judges what follows a subcommand.
func (j *judge) subcommand(p *program, name string) *Refusal {
	j.command = p.name + " " + name
	if j.permits(j.command, "*") {
		return nil
	}
	command, listed := p.commands[name]
	if !listed && !j.permits(j.command, "") {
		refusal := j.refuse("subcommand", name, "%s is none of the subcommands that plans may run", j.command)
		for _, group := range p.refused {
			if slices.Contains(group.names, name) || slices.Contains(group.names, firstWord(name)) {
				refusal = j.refuse(group.rule, name, "%s %s", j.command, group.why)
			}
		}
		return refusal
	}
	arguments := []string{}
	if refusal := j.options(command.options, &arguments); refusal != nil {
		return refusal
	}
	if !listed {
		command.arguments = plain
	}
	if command.check != nil && !j.help {
		if refusal := command.check(j, arguments); refusal != nil {
			return refusal
		}
	}
	for _, word := range arguments {
		if j.permits(j.command, word) {
			continue
		}
		if refusal := j.argument(command.arguments, word); refusal != nil {
			return refusal
		}
	}
	return nil
}

func firstWord(text string) string {
	first, _, _ := strings.Cut(text, " ")
	return first
}

// permits says that a permission names this command, and the option unless it is
// empty.
func (j *judge) permits(command, option string) bool {
	return slices.ContainsFunc(j.Permit, func(p Permission) bool {
		return canonical(p.Command) == command && (option == "" || slices.Contains(p.Options, option))
	})
}

// canonical returns the form of a permission's command that [judge.command] has.
func canonical(command string) string {
	words := strings.Fields(command)
	if len(words) == 0 {
		return ""
	}
	p, known := byName[words[0]]
	if !known {
		return strings.Join(words, " ")
	}
	words = words[1:]
	for len(words) > 0 && p.plugins[words[0]] != nil {
		p, words = p.plugins[words[0]], words[1:]
	}
	name := strings.Join(words, " ")
	if len(words) == 2 {
		name = cmp.Or(p.groups[words[0]][words[1]], name)
	}
	return strings.TrimSpace(p.name + " " + cmp.Or(p.aliases[name], name))
}

// kindOf returns the kind of an option that the table or a permission has.
func (j *judge) kindOf(table map[string]kind, name string) (is kind, listed bool) {
	is, listed = table[name]
	switch {
	case j.permits(j.command, name+"="):
		return free, true
	case !j.permits(j.command, name):
		return is, listed
	case listed && is != flag && is != optional:
		return free, true
	}
	return is, true
}

// options reads options and, unless arguments is nil, everything else into it. With
// nil, it stops at the first word that is no option. They are read as the program
// reads them.
func (j *judge) options(table map[string]kind, arguments *[]string) *Refusal {
	globals := arguments == nil
	for len(j.words) > 0 {
		word := j.words[0]
		switch {
		case word == "--":
			if globals {
				return j.refuse("global-option", word, "%s has -- before its subcommand", j.command)
			}
			for _, after := range j.words[1:] {
				if strings.HasPrefix(after, "-") && after != "-" {
					// No option, but only if this package and the program agree on
					// where options end.
					return j.refuse("dash", after, "%s is an argument that looks like an option: write ./%s for a file of this name", after, after)
				}
				*arguments = append(*arguments, after)
			}
			j.words = nil
			return nil
		case len(word) < 2 || word[0] != '-':
			if globals {
				return nil
			}
			*arguments = append(*arguments, word)
			j.words = j.words[1:]
			continue
		}
		j.words = j.words[1:]
		var refusal *Refusal
		if strings.HasPrefix(word, "--") {
			refusal = j.long(table, word, globals)
		} else {
			refusal = j.short(table, word, globals)
		}
		if refusal != nil {
			return refusal
		}
	}
	return nil
}

// long judges a word like --name, --name=value, with the next word if it is its value.
func (j *judge) long(table map[string]kind, word string, globals bool) *Refusal {
	name, value, joined := strings.Cut(word, "=")
	if name == "--help" && j.style != gitStyle && !joined {
		j.help = true // git would start a viewer
		return nil
	}
	is, listed := j.kindOf(table, name)
	if !listed {
		return j.unknown(table, name, word, globals)
	}
	switch is {
	case flag:
		if joined && (j.style == gitStyle || !isBool(value)) {
			return j.refuse("option", word, "%s takes no value", name)
		}
		return nil
	case optional:
		if joined {
			return j.value(plain, name, value)
		}
		return nil
	}
	if !joined {
		if len(j.words) == 0 {
			return nil // the program reports it
		}
		value, j.words = j.words[0], j.words[1:]
		if refusal := j.separate(name, value); refusal != nil {
			return refusal
		}
	}
	return j.value(is, name, value)
}

// short judges a word like -x, -xvalue or -xyz, with the next word if it is the value
// of the last one.
func (j *judge) short(table map[string]kind, word string, globals bool) *Refusal {
	if is, listed := table["-NUMBER"]; listed && is == flag && isNumber(word[1:]) {
		return nil
	}
	for i := 1; i < len(word); i++ {
		name, rest := "-"+word[i:i+1], word[i+1:]
		is, listed := j.kindOf(table, name)
		if !listed {
			return j.unknown(table, name, word, globals)
		}
		if is == flag {
			if strings.HasPrefix(rest, "=") {
				if j.style == gitStyle || !isBool(rest[1:]) {
					return j.refuse("option", word, "%s takes no value", name)
				}
				return nil
			}
			continue
		}
		if is == optional {
			return j.value(plain, name, rest)
		}
		if rest != "" {
			if j.style != gitStyle {
				rest = strings.TrimPrefix(rest, "=")
			}
			return j.value(is, name, rest)
		}
		if len(j.words) == 0 {
			return nil
		}
		value := j.words[0]
		j.words = j.words[1:]
		if refusal := j.separate(name, value); refusal != nil {
			return refusal
		}
		return j.value(is, name, value)
	}
	return nil
}

// separate refuses a value that looks like an option: a version of the program in
// which the option takes no value would read it as one.
func (j *judge) separate(name, value string) *Refusal {
	if len(value) < 2 || value[0] != '-' {
		return nil
	}
	return j.refuse("dash", value, "the value of %s looks like an option: join it to the option", name)
}

// unknown refuses an option that no table lists.
func (j *judge) unknown(table map[string]kind, name, word string, globals bool) *Refusal {
	rule, why := "option", "is none of those that plans may use"
	if globals {
		rule = "global-option"
	}
	special := slices.IndexFunc(specials, func(s special) bool {
		of := j.command == s.command || s.below && strings.HasPrefix(j.command, s.command+" ")
		return of && slices.Contains(s.options, name)
	})
	if special >= 0 {
		rule, why = specials[special].rule, specials[special].why
	} else if full := completion(table, name); full != "" {
		why += ". Options must be written in full, as " + full
	}
	refusal := j.refuse(rule, word, "option %s of %s %s", name, j.command, why)
	refusal.Option = name
	return refusal
}

// completion returns an option that a program may take the beginning for.
func completion(table map[string]kind, name string) string {
	if len(name) < 4 {
		return ""
	}
	for _, full := range slices.Sorted(maps.Keys(table)) {
		if strings.HasPrefix(full, name) {
			return full
		}
	}
	return ""
}

// refuse makes a refusal. What the rule refuses is permitted only by a permission for
// everything of the command.
func (j *judge) refuse(rule, word, format string, args ...any) *Refusal {
	if !strings.HasPrefix(rule, "path.") {
		rule = string(j.style) + "." + rule
	}
	return &Refusal{Rule: rule, Word: word, Why: fmt.Sprintf(format, args...), Command: j.command, Option: "*"}
}

func isBool(text string) bool {
	_, err := strconv.ParseBool(text)
	return err == nil
}

func isNumber(text string) bool {
	return text != "" && strings.Trim(text, "0123456789") == ""
}

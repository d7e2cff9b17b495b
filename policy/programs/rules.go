package programs

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// A style says how a program reads its options.
type style string

const (
	gitStyle     style = "git"     // values of short options are not joined by =
	dockerStyle  style = "docker"  // flags take =true and =false
	composeStyle style = "compose" // as docker
)

// A program has the rules of one program, or of a plugin of it.
type program struct {
	// name begins [Permission.Command].
	name  string
	style style
	// globals are the options before the subcommand.
	globals  map[string]kind
	commands map[string]command
	// aliases are other names of commands.
	aliases map[string]string
	// groups are names before other names: docker image ls is docker images.
	groups map[string]map[string]string
	// plugins are subcommands that have rules like a program.
	plugins map[string]*program
	refused []refused
}

// A command has the rules of a subcommand.
type command struct {
	options   map[string]kind
	arguments kind
	// check judges all arguments together, before each of them. Nil means any number.
	check func(j *judge, arguments []string) *Refusal
}

// refused names subcommands that are not in the list for the same reason.
type refused struct {
	rule  string
	names []string
	// why continues "git clone …".
	why string
}

// A special option is refused by a rule of its own.
type special struct {
	rule    string
	command string
	// below says that it is an option of all subcommands of command too.
	below   bool
	options []string
	// why continues "option -x of git clone …".
	why string
}

// options reads tables: words like -q|--quiet, separated by spaces. After the names, =
// says that the option takes a value, =text, =path and so on what it is, and ? that
// it takes a joined value or none.
func options(tables ...string) map[string]kind {
	kinds := map[string]kind{"": plain, "text": text, "path": path, "project": project, "setting": setting, "network": network, "scale": scale, "assignment": assignment}
	all := map[string]kind{}
	for _, word := range strings.Fields(strings.Join(tables, " ")) {
		names, value, takes := strings.Cut(word, "=")
		is := flag
		if takes {
			var known bool
			if is, known = kinds[value]; !known {
				panic("policy/programs: no kind of value: " + word)
			}
		} else if trimmed, found := strings.CutSuffix(names, "?"); found {
			names, is = trimmed, optional
		}
		for name := range strings.SplitSeq(names, "|") {
			all[name] = is
		}
	}
	return all
}

// A Rule is a rule as an operator reads it.
type Rule struct {
	// Name is that of [Refusal.Rule].
	Name string `json:"name"`
	// What is a sentence without a full stop.
	What string `json:"what"`
	// Commands are the subcommands, or the options, that the rule names. With none,
	// it is about everything that is not listed, or about values.
	Commands []string `json:"commands,omitempty"`
}

// An Allowed is a subcommand that every plan may run.
type Allowed struct {
	Command string   `json:"command"`
	Options []string `json:"options"`
}

// Describe returns all rules, in the order of their names, and what they allow.
func Describe() ([]Rule, []Allowed) {
	rules := slices.Clone(general)
	var allowed []Allowed
	for _, p := range everyProgram {
		for _, r := range p.refused {
			rule := Rule{Name: string(p.style) + "." + r.rule, What: "The subcommand " + r.why}
			for _, name := range r.names {
				rule.Commands = append(rule.Commands, p.name+" "+name)
			}
			rules = append(rules, rule)
		}
		for _, name := range slices.Sorted(maps.Keys(p.commands)) {
			allowed = append(allowed, Allowed{p.name + " " + name, slices.Sorted(maps.Keys(p.commands[name].options))})
		}
	}
	for _, s := range specials {
		rule := Rule{Name: familyOf(s.command) + "." + s.rule, What: "The option " + s.why}
		for _, option := range s.options {
			rule.Commands = append(rule.Commands, s.command+" "+option)
		}
		rules = append(rules, rule)
	}
	slices.SortStableFunc(rules, func(a, b Rule) int { return strings.Compare(a.Name, b.Name) })
	return rules, allowed
}

func familyOf(command string) string {
	switch {
	case strings.HasPrefix(command, "docker compose"):
		return string(composeStyle)
	case strings.HasPrefix(command, "docker"):
		return string(dockerStyle)
	}
	return string(gitStyle)
}

// general are the rules that are about everything that is not listed, or about values.
var general = func() []Rule {
	rules := []Rule{
		{Name: "git.setting", What: "git -c sets only " + strings.Join(slices.Sorted(maps.Keys(settings)), ", ")},
		{Name: "git.read-only", What: "git config, branch and tag only show, or create a branch or tag"},
		{Name: "compose.other-project", What: "compose acts on the run's project only"},
		{Name: "compose.other-service", What: "compose changes the run's service only"},
		{Name: "docker.other-container", What: "docker start, stop, restart, inspect and logs are about containers of the run's project only, by name"},
		{Name: "docker.remote-context", What: "A build's context is a folder of the workspace"},
		{Name: "git.runs", What: "No value of --format, --pretty, --sort or --submodule makes git start another program: no %G, no signature, no diff of submodules"},
		{Name: "docker.frontend", What: "Of the build arguments that change the builder itself, only BUILDKIT_INLINE_CACHE"},
		{Name: "compose.frontend", What: "Of the build arguments that change the builder itself, only BUILDKIT_INLINE_CACHE"},
		{Name: "docker.network", What: "A build uses the networks none and default only"},
		{Name: "path.outside", What: "A word that is a path must be below the workspace, without .. and ~"},
		{Name: "path.directory", What: "The directory that a command runs in must be below the workspace"},
		{Name: "path.link", What: "A path must not lead out of the workspace by a symbolic link"},
		{Name: "path.git", What: "A path must not be in git's own folder"},
		{Name: "path.remote", What: "A file is not an address"},
		{Name: "path.stdin", What: "A file is not standard input: plans have none"},
	}
	for _, family := range []string{"git", "docker", "compose"} {
		rules = append(rules,
			Rule{Name: family + ".subcommand", What: "Only listed subcommands of " + family},
			Rule{Name: family + ".option", What: fmt.Sprintf("Only listed options of each subcommand of %s, written in full", family)},
			Rule{Name: family + ".global-option", What: "Only listed options before the subcommand of " + family},
			Rule{Name: family + ".argument", What: "Arguments of " + family + " must be what the subcommand takes"},
			Rule{Name: family + ".dash", What: "No argument or separate value of " + family + " may look like an option"})
	}
	return rules
}()

var byName = map[string]*program{"git": git, "docker": docker, "docker-compose": standalone}

var everyProgram = []*program{git, docker, compose}

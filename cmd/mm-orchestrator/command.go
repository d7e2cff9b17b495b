package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

// command is a command or subcommand of the program.
type command struct {
	name string
	// args shows the positional arguments in the usage line; words is how many
	// of them are accepted.
	args  string
	words int
	// synonyms are names of this command in other programs. They do not run
	// it; the error for an unknown command suggests the right name.
	synonyms []string
	// wordHints maps arguments that similar commands of other programs accept
	// to the hint that the error gives.
	wordHints map[string]string
	// summary is one line for the list of commands.
	summary string
	// about is the description in the command's help.
	about string
	// internal commands are run by the program itself: the list of commands and
	// the shell's completion leave them out.
	internal bool
	// examples are command lines, each with a comment.
	examples []example
	// topics are the topics of the settings that the command reads.
	topics      []topic
	subcommands []*command
	// setup declares the command's own flags, and returns the function to run
	// after they are parsed.
	setup func(fs *pflag.FlagSet) runFunc
	// complete, if not nil, lists the possible next arguments for shell
	// completion.
	complete func(words []string) []string
}

type example struct{ line, comment string }

// runFunc runs a command.
type runFunc func(ctx context.Context, p *program, in input) error

// input is what a command gets from its command line, besides its own flags.
type input struct {
	// words are the positional arguments, at most command.words of them.
	words []string
	// settings are the flags for the settings that the command reads.
	settings *settingFlags
	// command is the command that runs, and parsed is its node in the parser.
	command *command
	parsed  *cobra.Command
}

// commands in the order of the help text.
func commands() []*command {
	return []*command{workerCommand, doctorCommand, configCommand, migrateCommand, runsCommand, pauseCommand, resumeCommand, parkedCommand, changesCommand, specCommand, policyCommand, auditCommand, healthCommand, versionCommand, completionCommand, helpCommand(), restartServiceCommand}
}

// execute parses the command line and runs the command.
func (p *program) execute(ctx context.Context, args []string) error {
	root := p.root()
	args = normalizeDashes(root, args)
	root.SetArgs(args)
	root.SetFlagErrorFunc(func(node *cobra.Command, err error) error {
		if asksForHelp(args) {
			return pflag.ErrHelp
		}
		return flagError(node, err)
	})
	return root.ExecuteContext(ctx)
}

// root builds the command tree for the parser. Each command line needs a new
// tree, because the tree stores the flags' values.
func (p *program) root() *cobra.Command {
	root := &cobra.Command{
		Use: "mm-orchestrator", Args: cobra.ArbitraryArgs, SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.SetOut(p.stdout)
	root.SetErr(p.stderr)
	root.SetHelpFunc(func(*cobra.Command, []string) { writeOverview(p.stdout) })
	version := root.Flags().BoolP("version", "v", false, "Print the version.")
	root.RunE = func(_ *cobra.Command, words []string) error {
		switch {
		case *version:
			return p.printVersion()
		case len(words) == 0:
			writeOverview(p.stderr)
			return &usageError{"give a command"}
		}
		return unknownCommand(words[0])
	}
	for _, cmd := range commands() {
		node := p.node(cmd)
		if cmd.name == "help" {
			root.SetHelpCommand(node)
		}
		root.AddCommand(node)
	}
	return root
}

// node builds the parser's node for a command and its subcommands.
func (p *program) node(cmd *command) *cobra.Command {
	node := &cobra.Command{
		Use: cmd.name, Short: cmd.summary, Args: cobra.ArbitraryArgs, DisableFlagsInUseLine: true, Hidden: cmd.internal,
		ValidArgsFunction: func(_ *cobra.Command, words []string, _ string) ([]string, cobra.ShellCompDirective) {
			if cmd.complete == nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return cmd.complete(words), cobra.ShellCompDirectiveNoFileComp
		},
	}
	fs := node.Flags()
	fs.SortFlags = false
	run := cmd.setup(fs)
	settings := addSettingFlags(fs, cmd.topics...)
	fs.VisitAll(func(f *pflag.Flag) { completeFlag(node, f) })
	node.InitDefaultHelpFlag()
	fs.Lookup("help").Usage = "Explain the command."
	node.SetHelpFunc(func(node *cobra.Command, _ []string) { writeCommandHelp(p.stdout, node.CommandPath(), cmd, fs) })
	node.RunE = func(node *cobra.Command, words []string) error {
		if len(words) > cmd.words {
			return cmd.tooManyWords(node, words)
		}
		return run(node.Context(), p, input{words: words, settings: settings, command: cmd, parsed: node})
	}
	for _, sub := range cmd.subcommands {
		node.AddCommand(p.node(sub))
	}
	return node
}

// choices is the annotation that lists the values a flag accepts.
const choices = "choices"

// completeFlag sets how the shell completes the value of a flag.
func completeFlag(node *cobra.Command, f *pflag.Flag) {
	var words []string
	directive := cobra.ShellCompDirectiveNoFileComp
	switch kind := f.Value.Type(); {
	case len(f.Annotations[choices]) > 0:
		words = f.Annotations[choices]
	case kind == "directory":
		directive = cobra.ShellCompDirectiveFilterDirs
	case kind == "file":
		directive = cobra.ShellCompDirectiveDefault
	case strings.Contains(kind, "|"):
		words = strings.Split(kind, "|")
	}
	_ = node.RegisterFlagCompletionFunc(f.Name, cobra.FixedCompletions(words, directive)) // fails for unknown flags only
}

// tooManyWords is the error for a surplus argument. The hint is about the first
// argument, which may be a misspelled subcommand.
func (cmd *command) tooManyWords(node *cobra.Command, words []string) error {
	return &usageError{fmt.Sprintf("%s does not take %q; %s", commandName(node), maskedWord(words[cmd.words], words...), cmd.hint(node, words[0]))}
}

// maskedWord returns a word of the command line as errors may show it. Addresses
// are flag values, but someone may type one as an argument. A blank in an unquoted
// password splits the address into several words, so that one suspicious word
// among others masks all of them.
func maskedWord(word string, others ...string) string {
	for _, other := range append(others, word) {
		if strings.Contains(other, "://") || strings.Contains(other, "@") {
			return address.SchemeOnly(word)
		}
	}
	return word
}

// hint suggests what a user who typed an unexpected word may have meant.
func (cmd *command) hint(node *cobra.Command, word string) string {
	if text, known := cmd.wordHints[word]; known {
		return text
	}
	if meant := nearestCommand(word, cmd.subcommands); meant != "" {
		return fmt.Sprintf("did you mean %s %s?", node.CommandPath(), meant)
	}
	return seeHelp(node)
}

// commandName is the command's path without the program's name.
func commandName(node *cobra.Command) string {
	_, name, _ := strings.Cut(node.CommandPath(), " ")
	return cmp.Or(name, node.Name())
}

func seeHelp(node *cobra.Command) string { return "see " + node.CommandPath() + " --help" }

func unknownCommand(word string) error {
	meant := nearestCommand(word, commands())
	if nearest(word, []string{settingsTopic, "options", "environment", "docs"}) != "" {
		meant = "help " + settingsTopic
	}
	if meant != "" {
		return &usageError{fmt.Sprintf("there is no command %q; did you mean %s?", maskedWord(word), meant)}
	}
	var known []string
	for _, cmd := range commands() {
		if !cmd.internal {
			known = append(known, cmd.name)
		}
	}
	return &usageError{fmt.Sprintf("there is no command %q; there are %s", maskedWord(word), strings.Join(known, ", "))}
}

// nearestCommand returns the command most similar to word, with its parent
// commands, or "".
func nearestCommand(word string, among []*command) string {
	meant := map[string]string{}
	var names []string
	var collect func(prefix string, list []*command)
	collect = func(prefix string, list []*command) {
		for _, cmd := range list {
			for _, name := range append([]string{cmd.name}, cmd.synonyms...) {
				names = append(names, name)
				meant[name] = cmp.Or(meant[name], prefix+cmd.name)
			}
			collect(prefix+cmd.name+" ", cmd.subcommands)
		}
	}
	collect("", among)
	return meant[nearest(word, names)]
}

// nearest returns the name most similar to word, or "". Similar are names that
// begin with word, and names at an edit distance of at most 2, less for short
// words.
func nearest(word string, names []string) string {
	word = strings.ToLower(word)
	best, least := "", 3
	for _, name := range names {
		lower := strings.ToLower(name)
		d := policy.Distance(word, lower)
		if len(word) >= 3 && strings.HasPrefix(lower, word) {
			d = min(d, 1)
		}
		if d < least && d <= (len(word)+1)/3 {
			best, least = name, d
		}
	}
	return best
}

// normalizeDashes rewrites -name as --name where the command has such a flag.
// Package flag, which earlier versions used, accepted both, and deployments may
// use either. Flag values, and everything after --, stay unchanged.
func normalizeDashes(root *cobra.Command, args []string) []string {
	node, _, err := root.Find(args)
	if err != nil {
		node = root
	}
	node.InitDefaultHelpFlag()
	out := make([]string, 0, len(args))
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			return append(out, args[i:]...)
		}
		name, _, hasValue := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		var known *pflag.Flag
		switch {
		case strings.HasPrefix(arg, "--"):
			known = node.Flags().Lookup(name)
		case strings.HasPrefix(arg, "-") && len(name) > 1:
			if known = node.Flags().Lookup(name); known != nil {
				arg = "-" + arg
			}
		case strings.HasPrefix(arg, "-") && len(name) == 1:
			known = node.Flags().ShorthandLookup(name)
		}
		out = append(out, arg)
		if known != nil && known.NoOptDefVal == "" && !hasValue && i+1 < len(args) {
			i++
			out = append(out, args[i])
		}
	}
	return out
}

// flagError rewords the parser's errors and adds a hint.
func flagError(node *cobra.Command, err error) error {
	var (
		unknown *pflag.NotExistError
		missing *pflag.ValueRequiredError
		invalid *pflag.InvalidValueError
		hint    = seeHelp(node)
		text    = err.Error()
	)
	switch {
	case errors.As(err, &unknown):
		given := "--" + unknown.GetSpecifiedName()
		name := unknown.GetSpecifiedName()
		if group := unknown.GetSpecifiedShortnames(); group != "" {
			name, _, _ = strings.Cut(group, "=")
			given = "-" + name
		}
		var known []string
		node.Flags().VisitAll(func(f *pflag.Flag) { known = append(known, f.Name) })
		if meant := nearest(name, known); meant != "" {
			hint = "did you mean --" + meant + "?"
		}
		text = "there is no flag " + given
	case errors.As(err, &missing):
		text = "--" + missing.GetFlag().Name + " needs a value"
	case errors.As(err, &invalid):
		cause := invalid.Unwrap().Error()
		switch invalid.GetFlag().Value.Type() {
		case "int":
			cause = "it must be a whole number"
		case "bool":
			cause = "it must be true or false"
		}
		text = fmt.Sprintf("--%s is %q: %s", invalid.GetFlag().Name, invalid.GetValue(), cause)
	}
	return &usageError{text + "; " + hint}
}

// durationVar declares a duration flag, in the syntax of settings: 90s, 15m, or
// a number of seconds.
func durationVar(fs *pflag.FlagSet, p *time.Duration, name string, value time.Duration, usage string) {
	*p = value
	fs.Var((*durationValue)(p), name, usage)
}

type durationValue time.Duration

func (v *durationValue) Set(text string) error {
	read := readDuration(func(*configuration) *time.Duration { return (*time.Duration)(v) }, 0)
	return read(nil, text)
}
func (v *durationValue) String() string { return shortDuration(time.Duration(*v)) }
func (v *durationValue) Type() string   { return "duration" }

// shortDuration writes 1m0s as 1m.
func shortDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// asksForHelp reports whether -h or --help is among the flags. Help is shown
// even if the parser rejects a flag before it.
func asksForHelp(args []string) bool {
	if end := slices.Index(args, "--"); end >= 0 {
		args = args[:end]
	}
	return slices.Contains(args, "-h") || slices.Contains(args, "--help")
}

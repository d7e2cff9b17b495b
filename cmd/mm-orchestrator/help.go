package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/pflag"
)

// helpCommand is a function because the command lists all commands, itself
// included.
func helpCommand() *command {
	return &command{
		name:       "help",
		args:       "[COMMAND | settings [NAME]]",
		words:      2,
		alsoCalled: []string{"man"},
		summary:    "explain a command, or the settings",
		about:      "Explains a command. `help settings` explains all that can be configured; a name narrows it down: a topic, a variable, a flag, or a part of one.",
		examples: []example{
			{"mm-orchestrator help runs revoke", "the same as: mm-orchestrator runs revoke --help"},
			{"mm-orchestrator help settings database", "where are the tables?"},
			{"mm-orchestrator help settings WORKSPACE_ROOT", "what is this variable?"},
		},
		complete: func(words []string) []string {
			var names []string
			if len(words) == 0 {
				for _, cmd := range commands() {
					names = append(names, cmd.name)
				}
				return append(names, settingsTopic)
			}
			if words[0] == settingsTopic {
				for _, s := range settings {
					names = append(names, s.name())
				}
				return names
			}
			for _, cmd := range commands() {
				for _, sub := range cmd.subcommands {
					if cmd.name == words[0] {
						names = append(names, sub.name)
					}
				}
			}
			return names
		},
		setup: func(*pflag.FlagSet) runFunc { return runHelp },
	}
}

// settingsTopic is what help explains besides commands.
const settingsTopic = "settings"

func runHelp(_ context.Context, p *program, in input) error {
	switch {
	case len(in.words) == 0:
		writeOverview(p.stdout)
		return nil
	case in.words[0] == settingsTopic:
		return writeSettings(p.stdout, in.words[1:])
	}
	asked, rest, err := in.parsed.Root().Find(in.words)
	switch {
	case err != nil || asked == in.parsed.Root():
		return unknownCommand(in.words[0])
	case len(rest) > 0:
		return &usageError{fmt.Sprintf("%s has no command %q; %s", commandName(asked), shownWord(rest[0], rest...), seeHelp(asked))}
	}
	return asked.Help()
}

// helpWidth is the width to which help texts are wrapped.
const helpWidth = 96

func writeOverview(w io.Writer) {
	fmt.Fprint(w, `mm-orchestrator takes over the queue of MoonMind's Celery orchestrator worker: it carries runs
through analyze, patch, build, restart and verify, or rolls them back.

Usage: mm-orchestrator COMMAND [flags]

`)
	writeCommands(w, commands())
	fmt.Fprint(w, "\n"+wrap("`mm-orchestrator COMMAND --help` explains a command. Flags may stand before or after other words; -- ends them.", "")+"\n\n"+
		wrap("Configuration comes from the environment variables of the Python worker and from flags; .env files are not read. "+
			"`mm-orchestrator help settings` explains all of it, `mm-orchestrator config` shows what is in effect and where it comes from.", "")+
		"\n\nExit codes:\n")
	for _, e := range exitCodes {
		fmt.Fprintf(w, "  %-3d %s\n", e.code, e.meaning)
	}
}

// writeCommands lists commands, with those below them.
func writeCommands(w io.Writer, list []*command) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var lines func(prefix string, list []*command)
	lines = func(prefix string, list []*command) {
		for _, cmd := range list {
			fmt.Fprintf(table, "  %s\t%s\n", prefix+cmd.name, cmd.summary)
			lines(prefix+cmd.name+" ", cmd.subcommands)
		}
	}
	lines("", list)
	_ = table.Flush()
}

// writeCommandHelp explains one command with its own flags and the settings
// that it reads.
func writeCommandHelp(w io.Writer, path string, cmd *command, fs *pflag.FlagSet) {
	usage := path
	if cmd.args != "" {
		usage += " " + cmd.args
	}
	fmt.Fprintf(w, "Usage: %s [flags]\n", usage)
	for _, sub := range cmd.subcommands {
		fmt.Fprintf(w, "       %s [flags]\n", strings.TrimSpace(path+" "+sub.name+" "+sub.args))
	}
	fmt.Fprintf(w, "\n%s\n", wrap(cmd.about, ""))

	if len(cmd.examples) > 0 {
		fmt.Fprint(w, "\nExamples:\n")
		for _, e := range cmd.examples {
			fmt.Fprintf(w, "  # %s\n  %s\n", e.comment, e.line)
		}
	}
	fmt.Fprint(w, "\nFlags:\n")
	writeFlags(w, fs)
	writeSettingsOf(w, cmd)
}

// writeFlags explains the flags that belong to no setting.
func writeFlags(w io.Writer, fs *pflag.FlagSet) {
	type line struct{ head, text string }
	var lines []line
	width := 0
	fs.VisitAll(func(f *pflag.Flag) {
		if _, isSetting := f.Value.(*flagValue); isSetting {
			return
		}
		head := "    --" + f.Name
		if f.Shorthand != "" {
			head = "-" + f.Shorthand + ", --" + f.Name
		}
		kind, text := pflag.UnquoteUsage(f)
		if kind == "int" {
			kind = "number"
		}
		if kind != "" {
			head += " " + kind
			if f.DefValue != "" {
				text += " Default: " + f.DefValue + "."
			}
		}
		lines = append(lines, line{head, text})
		width = max(width, len(head))
	})
	for _, l := range lines {
		indent := strings.Repeat(" ", width+4)
		fmt.Fprintf(w, "  %-*s  %s\n", width, l.head, strings.TrimPrefix(wrap(l.text, indent), indent))
	}
}

// shortList is how many topics a command may read for its help to list their
// settings.
const shortList = 3

// writeSettingsOf says which settings a command reads: a line for each, or
// where they are explained.
func writeSettingsOf(w io.Writer, cmd *command) {
	switch {
	case len(cmd.topics) == 0:
		return
	case len(cmd.topics) > shortList:
		fmt.Fprint(w, "\n"+wrap("It reads all settings, from environment variables or from flags. `mm-orchestrator help settings` explains them, "+
			"`mm-orchestrator config` shows what is in effect.", "")+"\n")
		return
	}
	fmt.Fprint(w, "\n"+wrap("Settings that it reads, by flag or by environment variable; a flag wins. `mm-orchestrator help settings` explains them.", "")+"\n")
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, t := range topics {
		if !slices.Contains(cmd.topics, t) {
			continue
		}
		for _, s := range settings {
			if s.topic == t {
				fmt.Fprintf(table, "  %s\t%s\tDefault: %s\n", s.flagText(), s.name(), s.defaultText())
			}
		}
	}
	_ = table.Flush()
}

// writeSettings explains the settings, or those that a name fits.
func writeSettings(w io.Writer, names []string) error {
	shown := func(setting) bool { return true }
	if len(names) > 0 {
		name := strings.ToLower(strings.TrimLeft(names[0], "-"))
		shown = func(s setting) bool { return s.fits(name) }
		if !slices.ContainsFunc(settings, shown) {
			hint := "`mm-orchestrator help settings` lists them"
			if meant := nearest(name, settingNames()); meant != "" {
				hint = "did you mean " + meant + "?"
			}
			return &usageError{fmt.Sprintf("there is no setting %q; %s", shownWord(names[0], names...), hint)}
		}
	} else {
		fmt.Fprint(w, wrap("What can be configured, by environment variable or by flag. The first variable that is set wins, the case of letters in its name does not matter, "+
			"and a flag wins over all of them. .env files are not read. Times are written as 90s, 15m, 1h30m, or as a number of seconds. "+
			"`mm-orchestrator config` shows what is in effect and where it comes from.", "")+"\n\n")
	}
	var last topic
	for _, s := range settings {
		if !shown(s) {
			continue
		}
		if s.topic != last {
			if last != "" {
				fmt.Fprintln(w)
			}
			fmt.Fprintln(w, s.topic)
			last = s.topic
		}
		writeSetting(w, s)
	}
	return nil
}

// fits says that a name in lower case means this setting: it is that of its
// topic, or a part of its flag or of one of its variables.
func (s setting) fits(name string) bool {
	if strings.HasPrefix(strings.ToLower(string(s.topic)), name) || strings.Contains(s.flag, name) {
		return true
	}
	return slices.ContainsFunc(s.vars, func(v variable) bool { return strings.Contains(strings.ToLower(v.name), name) })
}

func settingNames() []string {
	var list []string
	for _, s := range settings {
		if s.flag != "" {
			list = append(list, s.flag)
		}
		for _, v := range s.vars {
			list = append(list, v.name)
		}
	}
	return list
}

func writeSetting(w io.Writer, s setting) {
	fmt.Fprintf(w, "  %s   %s\n", s.name(), s.flagText())
	if len(s.vars) > 1 {
		var others []string
		for _, v := range s.vars[1:] {
			others = append(others, v.name)
		}
		fmt.Fprintln(w, wrap("else "+strings.Join(others, ", else "), "      "))
	}
	fmt.Fprintln(w, wrap(s.help+"\nDefault: "+s.defaultText(), "      "))
}

// flagText is the flag with the form of its value.
func (s setting) flagText() string {
	switch {
	case s.flag == "":
		return "(no flag)"
	case s.boolean:
		return "--" + s.flag + "[=" + s.form + "]"
	}
	return "--" + s.flag + " " + s.form
}

// defaultText is the default in words.
func (s setting) defaultText() string {
	switch {
	case s.defaultNote != "":
		return s.defaultNote
	case s.secret:
		return "the one that MoonMind's source gives"
	}
	return s.def
}

// wrap breaks paragraphs into lines that begin with indent. Lines that begin
// with a space are kept as they are.
func wrap(text, indent string) string {
	var out []string
	for paragraph := range strings.SplitSeq(text, "\n") {
		if paragraph == "" || strings.HasPrefix(paragraph, " ") {
			out = append(out, strings.TrimRight(indent+paragraph, " "))
			continue
		}
		line := indent
		for _, word := range strings.Fields(paragraph) {
			if len(line) > len(indent) && len(line)+1+len(word) > helpWidth {
				out = append(out, line)
				line = indent
			}
			if len(line) > len(indent) {
				line += " "
			}
			line += word
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

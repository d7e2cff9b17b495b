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

// helpCommand is a function, because a variable that refers to commands, which
// includes it, would be an initialization cycle.
func helpCommand() *command {
	return &command{
		name:     "help",
		args:     "[COMMAND | settings [NAME]]",
		words:    3,
		synonyms: []string{"man"},
		summary:  "explain a command or the settings",
		about:    "Explains a command. `help settings` explains all settings; with NAME only those of a topic, or those whose variable or flag contains NAME.",
		examples: []example{
			{"mm-orchestrator help runs revoke", "the same as: mm-orchestrator runs revoke --help"},
			{"mm-orchestrator help settings database", "the settings of a topic"},
			{"mm-orchestrator help settings WORKSPACE_ROOT", "one variable"},
		},
		complete: func(words []string) []string {
			var names []string
			if len(words) == 0 {
				for _, cmd := range commands() {
					if !cmd.internal {
						names = append(names, cmd.name)
					}
				}
				return append(names, settingsTopic)
			}
			if words[0] == settingsTopic {
				for _, s := range settings {
					names = append(names, s.name())
				}
				return names
			}
			list := commands()
			for _, word := range words {
				at := slices.IndexFunc(list, func(cmd *command) bool { return cmd.name == word })
				if at < 0 {
					return nil
				}
				list = list[at].subcommands
			}
			for _, cmd := range list {
				names = append(names, cmd.name)
			}
			return names
		},
		setup: func(*pflag.FlagSet) runFunc { return runHelp },
	}
}

// settingsTopic is the argument with which help explains the settings.
const settingsTopic = "settings"

func runHelp(_ context.Context, p *program, in input) error {
	switch {
	case len(in.words) == 0:
		writeOverview(p.stdout)
		return nil
	case in.words[0] == settingsTopic && len(in.words) > 2:
		return &usageError{fmt.Sprintf("help settings does not take %q; %s", maskedWord(in.words[2], in.words...), seeHelp(in.parsed))}
	case in.words[0] == settingsTopic:
		return writeSettings(p.stdout, in.words[1:])
	}
	asked, rest, err := in.parsed.Root().Find(in.words)
	switch {
	case err != nil || asked == in.parsed.Root():
		return unknownCommand(in.words[0])
	case len(rest) > 0:
		return &usageError{fmt.Sprintf("%s has no command %q; %s", commandName(asked), maskedWord(rest[0], rest...), seeHelp(asked))}
	}
	return asked.Help()
}

// helpWidth is the width to which help texts are wrapped.
const helpWidth = 96

func writeOverview(w io.Writer) {
	fmt.Fprint(w, `mm-orchestrator replaces MoonMind's Celery orchestrator worker. It takes runs from the same
queue, carries out their steps (analyze, patch, build, restart, verify), and rolls failed runs
back.

Usage: mm-orchestrator COMMAND [flags]

`)
	writeCommands(w, commands())
	fmt.Fprint(w, "\n"+wrap("`mm-orchestrator COMMAND --help` explains a command. Flags may come before or after arguments; -- ends the flags.", "")+"\n\n"+
		wrap("The program is configured by the Python worker's environment variables and by flags; .env files are not read. "+
			"`mm-orchestrator help settings` explains the settings, `mm-orchestrator config` shows the effective values and their sources.", "")+
		"\n\nExit codes:\n")
	for _, e := range exitCodes {
		fmt.Fprintf(w, "  %-3d %s\n", e.code, e.meaning)
	}
}

// writeCommands lists commands and their subcommands.
func writeCommands(w io.Writer, list []*command) {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var lines func(prefix string, list []*command)
	lines = func(prefix string, list []*command) {
		for _, cmd := range list {
			if cmd.internal {
				continue
			}
			fmt.Fprintf(table, "  %s\t%s\n", prefix+cmd.name, cmd.summary)
			lines(prefix+cmd.name+" ", cmd.subcommands)
		}
	}
	lines("", list)
	_ = table.Flush()
}

// writeCommandHelp explains a command, its flags and the settings that it reads.
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

// writeFlags explains the command's own flags, which are not settings.
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

// maxListedTopics is the number of topics up to which the help of a command lists
// its settings.
const maxListedTopics = 3

// writeSettingsOf lists the settings that a command reads, or, if there are too
// many, refers to help settings.
func writeSettingsOf(w io.Writer, cmd *command) {
	switch {
	case len(cmd.topics) == 0:
		return
	case len(cmd.topics) > maxListedTopics:
		fmt.Fprint(w, "\n"+wrap("The command reads all settings, from environment variables or flags. `mm-orchestrator help settings` explains them, "+
			"`mm-orchestrator config` shows the effective values.", "")+"\n")
		return
	}
	fmt.Fprint(w, "\n"+wrap("Settings, as flag or environment variable (the flag overrides the variable). `mm-orchestrator help settings` explains them.", "")+"\n")
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

// writeSettings explains all settings, or those that match a name.
func writeSettings(w io.Writer, names []string) error {
	shown := func(setting) bool { return true }
	if len(names) > 0 {
		name := strings.ToLower(strings.TrimLeft(names[0], "-"))
		shown = func(s setting) bool { return s.matches(name) }
		if !slices.ContainsFunc(settings, shown) {
			hint := "`mm-orchestrator help settings` lists them"
			if meant := nearest(name, settingNames()); meant != "" {
				hint = "did you mean " + meant + "?"
			}
			return &usageError{fmt.Sprintf("there is no setting %q; %s", maskedWord(names[0], names...), hint)}
		}
	} else {
		fmt.Fprint(w, wrap("Each setting has one or more environment variables and, unless it is secret, a flag. The flag overrides the variables; of the variables, the first that is set wins. "+
			"Variable names are case-insensitive. .env files are not read. Durations are written as 90s, 15m, 1h30m, or as a number of seconds. "+
			"`mm-orchestrator config` shows the effective values and their sources.", "")+"\n\n")
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

// matches reports whether a lower-case name is the beginning of the setting's
// topic, or a part of its flag or of one of its variables.
func (s setting) matches(name string) bool {
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

// flagText is the flag with a placeholder for its value.
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
		return "MoonMind's default"
	}
	return s.def
}

// wrap breaks paragraphs into lines that begin with indent. It does not break
// lines that begin with a space.
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

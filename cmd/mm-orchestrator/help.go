package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

// helpCommand is a function because the command lists all commands, itself
// included.
func helpCommand() *command {
	return &command{
		name:    "help",
		args:    "[COMMAND]",
		summary: "explain a command",
		about:   "Explains a command, or lists all of them.",
		run: func(p *program, ctx context.Context, cmd *command, args []string) error {
			fs, _ := p.flags(cmd)
			words, err := p.parse(cmd, fs, args, 1)
			if err != nil {
				return err
			}
			if len(words) == 0 {
				writeOverview(p.stdout)
				return nil
			}
			asked, err := findCommand(words[0])
			if err != nil {
				return err
			}
			return asked.run(p, ctx, asked, []string{"--help"})
		},
	}
}

// helpWidth is the width to which help texts are wrapped.
const helpWidth = 96

func writeOverview(w io.Writer) {
	fmt.Fprint(w, `mm-orchestrator takes over the queue of MoonMind's Celery orchestrator worker: it carries runs
through analyze, patch, build, restart and verify, or rolls them back.

Usage: mm-orchestrator COMMAND [flags]

`)
	for _, cmd := range commands() {
		fmt.Fprintf(w, "  %-9s %s\n", cmd.name, cmd.summary)
	}
	fmt.Fprint(w, "\nConfiguration comes from the environment variables of the Python worker and from flags; .env files\n"+
		"are not read. `mm-orchestrator worker --help` explains all of it, `mm-orchestrator config` shows what is\n"+
		"in effect and where it comes from.\n\nExit codes:\n")
	for _, e := range exitCodes {
		fmt.Fprintf(w, "  %-3d %s\n", e.code, e.meaning)
	}
}

// writeCommandHelp explains one command with its own flags and the settings
// that it reads.
func writeCommandHelp(w io.Writer, cmd *command, fs *flag.FlagSet) {
	usage := "mm-orchestrator " + cmd.name
	if cmd.args != "" {
		usage += " " + cmd.args
	}
	fmt.Fprintf(w, "Usage: %s [flags]\n\n%s\n", usage, wrap(cmd.about, ""))

	if len(cmd.examples) > 0 {
		fmt.Fprint(w, "\nExamples:\n")
		for _, e := range cmd.examples {
			fmt.Fprintf(w, "  # %s\n  %s\n", e.comment, e.line)
		}
	}

	own := ownFlags(fs)
	if len(own) > 0 {
		fmt.Fprint(w, "\nFlags:\n")
		for _, f := range own {
			fmt.Fprintf(w, "  --%s\n%s\n", f.Name, wrap(f.Usage, "      "))
		}
	}

	if len(cmd.topics) == 0 {
		return
	}
	fmt.Fprint(w, "\n"+wrap("Settings, by environment variable; the first that is set wins, letter case does not matter, and a flag wins over all of them. "+
		".env files are not read.", "")+"\n")
	for _, t := range topics {
		if !slices.Contains(cmd.topics, t) {
			continue
		}
		fmt.Fprintf(w, "\n%s\n", t)
		for _, s := range settings {
			if s.topic == t {
				writeSetting(w, s)
			}
		}
	}
}

func writeSetting(w io.Writer, s setting) {
	head := "  " + s.vars[0].name
	if s.flag != "" {
		head += "   --" + s.flag
	}
	fmt.Fprintln(w, head)
	if len(s.vars) > 1 {
		var others []string
		for _, v := range s.vars[1:] {
			others = append(others, v.name)
		}
		fmt.Fprintln(w, wrap("else "+strings.Join(others, ", else "), "      "))
	}
	fmt.Fprintln(w, wrap(s.help+"\nDefault: "+s.defaultText(), "      "))
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

// ownFlags are the flags that belong to no setting, in order.
func ownFlags(fs *flag.FlagSet) []*flag.Flag {
	var own []*flag.Flag
	fs.VisitAll(func(f *flag.Flag) {
		if _, isSetting := f.Value.(*flagValue); !isSetting {
			own = append(own, f)
		}
	})
	return own
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

package main

import (
	"context"
	"fmt"

	"github.com/spf13/pflag"
)

var shells = []string{"bash", "zsh", "fish"}

var completionCommand = &command{
	name:    "completion",
	args:    "bash|zsh|fish",
	words:   1,
	summary: "print a script that completes command lines in a shell",
	about:   "Prints a script for bash, zsh or fish. Once the shell has read it, the Tab key completes commands, flags and values.",
	examples: []example{
		{"source <(mm-orchestrator completion bash)", "bash, for this shell; bash-completion must be installed"},
		{"mm-orchestrator completion bash > /etc/bash_completion.d/mm-orchestrator", "bash, for everybody"},
		{"mm-orchestrator completion zsh > \"${fpath[1]}/_mm-orchestrator\"", "zsh, after compinit"},
		{"mm-orchestrator completion fish > ~/.config/fish/completions/mm-orchestrator.fish", "fish"},
	},
	complete: func(words []string) []string {
		if len(words) > 0 {
			return nil
		}
		return shells
	},
	setup: func(*pflag.FlagSet) runFunc { return runCompletion },
}

func runCompletion(_ context.Context, p *program, in input) error {
	if len(in.words) == 0 {
		return &usageError{"completion needs the name of a shell: " + oneOf(shells)}
	}
	root := in.parsed.Root()
	switch in.words[0] {
	case "bash":
		return root.GenBashCompletionV2(p.stdout, true)
	case "zsh":
		return root.GenZshCompletion(p.stdout)
	case "fish":
		return root.GenFishCompletion(p.stdout, true)
	}
	return &usageError{fmt.Sprintf("there is no completion for %q; there is for %s", shownWord(in.words[0]), oneOf(shells))}
}

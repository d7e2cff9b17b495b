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
	summary: "print a shell completion script",
	about:   "Prints a completion script for bash, zsh or fish. Once the shell has loaded it, the Tab key completes commands, flags and values.",
	examples: []example{
		{"source <(mm-orchestrator completion bash)", "bash, this session only; needs the package bash-completion"},
		{"mm-orchestrator completion bash > /etc/bash_completion.d/mm-orchestrator", "bash, all users"},
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
	return &usageError{fmt.Sprintf("no completion for %q; supported shells are %s", maskedWord(in.words[0]), oneOf(shells))}
}

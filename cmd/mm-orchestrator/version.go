package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is set by the linker for releases: -X main.version=v1.2.3.
var version string

var versionCommand = &command{
	name:    "version",
	summary: "print the version",
	about:   "Prints version, commit, Go version and platform on one line.",
	run: func(p *program, _ context.Context, cmd *command, args []string) error {
		fs, _ := p.flags(cmd)
		if _, err := p.parse(cmd, fs, args, 0); err != nil {
			return err
		}
		fmt.Fprintf(p.stdout, "mm-orchestrator %s, %s, %s/%s\n", versionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return nil
	},
}

// versionText is the release, or what the Go tool knows of the source.
func versionText() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "development"
	}
	text := info.Main.Version
	if text == "" || text == "(devel)" {
		text = "development"
	}
	var revision, modified string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value[:min(12, len(s.Value))]
		case "vcs.modified":
			if s.Value == "true" {
				modified = ", modified"
			}
		}
	}
	if revision != "" {
		text += " (commit " + revision + modified + ")"
	}
	return text
}

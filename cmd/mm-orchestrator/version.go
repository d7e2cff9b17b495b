package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/pflag"
)

// version is set by the linker for releases: -X main.version=v1.2.3.
var version string

var versionCommand = &command{
	name:    "version",
	summary: "print the version",
	about:   "Prints version, commit, Go version and platform on one line.",
	setup: func(*pflag.FlagSet) runFunc {
		return func(_ context.Context, p *program, _ input) error { return p.printVersion() }
	},
}

func (p *program) printVersion() error {
	_, err := fmt.Fprintf(p.stdout, "mm-orchestrator %s, %s, %s/%s\n", versionText(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

// versionText is the release, or the version that the Go tool recorded.
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

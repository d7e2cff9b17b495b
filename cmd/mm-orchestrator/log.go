package main

import (
	"io"
	"log/slog"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

// newLogger logs to w, as text on a terminal and as JSON otherwise, unless the
// configuration sets the format. The redactor removes secrets from each record.
func newLogger(w io.Writer, c *configuration, terminal bool, redactor *artifacts.Redactor) *slog.Logger {
	options := &slog.HandlerOptions{Level: c.LogLevel, ReplaceAttr: readableDuration}
	var handler slog.Handler = slog.NewJSONHandler(w, options)
	if c.LogFormat == "text" || (c.LogFormat == "auto" && terminal) {
		handler = slog.NewTextHandler(w, options)
	}
	return slog.New(redactor.Handler(handler))
}

// readableDuration formats durations as 1m30s; JSON would have nanoseconds.
func readableDuration(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		a.Value = slog.StringValue(a.Value.Duration().String())
	}
	return a
}

// redaction are the rules for the redactor of a worker: the settings, and what the
// policy says, which counts where both say something.
func (c *configuration) redaction() artifacts.Rules {
	rules := c.Redaction
	rules.Workspace = c.Workspace
	for _, source := range []credential.Source{c.Services.GitHubToken, c.Services.CodexKey} {
		if path := source.File(); path != "" { // before its first use, too: commands of steps can read it
			rules.Files = append(slices.Clone(rules.Files), path)
		}
	}
	if c.Policy == nil {
		return rules
	}
	more := c.Policy.Redaction
	rules.Names = append(slices.Clone(rules.Names), more.Add...)
	words := artifacts.CommonWords
	if more.Words != nil {
		words = more.Words
	}
	switch {
	case more.CommonWords == policy.MaskCommonWords:
		rules.CommonWords = nil
	case more.CommonWords == policy.GuardCommonWords, more.Words != nil && rules.CommonWords != nil:
		rules.CommonWords = words
	}
	return rules
}

// environmentRules are the same rules for commands that do not read all settings, and
// for errors in settings. A setting that is wrong adds none.
func environmentRules(env environment) artifacts.Rules {
	c := &configuration{}
	for i := range settings {
		if s := &settings[i]; s.topic == topicSecrets || slices.Contains([]string{"workspace", "profiles", "github-credential", "codex-credential"}, s.flag) {
			if v := find(s, env, nil); v.set {
				_ = s.read(c, v.text)
			}
		}
	}
	if c.Profiles != "" {
		// With mistakes in it, the file adds nothing, and a worker does not start.
		c.Policy, _ = policy.Load(c.Profiles)
	}
	return c.redaction()
}

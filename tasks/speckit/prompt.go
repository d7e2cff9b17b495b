package speckit

import (
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/codex"
)

// A prompt is what Codex is asked to do.
type prompt struct {
	// run and attempt make the mark.
	run     string
	attempt int
	// repository is owner/name, feature the key of the feature.
	repository, feature string
	// id, title and phase are those of the task in tasks.md.
	id, title, phase string
	// notes are those of whoever retries the run.
	notes string
	// instructions are those of the operator.
	instructions string
}

// mark begins the prompt. It finds a task of Codex Cloud again.
func (p prompt) mark() string { return fmt.Sprintf("[run %s, attempt %d]", p.run, p.attempt) }

// String is the text. Lines of what the operator has not written are joined, so that
// none of them begins like a part of the prompt.
func (p prompt) String() string {
	var text strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&text, format+"\n", args...) }
	line("%s %s", p.mark(), oneLine(strings.TrimSpace(p.id+" "+p.title)))
	line("")
	line("Do one task of a specification in this repository, and only that one.")
	line("")
	line("Repository: %s", oneLine(p.repository))
	line("Feature: %s", oneLine(p.feature))
	if p.phase != "" {
		line("Phase: %s", oneLine(p.phase))
	}
	line("Task: %s", oneLine(strings.TrimSpace(p.id+" "+p.title)))
	line("")
	line("- The specification is in a directory that is named like the feature, usually below specs/. Read what is there before you begin.")
	line("- Change files in this directory only. Do not commit, do not push, and do not change .git: whoever has started you takes the files as they are when you end.")
	line("- When the task is done, tick it in the feature's file of tasks: its line begins with `- [ ] %s`, make that `- [x] %s`.", oneLine(p.id), oneLine(p.id))
	line("- If nothing has to be changed, change nothing and say why.")
	line("- Nobody can answer while you work. If you cannot do the task without an answer, change nothing, and end your last message with a line that begins with %s and has the question.", codex.QuestionMark)
	line("- Write no credentials into files or messages.")
	if notes := strings.TrimSpace(p.notes); notes != "" {
		line("")
		line("An earlier attempt has failed. Whoever starts this one says: %s", oneLine(notes))
	}
	if instructions := strings.TrimSpace(p.instructions); instructions != "" {
		line("")
		line("%s", instructions)
	}
	return text.String()
}

// maxPart limits a part of the prompt that comes from a message or a file, in characters.
const maxPart = 4000

// oneLine collapses white space and cuts at maxPart.
func oneLine(text string) string {
	text = strings.Join(strings.Fields(strings.ToValidUTF8(strings.ReplaceAll(text, "\x00", ""), "\uFFFD")), " ")
	if runes := []rune(text); len(runes) > maxPart {
		text = string(runes[:maxPart]) + "…"
	}
	return text
}

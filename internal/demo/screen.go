package main

import (
	"fmt"
	"os"
	"strings"
	"time"
	"unicode/utf8"
)

// printEvery is the interval between progress lines when the output is not a
// terminal.
const printEvery = 10 * time.Second

// liveWidth is the maximum length of the progress line: a line that the terminal
// wraps cannot be erased.
const liveWidth = 79

// screen prints lines and, on a terminal, a progress line below them that it
// overwrites. It must be used by one goroutine.
type screen struct {
	out      *os.File
	terminal bool
	color    bool
	live     bool
	printed  time.Time // time of the last line
}

func newScreen(out *os.File) *screen {
	info, err := out.Stat()
	terminal := err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
	return &screen{out: out, terminal: terminal, color: terminal && os.Getenv("NO_COLOR") == ""}
}

// line prints an event, in the same columns as devenv.
func (s *screen) line(verb, what, result string) {
	if result == "" {
		s.print(fmt.Sprintf("%s %s", s.bold(pad(verb, 11)), what))
		return
	}
	s.print(fmt.Sprintf("%s %s %s", s.bold(pad(verb, 11)), pad(what, 68), result))
}

func (s *screen) print(text string) {
	s.clear()
	fmt.Fprintln(s.out, text)
	s.printed = time.Now()
}

// progress shows a step that is in progress, its duration, and the last line of
// its output.
func (s *screen) progress(step string, took time.Duration, last string) {
	text := fmt.Sprintf("  %s …  %s", pad(step, 9), pad(seconds(took), 8))
	if s.terminal {
		s.clear()
		fmt.Fprint(s.out, cut(text+"  "+last, liveWidth))
		s.live = true
		return
	}
	if time.Since(s.printed) >= printEvery {
		s.print(strings.TrimRight(text+"  "+last, " "))
	}
}

func (s *screen) clear() {
	if s.live {
		fmt.Fprint(s.out, "\r\x1b[K")
		s.live = false
	}
}

func (s *screen) bold(text string) string { return s.paint("1", text) }

// mark returns a step's result as one character.
func (s *screen) mark(status string) string {
	switch status {
	case "succeeded":
		return s.paint("32", "✓")
	case "failed":
		return s.paint("31", "✗")
	}
	return "–"
}

func (s *screen) paint(code, text string) string {
	if !s.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

func pad(text string, width int) string {
	return text + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(text)))
}

func cut(text string, width int) string {
	if utf8.RuneCountInString(text) <= width {
		return text
	}
	return string([]rune(text)[:width-1]) + "…"
}

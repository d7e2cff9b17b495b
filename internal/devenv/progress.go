package devenv

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
)

// printEvery is the interval between progress lines when the output is not a
// terminal.
const printEvery = 20 * time.Second

// progress prints a line when a part is done, and shows that long work
// continues: on a terminal in one line at the bottom that is overwritten,
// elsewhere by a line at intervals.
type progress struct {
	out      io.Writer
	terminal bool
	color    bool
	stop     chan struct{}
	stopped  chan struct{}

	mu      sync.Mutex
	running []*work
	live    bool // a live line is on the screen
}

// work is work in progress. The screen shows the last line of its output.
type work struct {
	progress *progress
	verb     string
	what     string
	since    time.Time
	last     string
	printed  time.Time
}

func newProgress(out io.Writer) *progress {
	p := &progress{out: out, stop: make(chan struct{}), stopped: make(chan struct{})}
	if file, ok := out.(*os.File); ok {
		info, err := file.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
	}
	p.color = p.terminal && os.Getenv("NO_COLOR") == ""
	go p.run()
	return p
}

func (p *progress) run() {
	defer close(p.stopped)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			p.mu.Lock()
			p.clear()
			p.mu.Unlock()
			return
		case <-tick.C:
			p.mu.Lock()
			p.show()
			p.mu.Unlock()
		}
	}
}

func (p *progress) close() {
	close(p.stop)
	<-p.stopped
}

// show shows the work in progress. The caller holds p.mu.
func (p *progress) show() {
	if p.terminal {
		p.clear()
		var parts []string
		for _, w := range p.running {
			parts = append(parts, fmt.Sprintf("%s %s (%.0f s)", w.verb, w.what, time.Since(w.since).Seconds()))
		}
		if len(parts) > 0 {
			fmt.Fprint(p.out, shorten("… "+strings.Join(parts, " · "), 110))
			p.live = true
		}
		return
	}
	for _, w := range p.running {
		if time.Since(w.printed) < printEvery {
			continue
		}
		w.printed = time.Now()
		line := fmt.Sprintf("%s, for %.0f s", w.what, time.Since(w.since).Seconds())
		if w.last != "" {
			line += ": " + w.last
		}
		p.print("still "+w.verb, line, "")
	}
}

func (p *progress) clear() {
	if p.live {
		fmt.Fprint(p.out, "\r\x1b[K")
		p.live = false
	}
}

// print writes one line. The caller holds p.mu.
func (p *progress) print(verb, what, result string) {
	p.clear()
	line := fmt.Sprintf("%-11s %s", verb, what)
	if result != "" {
		line = fmt.Sprintf("%-11s %-68s %s", verb, what, result)
	}
	if p.color {
		line = strings.Replace(line, verb, "\x1b[1m"+verb+"\x1b[0m", 1)
	}
	fmt.Fprintln(p.out, line)
}

func (p *progress) found(what, how string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.print("checking", what+" "+how, "ok")
}

// start records the start of work; the caller ends it with done or end.
func (p *progress) start(verb, what string) *work {
	now := time.Now()
	w := &work{progress: p, verb: verb, what: what, since: now, printed: now}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = append(p.running, w)
	return w
}

func (w *work) done(what string) { w.end(what, fmt.Sprintf("%.1f s", time.Since(w.since).Seconds())) }
func (w *work) failed()          { w.end(w.what, "failed") }

func (w *work) end(what, result string) {
	p := w.progress
	p.mu.Lock()
	defer p.mu.Unlock()
	for i, other := range p.running {
		if other == w {
			p.running = append(p.running[:i], p.running[i+1:]...)
			p.print(w.verb, what, result)
			return
		}
	}
}

// Write receives the output of the work and keeps its last line.
func (w *work) Write(b []byte) (int, error) {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if last := strings.TrimSpace(lines[len(lines)-1]); last != "" {
		w.progress.mu.Lock()
		w.last = shorten(strings.ToValidUTF8(last, ""), 80)
		w.progress.mu.Unlock()
	}
	return len(b), nil
}

func shorten(line string, limit int) string {
	if runes := []rune(line); len(runes) > limit {
		return string(runes[:limit-1]) + "…"
	}
	return line
}

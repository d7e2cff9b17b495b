package chaos

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

const (
	// resumeWithin is how soon after a kill the run should continue.
	resumeWithin = 5 * time.Second
	// recordedWithin is the aim for the time from the end of a command to its
	// record.
	recordedWithin = 5 * time.Millisecond
)

// printTable writes the campaign's results as a Markdown table of two columns:
// names, and counts with their totals.
func (r *Report) printTable(w io.Writer) {
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "| %s | %s |\n", name, fmt.Sprintf(format, args...))
	}
	row("`"+r.config.command()+"`", "%s, %d lanes, on %s", r.took.Round(time.Second), r.config.Lanes, r.servers)
	fmt.Fprint(w, "|---|---|\n")
	missed := fmt.Sprint(r.missed)
	if r.missed > 0 {
		missed += fmt.Sprintf(" (trials %s)", strings.Trim(fmt.Sprint(r.missedIn), "[]"))
	}
	row("trials, runs", "%d, %d; failed trials: %d/%d; points not reached: %s", r.trials, r.runs, len(r.failed), r.trials, missed)
	row("kills", "%d, at %s", r.kills, r.killedAt())
	for _, f := range []struct {
		name string
		of   []action
	}{
		{"broker faults", []action{breakBroker}}, {"database faults", []action{breakDatabase, endSessions}}, {"faults of both at once", []action{breakBoth}},
		{"restarts of the broker", []action{restartBroker}}, {"restarts of the database", []action{restartDatabase}}, {"restarts of both at once", []action{restartBoth}}, {"SIGTERM", []action{terminate}},
	} {
		n := 0
		for _, do := range f.of {
			n += r.did[do]
		}
		if n > 0 {
			row(f.name, "%d", n)
		}
	}
	for _, name := range specReport {
		if n := r.specs[name]; n > 0 {
			row(name, "%d", n)
		}
	}
	for _, p := range []struct {
		class class
		name  string
	}{
		{lost, "runs lost"}, {stuck, "runs stuck"}, {doubled, "effects doubled"}, {wrong, "wrong status, result or artifact"},
		{altered, "files, repository or containers not as they must be"}, {leaked, "a credential leaked"}, {left, "something left behind"}, {slowRecovery, fmt.Sprintf("recovered later than %s", backLimit)}, {harness, "the harness itself"},
	} {
		row(p.name, "%d/%d trials", r.problems[p.class], r.trials)
	}
	if of := len(r.resumed); of > 0 {
		row("from a kill to the next decision on the run", "median %s, worst %s (trial %d), later than %s: %d/%d",
			milliseconds(median(r.resumed)), milliseconds(worst(r.resumed)), r.slowest, resumeWithin, longer(r.resumed, resumeWithin), of)
	}
	printRecoveries(w, r.recoveries)
	row("commands that ran again, their end unrecorded", "%d, of which %d had ended", r.repeated, r.late)
	row("workers that wrongly considered themselves isolated", "%d", r.wronglyIsolated)
	var all []time.Duration
	for _, step := range steps {
		all = append(all, r.windows[step]...)
	}
	row("from the end of a command to its durable record", "less than %s: %d/%d", recordedWithin, len(all)-longer(all, recordedWithin-1), len(all))
	for _, step := range steps {
		if of := r.windows[step]; len(of) > 0 {
			row("… of "+step, "median %s, worst %s (of %d)",
				median(of).Round(10*time.Microsecond), worst(of).Round(10*time.Microsecond), len(of))
		}
	}
}

func milliseconds(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

func longer(of []time.Duration, limit time.Duration) int {
	n := 0
	for _, d := range of {
		if d > limit {
			n++
		}
	}
	return n
}

// killedAt says at how many places workers were killed, and which places of the
// list were not reached.
func (r *Report) killedAt() string {
	points := map[string]bool{}
	pairs := 0
	for name := range r.killed {
		point, step, _ := strings.Cut(name, " of ")
		points[point] = true
		if step != "" {
			pairs++
		}
	}
	text := fmt.Sprintf("%d named points and %d pairs of point and step or command", len(points), pairs)
	listed, missing := map[string]bool{}, map[string]bool{}
	list := func(s stage) {
		listed[s.place()] = true
		if r.killed[s.place()] == 0 {
			missing[s.place()] = true
		}
	}
	if slices.Contains(r.config.Kinds, KillAtPoint) {
		for _, p := range places {
			list(p.stage(kill))
		}
	}
	if slices.Contains(r.config.Kinds, Real) {
		for _, p := range realPlaces {
			list(p.stage(kill))
		}
	}
	for kind, places := range map[Kind][]specPlace{Spec: specPlaces, SpecCloud: cloudPlaces} {
		if slices.Contains(r.config.Kinds, kind) {
			for _, p := range places {
				list(p.stage(kill))
			}
		}
	}
	if slices.Contains(r.config.Kinds, Crowd) {
		for _, point := range crowdPoints {
			list(stage{Point: point})
		}
	}
	if slices.Contains(r.config.Kinds, Lost) {
		for _, s := range lostEnds {
			list(s)
		}
	}
	if len(missing) == 0 {
		return text + fmt.Sprintf(" (all %d of the list)", len(listed))
	}
	names := slices.Sorted(maps.Keys(missing))
	if len(names) > 12 {
		return text + fmt.Sprintf(" (%d of the list's %d were not reached)", len(missing), len(listed))
	}
	return text + fmt.Sprintf(" (of the list's %d not reached: %s)", len(listed), strings.Join(names, ", "))
}

// command returns the command that repeats the campaign.
func (c *Config) command() string {
	command := fmt.Sprintf("make chaos SEED=%d", c.Seed)
	switch {
	case c.For > 0:
		command += fmt.Sprintf(" MINUTES=%.3g", c.For.Minutes())
	default:
		command += fmt.Sprintf(" N=%d", c.Trials)
	}
	if !slices.Equal(c.Kinds, Kinds) {
		var kinds []string
		for _, k := range c.Kinds {
			kinds = append(kinds, string(k))
		}
		command += " KINDS=" + strings.Join(kinds, ",")
	}
	if slices.Contains(c.Kinds, Rush) || slices.Contains(c.Kinds, Mixed) {
		command += fmt.Sprintf(" RUNS=%d", c.Runs)
	}
	return command + fmt.Sprintf(" LANES=%d", c.Lanes)
}

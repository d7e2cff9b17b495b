package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	markdownFile = "results.md"
	jsonFile     = "results.json"
	plotFile     = "results.svg"
)

// Report is the content of results.json.
type Report struct {
	Began            time.Time `json:"began"`
	Ended            time.Time `json:"ended"`
	Command          string    `json:"command"`
	Rounds           int       `json:"rounds"`
	SecondsPerSample float64   `json:"seconds_per_sample"`
	Machine          []Fact    `json:"machine"`
	// Others is the share of the processors that other programs used before the run,
	// in percent.
	Others  float64   `json:"busy_percent_before"`
	Pilots  []Choice  `json:"celery_pilots"`
	Results []Outcome `json:"results"`
	// Failures are the cases without results.
	Failures []Failure `json:"failures,omitempty"`
	// Took is how long each case took, in seconds, with its pilots.
	Took []Took `json:"took"`
	// Statements are those of a run of a plan.
	Statements []StatementCount `json:"statements_of_a_run,omitempty"`
}

// Failure is a case that could not be measured, or whose contender left work undone.
type Failure struct {
	Case  string `json:"case"`
	Error string `json:"error"`
}

// err is an error that has all failures, or nil.
func (r *Report) err() error {
	var errs []error
	for _, f := range r.Failures {
		errs = append(errs, fmt.Errorf("case %s: %s", f.Case, f.Error))
	}
	return errors.Join(errs...)
}

// Took is how long a case took.
type Took struct {
	Case    string  `json:"case"`
	Seconds float64 `json:"seconds"`
}

// Outcome is one measure of a case.
type Outcome struct {
	Case    string  `json:"case"`
	Title   string  `json:"title"`
	What    string  `json:"what"`
	Measure Measure `json:"measure"`
	// Contenders by name, in the order of Names.
	Names      []string               `json:"names"`
	Contenders map[string]Performance `json:"contenders"`
	// Ratios of ours to the other contenders, round by round.
	Ratios map[string]Spread `json:"ratios_of_ours"`
	second bool              // not the first measure of its case
}

// Performance is what a contender did in all rounds.
type Performance struct {
	Spread
	CPU      map[string]float64 `json:"cpu_ms_per_task,omitempty"`
	Database map[string]float64 `json:"database_per_task,omitempty"`
}

// Spread are the values of all rounds.
type Spread struct {
	Rounds []float64 `json:"rounds"`
	Median float64   `json:"median"`
	Min    float64   `json:"min"`
	Max    float64   `json:"max"`
}

func spread(values []float64) Spread {
	s := Spread{Rounds: values, Median: median(values), Min: math.Inf(1), Max: math.Inf(-1)}
	for _, v := range values {
		s.Min, s.Max = min(s.Min, v), max(s.Max, v)
	}
	return s
}

func median(values []float64) float64 {
	if n := len(values); n%2 == 0 {
		return (percentile(values, 50) + percentile(values, 50+100/float64(n))) / 2
	}
	return percentile(values, 50)
}

// add adds the samples of a case.
func (r *Report) add(c Case, samples map[string][]Sample) {
	for i, m := range c.Measures {
		title := c.Title
		if m.Name != "" {
			title += ": " + m.Name
		}
		o := Outcome{Case: c.Name, Title: title, What: c.What, Measure: m, Names: c.Contenders,
			Contenders: map[string]Performance{}, Ratios: map[string]Spread{}, second: i > 0}
		for _, name := range c.Contenders {
			var values []float64
			for _, s := range samples[name] {
				values = append(values, s.Values[i])
			}
			o.Contenders[name] = Performance{
				Spread:   spread(values),
				CPU:      medians(samples[name], func(s Sample) map[string]float64 { return s.CPU }),
				Database: medians(samples[name], func(s Sample) map[string]float64 { return s.Database }),
			}
		}
		for _, name := range c.Contenders {
			if name == ours || m.Growth {
				continue
			}
			var ratios []float64
			for round, value := range o.Contenders[ours].Rounds {
				if other := o.Contenders[name].Rounds[round]; other != 0 {
					ratios = append(ratios, value/other)
				}
			}
			if len(ratios) > 0 {
				o.Ratios[name] = spread(ratios)
			}
		}
		r.Results = append(r.Results, o)
	}
}

// medians returns the median of each value of all samples.
func medians(samples []Sample, of func(Sample) map[string]float64) map[string]float64 {
	values := map[string][]float64{}
	for _, s := range samples {
		for name, v := range of(s) {
			values[name] = append(values[name], v)
		}
	}
	result := map[string]float64{}
	for name, v := range values {
		result[name] = median(v)
	}
	return result
}

// write writes the three files.
func (r *Report) write(folder string) error {
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	for name, content := range map[string]string{jsonFile: string(text) + "\n", markdownFile: r.markdown(), plotFile: r.plot()} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// The marks of the summary in a README.
const (
	readmeBegin = "<!-- benchmarks: `make bench` writes what follows -->\n"
	readmeEnd   = "<!-- /benchmarks -->\n"
)

// summaryCases are the cases of the summary.
var summaryCases = []string{"prefetch-1-result", "prefetch-64-result", "chain-hop"}

// summarize writes three lines of the table into a page, if all of them were measured.
func (r *Report) summarize(page string) error {
	if page == "" {
		return nil
	}
	short := Report{}
	for _, o := range r.Results {
		if slices.Contains(summaryCases, o.Case) && o.Contenders[celery].Rounds != nil {
			short.Results = append(short.Results, o)
		}
	}
	if len(short.Results) != len(summaryCases) {
		return nil
	}
	text, err := os.ReadFile(page)
	if err != nil {
		return err
	}
	before, rest, begins := strings.Cut(string(text), readmeBegin)
	_, after, ends := strings.Cut(rest, readmeEnd)
	if !begins || !ends {
		return fmt.Errorf("%s has no line %q before a line %q", page, strings.TrimSpace(readmeBegin), strings.TrimSpace(readmeEnd))
	}
	return os.WriteFile(page, []byte(before+readmeBegin+short.table()+readmeEnd+after), 0o644)
}

// busyLimit is the share of the processors, in percent, above which the report says
// that the machine had something else to do.
const busyLimit = 10

// table is the table of the measures that several contenders have.
func (r *Report) table() string {
	var b strings.Builder
	for _, o := range r.Results {
		if len(o.Names) == 1 {
			continue
		}
		if b.Len() == 0 {
			b.WriteString("| case | floor | ours | Celery | ours ÷ floor | ours ÷ Celery |\n|---|---:|---:|---:|---:|---:|\n")
		}
		fmt.Fprintf(&b, "| %s (%s)", o.Title, o.better())
		for _, name := range []string{floor, ours, celery} {
			p, measured := o.Contenders[name]
			b.WriteString(" | " + cell(p.Spread, measured, o.Measure.Unit))
		}
		for _, name := range []string{floor, celery} {
			ratio, measured := o.Ratios[name]
			b.WriteString(" | " + cell(ratio, measured, ""))
		}
		b.WriteString(" |\n")
	}
	return b.String()
}

// ownTable is the table of the measures that only ours has.
func (r *Report) ownTable() string {
	var b strings.Builder
	for _, o := range r.Results {
		if len(o.Names) > 1 {
			continue
		}
		if b.Len() == 0 {
			b.WriteString("| case | ours |\n|---|---:|\n")
		}
		fmt.Fprintf(&b, "| %s (%s) | %s |\n", o.Title, o.better(), cell(o.Contenders[ours].Spread, true, o.Measure.Unit))
	}
	return b.String()
}

// tables are both, with a blank line between them.
func (r *Report) tables() string {
	compared, own := r.table(), r.ownTable()
	if compared != "" && own != "" {
		compared += "\n"
	}
	return compared + own
}

func (o Outcome) better() string {
	if o.Measure.Lower {
		return "less is better"
	}
	return "more is better"
}

func cell(s Spread, measured bool, unit string) string {
	if !measured {
		return "–"
	}
	text := strings.TrimSpace(fmt.Sprintf("**%s** %s", format(s.Median), unit))
	if len(s.Rounds) > 1 {
		text += fmt.Sprintf(" (%s–%s)", format(s.Min), format(s.Max))
	}
	return text
}

// format writes a number with three significant digits, and all of those before the
// point.
func format(v float64) string {
	switch size := math.Abs(v); {
	case math.IsNaN(v):
		return "?"
	case size >= 100:
		return fmt.Sprintf("%.0f", v)
	case size >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (r *Report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Results\n\n`%s`, %s, %d rounds of %s s for each contender. How it is measured: [README.md](README.md).\n\n",
		r.Command, r.Began.Format("2006-01-02 15:04 MST"), r.Rounds, format(r.SecondsPerSample))
	b.WriteString("| machine | |\n|---|---|\n")
	for _, f := range r.Machine {
		fmt.Fprintf(&b, "| %s | %s |\n", f.Name, f.Value)
	}
	fmt.Fprintf(&b, "| processors used by other programs before the run | %.0f %% |\n\n", r.Others)
	if r.Others > busyLimit {
		b.WriteString("**Other programs ran on this machine at the same time: do not quote these figures.**\n\n")
	}
	for _, f := range r.Failures {
		fmt.Fprintf(&b, "**The case `%s` has failed:** %s\n\n", f.Case, strings.Join(strings.Fields(f.Error), " "))
	}
	fmt.Fprintf(&b, "![Each contender relative to the floor](%s)\n\n", plotFile)
	b.WriteString("Medians of all rounds, with the least and the greatest value. A ratio is made of two values of one round.\n\n" + r.tables())
	b.WriteString("\n## What each case is\n\n")
	for _, o := range r.Results {
		if !o.second {
			fmt.Fprintf(&b, "- **%s** (`%s`): %s\n", o.Title, o.Case, o.What)
		}
	}
	r.writeWork(&b)
	if len(r.Statements) > 0 {
		b.WriteString("\n## Statements of a run with six steps\n\nAs the case `statements` has counted them.\n\n| for each run | statement |\n|---:|---|\n")
		for _, c := range r.Statements {
			fmt.Fprintf(&b, "| %s | `%s` |\n", strings.TrimSuffix(fmt.Sprintf("%.1f", c.PerRun), ".0"), strings.ReplaceAll(strings.ReplaceAll(c.Statement, "|", `\|`), "`", "'"))
		}
	}
	r.writePilots(&b)
	b.WriteString("\n## How long it took\n\n| case | seconds |\n|---|---:|\n")
	for _, t := range r.Took {
		fmt.Fprintf(&b, "| %s | %.0f |\n", t.Case, t.Seconds)
	}
	fmt.Fprintf(&b, "| all, with the servers' start | %.0f |\n", r.Ended.Sub(r.Began).Seconds())
	b.WriteString("\n## Round by round\n\n| case | contender | values |\n|---|---|---|\n")
	for _, o := range r.Results {
		for _, name := range o.Names {
			fmt.Fprintf(&b, "| %s | %s, %s | %s |\n", o.Title, name, o.Measure.Unit, list(o.Contenders[name].Rounds))
		}
		for _, name := range []string{floor, celery} {
			if ratio, measured := o.Ratios[name]; measured {
				fmt.Fprintf(&b, "| | ours ÷ %s | %s |\n", name, list(ratio.Rounds))
			}
		}
	}
	return b.String()
}

// writeWork writes what each task has cost, for the cases that have tasks.
func (r *Report) writeWork(b *strings.Builder) {
	head := "\n## Processor time and database work\n\nFor each task. Transactions, flushes and bytes contain the start of the contender.\n\n" +
		"| case | contender | worker, ms | broker, ms | database, ms | transactions | WAL flushes | WAL bytes |\n|---|---|---:|---:|---:|---:|---:|---:|\n"
	for _, o := range r.Results {
		if o.second {
			continue
		}
		for _, name := range o.Names {
			p := o.Contenders[name]
			if len(p.CPU) == 0 && len(p.Database) == 0 {
				continue
			}
			fmt.Fprintf(b, "%s| %s | %s", head, o.Case, name)
			head = ""
			for _, part := range []string{"worker", "broker", "database"} {
				b.WriteString(" | " + optional(p.CPU, part, "%.3f"))
			}
			b.WriteString(" | " + optional(p.Database, "transactions", "%.2f") + " | " + optional(p.Database, "WAL flushes", "%.2f") +
				" | " + optional(p.Database, "WAL bytes", "%.0f") + " |\n")
		}
	}
}

// writePilots writes in which settings Celery was tried.
func (r *Report) writePilots(b *strings.Builder) {
	if len(r.Pilots) == 0 {
		return
	}
	fmt.Fprintf(b, "\n## Which Celery\n\nThe contender is the setting that is fastest in its slowest sample. The fastest one is repeated, until one has %d samples and is still the fastest.\n\n| setting | pool | tasks/s | |\n|---|---|---:|---|\n", confirmations)
	for _, c := range r.Pilots {
		mark := ""
		if c.Best {
			mark = "used"
		}
		var rates []string
		for _, rate := range c.Rates {
			if rate == 0 {
				rates = append(rates, fmt.Sprintf("not %d tasks in %s", pilotTasks, pilotTimeout))
				continue
			}
			rates = append(rates, format(rate))
		}
		fmt.Fprintf(b, "| %s | %s | %s | %s |\n", c.Setting, c.How, strings.Join(rates, ", "), mark)
	}
}

func optional(values map[string]float64, name, verb string) string {
	v, measured := values[name]
	if !measured {
		return "–"
	}
	return fmt.Sprintf(verb, v)
}

func list(values []float64) string {
	texts := make([]string, len(values))
	for i, v := range values {
		texts[i] = format(v)
	}
	return strings.Join(texts, ", ")
}

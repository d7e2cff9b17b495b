package bench

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// TestMain runs the test's program as a contender when the harness starts it so.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == ContenderVerb {
		spec, err := contender.FromEnvironment()
		if err == nil {
			err = contender.Run(os.Args[2], spec)
		}
		if err != nil {
			os.Stderr.WriteString(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// The cases of the worker alone and those of several contenders run side by side, with
// servers of their own: both wait most of the time.
func TestEachCaseCanBeMeasured(t *testing.T) {
	t.Parallel()
	var alone, together []string
	for _, c := range cases() {
		if c.Name == "plan" || len(c.Contenders) == 1 {
			alone = append(alone, c.Name)
		} else {
			together = append(together, c.Name)
		}
	}
	t.Run("alone", func(t *testing.T) { t.Parallel(); measureEach(t, alone) })
	t.Run("together", func(t *testing.T) { t.Parallel(); measureEach(t, together) })
}

func measureEach(t *testing.T, names []string) {
	folder := t.TempDir()
	// Without the flags of a release, all packages are built already.
	program := func(ctx context.Context, path string) error { return buildProgram(ctx, path, nil) }
	err := Run(t.Context(), Config{Cases: names, Contenders: []string{floor, ours}, Rounds: 1, Seconds: 0.05, Folder: folder, Program: program, Command: "make bench", Output: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(folder, jsonFile))
	if err != nil {
		t.Fatal(err)
	}
	var report Report
	if err := json.Unmarshal(text, &report); err != nil {
		t.Fatal(err)
	}
	// What idle workers ask in the meantime is an estimate, after which little may be left.
	mayBeZero := regexp.MustCompile(`descriptors|statements for each step|goroutines|more memory|after ÷ before|WAL flushes|memory`)
	if slices.Contains(names, "statements") && len(report.Statements) == 0 {
		t.Error("the report has no statements of a run")
	}
	var found []string
	for _, o := range report.Results {
		found = append(found, o.Case)
		for _, name := range o.Names {
			if p := o.Contenders[name]; len(p.Rounds) != 1 || p.Min <= 0 && !mayBeZero.MatchString(o.Title) {
				t.Errorf("%s of %s: %+v", o.Title, name, p)
			}
		}
		if o.Contenders[ours].Database != nil && o.Contenders[ours].Database["transactions"] < 1 {
			t.Errorf("%s: results are stored in %v", o.Title, o.Contenders[ours].Database)
		}
	}
	for _, name := range names {
		if !slices.Contains(found, name) {
			t.Errorf("the report lacks the case %s", name)
		}
	}
	plot, err := os.Open(filepath.Join(folder, plotFile))
	if err != nil {
		t.Fatal(err)
	}
	defer plot.Close()
	for decoder := xml.NewDecoder(plot); ; {
		if _, err := decoder.Token(); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
	}
}

// A report has the cases that could be measured, and says which could not and why.
func TestReportNamesTheCasesThatFailed(t *testing.T) {
	t.Parallel()
	r := Report{Failures: []Failure{{"prefetch-1", "ours: 3 messages\nare left in the queue"}}}
	r.add(Case{Name: "x", Title: "x", Contenders: []string{ours}, Measures: []Measure{{Unit: "ms"}}}, map[string][]Sample{ours: {{Values: []float64{5}}}})
	text := r.markdown()
	for _, want := range []string{"**The case `prefetch-1` has failed:** ours: 3 messages are left in the queue\n", "| x (more is better) | **5.00** ms |"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report lacks %q:\n%s", want, text)
		}
	}
	if err := r.err(); err == nil || !strings.Contains(err.Error(), "case prefetch-1: ours: 3 messages") {
		t.Errorf("the run ends with %v", err)
	}
}

// Each round has all contenders and begins with another one, and a case that takes long
// has fewer rounds.
func TestContendersTakeTurns(t *testing.T) {
	t.Parallel()
	for most, want := range map[int]string{0: "floor ours celery ours celery floor celery floor ours floor ours celery", 2: "floor ours celery ours celery floor"} {
		var turns []string
		h := &harness{Config: Config{Rounds: 4, Output: t.Output()}}
		samples, err := h.run(t.Context(), Case{Contenders: []string{floor, ours, celery}, rounds: most, measure: func(_ context.Context, _ *harness, name string) (Sample, error) {
			turns = append(turns, name)
			return Sample{Values: []float64{float64(len(turns))}}, nil
		}})
		if got := strings.Join(turns, " "); err != nil || got != want {
			t.Errorf("at most %d rounds: %s, %v, want %s", most, got, err, want)
		}
		for i, name := range turns[:6] {
			if got := samples[name][i/3].Values[0]; got != float64(i+1) {
				t.Errorf("round %d of %s has sample %v, want %d", i/3+1, name, got, i+1)
			}
		}
	}
}

func TestRatiosAreMadeOfOneRound(t *testing.T) {
	t.Parallel()
	var r Report
	sample := func(v float64) Sample { return Sample{Values: []float64{v}, CPU: map[string]float64{"worker": v}} }
	r.add(Case{Name: "x", Title: "x", Contenders: []string{floor, ours}, Measures: []Measure{{Unit: "tasks/s"}}}, map[string][]Sample{
		floor: {sample(100), sample(10), sample(40)},
		ours:  {sample(50), sample(9), sample(10)},
	})
	o := r.Results[0]
	if got := o.Ratios[floor]; !slices.Equal(got.Rounds, []float64{0.5, 0.9, 0.25}) || got.Median != 0.5 || got.Min != 0.25 || got.Max != 0.9 {
		t.Errorf("ratios are %+v", got)
	}
	if got := o.Contenders[ours].CPU["worker"]; got != 10 {
		t.Errorf("processor time is %v, want the median", got)
	}
	if table := r.table(); !strings.Contains(table, "| x (more is better) | **40.0** tasks/s (10.0–100) | **10.0** tasks/s (9.00–50.0) | – | **0.50** (0.25–0.90) | – |") {
		t.Errorf("table:\n%s", table)
	}
}

func TestSummaryStandsBetweenItsMarks(t *testing.T) {
	t.Parallel()
	page := filepath.Join(t.TempDir(), "README.md")
	if err := os.WriteFile(page, []byte("before\n"+readmeBegin+"old\n"+readmeEnd+"after\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	var r Report
	one := []Sample{{Values: []float64{100}}}
	for _, name := range summaryCases {
		r.add(Case{Name: name, Title: name, Contenders: []string{floor, ours, celery}, Measures: []Measure{{Unit: "tasks/s"}}}, map[string][]Sample{floor: one, ours: one, celery: one})
	}
	if err := r.summarize(page); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(text); !strings.HasPrefix(s, "before\n"+readmeBegin+"| case |") || !strings.HasSuffix(s, "|\n"+readmeEnd+"after\n") || strings.Contains(s, "old") || strings.Count(s, "tasks/s") < 3 {
		t.Errorf("the page is\n%s", text)
	}
}

func TestPauseIsTheLongestTimeWithoutATask(t *testing.T) {
	t.Parallel()
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	r := &recovery{done: []time.Time{at(0), at(100), at(900), at(1000)}}
	if got := r.pause(at(50), at(1200)); got != 0.8 {
		t.Errorf("pause is %v, want 0.8", got)
	}
	if got := r.between(at(50), at(1050)); got != 3 {
		t.Errorf("%v tasks a second, want 3", got)
	}
}

func TestMedian(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		values []float64
		want   float64
	}{{[]float64{3}, 3}, {[]float64{4, 1}, 2.5}, {[]float64{9, 1, 2}, 2}, {[]float64{9, 1, 2, 4}, 3}, {[]float64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 5.5}} {
		if got := median(c.values); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.values, got, c.want)
		}
	}
}

// The floor publishes as many bytes as a worker that takes one task out of the chain.
func TestFloorsChainGetsShorterAsARealOne(t *testing.T) {
	t.Parallel()
	id := (&ids{prefix: "00000001"}).new()
	m := chainOf(3, "q", id, true)
	var body [3]json.RawMessage
	if err := json.Unmarshal(m.Body, &body); err != nil {
		t.Fatal(err)
	}
	var embed struct{ Chain []json.RawMessage }
	if err := json.Unmarshal(body[2], &embed); err != nil {
		t.Fatal(err)
	}
	if n := len(embed.Chain[0]) + 1; m.Headers[contender.HeaderCut] != int32(n) || m.Headers[contender.HeaderLeft] != int32(2) {
		t.Errorf("headers are %v, want a cut of %d", m.Headers, n)
	}
	if err := m.Headers.Validate(); err != nil || m.DeliveryMode != amqp.Persistent {
		t.Error(err, m.DeliveryMode)
	}
}

package changetest

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// A Campaign runs many cases.
type Campaign struct {
	Programs Programs
	// Folder gets all files. The evidence of each case with differences stays there.
	Folder string
	// Name is that of the compose projects, to which each lane adds its own.
	Name string
	Seed uint64
	// Numbers are the cases.
	Numbers []int
	// Lanes is how many cases run at the same time; most of a case is waiting.
	Lanes int
	// For ends the campaign early: no case begins after this time. 0 means no limit.
	For time.Duration
	// Output gets progress and the cases with differences.
	Output io.Writer
}

// A Report has the results of a campaign.
type Report struct {
	Results []Result
	Took    time.Duration
}

// Run runs the campaign. An error means that it did not work itself; the report has
// what the cases have shown.
func (c Campaign) Run(ctx context.Context) (*Report, error) {
	began := time.Now()
	report := &Report{}
	var mu sync.Mutex
	var failed error
	next := 0
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		if next == len(c.Numbers) || failed != nil || c.For > 0 && time.Since(began) > c.For {
			return 0, false
		}
		next++
		return c.Numbers[next-1], true
	}
	record := func(r Result) {
		mu.Lock()
		defer mu.Unlock()
		report.Results = append(report.Results, r)
		if len(r.Differences) > 0 {
			fmt.Fprintf(c.Output, "%s: DIFFERS (seed %d; %s: %s)\n", r.Case, r.Case.Seed, r.Status, r.Summary)
			for i, line := range r.Differences {
				if i == 12 {
					fmt.Fprintf(c.Output, "    … and %d more\n", len(r.Differences)-i)
					break
				}
				fmt.Fprintf(c.Output, "    %s\n", line)
			}
			fmt.Fprintf(c.Output, "    evidence: %s\n", r.Evidence)
		}
		if n := len(report.Results); n%10 == 0 || n == len(c.Numbers) {
			fmt.Fprintf(c.Output, "%s %d of %d cases, %d with differences\n", time.Since(began).Round(time.Second), n, len(c.Numbers), report.Differing())
		}
	}
	work := func(number int) (err error) {
		var l *Lane
		defer func() {
			if l == nil {
				return
			}
			if closeErr := l.Close(ctx); err == nil {
				err = closeErr
			}
		}()
		for made := 0; ; {
			n, ok := take()
			if !ok || ctx.Err() != nil {
				return nil
			}
			if l == nil {
				made++
				name := fmt.Sprintf("%s-%d-%d", c.Name, number, made)
				if l, err = NewLane(ctx, c.Programs, filepath.Join(c.Folder, fmt.Sprintf("lane-%d-%d", number, made)), name); err != nil {
					l = nil // NewLane has closed it
					return err
				}
			}
			r, err := l.Run(ctx, NewCase(c.Seed, n))
			if err != nil {
				return fmt.Errorf("%s: %w", NewCase(c.Seed, n), err)
			}
			record(r)
			if l.Broken() {
				if err := l.Close(ctx); err != nil {
					return err
				}
				l = nil
			}
		}
	}
	var wait sync.WaitGroup
	for number := range min(max(c.Lanes, 1), len(c.Numbers)) {
		wait.Go(func() {
			if err := work(number); err != nil {
				mu.Lock()
				if failed == nil { // what follows from the cancellation says nothing
					failed = err
				}
				mu.Unlock()
				cancel()
			}
		})
	}
	wait.Wait()
	report.Took = time.Since(began)
	return report, failed
}

// Differing counts the cases with differences.
func (r *Report) Differing() int {
	n := 0
	for _, result := range r.Results {
		if len(result.Differences) > 0 {
			n++
		}
	}
	return n
}

// Rollbacks returns the times of the rollbacks, shortest first.
func (r *Report) Rollbacks() []time.Duration {
	var times []time.Duration
	for _, result := range r.Results {
		if result.Rollback > 0 {
			times = append(times, result.Rollback)
		}
	}
	slices.Sort(times)
	return times
}

// MedianRollback is the median of the times of the rollbacks, 0 for none.
func (r *Report) MedianRollback() time.Duration {
	times := r.Rollbacks()
	if len(times) == 0 {
		return 0
	}
	return times[len(times)/2]
}

// Print writes the figures.
func (r *Report) Print(w io.Writer) {
	times := r.Rollbacks()
	fmt.Fprintf(w, "%d cases in %s: %d with differences\n", len(r.Results), r.Took.Round(time.Second), r.Differing())
	deaths, refused := 0, 0
	for _, result := range r.Results {
		deaths += result.Deaths
		if result.Refused {
			refused++
		}
	}
	fmt.Fprintf(w, "workers killed: %d; runs refused: %d\n", deaths, refused)
	if len(times) > 0 {
		fmt.Fprintf(w, "rollback took: median %s, worst %s (of %d)\n",
			r.MedianRollback().Round(time.Millisecond), times[len(times)-1].Round(time.Millisecond), len(times))
	}
	by := func(what string, key func(Case) string) {
		counts, differing := map[string]int{}, map[string]int{}
		for _, result := range r.Results {
			counts[key(result.Case)]++
			if len(result.Differences) > 0 {
				differing[key(result.Case)]++
			}
		}
		for name, n := range differing {
			fmt.Fprintf(w, "  %s %s: %d of %d differ\n", what, name, n, counts[name])
		}
	}
	by("workspace", func(c Case) string { return string(c.Workspace) })
	by("fault", func(c Case) string { return c.Step + " " + string(c.Fault) })
	by("disturbance", func(c Case) string { return string(c.Disturbance) })
}

package preflight

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Limit is how long the looks before a run may take together.
const Limit = 2 * time.Second

// busyFactor is how many times longer looks may take on a machine that has too much
// to do.
const busyFactor = 4

// stopTime is the part of the limit in which the programs of looks that have not
// answered are ended.
const stopTime = 250 * time.Millisecond

// A Status says what follows from a look.
type Status string

// The statuses.
const (
	// OK: a run can use what was looked at.
	OK Status = "ok"
	// Note: a run can use it, but an operator should know about it.
	Note Status = "note"
	// Refuse: a run would fail because of it, or would destroy something.
	Refuse Status = "refuse"
	// Skip: not looked at, because a look that it needs was refused or skipped.
	Skip Status = "skip"
)

// A Result is what a look has found.
type Result struct {
	// Look is the name of the look.
	Look   string
	Status Status
	// Found is what is there, and Cure what mends it, "" for a good result. Both
	// are without a full stop at the end.
	Found, Cure string
	// Late says that the look did not answer within the limit.
	Late bool
}

// A Look looks at one thing that runs need.
type Look struct {
	// Name is the same in every run and for every user of the looks. No two looks of
	// one Run have the same.
	Name string
	// At says what it looks at, as the subject of "gives no answer".
	At string
	// Needs names the looks without which this one makes no sense. Those that are not
	// among the looks of a Run do not count.
	Needs []string
	// After names looks that must have ended before this one begins, whatever they
	// have found.
	After []string
	// Late is the result if there is no answer within the limit: Note where the
	// run itself will find out, Refuse where the run would hang too. LateCure says
	// what to do about it.
	Late     Status
	LateCure string
	// Remote says that it waits for the docker engine. A busy machine is no reason to
	// wait longer for that.
	Remote bool
	// Do returns at least one result, the most important one first. Run sets their
	// names. It must return soon after ctx has ended.
	Do func(ctx context.Context) []Result
}

// errLimit is the cause with which Run ends the looks.
var errLimit = errors.New("the looks took longer than their limit")

// Run runs the looks and returns their results in the order of the looks.
//
//   - A look waits for those of Needs and After; all others run at the same time.
//   - Run returns within limit, with a result of each look. What did not answer
//     by then has the result of a late look. If ctx ends, all that is left is
//     late at once.
//   - Time in which this process does not run (a stopped container, a suspended
//     machine) is not counted, because nothing could answer in it. While the
//     machine has too much to do, a look that only needs that machine has up to four
//     times as long: a run must not be refused for being slow.
//   - A look that hangs in the kernel, as on a network file system whose server is
//     gone, is left behind: nothing can end it.
func Run(ctx context.Context, limit time.Duration, looks []Look) []Result {
	return run(ctx, limit, isBusy, looks)
}

func run(ctx context.Context, limit time.Duration, busy func() bool, looks []Look) []Result {
	began := time.Now()
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	type answer struct {
		index   int
		results []Result
	}
	answers := make(chan answer, len(looks)) // a look that is left behind can still write to it
	usable := map[string]chan bool{}         // each gets one value, for each look that needs it
	var local atomic.Int32                   // how many looks that are not remote have no answer
	for _, look := range looks {
		usable[look.Name] = make(chan bool, len(looks))
		if !look.Remote {
			local.Add(1)
		}
	}
	for i, look := range looks {
		go func() {
			results := look.run(work, usable)
			if work.Err() != nil && results[0].Status != OK {
				// Its programs were ended: what it says about them is not the cause.
				results = []Result{look.late(limit, began)}
			}
			good := results[0].Status == OK || results[0].Status == Note
			for range looks {
				usable[look.Name] <- good
			}
			if !look.Remote {
				local.Add(-1)
			}
			answers <- answer{i, results}
		}()
	}
	all := make([][]Result, len(looks))
	left := len(looks)
	over, stop := clock(limit-min(stopTime, limit/4), func() bool { return local.Load() > 0 && busy() })
	defer stop()
	ended := ctx.Done()
	for end := (<-chan time.Time)(nil); left > 0; {
		select {
		case answer := <-answers:
			all[answer.index] = answer.results
			left--
			continue
		case <-over:
			over = nil
			cancel(errLimit)
		case <-ended:
			ended = nil
		case <-end:
			left = 0
			continue
		}
		if end == nil {
			timer := time.NewTimer(min(stopTime, limit/4))
			defer timer.Stop()
			end = timer.C
		}
	}
	var list []Result
	for i, look := range looks {
		if all[i] == nil {
			all[i] = []Result{look.late(limit, began)}
		}
		for _, result := range all[i] {
			result.Look = look.Name
			list = append(list, result)
		}
	}
	return list
}

func (l Look) run(ctx context.Context, usable map[string]chan bool) []Result {
	for _, name := range slices.Concat(l.Needs, l.After) {
		needed, is := usable[name]
		if !is {
			continue
		}
		select {
		case good := <-needed:
			if !good && slices.Contains(l.Needs, name) {
				return []Result{{Status: Skip, Found: "needs the check " + name}}
			}
		case <-ctx.Done():
			return []Result{{Status: Skip}} // Run makes it late
		}
	}
	return l.Do(ctx)
}

func (l Look) late(limit time.Duration, began time.Time) Result {
	// Not less than the limit, which is what the documentation says.
	took := max(limit, time.Since(began).Round(time.Second))
	return Result{Status: cmp.Or(l.Late, Note), Found: fmt.Sprintf("%s gives no answer within %v s", l.At, took.Seconds()), Cure: l.LateCure, Late: true}
}

// tick is the resolution of clock.
const tick = 25 * time.Millisecond

// clock returns a channel that is closed when this process has run for limit, or
// for longer while the machine is busy. A pause of the whole process counts as
// little, however long it was.
func clock(limit time.Duration, busy func() bool) (over <-chan struct{}, stop func()) {
	closed, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		ticker := time.NewTicker(tick)
		defer ticker.Stop()
		for spent, last := time.Duration(0), time.Now(); spent < limit || spent < busyFactor*limit && busy(); {
			select {
			case <-stopped:
				return
			case <-ticker.C:
			}
			now := time.Now()
			spent += min(now.Sub(last), 4*tick)
			last = now
		}
		close(closed)
	}()
	return closed, func() { close(stopped) }
}

// isBusy says whether more than twice as many threads want to run as there are
// processors. It is false where the system does not show that.
func isBusy() bool {
	text, err := os.ReadFile("/proc/loadavg")
	fields := strings.Fields(string(text))
	if err != nil || len(fields) < 4 {
		return false
	}
	runnable, _, _ := strings.Cut(fields[3], "/")
	n, err := strconv.Atoi(runnable)
	return err == nil && n > 2*runtime.NumCPU()
}

// Refusals are the results because of which a run must not begin; notes are the
// others that an operator should know about.
//
// The compose program decides whether docker can be used: it may know a docker
// context that this process does not. So an engine that does not answer this
// process is a note if one answers compose. A compose program that gives no answer
// in time is refused only if the engine gives this process no answer either:
// otherwise it is slow, not broken.
func Refusals(results []Result) (refused, notes []Result) {
	find := func(name string) Result {
		for _, result := range results {
			if result.Look == name {
				return result
			}
		}
		return Result{Status: Skip}
	}
	program, engine, target := find(lookComposeEngine), find(lookEngine), find(lookTarget)
	for _, result := range results {
		switch {
		case result.Status == Refuse && result.Look == lookEngine && program.Status != Refuse:
			result.Status = Note
		case result.Status == Refuse && result.Look == lookEngine && program.Status == Refuse:
			continue // compose has said it, with the same cause
		case result.Look == lookTarget && program.Status == Refuse && !program.Late:
			continue // the same again
		case result.Late && result.Look == lookComposeEngine && engine.Status == OK && !target.Late:
			result.Status = Note
		}
		switch result.Status {
		case Refuse:
			if !slices.ContainsFunc(refused, func(r Result) bool { return r.Text() == result.Text() }) {
				refused = append(refused, result)
			}
		case Note:
			notes = append(notes, result)
		}
	}
	return refused, notes
}

// Text is the sentence about a result: what was found, and the cure.
func (r Result) Text() string {
	if r.Cure == "" {
		return r.Found
	}
	return r.Found + ". " + r.Cure
}

// Refusal is the message of a step that was refused.
func Refusal(refused []Result) string {
	const nothing = "Run refused before it changed anything"
	if len(refused) == 1 {
		return nothing + ": " + refused[0].Text()
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s, for %d reasons:", nothing, len(refused))
	for _, result := range refused {
		text.WriteString("\n- " + result.Text())
	}
	return text.String()
}

func ok(format string, args ...any) []Result {
	return []Result{{Status: OK, Found: fmt.Sprintf(format, args...)}}
}

func note(cure, format string, args ...any) []Result {
	return []Result{{Status: Note, Found: fmt.Sprintf(format, args...), Cure: cure}}
}

func refuse(cure, format string, args ...any) []Result {
	return []Result{{Status: Refuse, Found: fmt.Sprintf(format, args...), Cure: cure}}
}

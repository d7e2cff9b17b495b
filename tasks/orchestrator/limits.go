package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// minMeasurePause is the shortest time between two measurements of the disk. They take
// at most a twentieth of the time: one that takes longer is followed by a longer pause.
const (
	minMeasurePause = time.Second
	measureShare    = 20
)

// A meter ends the work of a step that takes more than a limit of the policy, of the
// step or of the whole run (docs/policy.md#limits). What takes exactly the limit is
// within it.
//
// The limit of a step's time belongs to its context from the start, see withPolicyTime.
// A rollback has only limits of its own, and takes nothing of the run's.
type meter struct {
	step   policy.StepLimits
	run    policy.RunLimits
	used   change.Usage // by the steps before
	named  func(limit string) string
	rule   func(limit, value string) audit.Rule
	end    func(error)
	began  time.Time
	dirs   []string
	now    func() time.Time
	before int64 // DiskBefore, once diskBegan
	// stopped is closed by stop, and watching waits for what it stops.
	stopped  chan struct{}
	watching sync.WaitGroup

	mu         sync.Mutex // guards all below
	output     int64      // of the step
	commands   int        // that run now
	lastOutput time.Time  // or the start of a command
	woken      chan struct{}
	exceeded   error // the first limit that was exceeded
}

// startMeter begins to measure the step. The context ends when a limit is exceeded;
// stop must be called at the end of the step, and records what it has taken.
func (s *stepRun) startMeter(ctx context.Context) (context.Context, func(), *Failure) {
	limits := s.profile.Limits
	m := &meter{
		step: limits.For(string(s.step)), run: limits.Run, now: s.config.Now, began: s.config.Now(),
		dirs: []string{s.config.Workspace}, stopped: make(chan struct{}), woken: make(chan struct{}, 1),
	}
	if s.step == store.StepRollback {
		m.run = policy.RunLimits{}
	}
	s.meter = m
	if m.step.Idle == 0 && m.step.Output == 0 && m.step.Disk == 0 && m.run == (policy.RunLimits{}) {
		return ctx, func() {}, nil
	}
	if s.place.Dir != "" {
		m.dirs = append(m.dirs, s.place.Dir)
	}
	m.named = func(limit string) string { return limitName(s.profile, s.step, limit) }
	m.rule = func(limit, value string) audit.Rule { return limitRule(s.profile, s.step, limit, value) }
	attempt := s.journal.claim.Attempt
	if usage := s.record.Usage; usage != nil && usage.Attempt == attempt {
		m.used = *usage
	}
	resumed := m.used.Step == string(s.step) && s.journal.claim.Starts > 1
	switch {
	case resumed:
		// Another worker has begun the step: what it has taken counts.
		m.before = m.used.DiskBefore
		m.began = s.journal.claim.StartedAt
		if found := s.journal.found; found != nil {
			m.output = found.LogSize
		}
	case m.step.Disk > 0 || m.run.Disk > 0:
		m.before = diskUse(m.dirs)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	m.end = func(err error) { cancel(endCause{timeLimit, err}) }
	stop := func() {
		close(m.stopped)
		m.watching.Wait()
		cancel(nil)
	}
	if m.run != (policy.RunLimits{}) {
		if failure := s.recordUsage(ctx, m.usage(attempt, string(s.step))); failure != nil {
			stop()
			return ctx, func() {}, failure
		}
		inner := stop
		stop = func() {
			inner()
			if s.refused != nil {
				return // the step has not been done, and its claim is given up
			}
			after := m.usage(attempt, "")
			after.Time += max(0, m.now().Sub(m.began))
			after.Output += m.output
			if m.measuresDisk() {
				after.Disk += diskUse(m.dirs) - m.before
			}
			// Also for a step whose context has ended.
			if failure := s.recordUsage(context.WithoutCancel(ctx), after); failure != nil {
				s.log.Warn("what the step has taken of the run's limits is not recorded", "error", failure)
			}
		}
	}
	if m.run.Time > 0 {
		m.watching.Go(m.watchTime)
	}
	if m.step.Idle > 0 {
		m.watching.Go(m.watchIdle)
	}
	if m.measuresDisk() {
		m.watching.Go(m.watchDisk)
	}
	return ctx, stop, nil
}

// usage is what the steps before have taken, for the record.
func (m *meter) usage(attempt int, step string) *change.Usage {
	used := m.used
	used.Attempt, used.Step, used.DiskBefore = attempt, step, m.before
	if step == "" {
		used.DiskBefore = 0
	}
	return &used
}

func (s *stepRun) recordUsage(ctx context.Context, usage *change.Usage) *Failure {
	ctx, cancel := context.WithTimeout(ctx, s.config.FinishTimeout)
	defer cancel()
	s.record.Usage = usage
	return s.saveRecord(ctx)
}

func (m *meter) measuresDisk() bool { return m.step.Disk > 0 || m.run.Disk > 0 }

// limitName says which limit of the policy it is and where it comes from: "limit idle of
// step build, service api, profiles.yaml:12". A limit of the run has the prefix "run.".
func limitName(service policy.Service, step store.Step, limit string) string {
	field, isRun := strings.CutPrefix(limit, "run.")
	of := "step " + string(step)
	if isRun {
		of = "the run"
	}
	return fmt.Sprintf("limit %s of %s, service %s, %s", field, of, service.Name, limitOrigin(service, step, limit))
}

// limitField is the field of the policy file that has a limit of a step or of the run.
func limitField(service policy.Service, step store.Step, limit string) string {
	field := "limits." + string(step) + "." + limit
	if _, own := service.Origins[field]; own {
		return field
	}
	if strings.HasPrefix(limit, "run.") {
		return "limits." + limit
	}
	return "limits.everyStep." + limit
}

// limitOrigin says where a limit of the policy comes from.
func limitOrigin(service policy.Service, step store.Step, limit string) policy.Origin {
	return service.Origins[limitField(service, step, limit)]
}

// limitRule is a limit in the audit trail.
func limitRule(service policy.Service, step store.Step, limit, value string) audit.Rule {
	return audit.Rule{Name: limitField(service, step, limit), Limit: value}
}

// A limitError says which limit has ended the work of a step.
type limitError struct {
	rule audit.Rule
	text string
}

func (e *limitError) Error() string { return e.text }

// auditLimit adds the record about the limit that has ended the step, once.
func (s *stepRun) auditLimit(ctx context.Context) {
	var limit *limitError
	if !s.limitAudited && errors.As(context.Cause(ctx), &limit) {
		s.limitAudited = true
		s.audit(audit.Record{Kind: audit.LimitReached, Rule: &limit.rule, Text: cut(limit.text)})
	}
}

// messageLimitRecords are those about a time limit of the message that has ended a step.
func messageLimitRecords(cause endCause) []audit.Record {
	var limit *limitError
	if cause.reason != timeLimit || errors.As(cause.err, &limit) {
		return nil // auditLimit has added it
	}
	return []audit.Record{{Kind: audit.LimitReached, Rule: &audit.Rule{Name: "time limit of the message"}, Text: cut(cause.Error())}}
}

// exceed ends the step's work, unless a limit has ended it before. value is the limit's.
func (m *meter) exceed(limit, value, format string, args ...any) {
	err := &limitError{m.rule(limit, value), fmt.Sprintf("%s (%s)", fmt.Sprintf(format, args...), m.named(limit))}
	if m.exceeded == nil {
		m.exceeded = err
		m.end(err)
	}
}

// watchTime ends the step when the run's steps together have worked for too long.
func (m *meter) watchTime() {
	timer := time.NewTimer(m.run.Time - m.used.Time - m.now().Sub(m.began))
	defer timer.Stop()
	select {
	case <-m.stopped:
	case <-timer.C:
		m.mu.Lock()
		defer m.mu.Unlock()
		m.exceed("run.time", shortDuration(m.run.Time), "the steps of the run took longer than %s", shortDuration(m.run.Time))
	}
}

// watchIdle ends the step when a command writes nothing for too long.
func (m *meter) watchIdle() {
	timer := time.NewTimer(m.step.Idle)
	defer timer.Stop()
	for {
		select {
		case <-m.stopped:
			return
		case <-m.woken: // a command has begun
		case <-timer.C:
		}
		m.mu.Lock()
		left := m.step.Idle - m.now().Sub(m.lastOutput)
		if m.commands == 0 {
			left = m.step.Idle
		} else if left < 0 {
			m.exceed("idle", shortDuration(m.step.Idle), "no output for %s", shortDuration(m.step.Idle))
			left = m.step.Idle
		}
		m.mu.Unlock()
		timer.Reset(left + time.Nanosecond)
	}
}

// watchDisk ends the step when the files have grown too much.
func (m *meter) watchDisk() {
	timer := time.NewTimer(minMeasurePause)
	defer timer.Stop()
	for {
		select {
		case <-m.stopped:
			return
		case <-timer.C:
		}
		began := time.Now()
		m.checkDisk()
		timer.Reset(max(minMeasurePause, measureShare*time.Since(began)))
	}
}

// checkDisk measures the files, and returns why the step has to end, if it has.
func (m *meter) checkDisk() error {
	grown := int64(0)
	if m.measuresDisk() {
		grown = diskUse(m.dirs) - m.before
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.step.Disk > 0 && grown > m.step.Disk:
		m.exceed("disk", sizeText(m.step.Disk), "workspace and artifacts have grown by %s, more than %s", sizeText(grown), sizeText(m.step.Disk))
	case m.run.Disk > 0 && m.used.Disk+grown > m.run.Disk:
		m.exceed("run.disk", sizeText(m.run.Disk), "workspace and artifacts have grown by %s in the run, more than %s", sizeText(m.used.Disk+grown), sizeText(m.run.Disk))
	}
	return m.exceeded
}

// command measures a command. The writers are those of its output; ended must be called
// at its end, and returns why the step has to end, if it has.
func (m *meter) command(stdout, stderr io.Writer) (countedOut, countedErr io.Writer, ended func() error) {
	if m == nil || m.named == nil {
		return stdout, stderr, func() error { return nil }
	}
	m.mu.Lock()
	m.commands++
	m.lastOutput = m.now()
	m.mu.Unlock()
	select {
	case m.woken <- struct{}{}:
	default:
	}
	return meteredWriter{m, stdout}, meteredWriter{m, stderr}, func() error {
		m.mu.Lock()
		m.commands--
		m.mu.Unlock()
		return m.checkDisk()
	}
}

// A meteredWriter counts the output of a command, as the program writes it. What is
// beyond the limit is dropped.
type meteredWriter struct {
	m  *meter
	to io.Writer
}

func (w meteredWriter) Write(p []byte) (int, error) {
	if n, err := w.to.Write(p[:w.m.count(len(p))]); err != nil {
		return n, err
	}
	return len(p), nil
}

// count counts output and returns how much of it is within the limits.
func (m *meter) count(size int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lastOutput = m.now()
	left := int64(size)
	if m.step.Output > 0 {
		if within := max(0, m.step.Output-m.output); within < left {
			left = within
			m.exceed("output", sizeText(m.step.Output), "it wrote more than %s", sizeText(m.step.Output))
		}
	}
	if m.run.Output > 0 {
		if within := max(0, m.run.Output-m.used.Output-m.output); within < left {
			left = within
			m.exceed("run.output", sizeText(m.run.Output), "the commands of the run wrote more than %s", sizeText(m.run.Output))
		}
	}
	m.output += int64(size)
	return int(left)
}

// diskUse is what the files below the directories take on the disk. A file with several
// names counts once, folders do not count. What vanishes meanwhile does not count.
func diskUse(dirs []string) int64 {
	type file struct{ device, inode uint64 }
	seen := map[file]bool{}
	total := int64(0)
	for i, dir := range dirs {
		if slices.ContainsFunc(dirs[:i], func(other string) bool { return change.Below(other, dir) }) {
			continue
		}
		_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return nil
			case entry.IsDir() && slices.Contains(dirs[:i], path):
				return filepath.SkipDir // counted already
			case entry.IsDir():
				return nil
			}
			info, err := os.Lstat(path)
			if err != nil {
				return nil
			}
			stat, known := info.Sys().(*syscall.Stat_t)
			if !known {
				total += info.Size()
				return nil
			}
			if stat.Nlink > 1 {
				id := file{uint64(stat.Dev), stat.Ino}
				if seen[id] {
					return nil
				}
				seen[id] = true
			}
			total += stat.Blocks * 512
			return nil
		})
	}
	return total
}

// shortDuration is a duration without the units that are zero at its end: 10m, not
// 10m0s.
func shortDuration(d time.Duration) string {
	text := d.String()
	for _, zero := range []string{"0s", "0m"} {
		if short, found := strings.CutSuffix(text, zero); found && short != "" && !isDigit(short[len(short)-1]) && short[len(short)-1] != '.' {
			text = short
		}
	}
	return text
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// sizeText is a number of bytes in the largest unit that shows it exactly.
func sizeText(size int64) string {
	for _, unit := range []struct {
		size int64
		name string
	}{{1 << 40, "TiB"}, {1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if size != 0 && size%unit.size == 0 {
			return fmt.Sprintf("%d %s", size/unit.size, unit.name)
		}
	}
	return fmt.Sprintf("%d bytes", size)
}

package chaos

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

func (o *outcome) complain(c class, format string, args ...any) {
	o.problems = append(o.problems, problem{c, fmt.Sprintf(format, args...)})
}

// failAt is the step at which the run must have failed, "" for none.
func (o *outcome) failAt() string {
	if o.trial.givesUp() && o.missed == 0 {
		return o.trial.Stages[0].Step
	}
	if o.lost && o.trial.LostStep != "" {
		return o.trial.LostStep
	}
	return o.run.Shape.FailAt
}

// cutShort says whether the step failed without an end of its own, so that it
// may never have come to its commands' ends, and nobody has registered what it
// left.
func (o *outcome) cutShort(step string) bool {
	return step == o.failAt() && (o.trial.givesUp() || o.lost && o.trial.LostStep != "")
}

// lostAfter is how long nothing may be in the queue, nothing in hand and nobody
// at work before a run that has not ended counts as lost. Sweeps that repair
// have come round by then.
const lostAfter = 20 * time.Second

var errLost = fmt.Errorf("for %s no message waited, none was in hand, and nobody did anything", lostAfter)

// judge waits for the end of the run and looks at everything that is there.
func (l *lane) judge(ctx context.Context, o *outcome) {
	var status string
	var idle time.Time // since when nobody has done anything
	moments := -1
	err := until(ctx, "the run to end", func() (complete bool, err error) {
		if status, complete, err = l.status(ctx, o.run.ID); complete || err != nil {
			return complete, err
		}
		seen, err := l.trace.read()
		if err != nil {
			return false, err
		}
		waiting, err := l.waiting()
		if err != nil {
			return false, err
		}
		if waiting > 0 || l.inHand() || len(seen) != moments {
			idle, moments = time.Now(), len(seen)
		}
		if time.Since(idle) > lostAfter {
			return false, errLost
		}
		return false, nil
	})
	if err == nil {
		_, err = l.quiet(ctx)
	}
	if ctx.Err() != nil {
		o.complain(harness, "%v", context.Cause(ctx))
		return
	}
	var readErr error
	if o.moments, readErr = l.trace.read(); readErr != nil {
		o.complain(harness, "%v", readErr)
	}
	if o.ledger, readErr = ledger.Read(l.ledger, o.run.ID); readErr != nil {
		o.complain(harness, "%v", readErr)
	}
	o.measure()
	if err != nil {
		c := stuck
		if errors.Is(err, errLost) {
			c = lost
		}
		o.complain(c, "%v; the run is %s", err, status)
	}
	l.inspect(ctx, o, status)
}

// inspect looks at everything that a run which has ended has left.
func (l *lane) inspect(ctx context.Context, o *outcome, status string) {
	want := "succeeded"
	if o.failAt() != "" {
		want = "rolled_back"
	}
	if status != want {
		o.complain(wrong, "the run is %s, its plan demands %s", status, want)
	}
	for _, look := range []func(context.Context, *outcome) error{l.judgeStates, l.judgeResults, l.judgeArtifacts, l.judgeTables, l.judgeLost} {
		if err := look(ctx, o); err != nil {
			o.complain(harness, "%v", err)
		}
	}
	o.judgeLedger()
	o.judgeRollback(status)
	o.judgeProcesses(filepath.Base(l.config.programs.ledger))
}

// judgeAll judges each run of the trial, and that they took turns.
func (l *lane) judgeAll(ctx context.Context, o *outcome) {
	l.judge(ctx, o)
	l.recovered(ctx, o)
	for _, r := range o.others {
		other := &outcome{trial: o.trial, run: r, hits: o.hits}
		l.judge(ctx, other)
		o.problems = append(o.problems, other.problems...)
		o.repeated, o.late = o.repeated+other.repeated, o.late+other.late
	}
	if err := l.judgeLeft(ctx, o); err != nil {
		o.complain(harness, "%v", err)
	}
	if len(o.others) == 0 {
		return
	}
	all, err := ledger.Read(l.ledger, "")
	if err != nil {
		o.complain(harness, "%v", err)
	}
	o.judgeTurns(slices.DeleteFunc(all, func(r ledger.Record) bool {
		return r.Run != o.run.ID && !slices.ContainsFunc(o.others, func(other run) bool { return other.ID == r.Run })
	}))
}

// inHand says whether a living worker has a delivery.
func (l *lane) inHand() bool {
	alive := map[int]bool{}
	for _, w := range l.workers {
		if w.alive() {
			alive[w.pid()] = true
		}
	}
	return open(l.trace.moments, alive) > 0
}

// wantState is how a step of the run must stand at the end.
func (o *outcome) wantState(step string) string {
	failAt := o.failAt()
	switch {
	case failAt == "" && step == "rollback":
		return "skipped SUCCESS"
	case failAt == "" || step == "rollback" || slices.Index(steps, step) < slices.Index(steps, failAt):
		return "succeeded SUCCESS"
	case step == failAt:
		return "failed FAILURE"
	}
	return "pending "
}

func (l *lane) judgeStates(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `
		SELECT plan_step::text, plan_step_status::text || ' ' || COALESCE(celery_state::text, '')
		FROM spec_workflow_task_states WHERE orchestrator_run_id = $1`, o.run.ID)
	if err != nil {
		return err
	}
	n := 0
	var step, state string
	_, err = pgx.ForEachRow(rows, []any{&step, &state}, func() error {
		n++
		if want := o.wantState(step); strings.TrimSuffix(state, "PENDING") != want {
			o.complain(wrong, "step %s is %s, want %s", step, state, want)
		}
		return nil
	})
	if n != len(steps) {
		o.complain(wrong, "the run has %d states, want %d", n, len(steps))
	}
	return err
}

// judgeResults looks at all results of tasks that have the run among their
// arguments.
func (l *lane) judgeResults(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `
		SELECT task_id, COALESCE(status, ''), COALESCE(convert_from(args, 'UTF8'), '') FROM celery_taskmeta
		WHERE position($1::bytea IN args) > 0`, []byte(o.run.ID))
	if err != nil {
		return err
	}
	found := map[string]string{}
	var id, status, args string
	_, err = pgx.ForEachRow(rows, []any{&id, &status, &args}, func() error {
		found[id] = status
		if strings.Contains(args, `"rollback"`) {
			if status != "SUCCESS" {
				o.complain(wrong, "the result of rollback %s is %s", id, status)
			} else if o.failAt() == "" && o.run.before == nil {
				o.complain(wrong, "rollback %s has a result, but the run is good", id)
			}
			return nil
		}
		known := false
		for r := &o.run; r != nil; r = r.before {
			for _, task := range r.Tasks {
				known = known || task == id
			}
		}
		if !known {
			o.complain(doubled, "task %s %s was never submitted and has the result %s", id, args, status)
		}
		return nil
	})
	failAt := o.failAt()
	for _, step := range steps[:5] {
		want := "SUCCESS"
		if failAt != "" && slices.Index(steps, step) >= slices.Index(steps, failAt) {
			want = "FAILURE"
			if o.lost && o.trial.LostStep != "" {
				want = "" // there is no message that it would be the result of
			}
		}
		if got := found[o.run.Tasks[step]]; got != want {
			o.complain(wrong, "the result of %s is %q, want %s", step, got, want)
		}
	}
	return err
}

// judgeArtifacts demands that what is registered is what is on disk.
func (l *lane) judgeArtifacts(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `SELECT path, COALESCE(checksum, ''), COALESCE(size_bytes, -1) FROM orchestrator_run_artifacts WHERE run_id = $1`, o.run.ID)
	if err != nil {
		return err
	}
	var paths []string
	var path, checksum string
	var size int64
	_, err = pgx.ForEachRow(rows, []any{&path, &checksum, &size}, func() error {
		paths = append(paths, path)
		text, err := os.ReadFile(filepath.Join(l.artifacts, o.run.ID, path))
		sum := sha256.Sum256(text)
		switch {
		case err != nil:
			o.complain(wrong, "artifact %s is registered: %v", path, err)
		case hex.EncodeToString(sum[:]) != checksum || int64(len(text)) != size:
			o.complain(wrong, "artifact %s is not what was registered: %d bytes for %d", path, len(text), size)
		}
		return nil
	})
	for _, step := range steps {
		if strings.HasPrefix(o.wantState(step), "succeeded") && !slices.Contains(paths, step+".log") {
			o.complain(wrong, "step %s has no artifact %s.log", step, step)
		}
	}
	// Nothing half-written stays either.
	files, readErr := os.ReadDir(filepath.Join(l.artifacts, o.run.ID))
	if readErr != nil {
		return readErr
	}
	for _, file := range files {
		if !slices.Contains(paths, file.Name()) && !o.unregistered(file.Name()) {
			o.complain(left, "file %s in the run's directory is registered nowhere", file.Name())
		}
	}
	return err
}

// unregistered says whether a file may lie there without a row: a worker that
// died leaves its temporary files; a patch that was given up leaves the
// difference of those who died in it, and a step that was lost its log too; a
// retried run keeps the files of its first attempt.
func (o *outcome) unregistered(name string) bool {
	step, _, _ := strings.Cut(name, ".")
	return strings.HasPrefix(name, ".") && len(o.hits) > 0 ||
		o.cutShort(step) && (name == "patch.diff" || o.lost && name == step+".log") || o.run.before != nil
}

// judgeTables demands that no claim is left open. A rollback during which the
// run is retried belongs to an attempt that is over, and has no outcome.
func (l *lane) judgeTables(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `
		SELECT step || ' attempt ' || attempt || ' of ' || worker FROM mm_orchestrator.claims
		WHERE run_id = $1 AND (holder IS NOT NULL OR outcome IS NULL AND NOT ($2 AND step = 'rollback' AND attempt = 1))`,
		o.run.ID, o.trial.Variant == retriedEarly)
	if err != nil {
		return err
	}
	var claim string
	_, err = pgx.ForEachRow(rows, []any{&claim}, func() error {
		o.complain(left, "claim on %s is open", claim)
		return nil
	})
	return err
}

// judgeLeft demands that no run has anything left: all have ended.
func (l *lane) judgeLeft(ctx context.Context, o *outcome) error {
	for what, count := range map[string]string{
		"parked messages":                 `SELECT count(*) FROM mm_orchestrator.parked`,
		"workspaces that a run still has": `SELECT count(*) FROM mm_orchestrator.holds WHERE run_id IS NOT NULL`,
		"revocations":                     `SELECT count(*) FROM mm_orchestrator.revocations`,
	} {
		var n int
		if err := l.pool.QueryRow(ctx, count).Scan(&n); err != nil {
			return err
		}
		if n > 0 {
			o.complain(left, "%d %s", n, what)
		}
	}
	return nil
}

// judgeGivenBack demands that the last worker which stops in order leaves no
// message where only workers of this program look.
func (l *lane) judgeGivenBack(ctx context.Context, o *outcome) error {
	if slices.ContainsFunc(l.workers, (*workerProcess).alive) {
		return nil
	}
	var parked int
	err := l.pool.QueryRow(ctx, `SELECT count(*) FROM mm_orchestrator.parked`).Scan(&parked)
	if err == nil && parked > 0 {
		o.complain(left, "%d messages are still parked when the last worker has stopped: a Python worker would never find them", parked)
	}
	return err
}

// judgeTurns demands that the effects of the trial's runs do not interleave:
// who has begun changing the workspace has it until its run has ended.
func (o *outcome) judgeTurns(all []ledger.Record) {
	var holder string
	over := map[string]bool{}
	for _, r := range all {
		if r.Run == holder {
			continue
		}
		if over[r.Run] {
			o.complain(doubled, "the commands of run %s and run %s interleave", r.Run, holder)
			return
		}
		if holder != "" {
			over[holder] = true
		}
		holder = r.Run
	}
}

// judgeLedger counts the effects, command by command.
func (o *outcome) judgeLedger() {
	for _, step := range withCommand {
		o.judgeOrderOf(step)
		for number := 1; number <= several; number++ {
			o.judgeCommand(step, number)
		}
	}
}

func (o *outcome) judgeCommand(step string, number int) {
	var starts, ends int
	for _, r := range o.ledger {
		if r.Step != step || r.Command != number {
			continue
		}
		switch r.Event {
		case ledger.Start:
			starts++
		case ledger.End:
			ends++
		case ledger.Overlap:
			o.complain(doubled, "command %d of %s ran beside another one", number, step)
		}
	}
	want, excused := o.wantCommand(step, number), o.excuses(step, number)
	switch {
	case starts > want+excused:
		o.complain(doubled, "command %d of %s ran %d times, want %d (and %d times more at most, after crashes)", number, step, starts, want, excused)
	case starts < want:
		o.complain(wrong, "command %d of %s ran %d times, want %d", number, step, starts, want)
	case starts > want:
		o.repeated += starts - want
		o.late += max(0, ends-want)
	case o.trial.Variant == retriedEarly && ends < starts-excused:
		o.complain(wrong, "command %d of %s was cut short, %d of %d times", number, step, starts-ends, starts)
	}
}

// wantCommand is how often a command has to run when no worker goes while it
// does.
func (o *outcome) wantCommand(step string, number int) int {
	want := 0
	switch {
	case !o.cutShort(step):
		want = o.run.Shape.runs(o.failAt(), step, number)
	case o.recorded(step, number):
		want = 1
	}
	if before := o.run.before; before != nil {
		want += before.Shape.runs(before.Shape.FailAt, step, number)
	}
	return want
}

// runs is how often a command of a step runs when the run fails at failAt.
func (s shape) runs(failAt, step string, number int) int {
	switch {
	case number > s.commands(step),
		step == "rollback" && failAt == "",
		step != "rollback" && failAt != "" && slices.Index(steps, step) > slices.Index(steps, failAt),
		step == failAt && number > s.failing(step):
		return 0
	}
	return 1
}

// judgeOrderOf demands that a step's commands ran in their order, each after
// the end of the one before.
func (o *outcome) judgeOrderOf(step string) {
	last, over := 0, true
	for _, r := range o.ledger {
		switch {
		case r.Step != step:
		case r.Event == ledger.End:
			over = over || r.Command == last
		case r.Event == ledger.Start:
			// One that had run already is none too early, whether it may run
			// again is counted elsewhere.
			if r.Command > last && (r.Command > last+1 || !over) {
				o.complain(wrong, "command %d of %s began before the end of the one before it", r.Command, step)
			}
			last, over = r.Command, false
		}
	}
}

// recorded says whether the end of a step's command was put on record.
func (o *outcome) recorded(step string, number int) bool {
	return slices.ContainsFunc(o.moments, func(m moment) bool {
		return m.Point == faultpoint.CommandRecorded && m.about(step) && m.about(commandSubject(number)) && m.about(o.run.ID)
	})
}

// judgeProcesses demands that no command outlives its step.
func (o *outcome) judgeProcesses(program string) {
	for _, r := range o.ledger {
		if r.Event != ledger.Start || syscall.Kill(r.PID, 0) != nil {
			continue
		}
		// The number may be somebody else's by now.
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", r.PID)); err == nil && strings.Contains(string(name), program) && strings.Contains(string(name), o.run.ID) {
			o.complain(left, "the command of %s (pid %d) still runs", r.Step, r.PID)
		}
	}
}

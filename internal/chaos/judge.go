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

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

func (o *outcome) report(c class, format string, args ...any) {
	o.problems = append(o.problems, problem{c, fmt.Sprintf(format, args...)})
}

// failAt returns the step at which the run must have failed, "" for none.
func (o *outcome) failAt() string {
	if o.trial.isPoison() && o.missed == 0 {
		return o.trial.Stages[0].Step
	}
	if o.lost && o.trial.LostStep != "" {
		return o.trial.LostStep
	}
	return o.run.Shape.FailAt
}

// cutShort says that the step failed without an end of its own. Its commands may not
// have run to their ends, and its files may not be registered.
func (o *outcome) cutShort(step string) bool {
	return step == o.failAt() && (o.trial.isPoison() || o.lost && o.trial.LostStep != "")
}

// lostAfter is how long no message may be ready or unacknowledged, and no worker
// may reach a fault point, before a run that has not ended counts as lost. By then
// the sweeps have repaired what they can.
const lostAfter = 20 * time.Second

var errLost = fmt.Errorf("for %s no message was ready or unacknowledged, and no worker did anything", lostAfter)

// judge waits for the end of the run and checks everything that it has left.
func (l *lane) judge(ctx context.Context, o *outcome) {
	var status string
	var idle time.Time // since when no worker has done anything
	moments := -1
	err := l.untilOfRun(ctx, "the run to end", func() (complete bool, err error) {
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
		if waiting > 0 || l.hasUnacked() || len(seen) != moments {
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
		o.report(harness, "%v", context.Cause(ctx))
		return
	}
	var readErr error
	if o.moments, readErr = l.trace.read(); readErr != nil {
		o.report(harness, "%v", readErr)
	}
	if o.ledger, readErr = ledger.Read(l.ledger, o.run.ID); readErr != nil {
		o.report(harness, "%v", readErr)
	}
	o.measure()
	if err != nil {
		c := stuck
		if errors.Is(err, errLost) {
			c = lost
		}
		o.report(c, "%v; the run is %s", err, status)
	}
	l.inspect(ctx, o, status)
}

// inspect checks everything that a run has left at its end.
func (l *lane) inspect(ctx context.Context, o *outcome, status string) {
	if o.trial.Kind.isSpec() {
		l.inspectSpec(ctx, o, status)
		return
	}
	want := "succeeded"
	if o.failAt() != "" {
		want = "rolled_back"
	}
	if status != want {
		o.report(wrong, "the run is %s, want %s by its plan", status, want)
	}
	for _, check := range []func(context.Context, *outcome) error{l.judgeStates, l.judgeResults, l.judgeArtifacts, l.judgeTables, l.judgeTrail, l.judgeLost} {
		if err := check(ctx, o); err != nil {
			o.report(harness, "%v", err)
		}
	}
	if err := l.judgeReal(ctx, o, status); err != nil {
		o.report(harness, "%v", err)
	}
	o.judgeLedger()
	o.judgeRollback(status)
	o.judgeProcesses(filepath.Base(l.config.programs.ledger))
}

// judgeAll checks each run of the trial, and that they took turns.
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
		o.report(harness, "%v", err)
	}
	if len(o.others) == 0 {
		return
	}
	all, err := ledger.Read(l.ledger, "")
	if err != nil {
		o.report(harness, "%v", err)
	}
	o.judgeTurns(slices.DeleteFunc(all, func(r ledger.Record) bool {
		return r.Run != o.run.ID && !slices.ContainsFunc(o.others, func(other run) bool { return other.ID == r.Run })
	}))
}

// hasUnacked says that a living worker has a delivery that it has not settled.
func (l *lane) hasUnacked() bool {
	alive := map[int]bool{}
	for _, w := range l.workers {
		if w.alive() {
			alive[w.pid()] = true
		}
	}
	return unackedTasks(l.trace.moments, alive) > 0
}

// wantState returns the state that a step of the run must have at the end.
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
			o.report(wrong, "step %s is %s, want %s", step, state, want)
		}
		return nil
	})
	if n != len(steps) {
		o.report(wrong, "the run has %d states, want %d", n, len(steps))
	}
	return err
}

// judgeResults checks all results of tasks whose arguments name the run.
func (l *lane) judgeResults(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `
		SELECT task_id, COALESCE(status, ''), COALESCE(convert_from(args, 'UTF8'), '') FROM celery_taskmeta
		WHERE position($1::bytea IN args) > 0`, []byte(o.run.ID))
	if err != nil {
		return err
	}
	found := map[string]string{}
	if o.trial.Gate == preVerify {
		// The steps of one chain end with those of another: see judgeStates.
		rows.Close()
		return rows.Err()
	}
	var id, status, args string
	_, err = pgx.ForEachRow(rows, []any{&id, &status, &args}, func() error {
		found[id] = status
		if strings.Contains(args, `"rollback"`) {
			if status != "SUCCESS" {
				o.report(wrong, "the result of rollback %s is %s", id, status)
			} else if o.failAt() == "" && o.run.before == nil {
				o.report(wrong, "rollback %s has a result, but the run has succeeded", id)
			}
			return nil
		}
		known := false
		for r := &o.run; r != nil; r = r.before {
			for _, tasks := range []map[string]string{r.Tasks, r.earlier} {
				for _, task := range tasks {
					known = known || task == id
				}
			}
		}
		if !known {
			o.report(doubled, "task %s %s was never submitted and has the result %s", id, args, status)
		}
		return nil
	})
	failAt := o.failAt()
	for _, step := range steps[:5] {
		want := "SUCCESS"
		if failAt != "" && slices.Index(steps, step) >= slices.Index(steps, failAt) {
			want = "FAILURE"
			if o.lost && o.trial.LostStep != "" {
				want = "" // the message was lost, so there is no result
			}
		}
		if got := found[o.run.Tasks[step]]; got != want {
			o.report(wrong, "the result of %s is %q, want %s", step, got, want)
		}
	}
	return err
}

// judgeArtifacts checks that the registered artifacts are those on disk.
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
			o.report(wrong, "artifact %s is registered: %v", path, err)
		case hex.EncodeToString(sum[:]) != checksum || int64(len(text)) != size:
			o.report(wrong, "artifact %s differs from its registration: %d bytes, registered are %d", path, len(text), size)
		}
		return nil
	})
	for _, step := range steps {
		if strings.HasPrefix(o.wantState(step), "succeeded") && !slices.Contains(paths, step+".log") {
			o.report(wrong, "step %s has no artifact %s.log", step, step)
		}
	}
	// No other file may remain.
	files, readErr := os.ReadDir(filepath.Join(l.artifacts, o.run.ID))
	if readErr != nil {
		return readErr
	}
	for _, file := range files {
		if !slices.Contains(paths, file.Name()) && !o.unregistered(file.Name()) {
			o.report(left, "file %s in the run's directory is not registered", file.Name())
		}
	}
	return err
}

// unregistered says that a file may exist without a row. A killed worker leaves its
// temporary files. A patch step whose workers were all killed leaves their diff, and
// a lost step also its log. A retried run keeps the files of its first attempt.
func (o *outcome) unregistered(name string) bool {
	step, _, _ := strings.Cut(name, ".")
	return strings.HasPrefix(name, ".") && len(o.hits) > 0 ||
		o.cutShort(step) && (name == "patch.diff" || o.lost && name == step+".log") || o.run.before != nil
}

// judgeTables checks that no claim is open. A rollback during which the run is
// retried belongs to an attempt that has ended, and has no outcome.
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
		o.report(left, "claim on %s is open", claim)
		return nil
	})
	return err
}

// A trail is the audit trail of a run as it is in the database.
type trail struct {
	records []audit.Record
	text    []byte
	report  audit.Report
}

// readTrail reads and checks the audit trail of a run; false if there is none.
func (l *lane) readTrail(ctx context.Context, id string) (t trail, found bool, err error) {
	head := audit.Head{}
	err = pgx.BeginTxFunc(ctx, l.pool, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `SELECT length, head FROM mm_orchestrator.audit_heads WHERE run_id = $1`, id).Scan(&head.Length, &head.Hash)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		found = true
		rows, err := tx.Query(ctx, `SELECT seq, record, hash FROM mm_orchestrator.audit WHERE run_id = $1 ORDER BY seq`, id)
		if err != nil {
			return err
		}
		v := audit.NewVerifier(id, audit.Start(), &head)
		var text string
		var e audit.Entry
		_, err = pgx.ForEachRow(rows, []any{&e.Seq, &text, &e.Hash}, func() error {
			e.Text = []byte(text)
			v.Add(e)
			t.text = append(append(t.text, text...), '\n')
			if r, err := audit.Decode(e.Text); err == nil {
				t.records = append(t.records, r)
			}
			return nil
		})
		t.report = v.End()
		return err
	})
	return t, found, err
}

// commandOf is a command of a step.
type commandOf struct {
	step   string
	number int
}

// announced counts the records of commands that were about to start.
func (t trail) announced() map[commandOf]int {
	n := map[commandOf]int{}
	for _, r := range t.records {
		if r.Kind == audit.CommandStarted {
			n[commandOf{r.Step, r.Command.Number}]++
		}
	}
	return n
}

// judgeAnnounced checks that a trail announces every command that the ledger has.
func (o *outcome) judgeAnnounced(t trail, records []ledger.Record, when string) {
	announced, started := t.announced(), map[commandOf]int{}
	for _, r := range records {
		if r.Event == ledger.Start {
			started[commandOf{r.Step, r.Command}]++
		}
	}
	for c, n := range started {
		if announced[c] < n {
			o.report(wrong, "%s, the audit trail announces command %d of %s %d times, and it ran %d times", when, c.number, c.step, announced[c], n)
		}
	}
}

// judgeTrail checks that the run's audit trail is whole, that it announces every command
// which has started, and that it ends with the run. A Python worker keeps no trail.
func (l *lane) judgeTrail(ctx context.Context, o *outcome) error {
	t, found, err := l.readTrail(ctx, o.run.ID)
	switch {
	case err != nil:
		return err
	case !found && o.trial.Kind == Mixed:
		return nil
	case !found:
		o.report(wrong, "the run has no audit trail")
		return nil
	}
	for _, finding := range t.report.Findings {
		o.report(wrong, "audit trail: %s", finding)
	}
	if o.trial.Kind == Mixed {
		return nil
	}
	if last := t.records[len(t.records)-1]; last.Kind != audit.RunEnded {
		o.report(wrong, "audit trail ends with %s of %s, not with the end of the run", last.Kind, last.Step)
	}
	o.judgeAnnounced(t, o.ledger, "at the end")
	return nil
}

// judgeLeft checks that nothing is left in the tables after all runs have ended.
func (l *lane) judgeLeft(ctx context.Context, o *outcome) error {
	for what, count := range map[string]string{
		"parked messages":                   `SELECT count(*) FROM mm_orchestrator.parked`,
		"workspaces that a run still holds": `SELECT count(*) FROM mm_orchestrator.holds WHERE run_id IS NOT NULL`,
		"revocations":                       `SELECT count(*) FROM mm_orchestrator.revocations`,
	} {
		var n int
		if err := l.pool.QueryRow(ctx, count).Scan(&n); err != nil {
			return err
		}
		if n > 0 {
			o.report(left, "%d %s", n, what)
		}
	}
	return nil
}

// judgeReturned checks that the last worker which stops in order leaves no message
// parked, where only workers of this program look for it.
func (l *lane) judgeReturned(ctx context.Context, o *outcome) error {
	if slices.ContainsFunc(l.workers, (*workerProcess).alive) {
		return nil
	}
	var parked int
	err := l.pool.QueryRow(ctx, `SELECT count(*) FROM mm_orchestrator.parked`).Scan(&parked)
	if err == nil && parked > 0 {
		o.report(left, "%d messages are still parked when the last worker has stopped: a Python worker would never find them", parked)
	}
	return err
}

// judgeTurns checks that the effects of the trial's runs do not interleave: a run
// that has begun to change the workspace has it until its end.
func (o *outcome) judgeTurns(all []ledger.Record) {
	var holder string
	over := map[string]bool{}
	for _, r := range all {
		if r.Run == holder {
			continue
		}
		if over[r.Run] {
			o.report(doubled, "the commands of run %s and run %s interleave", r.Run, holder)
			return
		}
		if holder != "" {
			over[holder] = true
		}
		holder = r.Run
	}
}

// judgeLedger checks the effects, command by command.
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
			o.report(doubled, "command %d of %s ran beside another one", number, step)
		}
	}
	want, excused := o.wantCommand(step, number), o.excuses(step, number)
	switch {
	case starts > want+excused:
		o.report(doubled, "command %d of %s ran %d times, want %d, and after kills at most %d more", number, step, starts, want, excused)
	case starts < want:
		o.report(wrong, "command %d of %s ran %d times, want %d", number, step, starts, want)
	case starts > want:
		o.repeated += starts - want
		o.late += max(0, ends-want)
	case o.trial.Variant == retriedEarly && ends < starts-excused:
		o.report(wrong, "command %d of %s did not reach its end, %d of %d times", number, step, starts-ends, starts)
	}
}

// wantCommand returns how often a command has to run if no worker ends while it
// runs.
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

// runs returns how often a command of a step runs if the run fails at failAt.
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

// judgeOrderOf checks that a step's commands ran in their order, each after the end
// of the one before.
func (o *outcome) judgeOrderOf(step string) {
	last, over := 0, true
	for _, r := range o.ledger {
		switch {
		case r.Step != step:
		case r.Event == ledger.End:
			over = over || r.Command == last
		case r.Event == ledger.Start:
			// A command that has run before is not too early. judgeCommand checks
			// whether it may run again.
			if r.Command > last && (r.Command > last+1 || !over) {
				o.report(wrong, "command %d of %s began before the end of the one before it", r.Command, step)
			}
			last, over = r.Command, false
		}
	}
}

// recorded says that the end of a step's command was recorded.
func (o *outcome) recorded(step string, number int) bool {
	return slices.ContainsFunc(o.moments, func(m moment) bool {
		return m.Point == faultpoint.CommandRecorded && m.about(step) && m.about(commandSubject(number)) && m.about(o.run.ID)
	})
}

// judgeProcesses checks that no command outlives its step.
func (o *outcome) judgeProcesses(program string) {
	for _, r := range o.ledger {
		if r.Event != ledger.Start || syscall.Kill(r.PID, 0) != nil {
			continue
		}
		// The pid may belong to another process by now.
		if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", r.PID)); err == nil && strings.Contains(string(name), program) && strings.Contains(string(name), o.run.ID) {
			o.report(left, "the command of %s (pid %d) still runs", r.Step, r.PID)
		}
	}
}

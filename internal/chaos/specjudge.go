package chaos

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// inspectSpec checks everything that a run of the Spec workflow has left at its end.
func (l *lane) inspectSpec(ctx context.Context, o *outcome, status string) {
	if status != "succeeded" {
		o.report(wrong, "the run is %s, want succeeded: %s", status, l.specFailure(ctx, o.run))
	}
	for _, check := range []func(context.Context, *outcome) error{l.judgeSpecRows, l.judgeSpecResults, l.judgeSpecFiles} {
		if err := check(ctx, o); err != nil {
			o.report(harness, "%v", err)
		}
	}
	o.judgeSpecStages()
	o.judgeCodexRuns()
	o.judgeProcesses(filepath.Base(l.config.programs.ledger))
}

// specFailure is what the rows of a run say about its failure.
func (l *lane) specFailure(ctx context.Context, r run) string {
	rows, _ := l.rows(ctx, `SELECT task_name || ' ' || status || ': ' || COALESCE(message, '') FROM spec_workflow_task_states WHERE workflow_run_id = $1 ORDER BY created_at`, r.ID)
	return strings.Join(rows, "; ")
}

// judgeSpecRows checks that each task has one row and one claim, which has ended.
func (l *lane) judgeSpecRows(ctx context.Context, o *outcome) error {
	var phase, branch, url string
	if err := l.pool.QueryRow(ctx, `SELECT phase::text, COALESCE(branch_name, ''), COALESCE(pr_url, '') FROM spec_workflow_runs WHERE id = $1`, o.run.ID).Scan(&phase, &branch, &url); err != nil {
		return err
	}
	if phase != "complete" || branch == "" || url == "" {
		o.report(wrong, "the run is in phase %s, with the branch %q and the pull request %q", phase, branch, url)
	}
	states, err := l.rows(ctx, `SELECT task_name || ' ' || attempt || ' ' || status FROM spec_workflow_task_states WHERE workflow_run_id = $1 ORDER BY task_name`, o.run.ID)
	if err != nil {
		return err
	}
	if want := []string{publish + " 1 succeeded", discover + " 1 succeeded", submit + " 1 succeeded"}; !slices.Equal(states, want) {
		o.report(wrong, "the rows of the tasks are %q, want %q", states, want)
	}
	rows, err := l.pool.Query(ctx, `SELECT task, task_id, holder IS NOT NULL OR outcome IS NULL, starts FROM mm_orchestrator.spec_claims WHERE run_id = $1`, o.run.ID)
	if err != nil {
		return err
	}
	claims := 0
	var task, id string
	var open bool
	var starts int
	_, err = pgx.ForEachRow(rows, []any{&task, &id, &open, &starts}, func() error {
		claims++
		if open {
			o.report(left, "the claim on %s is open", task)
		}
		if id != o.run.Tasks[task] {
			o.report(doubled, "task %s has a claim with the id %s, which was never submitted", task, id)
		}
		if most := 1 + o.interrupted(task); starts > most {
			o.report(doubled, "task %s was started %d times, and at most %d of them were interrupted", task, starts, most-1)
		}
		return nil
	})
	if claims != len(moonmind.SpecTasks) {
		o.report(wrong, "the run has %d claims, want %d", claims, len(moonmind.SpecTasks))
	}
	return err
}

// interrupted counts the faults that may have ended a start of a task.
func (o *outcome) interrupted(task string) int {
	n := 0
	for _, h := range o.hits {
		if h.stage.Do == kill || h.stage.Do == terminate {
			n++
		}
	}
	// An answer that is lost with its connection, or a session that is lost with a claim.
	n += len(o.outages)
	for _, m := range o.moments {
		if m.Point == faultpoint.ReleaseBefore && m.about(task) && m.about(o.run.ID) {
			n++
		}
	}
	return n
}

// judgeSpecResults checks that exactly the tasks of the chain have results.
func (l *lane) judgeSpecResults(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `SELECT task_id, COALESCE(status, '') FROM celery_taskmeta WHERE position($1::bytea IN args) > 0 OR task_id = ANY($2)`,
		[]byte(o.run.ID), []string{o.run.Tasks[discover], o.run.Tasks[submit], o.run.Tasks[publish]})
	if err != nil {
		return err
	}
	found := map[string]string{}
	var id, status string
	if _, err := pgx.ForEachRow(rows, []any{&id, &status}, func() error {
		found[id] = status
		return nil
	}); err != nil {
		return err
	}
	for _, task := range moonmind.SpecTasks {
		id := o.run.Tasks[task]
		if found[id] != "SUCCESS" {
			o.report(wrong, "the result of %s is %q, want SUCCESS", task, found[id])
		}
		delete(found, id)
	}
	for id, status := range found {
		o.report(doubled, "task %s was never submitted and has the result %s", id, status)
	}
	return nil
}

// judgeSpecFiles checks that the rows of artifacts are the files of the run.
func (l *lane) judgeSpecFiles(ctx context.Context, o *outcome) error {
	rows, err := l.pool.Query(ctx, `SELECT artifact_type::text, path, COALESCE(digest, ''), COALESCE(size_bytes, -1) FROM workflow_artifacts WHERE workflow_run_id = $1`, o.run.ID)
	if err != nil {
		return err
	}
	types, paths := map[string]int{}, map[string]bool{}
	var kind, path, digest string
	var size int64
	if _, err := pgx.ForEachRow(rows, []any{&kind, &path, &digest, &size}, func() error {
		types[kind]++
		path = filepath.Join(l.spec.root, path)
		paths[path] = true
		text, err := os.ReadFile(path)
		sum := sha256.Sum256(text)
		switch {
		case err != nil:
			o.report(wrong, "artifact %s is registered: %v", path, err)
		case "sha256:"+hex.EncodeToString(sum[:]) != digest || int64(len(text)) != size:
			o.report(wrong, "artifact %s differs from its registration: %d bytes, registered are %d", path, len(text), size)
		}
		return nil
	}); err != nil {
		return err
	}
	for _, kind := range []string{"codex_logs", "codex_patch", "apply_output", "gh_pr_response", "pr_payload"} {
		if types[kind] == 0 {
			o.report(wrong, "the run has no artifact of the type %s", kind)
		}
	}
	return filepath.WalkDir(l.specDirectory(o.run), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !paths[path] && len(o.hits) == 0 {
			o.report(left, "file %s in the run's directory is not registered", path)
		}
		return err
	})
}

// A finished stage and what must not follow it, in any process.
var afterStages = []struct {
	task     string
	finished faultpoint.Point
	never    []faultpoint.Point
}{
	{submit, faultpoint.CodexRecorded, []faultpoint.Point{faultpoint.CodexCloneBefore, faultpoint.CodexStarting}},
	{publish, faultpoint.PublishPushRecorded, []faultpoint.Point{faultpoint.PublishFetching, faultpoint.PublishPushing}},
	{publish, faultpoint.PublishOpenRecorded, []faultpoint.Point{faultpoint.PublishFetching, faultpoint.PublishPushing, faultpoint.PublishOpening}},
	{discover, faultpoint.FinishAfter, []faultpoint.Point{faultpoint.StepBegun}},
	{submit, faultpoint.FinishAfter, []faultpoint.Point{faultpoint.StepBegun}},
	{publish, faultpoint.FinishAfter, []faultpoint.Point{faultpoint.StepBegun}},
}

// judgeSpecStages checks that a task goes on after the last stage that was finished.
func (o *outcome) judgeSpecStages() {
	for _, s := range afterStages {
		finished := false
		for _, m := range o.moments {
			if !m.about(o.run.ID) || !m.about(s.task) {
				continue
			}
			if finished && slices.Contains(s.never, m.Point) {
				o.report(doubled, "task %s reached %s after %s: a finished stage was repeated", s.task, m.Point, s.finished)
				break
			}
			finished = finished || m.Point == s.finished
		}
	}
}

// judgeCodexRuns checks that Codex ran once for each time that it was interrupted, and
// once more.
func (o *outcome) judgeCodexRuns() {
	if o.trial.Case == simulated {
		return
	}
	starts, ends := 0, 0
	for _, r := range o.ledger {
		if r.Step != submit {
			continue
		}
		switch r.Event {
		case ledger.Start:
			starts++
		case ledger.End:
			ends++
		case ledger.Overlap:
			o.report(doubled, "codex ran beside another one")
		}
	}
	excused := 0
	for _, h := range o.hits {
		if (h.stage.Do == kill || h.stage.Do == terminate) && o.codexOpen(h) {
			excused++
		}
	}
	switch {
	case starts > 1+excused:
		o.report(doubled, "codex ran %d times, and a fault fell into %d of them", starts, excused)
	case starts == 0:
		o.report(wrong, "codex never ran")
	case starts > 1:
		o.repeated += starts - 1
		o.late += max(0, ends-1)
	}
}

// codexOpen says that the process of a hit had started codex and not recorded its end.
func (o *outcome) codexOpen(h hit) bool {
	open := false
	for _, m := range o.moments {
		if m.PID != h.pid || !m.about(o.run.ID) || h.stage.Do == kill && m.At > h.at.UnixNano() {
			continue
		}
		switch m.Point {
		case faultpoint.CodexStarting:
			open = true
		case faultpoint.CodexRecorded:
			open = false
		}
	}
	return open
}

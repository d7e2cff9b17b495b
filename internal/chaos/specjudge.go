package chaos

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// inspectSpec checks everything that a run of the Spec workflow has left at its end.
func (l *lane) inspectSpec(ctx context.Context, o *outcome, status string) {
	if status != "succeeded" {
		o.report(wrong, "the run is %s, want succeeded: %s", status, l.specFailure(ctx, o.run))
	}
	for _, check := range []func(context.Context, *outcome) error{l.judgeSpecRows, l.judgeSpecResults, l.judgeSpecFiles, l.judgePublished, l.judgeSecrets} {
		if err := check(ctx, o); err != nil {
			o.report(harness, "%v", err)
		}
	}
	if l.spec.faults != nil {
		if o.serviceFaults = l.spec.faults(); o.serviceFaults == 0 {
			o.missed++
		}
	}
	if err := l.judgeCloud(o); err != nil {
		o.report(harness, "%v", err)
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

// judgeSpecRows checks that each task has one row and one claim for each attempt, which
// has ended.
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
	var want, wantClaims []string
	for _, row := range o.run.wantRows() {
		want = append(want, fmt.Sprintf("%s %d %s", row.task, row.attempt, row.status))
		if row.status != "skipped" {
			wantClaims = append(wantClaims, fmt.Sprintf("%s %d", row.task, row.attempt))
		}
	}
	slices.Sort(states)
	slices.Sort(want)
	if !slices.Equal(states, want) {
		o.report(wrong, "the rows of the tasks are %q, want %q", states, want)
	}
	rows, err := l.pool.Query(ctx, `SELECT task, task_id, attempt, holder IS NOT NULL OR outcome IS NULL, starts FROM mm_orchestrator.spec_claims WHERE run_id = $1`, o.run.ID)
	if err != nil {
		return err
	}
	var claims []string
	var task, id string
	var open bool
	var attempt, starts int
	_, err = pgx.ForEachRow(rows, []any{&task, &id, &attempt, &open, &starts}, func() error {
		claims = append(claims, fmt.Sprintf("%s %d", task, attempt))
		if open {
			o.report(left, "the claim on %s is open", task)
		}
		// The program draws the ids of a retry.
		if (id == o.run.Tasks[task]) != (attempt == 1) {
			o.report(doubled, "attempt %d of task %s has a claim with the id %s, which was never submitted", attempt, task, id)
		}
		if most := 1 + o.interrupted(task); starts > most {
			o.report(doubled, "task %s was started %d times, and at most %d of them were interrupted", task, starts, most-1)
		}
		return nil
	})
	slices.Sort(claims)
	slices.Sort(wantClaims)
	if !slices.Equal(claims, wantClaims) {
		o.report(wrong, "the run has the claims %q, want %q", claims, wantClaims)
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
	for _, row := range o.run.wantRows() {
		id := o.run.Tasks[row.task]
		if row.attempt > 1 {
			ids, err := l.rows(ctx, `SELECT task_id FROM mm_orchestrator.spec_claims WHERE run_id = $1 AND task = $2 AND attempt = $3`, o.run.ID, row.task, row.attempt)
			if err != nil {
				return err
			}
			id = strings.Join(ids, " and ")
		}
		want := "FAILURE"
		if row.status == "succeeded" {
			want = "SUCCESS"
		}
		if found[id] != want {
			o.report(wrong, "the result of attempt %d of %s is %q, want %s", row.attempt, row.task, found[id], want)
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
		if !filepath.IsAbs(path) {
			path = filepath.Join(l.spec.root, path)
		}
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
		finished, retried := false, false
		for _, m := range o.moments {
			if !m.about(o.run.ID) || !m.about(s.task) {
				continue
			}
			if again := o.run.again(s.task) && m.At > o.run.retried.UnixNano(); again && !retried {
				finished, retried = false, true // another attempt
			}
			if finished && slices.Contains(s.never, m.Point) {
				o.report(doubled, "task %s reached %s after %s: a finished stage was repeated", s.task, m.Point, s.finished)
				break
			}
			finished = finished || m.Point == s.finished
		}
	}
}

// judgeCodexRuns checks that Codex ran once for each attempt, and once more for each time
// that it was interrupted.
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
	for _, m := range o.moments {
		// A worker that is not alone ends codex when it has neither server: another one may
		// have the task.
		if m.Point == faultpoint.Isolated && m.about(o.run.ID) && o.codexOpen(hit{pid: m.PID, at: time.Unix(0, m.At), stage: stage{Do: kill}}) {
			excused++
		}
	}
	want := o.wantCodexRuns()
	switch {
	case starts > want+excused:
		o.report(doubled, "codex ran %d times, want %d, and a fault fell into %d of them", starts, want, excused)
	case starts < want:
		o.report(wrong, "codex ran %d times, want %d", starts, want)
	case starts > want:
		o.repeated += starts - want
		o.late += max(0, ends-want)
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

// judgePublished checks that the run has left one branch with one commit, and one pull
// request, and no clone.
func (l *lane) judgePublished(ctx context.Context, o *outcome) error {
	if o.trial.Case == simulated {
		return nil
	}
	server, name := l.spec.github, repositoryOf(o.run)
	var branch, url string
	if err := l.pool.QueryRow(ctx, `SELECT COALESCE(branch_name, ''), COALESCE(pr_url, '') FROM spec_workflow_runs WHERE id = $1`, o.run.ID).Scan(&branch, &url); err != nil {
		return err
	}
	refs, err := server.Git(ctx, name, "for-each-ref", "--format=%(refname:lstrip=2)", "refs/heads")
	if err != nil {
		return err
	}
	others := slices.DeleteFunc(strings.Fields(refs), func(ref string) bool { return ref == "main" })
	if len(others) != 1 || others[0] != branch {
		o.report(doubled, "the repository has the branches %q besides main, want %q", others, branch)
		return nil
	}
	commits, err := server.Git(ctx, name, "rev-list", "main.."+branch)
	if err != nil {
		return err
	}
	if n := len(strings.Fields(commits)); n != 1 {
		o.report(doubled, "the branch has %d commits, want 1", n)
	}
	changed, err := server.Git(ctx, name, "diff", "--name-only", "main", branch)
	if err != nil {
		return err
	}
	text, err := server.Read(ctx, name, branch, changedFile(o.run.ID))
	if err != nil || text != strings.TrimSpace(changedText(o.run.ID)) || changed != changedFile(o.run.ID) {
		o.report(wrong, "the branch changes %q, and %s is %q (%v)", changed, changedFile(o.run.ID), text, err)
	}
	pulls := server.Pulls(name)
	if len(pulls) != 1 {
		o.report(doubled, "the repository has %d pull requests, want 1", len(pulls))
	}
	for _, p := range pulls {
		if p.Head != branch || p.Base != "main" || p.State != "open" || !strings.HasSuffix(url, fmt.Sprintf("/%s/pull/%d", name, p.Number)) {
			o.report(wrong, "pull request %d is %s, of %s into %s; the run has %s", p.Number, p.State, p.Head, p.Base, url)
		}
	}
	if found, _ := filepath.Glob(filepath.Join(l.spec.clones, o.run.ID, "*", "*")); len(found) > 0 {
		o.report(left, "clones of the run: %q", found)
	}
	return nil
}

// judgeSecrets looks for the credentials wherever the run may have left them.
func (l *lane) judgeSecrets(ctx context.Context, o *outcome) error {
	if o.trial.Case == simulated {
		return nil
	}
	look := func(where, text string) {
		if name, piece := l.spec.secrets.Find(text); name != "" {
			o.report(leaked, "%s has a part of the %s: %q", where, name, piece)
		}
	}
	for table, query := range map[string]string{
		"spec_workflow_runs":         `SELECT to_jsonb(t)::text FROM spec_workflow_runs t WHERE id = $1`,
		"spec_workflow_task_states":  `SELECT to_jsonb(t)::text FROM spec_workflow_task_states t WHERE workflow_run_id = $1`,
		"workflow_artifacts":         `SELECT to_jsonb(t)::text FROM workflow_artifacts t WHERE workflow_run_id = $1`,
		"workflow_credential_audits": `SELECT to_jsonb(t)::text FROM workflow_credential_audits t WHERE workflow_run_id = $1`,
		"spec_claims":                `SELECT to_jsonb(t)::text FROM mm_orchestrator.spec_claims t WHERE run_id = $1`,
		"celery_taskmeta":            `SELECT (to_jsonb(t) - 'result' - 'args' - 'kwargs')::text || encode(COALESCE(result, ''), 'escape') || encode(COALESCE(args, ''), 'escape') FROM celery_taskmeta t WHERE position($1::text::bytea IN args) > 0`,
	} {
		rows, err := l.rows(ctx, query, o.run.ID)
		if err != nil {
			return err
		}
		look("table "+table, strings.Join(rows, "\n"))
	}
	files := []string{l.spec.calls}
	for _, w := range l.workers {
		files = append(files, w.logPath())
	}
	if err := filepath.WalkDir(l.specDirectory(o.run), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	}); err != nil {
		return err
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		look(path, string(text[max(0, len(text)-1<<20):]))
	}
	name := repositoryOf(o.run)
	history, err := l.spec.github.Git(ctx, name, "log", "--all", "--patch")
	if err != nil {
		return err
	}
	look("the repository", history)
	for _, p := range l.spec.github.Pulls(name) {
		look("the pull request", p.Title+"\n"+p.Body)
	}
	for _, r := range l.spec.github.Requests(o.run.ID) {
		look("a request's address or body", r.Path+"\n"+string(r.Body))
	}
	return nil
}

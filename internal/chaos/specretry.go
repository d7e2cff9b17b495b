package chaos

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// A specFailure makes a task of the first attempt fail.
type specFailure struct {
	name string
	// task fails, and from is the task from which the retry goes on.
	task, from string
	// codex says that Codex has run in the first attempt.
	codex bool
	// cause makes it fail, before the run is submitted. cure removes that, nil if it ends by
	// itself.
	cause func(*lane, run) error
	cure  func(*lane) error
}

var specFailures = []specFailure{
	{"the feature has no tasks.md", discover, discover, false, func(l *lane, _ run) error {
		return os.Remove(filepath.Join(l.spec.root, "specs", feature(l.trial), "tasks.md"))
	}, (*lane).writeTasks},
	{"the token is revoked", submit, submit, false, func(l *lane, _ run) error {
		for _, value := range l.spec.credentials {
			l.spec.github.RevokeToken(value)
		}
		return nil
	}, func(l *lane) error { return l.spec.rotateToken() }},
	{"codex prints garbage", submit, submit, true, (*lane).garble, (*lane).ungarble},
	{"codex prints garbage, and the run begins again", submit, discover, true, (*lane).garble, (*lane).ungarble},
	{"the push is refused", publish, publish, true, func(l *lane, r run) error {
		l.spec.github.Fail("POST /"+repositoryOf(r)+".git/git-receive-pack", 1, githubtest.Text(http.StatusForbidden, "Permission denied"))
		return nil
	}, nil},
	{"the pull request is refused", publish, publish, true, (*lane).refusePull, nil},
	{"the pull request is refused, and the run begins again", publish, discover, true, (*lane).refusePull, nil},
}

func (l *lane) garble(run) error { return os.WriteFile(l.spec.garbage, nil, 0o644) }

func (l *lane) ungarble() error { return os.Remove(l.spec.garbage) }

func (l *lane) refusePull(r run) error {
	l.spec.github.Fail("POST /api/v3/repos/"+repositoryOf(r)+"/pulls", 1, githubtest.Status(http.StatusForbidden, "Resource not accessible by personal access token"))
	return nil
}

func findFailure(name string) (specFailure, bool) {
	i := slices.IndexFunc(specFailures, func(f specFailure) bool { return f.name == name })
	if i < 0 {
		return specFailure{}, false
	}
	return specFailures[i], true
}

// retrySpec waits for the failure of the run, removes its cause, and retries the run with
// the program's own command.
func (l *lane) retrySpec(ctx context.Context, o *outcome, arm func() error) (bool, error) {
	if err := l.restartDead(o.trial); err != nil {
		return false, err
	}
	f, _ := findFailure(o.trial.Failure)
	status := ""
	if err := l.untilOfRun(ctx, "the first attempt to fail", func() (ended bool, err error) {
		status, ended, err = l.status(ctx, o.run.ID)
		return ended, err
	}); err != nil {
		o.report(stuck, "%v", err)
		return false, nil
	}
	if status != "failed" {
		o.report(wrong, "the first attempt has %s, although %s", status, f.name)
		return false, nil
	}
	// The message of the failed task is acknowledged after that.
	if _, err := l.quiet(ctx); err != nil {
		o.report(stuck, "after the first attempt: %v", err)
		return false, nil
	}
	if f.cure != nil {
		if err := f.cure(l); err != nil {
			return false, err
		}
	}
	o.run.from, o.run.retried = f.from, time.Now()
	if err := arm(); err != nil {
		return false, err
	}
	args := []string{"spec", "retry", o.run.ID}
	if f.from == discover && f.task != discover {
		args = append(args, "--from-discovery")
	}
	return true, l.specCommand(ctx, args...)
}

// specCommand runs a command of the program with the settings of the trial's workers, and
// without their faults.
func (l *lane) specCommand(ctx context.Context, args ...string) error {
	w := *l.workers[0]
	w.environ = append(slices.Clip(w.environ), w.settings...)
	w.environ = slices.DeleteFunc(w.environ, func(v string) bool { return strings.HasPrefix(v, "MM_CHAOS_DIR=") })
	return w.run(ctx, args...)
}

// again says that the retry of the run, if there is one, has the task.
func (r run) again(task string) bool {
	return r.from != "" && slices.Index(moonmind.SpecTasks, task) >= slices.Index(moonmind.SpecTasks, r.from)
}

// A specRow is a task of an attempt as it must be at the end.
type specRow struct {
	task    string
	attempt int
	status  string
}

// wantRows are the rows that the run must have.
func (r run) wantRows() (all []specRow) {
	for i, task := range moonmind.SpecTasks {
		failed := slices.Index(moonmind.SpecTasks, r.failed)
		switch {
		case r.from == "" || i < failed:
			all = append(all, specRow{task, 1, "succeeded"})
		case i == failed:
			all = append(all, specRow{task, 1, "failed"})
		default:
			all = append(all, specRow{task, 1, "skipped"})
		}
		if r.again(task) {
			all = append(all, specRow{task, 2, "succeeded"})
		}
	}
	return all
}

// wantCodexRuns is how often Codex must have run if no fault fell into it.
func (o *outcome) wantCodexRuns() int {
	f, found := findFailure(o.trial.Failure)
	n := 0
	if !found || f.codex {
		n++
	}
	if o.run.from != "" && o.run.from != publish {
		n++
	}
	return n
}

// What the report of trials of the Spec workflow counts.
const (
	requestsWithFault = "requests to GitHub or the git server with a fault"
	messagesTwice     = "messages delivered twice"
	retriedRuns       = "failed runs that were retried"
)

// specReport are the names of its rows in their order.
var specReport = []string{"runs with " + realCodex, "runs with " + playedCodex, "runs with " + cloudCodex, "runs in test mode", retriedRuns, messagesTwice, requestsWithFault}

// addSpec adds a trial of the Spec workflow to the report.
func (r *Report) addSpec(o *outcome) {
	if !o.trial.Kind.isSpec() {
		return
	}
	name := "runs with " + o.trial.Case
	if o.trial.Case == simulated {
		name = "runs in test mode"
	}
	r.specs[name]++
	r.specs[requestsWithFault] += o.serviceFaults
	if o.run.from != "" {
		r.specs[retriedRuns]++
	}
	if o.trial.Variant != "" || slices.ContainsFunc(o.hits, func(h hit) bool { return h.stage.Do == publishAgain }) {
		r.specs[messagesTwice]++
	}
}

package chaos

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

const (
	// mixedWorkers is how many workers of each kind a mixed fleet has.
	mixedWorkers = 2
	// mixedGrace is the workers' LostGrace beside Python workers: the shortest
	// that can be set.
	mixedGrace = time.Second
	// mixedLogged is the time after which a worker has certainly logged that there
	// are foreign consumers: five sweeps, and more on a busy machine.
	mixedLogged = 15 * time.Second
	// mixedCelery is the release that MoonMind is pinned to.
	mixedCelery = "5.4.0"
)

// mixed are the figures of a mixed fleet.
type mixed struct {
	runs, ended, failing int
	took                 time.Duration
	// python and ours count the steps that each kind of worker has run.
	python, ours int
	// exposed counts the steps that a Python worker ran for longer than LostGrace in
	// a run that a worker of this program had begun. A worker that ignored Python
	// workers would consider such a run lost.
	exposed int
	// half is the time until half of the runs had ended.
	half time.Duration
	// logged is how many of our workers have logged that lost runs are not looked
	// for, at most once for each start of the Python workers.
	logged int
}

func (m *mixed) print(w io.Writer) {
	fmt.Fprintf(w, "%d runs, %d of them meant to fail, for %d workers of this program and %d of Celery %s on one queue: %d/%d ended in %s\n",
		m.runs, m.failing, mixedWorkers, mixedWorkers, mixedCelery, m.ended, m.runs, m.took.Round(time.Millisecond))
	fmt.Fprintf(w, "  steps: %d by Python, %d by this program; %d by Python for longer than LostGrace (%s) in runs that this program had begun\n",
		m.python, m.ours, m.exposed, mixedGrace)
	fmt.Fprintf(w, "  workers that logged that lost runs are not looked for, and not at every sweep: %d/%d\n", m.logged, mixedWorkers)
}

//go:embed testdata/python_worker.py
var pythonWorker []byte

// A pythonProcess is a Celery worker of Python.
type pythonProcess struct {
	name    string
	log     *os.File
	command *exec.Cmd
	exited  chan struct{}
}

// startPython starts a Celery worker on the lane's queue.
func (l *lane) startPython(script, name string) (*pythonProcess, error) {
	root := os.Getenv(devenv.EnvPythonRoot)
	if root == "" {
		return nil, fmt.Errorf("%s is not set: a mixed fleet needs Python with Celery %s; `make chaos KINDS=%s` brings it", devenv.EnvPythonRoot, mixedCelery, Mixed)
	}
	database, err := url.Parse(l.database)
	if err != nil {
		return nil, err
	}
	database.Scheme = "db+postgresql+psycopg2"
	p := &pythonProcess{name: name, exited: make(chan struct{})}
	if p.log, err = os.OpenFile(filepath.Join(l.folder, name+".log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644); err != nil {
		return nil, err
	}
	p.command = exec.Command(devenv.CeleryPython(root, mixedCelery), script, name+"@chaos")
	p.command.Dir, p.command.Stdout, p.command.Stderr = l.folder, p.log, p.log
	p.command.Env = []string{
		"PATH=" + filepath.Dir(l.config.programs.ledger) + ":" + os.Getenv("PATH"), "HOME=" + l.folder,
		"CELERY_BROKER_URL=" + l.broker, "CELERY_RESULT_BACKEND=" + database.String(),
		"PYTHONUNBUFFERED=1", "PYTHONDONTWRITEBYTECODE=1",
	}
	// It has child processes, which await ends.
	devenv.OwnGroup(p.command, syscall.SIGKILL)
	if err := p.command.Start(); err != nil {
		p.log.Close()
		return nil, err
	}
	go func() {
		_ = p.command.Wait()
		close(p.exited)
	}()
	return p, nil
}

// startPythons starts the Python workers and returns when they consume. On an error
// none of them runs.
func (l *lane) startPythons(ctx context.Context) (pythons []*pythonProcess, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, stopPythons(pythons))
		}
	}()
	// Written once: a worker that starts must not read half of it.
	script := filepath.Join(l.folder, "python_worker.py")
	if err := os.WriteFile(script, pythonWorker, 0o644); err != nil {
		return nil, err
	}
	for i := range mixedWorkers {
		p, err := l.startPython(script, fmt.Sprintf("python-%d", i+1))
		if err != nil {
			return pythons, err
		}
		pythons = append(pythons, p)
	}
	return pythons, l.awaitPython(ctx, pythons)
}

// stopPythons stops the Python workers as an operator does: each ends its step first.
func stopPythons(pythons []*pythonProcess) error {
	var failures []error
	for _, p := range pythons {
		if err := p.command.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			failures = append(failures, err)
		}
	}
	for _, p := range pythons {
		failures = append(failures, p.await())
	}
	return errors.Join(failures...)
}

// await returns when the process and its children have ended.
func (p *pythonProcess) await() error {
	defer p.log.Close()
	defer func() {
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		<-p.exited
	}()
	select {
	case <-p.exited:
		return nil
	case <-time.After(waitTimeout):
		return fmt.Errorf("worker %s of Python did not end within %s of SIGTERM: %s", p.name, waitTimeout, tail(p.log.Name(), 2000))
	}
}

// mixedShapes draws the runs for a mixed fleet. One step of each takes more than
// twice LostGrace. Every fifth run fails.
func mixedShapes(random *rand.Rand, runs int) []shape {
	shapes := make([]shape, runs)
	for i := range shapes {
		// A late step, so that a worker of ours has most likely begun the run.
		shapes[i] = shape{Milliseconds: 2800 + random.IntN(600), Long: "restart"}
		if i%5 == 4 {
			shapes[i].FailAt = []string{"build", "restart"}[random.IntN(2)]
			shapes[i].Long = shapes[i].FailAt
		}
	}
	return shapes
}

// mix publishes many runs at once for Python workers and ours on one queue, and
// checks them when all have ended. Half-way the Python workers are stopped in order
// and started again. No worker is killed: every effect must happen once, and no run
// may count as lost.
func (l *lane) mix(ctx context.Context, t Trial, o *outcome) (err error) {
	random := rand.New(rand.NewPCG(t.Seed, uint64(t.Number)))
	release, err := l.configureWorkers(t)
	if err != nil {
		return err
	}
	defer func() {
		if err := release(); err != nil {
			o.report(stuck, "%v", err)
		}
	}()
	if err := l.runWorkers(ctx, mixedWorkers); err != nil {
		return err
	}
	logged := l.foreignLogged()
	pythons, err := l.startPythons(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err := stopPythons(pythons); err != nil {
			o.report(harness, "%v", err)
		}
	}()
	runs, err := l.createAll(ctx, mixedShapes(random, l.config.Runs))
	if err != nil {
		return err
	}
	o.run = runs[0]
	figures := &mixed{runs: len(runs)}
	o.mixed = figures
	for _, r := range runs {
		if r.Shape.FailAt != "" {
			figures.failing++
		}
	}
	began := time.Now()
	if err := l.publishAll(ctx, runs); err != nil {
		return err
	}
	err = l.awaitEnds(ctx, o, began, len(runs)/2)
	figures.half = figures.took
	if err == nil {
		// They cancel their consumers first and then end their steps: meanwhile the
		// queue has only our consumers, although Python has messages.
		if err := stopPythons(pythons); err != nil {
			o.report(harness, "%v", err)
		}
		if pythons, err = l.startPythons(ctx); err != nil {
			return err
		}
		err = l.awaitEnds(ctx, o, began, len(runs))
	}
	if err != nil {
		if ctx.Err() != nil {
			return err
		}
		o.report(stuck, "%v", err)
	}
	// Python stores a result and acknowledges after its commit.
	if err := stopPythons(pythons); err != nil {
		o.report(harness, "%v", err)
	}
	pythons = nil
	if _, err := l.quiet(ctx); err != nil {
		o.report(stuck, "%v", err)
	}
	if o.moments, err = l.trace.read(); err != nil {
		return err
	}
	records, err := ledger.Read(l.ledger, "")
	if err != nil {
		return err
	}
	// Python's workers do not take turns.
	o.ledger = slices.DeleteFunc(records, func(r ledger.Record) bool { return r.Event == ledger.Overlap })
	l.judgeEach(ctx, o, runs, o.ledger)
	if err := l.judgeLeftSoon(ctx, o); err != nil {
		return err
	}
	return l.judgeMixed(ctx, o, logged)
}

// awaitPython waits until all workers consume.
func (l *lane) awaitPython(ctx context.Context, pythons []*pythonProcess) error {
	return until(ctx, "the Python workers to consume", func() (bool, error) {
		for _, p := range pythons {
			select {
			case <-p.exited:
				return false, fmt.Errorf("worker %s of Python ended: %s", p.name, tail(p.log.Name(), 2000))
			default:
			}
		}
		state, err := l.channel.QueueDeclarePassive(l.queue, true, false, false, false, nil)
		return state.Consumers == mixedWorkers+len(pythons), err
	})
}

// awaitEnds waits until the wanted number of runs have ended. It gives up when none
// has ended for waitTimeout.
func (l *lane) awaitEnds(ctx context.Context, o *outcome, began time.Time, wanted int) error {
	figures, changed := o.mixed, time.Now()
	for {
		var n int
		err := l.pool.QueryRow(ctx, `
			SELECT count(*) FROM orchestrator_runs
			WHERE completed_at IS NOT NULL AND status IN ('succeeded', 'failed', 'rolled_back') AND queued_at >= $1`, o.run.created).Scan(&n)
		if err != nil {
			return err
		}
		if n != figures.ended {
			figures.ended, changed = n, time.Now()
		}
		figures.took = time.Since(began)
		switch {
		case n >= wanted:
			return nil
		case time.Since(changed) > waitTimeout:
			return fmt.Errorf("%d of %d runs have ended, and no other one in %s", n, figures.runs, waitTimeout)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// judgeLeftSoon is judgeLeft with time for the next sweep, which frees the workspace
// of a run that Python has ended.
func (l *lane) judgeLeftSoon(ctx context.Context, o *outcome) error {
	err := until(ctx, "the workspace to be free", func() (bool, error) {
		left := &outcome{}
		err := l.judgeLeft(ctx, left)
		return len(left.problems) == 0, err
	})
	if err != nil && ctx.Err() == nil {
		return l.judgeLeft(ctx, o)
	}
	return err
}

// judgeMixed checks that the trial had steps longer than LostGrace, and that no run
// counts as lost.
func (l *lane) judgeMixed(ctx context.Context, o *outcome, logged []int) error {
	figures := o.mixed
	// Only our workers have claims.
	err := l.pool.QueryRow(ctx, `
		SELECT count(*) FILTER (WHERE c.run_id IS NULL), count(c.run_id),
		       count(*) FILTER (WHERE c.run_id IS NULL AND s.finished_at - s.started_at > make_interval(secs => $1)
		                          AND EXISTS (SELECT FROM mm_orchestrator.claims AS e WHERE e.run_id = s.orchestrator_run_id AND e.finished_at < s.started_at))
		FROM spec_workflow_task_states AS s
		JOIN orchestrator_runs AS r ON r.id = s.orchestrator_run_id
		LEFT JOIN mm_orchestrator.claims AS c ON c.run_id = s.orchestrator_run_id AND c.step = s.plan_step::text
		WHERE s.started_at IS NOT NULL AND r.queued_at >= $2`, mixedGrace.Seconds(), o.run.created).Scan(&figures.python, &figures.ours, &figures.exposed)
	if err != nil {
		return err
	}
	if figures.exposed == 0 {
		o.missed++ // possible with few runs
	}
	lostRuns, err := l.rows(ctx, `
		SELECT s.orchestrator_run_id || ': ' || s.message FROM spec_workflow_task_states AS s
		JOIN orchestrator_runs AS r ON r.id = s.orchestrator_run_id
		WHERE s.message LIKE 'run was lost%' AND r.queued_at >= $1`, o.run.created)
	if err != nil {
		return err
	}
	for _, text := range lostRuns {
		o.report(wrong, "run %s", text)
	}
	// A worker logs it after some sweeps only, and once more if the Python workers
	// took long to start again.
	least := 0
	if figures.half > mixedLogged {
		least = 1
	}
	for i, n := range l.foreignLogged() {
		if n -= logged[i]; n < least || n > 2 {
			o.report(wrong, "worker %s has logged %d times that lost runs are not looked for, want %d to 2", l.workers[i].name, n, least)
		}
		if n > 0 {
			figures.logged++
		}
	}
	return nil
}

// foreignLogged counts, for each worker, how often it has logged that lost runs are
// not looked for.
func (l *lane) foreignLogged() (times []int) {
	for _, w := range l.workers[:mixedWorkers] {
		times = append(times, strings.Count(tail(w.logPath(), 10<<20), "lost runs are not looked for"))
	}
	return times
}

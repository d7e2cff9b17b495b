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
	// mixedWorkers is how many workers of each sort a mixed fleet has.
	mixedWorkers = 2
	// mixedGrace is the workers' LostGrace beside Python workers: the shortest
	// that can be set.
	mixedGrace = time.Second
	// mixedTold is when a worker has told for certain that there are consumers
	// that are not ours: after five sweeps, and more on a busy machine.
	mixedTold = 15 * time.Second
	// mixedCelery is the release that MoonMind is pinned to.
	mixedCelery = "5.4.0"
)

// mixed are the figures of a mixed fleet.
type mixed struct {
	runs, ended, failing int
	took                 time.Duration
	// python and ours count the steps that each sort of worker has done.
	python, ours int
	// exposed counts the steps that a Python worker did for longer than the
	// grace, while a worker of this program held the run's workspace for it: a
	// worker that goes by what it sees itself would find the run lost.
	exposed int
	// half is the time until half of the runs had ended.
	half time.Duration
	// told is how many of our workers' logs say that no run is found lost, once
	// for each start of Python's workers at most.
	told int
}

func (m *mixed) print(w io.Writer) {
	fmt.Fprintf(w, "%d runs, %d of which are to fail, for %d workers of this program and %d of Celery %s on one queue: %d/%d ended in %s\n",
		m.runs, m.failing, mixedWorkers, mixedWorkers, mixedCelery, m.ended, m.runs, m.took.Round(time.Millisecond))
	fmt.Fprintf(w, "  steps: %d by Python, %d by this program; %d by Python for longer than the grace of %s while one of this program's had the workspace\n",
		m.python, m.ours, m.exposed, mixedGrace)
	fmt.Fprintf(w, "  workers that told that no run is found lost, and not at every look: %d/%d\n", m.told, mixedWorkers)
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
	// It has children, which must not outlive it.
	p.command.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
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

// startPythons starts all and returns when they consume. When it fails none is
// left.
func (l *lane) startPythons(ctx context.Context) (pythons []*pythonProcess, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, stopPythons(pythons))
		}
	}()
	// Once for all: one that starts must not find it half written.
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

// stopPythons ends all as their operator does: each ends its step first.
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

// await returns when it has ended, and leaves nothing of it.
func (p *pythonProcess) await() error {
	defer p.log.Close()
	defer func() {
		_ = syscall.Kill(-p.command.Process.Pid, syscall.SIGKILL)
		<-p.exited
	}()
	select {
	case <-p.exited:
		return nil
	case <-time.After(patience):
		return fmt.Errorf("Python worker %s did not end within %s of SIGTERM: %s", p.name, patience, tail(p.log.Name(), 2000))
	}
}

// mixedShapes draws the runs for a mixed fleet. One step of each takes so long
// that a worker which goes by the grace alone, and looks once a second, would
// have found the run lost twice. Every fifth run fails.
func mixedShapes(random *rand.Rand, runs int) []shape {
	shapes := make([]shape, runs)
	for i := range shapes {
		// A late one, so that a worker of ours has most likely begun the run.
		shapes[i] = shape{Milliseconds: 2800 + random.IntN(600), Long: "restart"}
		if i%5 == 4 {
			shapes[i].FailAt = []string{"build", "restart"}[random.IntN(2)]
			shapes[i].Long = shapes[i].FailAt
		}
	}
	return shapes
}

// mix publishes many runs at once for a fleet of Python's workers and ours on one
// queue, and judges them when all have ended. Half-way Python's workers are
// stopped in order and started again. Nobody is killed: every effect happens
// once, and no run is lost.
func (l *lane) mix(ctx context.Context, t Trial, o *outcome) (err error) {
	random := rand.New(rand.NewPCG(t.Seed, uint64(t.Number)))
	release, err := l.hire(t)
	if err != nil {
		return err
	}
	defer func() {
		if err := release(); err != nil {
			o.complain(stuck, "%v", err)
		}
	}()
	if err := l.staffAll(ctx, mixedWorkers); err != nil {
		return err
	}
	told := l.toldForeign()
	pythons, err := l.startPythons(ctx)
	if err != nil {
		return err
	}
	defer func() {
		if err := stopPythons(pythons); err != nil {
			o.complain(harness, "%v", err)
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
		// Asked to stop, they consume no more and end their steps: the queue has
		// no consumers but ours, and the runs are in hand all the same.
		if err := stopPythons(pythons); err != nil {
			o.complain(harness, "%v", err)
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
		o.complain(stuck, "%v", err)
	}
	// Python stores a result, and acknowledges, after the commit that all can
	// see.
	if err := stopPythons(pythons); err != nil {
		o.complain(harness, "%v", err)
	}
	pythons = nil
	if _, err := l.quiet(ctx); err != nil {
		o.complain(stuck, "%v", err)
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
	return l.judgeMixed(ctx, o, told)
}

// awaitPython waits until all workers consume.
func (l *lane) awaitPython(ctx context.Context, pythons []*pythonProcess) error {
	return until(ctx, "the Python workers to consume", func() (bool, error) {
		for _, p := range pythons {
			select {
			case <-p.exited:
				return false, fmt.Errorf("Python worker %s ended: %s", p.name, tail(p.log.Name(), 2000))
			default:
			}
		}
		state, err := l.channel.QueueDeclarePassive(l.queue, true, false, false, false, nil)
		return state.Consumers == mixedWorkers+len(pythons), err
	})
}

// awaitEnds waits until so many runs have ended. One that takes long is waited
// for as long as others end.
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
		case time.Since(changed) > patience:
			return fmt.Errorf("%d of %d runs have ended, and no other one in %s", n, figures.runs, patience)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// judgeLeftSoon gives the next sweep time to free the workspace of a run that
// Python has ended.
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

// judgeMixed demands that the trial had what it is about, and that nobody took a
// run for lost.
func (l *lane) judgeMixed(ctx context.Context, o *outcome, told []int) error {
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
		o.missed++ // with few runs, it may happen so
	}
	gone, err := l.rows(ctx, `
		SELECT s.orchestrator_run_id || ': ' || s.message FROM spec_workflow_task_states AS s
		JOIN orchestrator_runs AS r ON r.id = s.orchestrator_run_id
		WHERE s.message LIKE 'run was lost%' AND r.queued_at >= $1`, o.run.created)
	if err != nil {
		return err
	}
	for _, text := range gone {
		o.complain(wrong, "run %s", text)
	}
	// After some sweeps only; and once more if Python's workers needed long to
	// start again.
	least := 0
	if figures.half > mixedTold {
		least = 1
	}
	for i, n := range l.toldForeign() {
		if n -= told[i]; n < least || n > 2 {
			o.complain(wrong, "worker %s has told %d times that no run is found lost, want %d to 2", l.workers[i].name, n, least)
		}
		if n > 0 {
			figures.told++
		}
	}
	return nil
}

// toldForeign counts, for each worker, how often its log says that no run is
// found lost.
func (l *lane) toldForeign() (times []int) {
	for _, w := range l.workers[:mixedWorkers] {
		times = append(times, strings.Count(tail(w.logPath(), 10<<20), "lost runs are not looked for"))
	}
	return times
}

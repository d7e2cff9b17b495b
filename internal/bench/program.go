package bench

import (
	"context"
	"fmt"
	"maps"
	"math"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// StatementCount is a statement of the program in a run of a plan.
type StatementCount struct {
	Statement string  `json:"statement"`
	PerRun    float64 `json:"per_run"`
}

// programs are processes of the program, whose statements a relay counts.
type programs struct {
	relay     *relay
	processes []*process
}

// startPrograms starts n workers and returns once all of them receive messages.
func (h *harness) startPrograms(ctx context.Context, n int) (p *programs, err error) {
	p = &programs{}
	if p.relay, err = startRelay(h.servers.database.URL, true); err != nil {
		return nil, err
	}
	for range n {
		process, err := h.startProgram(p.relay.URL)
		if process != nil {
			p.processes = append(p.processes, process)
		}
		if err != nil {
			p.kill()
			return nil, err
		}
	}
	if _, err := h.consumers(ctx, h.plan.queue, n, p.processes[0]); err != nil {
		p.kill()
		return nil, err
	}
	return p, nil
}

// startProgram starts a worker with another address of the database, "" for the
// database itself.
func (h *harness) startProgram(database string) (*process, error) {
	process, command := newProcess(ours), exec.Command(h.plan.program, "worker")
	command.Env = h.plan.environ
	if database != "" {
		address, err := url.Parse(database)
		if err != nil {
			return nil, err
		}
		// The last value of a variable counts.
		command.Env = append(slices.Clone(command.Env), "POSTGRES_HOST="+address.Hostname(), "POSTGRES_PORT="+address.Port(),
			"CELERY_RESULT_BACKEND=db+postgresql://"+address.User.String()+"@"+address.Host+address.Path)
	}
	if err := process.begin(command, h.plan.workspace); err != nil {
		return nil, err
	}
	return process, nil
}

func (p *programs) kill() {
	failed := context.Canceled // any error
	for _, process := range p.processes {
		process.end(&failed)
	}
	p.relay.close()
}

func (p *programs) stop() (err error) {
	defer p.relay.close()
	for i, process := range p.processes {
		if err = process.stop(); err != nil {
			for _, rest := range p.processes[i+1:] {
				rest.end(&err)
			}
			return err
		}
	}
	return nil
}

// consumers waits until n workers receive messages from a queue.
func (h *harness) consumers(ctx context.Context, queue string, n int, p *process) (time.Time, error) {
	deadline := time.NewTimer(markTimeout)
	defer deadline.Stop()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		state, err := h.servers.channel.QueueDeclarePassive(queue, true, false, false, false, nil)
		if err != nil {
			return time.Time{}, err
		}
		if state.Consumers >= n {
			return time.Now(), nil
		}
		select {
		case <-tick.C:
		case <-p.exited:
			return time.Time{}, fmt.Errorf("the process has ended (%s): %s", p.command.ProcessState, p.output)
		case <-deadline.C:
			return time.Time{}, fmt.Errorf("%d of %d workers receive messages after %s: %s", state.Consumers, n, markTimeout, p.output)
		case <-ctx.Done():
			return time.Time{}, context.Cause(ctx)
		}
	}
}

// programFigures are the program's size, its start, and its memory at rest.
func (h *harness) programFigures(ctx context.Context) (sample Sample, err error) {
	file, err := os.Stat(h.plan.program)
	if err != nil {
		return sample, err
	}
	began := time.Now()
	p, err := h.startProgram("")
	if err != nil {
		return sample, err
	}
	defer p.end(&err)
	ready, err := h.consumers(ctx, h.plan.queue, 1, p)
	if err != nil {
		return sample, err
	}
	select { // until what the start needed is done and returned
	case <-time.After(2 * time.Duration(h.seconds*float64(time.Second))):
	case <-ctx.Done():
		return sample, context.Cause(ctx)
	}
	sample.Values = []float64{float64(file.Size()) / 1e6, ready.Sub(began).Seconds() * 1000, residentOf(p.pid(), "VmRSS") / 1e6, residentOf(p.pid(), "RssAnon") / 1e6}
	return sample, p.stop()
}

// countStatements counts what runs of a plan ask of the database.
func (h *harness) countStatements(ctx context.Context) (sample Sample, err error) {
	// Its counters change when a session ends: the same session without runs is
	// subtracted.
	var work [2]databaseWork
	runs := h.sizes().countedRuns
	var statements map[string]int
	var total, roundTrips int
	for i, n := range []int{1, 1 + runs} {
		before, err := h.servers.work(ctx)
		if err != nil {
			return sample, err
		}
		p, err := h.startPrograms(ctx, 1)
		if err != nil {
			return sample, err
		}
		for run := range n {
			if run == 1 {
				p.relay.take() // without what only the first run needs
			}
			if _, err := h.oneRun(ctx, p.processes[0]); err != nil {
				p.kill()
				return sample, err
			}
		}
		statements, total, roundTrips = p.relay.take()
		if err := p.stop(); err != nil {
			return sample, err
		}
		after, err := h.servers.work(ctx)
		if err != nil {
			return sample, err
		}
		work[i] = databaseWork{after.transactions - before.transactions, after.flushes - before.flushes, after.bytes - before.bytes}
	}
	h.counts = nil
	for _, text := range slices.Sorted(maps.Keys(statements)) {
		h.counts = append(h.counts, StatementCount{Statement: text, PerRun: float64(statements[text]) / float64(runs)})
	}
	slices.SortStableFunc(h.counts, func(a, b StatementCount) int { return int(math.Copysign(1, b.PerRun-a.PerRun)) })
	for _, v := range []float64{float64(total), float64(roundTrips), work[1].transactions - work[0].transactions, work[1].flushes - work[0].flushes} {
		sample.Values = append(sample.Values, v/float64(runs))
	}
	return sample, nil
}

// queuedRuns measures the steps of one run at a time while others are queued.
func (h *harness) queuedRuns(ctx context.Context) (sample Sample, err error) {
	size, queued := h.sizes(), 0
	runs, warmUp := size.runs, size.warmUpRuns
	for _, v := range []struct{ queued, workers int }{
		{10, 1}, {10, min(4, size.workers)}, {10, size.workers},
		{size.queued, 1}, {size.queued, min(4, size.workers)}, {size.queued, size.workers},
	} {
		if err := h.queueRuns(ctx, v.queued-queued); err != nil {
			return sample, err
		}
		queued = v.queued
		p, err := h.startPrograms(ctx, v.workers)
		if err != nil {
			return sample, err
		}
		for range 1 + warmUp*v.workers { // each worker should have had a step
			if _, err := h.oneRun(ctx, p.processes[0]); err != nil {
				p.kill()
				return sample, err
			}
		}
		// What workers ask without a run is no part of a step.
		idle := 4 * time.Duration(h.seconds*float64(time.Second))
		p.relay.take()
		select {
		case <-time.After(idle):
		case <-ctx.Done():
			p.kill()
			return sample, context.Cause(ctx)
		}
		_, background, _ := p.relay.take()
		var times []float64
		began := time.Now()
		for range runs {
			took, err := h.oneRun(ctx, p.processes[0])
			if err != nil {
				p.kill()
				return sample, err
			}
			times = append(times, (took-quietPeriod).Seconds()*1000/planSteps)
		}
		_, statements, _ := p.relay.take()
		own := float64(statements) - float64(background)*time.Since(began).Seconds()/idle.Seconds()
		sample.Values = append(sample.Values, percentile(times, 50), own/float64(runs*planSteps))
		// Killed: in an orderly end the last worker returns the parked messages.
		p.kill()
	}
	// Of the cases that follow, the last worker ends in an orderly way.
	_, err = h.servers.db.Exec(ctx, `TRUNCATE mm_orchestrator.parked`)
	return sample, err
}

// queueRuns creates runs that wait for a workspace, as workers do that receive their
// messages: a run holds it that waits for an approval. The runs that are measured have
// another one, as they would have to wait, too.
func (h *harness) queueRuns(ctx context.Context, n int) error {
	plan, err := h.plan.steps()
	if err != nil || n <= 0 {
		return err
	}
	_, message, err := moonmind.Chain(h.plan.queue, moonmind.NewID()) // never published
	if err != nil {
		return err
	}
	const insertRuns = `
		WITH ids AS MATERIALIZED (SELECT gen_random_uuid() AS run, gen_random_uuid() AS plan FROM generate_series(1, $1::int)),
		plans AS (
		    INSERT INTO orchestrator_action_plans (id, steps, service_context)
		    SELECT plan, $2::text::jsonb, jsonb_build_object('service', 'api', 'queue', $3::text) FROM ids),
		runs AS (
		    INSERT INTO orchestrator_runs (id, instruction, target_service, priority, status, metrics_snapshot, artifact_root, action_plan_id)
		    SELECT run, 'Wait', 'api', 'normal', $4::orchestratorrunstatus, '{}', '/nowhere/' || run, plan FROM ids),
		states AS (
		    INSERT INTO spec_workflow_task_states (id, orchestrator_run_id, task_name, status, attempt, plan_step, plan_step_status, artifact_refs)
		    SELECT gen_random_uuid(), run, step, 'queued', 1, step::orchestratorplanstep, 'pending', '[]'
		    FROM ids CROSS JOIN unnest(ARRAY['analyze', 'patch', 'build', 'restart', 'verify', 'rollback']) AS step)`
	_, err = h.servers.db.Exec(ctx, insertRuns+`
		INSERT INTO mm_orchestrator.holds (workspace, queue, run_id) SELECT 'busy', $3, run FROM ids ON CONFLICT DO NOTHING`,
		1, string(plan), h.plan.queue, "awaiting_approval")
	if err != nil {
		return fmt.Errorf("queueing %d runs: %w", n, err)
	}
	_, err = h.servers.db.Exec(ctx, insertRuns+`
		INSERT INTO mm_orchestrator.parked (workspace, queue, run_id, step, task_id, message_key, why, rank, queued_at, headers, properties, body)
		SELECT 'busy', $3, run, 'analyze', run::text, sha256(run::text::bytea), 'workspace', 2, now(), '{}', '{}', $5 FROM ids`,
		n, string(plan), h.plan.queue, "pending", message.Body)
	if err != nil {
		return fmt.Errorf("queueing %d runs: %w", n, err)
	}
	for _, statement := range []string{`VACUUM ANALYZE`, `CHECKPOINT`} {
		if _, err := h.servers.db.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

package bench

import (
	"context"
	"fmt"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// send measures how many messages a second a client sends, one after the other, each
// with a confirm.
func (h *harness) send(ctx context.Context, name string) (sample Sample, err error) {
	h.sequence++
	queue := fmt.Sprintf("bench-%d", h.sequence)
	if err := h.servers.declare(queue); err != nil {
		return sample, err
	}
	// A rate of the machine, not of the contender: enough for all of them.
	count := max(20, int(2000*h.seconds))
	p, err := h.start(name, contender.Spec{Broker: h.servers.broker.URL, Queue: queue, Job: contender.JobSend, Count: count, Slots: 1})
	if err != nil {
		return sample, err
	}
	defer p.end(&err)
	begin, err := p.mark(ctx)
	if err != nil {
		return sample, err
	}
	before := h.usage(p)
	end, err := p.mark(ctx)
	if err != nil {
		return sample, err
	}
	sample.CPU = h.usage(p).perTask(before, count)
	sample.Values = []float64{float64(count) / end.Sub(begin).Seconds()}
	if err := p.stop(); err != nil {
		return sample, err
	}
	left, err := h.servers.remove(queue)
	if err == nil && left != count+contender.SentToWarmUp {
		err = fmt.Errorf("%d of %d messages are in the queue", left, count+contender.SentToWarmUp)
	}
	return sample, err
}

// logText measures the way of a program's output into a log, with secrets.
func (h *harness) logText(ctx context.Context, name string, secrets int) (sample Sample, err error) {
	h.sequence++
	size := h.sizes().log
	p, err := h.start(name, contender.Spec{Folder: h.folder, Job: contender.JobLog, Count: size, Secrets: secrets})
	if err != nil {
		return sample, err
	}
	defer p.end(&err)
	begin, err := p.mark(ctx)
	if err != nil {
		return sample, err
	}
	before := h.usage(p)
	end, err := p.mark(ctx)
	if err != nil {
		return sample, err
	}
	cpu := h.usage(p)["worker"] - before["worker"]
	if err := p.stop(); err != nil {
		return sample, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.values) != 1 {
		return sample, fmt.Errorf("the process tells no memory: %s", p.output)
	}
	if cpu == 0 {
		cpu = end.Sub(begin).Seconds() // without /proc
	}
	sample.Values = []float64{float64(size) / 1e6 / end.Sub(begin).Seconds(), float64(size) / 1e6 / cpu, p.values[0] / 1e6}
	return sample, nil
}

// manyMessages compares a worker before and after very many messages.
func (h *harness) manyMessages(ctx context.Context) (sample Sample, err error) {
	tasks := h.sizes().messages
	s := setting{slots: 4, prefetch: 64}
	r, err := h.open(ctx, ours, how{slots: s.slots}, s, func(*running) error { return nil })
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	send := func(n int) error {
		for n > 0 {
			part := min(n, 5000)
			n -= part
			messages := make([]amqp.Publishing, part)
			for i := range messages {
				messages[i] = r.task(contender.Noop, 3)
			}
			if err := h.servers.publish(ctx, r.queue, messages...); err != nil {
				return err
			}
		}
		// The second mark finds a worker that does nothing else.
		for _, task := range []string{contender.Mark, contender.Rest} {
			if err := h.servers.publish(ctx, r.queue, r.task(task, 0)); err != nil {
				return err
			}
			if _, err := r.markWithin(ctx, 20*time.Minute); err != nil {
				return err
			}
			select { // the tasks before the mark end
			case <-time.After(time.Duration(h.seconds * float64(time.Second))):
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	}
	// A tenth fills the pools of the runtime.
	var memory, files []float64
	for _, n := range []int{max(200, tasks/10), tasks} {
		if err := send(n); err != nil {
			return sample, err
		}
		memory, files = append(memory, residentOf(r.pid(), "VmRSS")/1e6), append(files, float64(openFiles(r.pid())))
	}
	if err := h.finish(ctx, r, s, &sample); err != nil {
		return sample, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.values) != 4 { // for each mark
		return sample, fmt.Errorf("the worker tells its goroutines %d times: %s", len(r.values), r.output)
	}
	sample.Values = []float64{memory[0], memory[1], r.values[3] - r.values[1], files[1] - files[0]}
	return sample, nil
}

// withoutFlushes lets the servers of a sample not wait for the disk.
func (h *harness) withoutFlushes(ctx context.Context, measure func() (Sample, error)) (sample Sample, err error) {
	set := func(value string) error {
		for _, statement := range []string{`ALTER SYSTEM SET fsync = ` + value, `SELECT pg_reload_conf()`} {
			if _, err := h.servers.db.Exec(ctx, statement); err != nil {
				return err
			}
		}
		return nil
	}
	if err := set("off"); err != nil {
		return sample, err
	}
	h.transient = true
	defer func() { h.transient = false }()
	sample, err = measure()
	if again := set("on"); err == nil {
		err = again
	}
	return sample, err
}

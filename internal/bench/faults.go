package bench

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// A fault is what a case of recovery does to a worker at work. inject returns when the
// fault is over.
type fault struct {
	// name is the end of the case's name, title that of its title.
	name, title string
	// what happens, for the report.
	what   string
	inject func(*recovery, context.Context) error
}

var faults = []fault{
	{"none", "no fault", "Nothing happens: what the machine does by itself, above all its disk, is in the other ratios too.", func(*recovery, context.Context) error { return nil }},
	{"killed", "worker killed", "The worker is killed and started again at once.", func(r *recovery, ctx context.Context) error { return r.restartWorker() }},
	{"killed-again", "worker killed again and again", "The worker is killed five times, a second apart, and started again at once.", func(r *recovery, ctx context.Context) error {
		for i := range 5 {
			if i > 0 {
				if err := r.sleep(ctx, r.pace); err != nil {
					return err
				}
			}
			if err := r.restartWorker(); err != nil {
				return err
			}
		}
		return nil
	}},
	{"broker", "broker restarted", "RabbitMQ is stopped in an orderly way and started.", func(r *recovery, ctx context.Context) error {
		if err := r.servers.broker.Stop(); err != nil {
			return err
		}
		if err := r.servers.broker.Start(ctx); err != nil {
			return err
		}
		return r.servers.connectBroker()
	}},
	{"database", "database restarted", "PostgreSQL is stopped in an orderly way and started.", func(r *recovery, ctx context.Context) (err error) {
		_ = r.servers.db.Close(ctx) // it would keep an orderly end waiting
		if err := r.servers.database.Stop(); err != nil {
			return err
		}
		if err := r.servers.database.Start(ctx); err != nil {
			return err
		}
		r.servers.db, err = pgx.Connect(ctx, r.servers.database.URL)
		return err
	}},
	{"stalled", "connection stalled", "A relay between the worker and RabbitMQ forwards nothing for 5 s.", func(r *recovery, ctx context.Context) error {
		r.relay.stall()
		defer r.relay.resume()
		return r.sleep(ctx, 5*r.pace)
	}},
}

// recovery is a worker with more tasks than it can do, to which faults happen.
type recovery struct {
	*harness
	relay  *relay
	spec   contender.Spec
	worker *process
	// pace is a second, and less in tests.
	pace time.Duration
	// ahead is how many messages are in the queue at most.
	ahead int

	mu   sync.Mutex
	done []time.Time // of each task
	sent int
}

func (r *recovery) sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-r.worker.exited:
		return fmt.Errorf("the worker has ended (%s): %s", r.worker.command.ProcessState, r.worker.output)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (r *recovery) restartWorker() error {
	killed := syscall.SIGKILL
	_ = syscall.Kill(-r.worker.pid(), killed)
	<-r.worker.exited
	_, _ = r.worker.stdin.Close(), r.worker.pipe.Close()
	return r.startWorker()
}

func (r *recovery) startWorker() (err error) {
	r.sequence++
	r.worker, err = r.start(ours, r.spec)
	return err
}

// between returns how many tasks a second were done between two moments.
func (r *recovery) between(from, to time.Time) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	first, _ := slices.BinarySearchFunc(r.done, from, time.Time.Compare)
	last, _ := slices.BinarySearchFunc(r.done, to, time.Time.Compare)
	return float64(last-first) / to.Sub(from).Seconds()
}

// pause returns the longest time without a task between two moments, in seconds.
func (r *recovery) pause(from, to time.Time) (longest float64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	first, _ := slices.BinarySearchFunc(r.done, from, time.Time.Compare)
	for _, at := range r.done[first:] {
		if at.After(to) {
			break
		}
		longest = max(longest, at.Sub(from).Seconds())
		from = at
	}
	return max(longest, to.Sub(from).Seconds())
}

// spend returns a function that tells the processor time for each task since then, of
// the worker and the servers. It is 0 if it is not known.
func (r *recovery) spend() func() float64 {
	done := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.done)
	}
	worker, before, first := r.worker, r.usage(r.worker), done()
	return func() (cost float64) {
		n := done() - first
		if n == 0 || r.worker != worker {
			return 0
		}
		for _, each := range r.usage(worker).perTask(before, n) {
			cost += each
		}
		return cost
	}
}

// feed keeps messages in the queue until ctx ends. What a restart of the broker
// interrupts is published again: there may be more messages, never too few.
func (r *recovery) feed(ctx context.Context, queue, prefix string) {
	ids := ids{prefix: prefix}
	for ctx.Err() == nil {
		if err := r.feedOnce(ctx, queue, &ids); err != nil {
			select {
			case <-time.After(r.pace / 10):
			case <-ctx.Done():
			}
		}
	}
}

// fedTogether is how many messages are published at a time.
const fedTogether = 200

func (r *recovery) feedOnce(ctx context.Context, queue string, ids *ids) error {
	conn, err := amqp.Dial(r.servers.broker.URL)
	if err != nil {
		return err
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		return err
	}
	if err := channel.Confirm(false); err != nil {
		return err
	}
	own := &servers{channel: channel}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if r.full() {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return nil
			}
			continue
		}
		messages := make([]amqp.Publishing, fedTogether)
		for i := range messages {
			messages[i] = message(contender.Timed, ids.new(), time.Now().UnixNano(), nil, true)
		}
		if err := own.publish(ctx, queue, messages...); err != nil {
			return err
		}
		r.mu.Lock()
		r.sent += fedTogether
		r.mu.Unlock()
	}
}

// full says whether the queue has as many messages as it should.
func (r *recovery) full() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sent-len(r.done) > r.ahead-fedTogether
}

// firstTask waits until a task has been done after a moment.
func (r *recovery) firstTask(ctx context.Context, from time.Time) error {
	for end := time.Now().Add(markTimeout); ; {
		r.mu.Lock()
		done := len(r.done) > 0 && r.done[len(r.done)-1].After(from)
		r.mu.Unlock()
		switch {
		case done:
			return nil
		case time.Now().After(end):
			return fmt.Errorf("no task within %s: %s", markTimeout, r.worker.output)
		}
		if err := r.sleep(ctx, r.pace/10); err != nil {
			return err
		}
	}
}

// recover measures the throughput of ours in the minute after a fault, relative to that
// before.
func (h *harness) recover(ctx context.Context, f fault) (sample Sample, err error) {
	size := h.sizes()
	before, after := size.before, size.after
	r := &recovery{harness: h, pace: size.pace, ahead: int(10_000 * size.pace / time.Second)}
	h.sequence++
	queue, prefix := fmt.Sprintf("bench-%d", h.sequence), fmt.Sprintf("%08x", h.sequence)
	if err := h.servers.declare(queue); err != nil {
		return sample, err
	}
	if r.relay, err = startRelay(h.servers.broker.URL, false); err != nil {
		return sample, err
	}
	defer r.relay.close()
	r.spec = contender.Spec{Broker: r.relay.URL, Database: h.servers.database.URL, Queue: queue, Slots: 4, Prefetch: 64, Results: true}
	h.seen = func(at time.Time) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.done = append(r.done, at)
	}
	defer func() { h.seen = nil }()
	feeding, stopFeeding := context.WithCancel(ctx)
	var feeder sync.WaitGroup
	feeder.Go(func() { r.feed(feeding, queue, prefix) })
	defer feeder.Wait()
	defer stopFeeding()
	if err := r.startWorker(); err != nil {
		return sample, err
	}
	defer func() { r.worker.end(&err) }()
	if err := r.firstTask(ctx, time.Time{}); err != nil {
		return sample, err
	}
	// What fills the queue takes time from the worker.
	for end := time.Now().Add(markTimeout); !r.full() && time.Now().Before(end); {
		if err := r.sleep(ctx, r.pace/10); err != nil {
			return sample, err
		}
	}
	if err := r.sleep(ctx, before/4); err != nil { // to warm up
		return sample, err
	}
	var began time.Time
	var rate, cost float64
	for end := time.Now().Add(markTimeout); rate == 0; { // again on a machine that is too busy
		spent := r.spend()
		if err := r.sleep(ctx, before); err != nil {
			return sample, err
		}
		cost = spent()
		began = time.Now()
		if rate = r.between(began.Add(-before), began); rate == 0 && began.After(end) {
			return sample, fmt.Errorf("no task in the %s before the fault: %s", before, r.worker.output)
		}
	}
	if err := f.inject(r, ctx); err != nil {
		return sample, err
	}
	over, spent := time.Now(), r.spend()
	if err := r.sleep(ctx, after); err != nil {
		return sample, fmt.Errorf("after the fault: %w", err)
	}
	costAfter := spent()
	// A test's time is too short for some recoveries.
	if err := r.firstTask(ctx, over); err != nil {
		return sample, err
	}
	fmt.Fprintf(h.Output, "  tasks/s before: %.0f; after, in tenths of the time:", rate)
	for i := range 10 {
		fmt.Fprintf(h.Output, " %.0f", r.between(over.Add(after*time.Duration(i)/10), over.Add(after*time.Duration(i+1)/10)))
	}
	fmt.Fprintln(h.Output)
	sample.Values = []float64{r.between(over, over.Add(after)) / rate, r.pause(began, time.Now()), 0}
	if cost > 0 {
		sample.Values[2] = costAfter / cost
	}
	stopFeeding()
	feeder.Wait()
	if err := r.worker.stop(); err != nil {
		return sample, err
	}
	if _, err := h.servers.remove(queue); err != nil {
		return sample, err
	}
	return sample, h.servers.tidy(ctx, prefix)
}

// recoveryCase is one for each fault, so that a run may have some of them: a minute is
// long.
func recoveryCase(f fault) Case {
	return Case{
		Name: "recovery-" + f.name, Title: "recovery, " + f.title, Contenders: []string{ours}, rounds: 1,
		Measures: []Measure{{Name: "throughput after ÷ before"}, {Name: "longest pause", Unit: "s", Lower: true}, {Name: "processor time of a task, after ÷ before", Lower: true}},
		What: f.what + " One worker with 4 slots, prefetch 64, results and a queue that is never empty: the tasks of the minute after the fault's end ÷ those of the 20 s before it, both per second (10 s and 5 s with `BENCH=short`), " +
			"the longest time without a task, the fault included, and the processor time for each task, of worker, broker and database, in the same two times: what stays of a fault shows there also while another program takes time from all.",
		measure: func(ctx context.Context, h *harness, _ string) (Sample, error) { return h.recover(ctx, f) },
	}
}

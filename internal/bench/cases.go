package bench

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// cases are all cases in the order of the report.
func cases() []Case {
	all := []string{floor, ours, celery}
	rate := []Measure{{Unit: "tasks/s"}}
	throughput := func(name, title, what string, s setting) Case {
		return Case{
			Name: name, Title: title, What: what, Contenders: all, Measures: rate,
			prepare: func(ctx context.Context, h *harness) error { return h.makePilots(ctx, s) },
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
				pilot := h.pilots[pilotKey{s, name}]
				return h.throughput(ctx, name, pilot.how, s, max(20, int(pilot.rate*h.seconds)))
			},
		}
	}
	one, four := setting{slots: 1, prefetch: 1}, setting{slots: 4, prefetch: 64}
	oneStored, fourStored := one, four
	oneStored.results, fourStored.results = true, true
	newTable := oneStored
	newTable.newTable = true
	pickUp := func(name, title, what string, measure func(ctx context.Context, h *harness, name string, own pilot) (Sample, error)) Case {
		return Case{
			Name: name, Title: title, What: what, Contenders: all,
			Measures: []Measure{{Name: "p50", Unit: "ms", Lower: true}, {Name: "p99", Unit: "ms", Lower: true}},
			prepare:  func(ctx context.Context, h *harness) error { return h.makePilots(ctx, oneStored) },
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
				return measure(ctx, h, name, h.pilots[pilotKey{oneStored, name}])
			},
		}
	}
	list := []Case{
		throughput("prefetch-1-result", "prefetch 1, result committed",
			"A full queue of tasks that do nothing. One message at a time; its result is committed before it is acknowledged. Nothing is batched.", oneStored),
		throughput("prefetch-1", "prefetch 1, no result",
			"A full queue of tasks that do nothing, one message at a time, acknowledged after the task. Nothing is batched.", one),
		throughput("prefetch-64-result", "prefetch 64, 4 slots, result committed",
			"The same with 4 tasks at once and 64 messages sent ahead. Batched: PostgreSQL may flush several commits together, and our worker writes the acknowledgements that are due at the same time together; the floor does not.", fourStored),
		throughput("prefetch-64", "prefetch 64, 4 slots, no result",
			"The same without results. Batched: the acknowledgements, as before.", four),
		throughput("new-result-table", "prefetch 1, result committed, new table",
			"As the first case, in a result table that is empty and was never analyzed.", newTable),
		{
			Name: "chain-hop", Title: "chain hop", Contenders: all, Measures: []Measure{{Unit: "ms", Lower: true}},
			What:    "The time from one task of a chain to the next: the next message confirmed, the result committed, the acknowledgement, the delivery. One chain of 10 tasks at a time, prefetch 1.",
			prepare: func(ctx context.Context, h *harness) error { return h.makePilots(ctx, oneStored) },
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
				return h.chainHop(ctx, name, h.pilots[pilotKey{oneStored, name}].how, oneStored)
			},
		},
		{
			Name: "plan", Title: "run of a plan with six steps", Contenders: []string{floor, ours}, Measures: []Measure{{Unit: "ms", Lower: true}},
			What: "The program, from before the first message of a run is published until the run is recorded as succeeded. Four commands in its steps do nothing; verify asks a healthy address, and the 100 ms for which it watches the service are subtracted; the rollback is skipped. " +
				"For the floor: five steps, each with a committed beginning, its commands, each of them with an intent and an end that are committed, its artifacts on disk, a committed end, and what a chain hop has (`internal/bench/contender/step.go`).",
			prepare: func(ctx context.Context, h *harness) error { return h.preparePlans(ctx) },
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
				if name == floor {
					return h.floorPlans(ctx)
				}
				return h.plans(ctx)
			},
		},
		pickUp("pick-up", "pick-up at half load",
			"The time from before a message is published until its task runs, at half of the contender's own rate with prefetch 1 and results. Messages are published at fixed times, whether or not the worker keeps up.",
			func(ctx context.Context, h *harness, name string, own pilot) (Sample, error) {
				return h.pickUp(ctx, name, own.how, oneStored, own.rate/2, 1.5*h.seconds)
			}),
		pickUp("pick-up-same-rate", "pick-up at the same rate",
			"The same with one rate for all: half of the slowest contender's. This compares how long a message waits for a worker that has the same to do; in the case above the faster worker gets more messages, and the disk more to flush.",
			func(ctx context.Context, h *harness, name string, own pilot) (Sample, error) {
				return h.pickUp(ctx, name, own.how, oneStored, h.slowest(oneStored)/2, 4*h.seconds)
			}),
		pickUp("pick-up-no-flush", "pick-up at half load, no flush to disk",
			"As the first of these cases at the same rates, with fsync off in PostgreSQL and with messages that are not persistent, so that RabbitMQ does not write them to disk (it has no setting for that). "+
				"This is what the programs take; the difference from the first case is the disk. Nothing should run like this.",
			func(ctx context.Context, h *harness, name string, own pilot) (Sample, error) {
				return h.withoutFlushes(ctx, func() (Sample, error) {
					return h.pickUp(ctx, name, own.how, oneStored, own.rate/2, 1.5*h.seconds)
				})
			}),
		{
			Name: "ready", Title: "start to first task", Contenders: all, Measures: []Measure{{Unit: "ms", Lower: true}},
			What:    "The time from the start of the process until it runs a task that waits in the queue. With results.",
			prepare: func(ctx context.Context, h *harness) error { return h.makePilots(ctx, oneStored) },
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
				return h.ready(ctx, name, h.pilots[pilotKey{oneStored, name}].how, oneStored)
			},
		},
		{
			Name: "memory", Title: "memory", Contenders: all, rounds: 2,
			Measures: []Measure{{Name: "at rest", Unit: "MB", Lower: true}, {Name: "after many messages", Unit: "MB", Lower: true}},
			What: "The memory of the process and its children, pages that they share counted once, after the first task and after as many tasks as the case \"prefetch 64, 4 slots, result committed\" " +
				"runs in three samples. With 4 slots, prefetch 64 and results.",
			prepare: func(ctx context.Context, h *harness) error { return h.makePilots(ctx, fourStored) },
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
				pilot := h.pilots[pilotKey{fourStored, name}]
				return h.memory(ctx, name, pilot.how, fourStored, max(100, int(3*pilot.rate*h.seconds)))
			},
		},
		{
			Name: "send", Title: "messages sent", Contenders: all, Measures: []Measure{{Unit: "messages/s"}},
			What:    "One process sends task messages, one after the other, and waits for the broker's confirm of each: `client.Send`, and `apply_async` with `confirm_publish`. Nothing is batched.",
			measure: func(ctx context.Context, h *harness, name string) (Sample, error) { return h.send(ctx, name) },
		},
		logCase("log-10", 10), logCase("log-50", 50),
		{
			Name: "program", Title: "the program", Contenders: []string{ours},
			Measures: []Measure{{Name: "size", Unit: "MB", Lower: true}, {Name: "start until it receives messages", Unit: "ms", Lower: true},
				{Name: "memory at rest", Unit: "MB", Lower: true}, {Name: "memory at rest without pages of files", Unit: "MB", Lower: true}},
			What: "The file of `mm-orchestrator`; from the start of `mm-orchestrator worker` until the broker knows its consumer; its resident memory (RSS) with no run, " +
				"and that without pages of the program's file, which all processes of it share and which the system can drop.",
			prepare: func(ctx context.Context, h *harness) error { return h.preparePlans(ctx) },
			measure: func(ctx context.Context, h *harness, _ string) (Sample, error) { return h.programFigures(ctx) },
		},
		{
			Name: "statements", Title: "database work of a run with six steps", Contenders: []string{ours}, rounds: 1,
			Measures: []Measure{{Name: "statements", Lower: true}, {Name: "round trips", Lower: true}, {Name: "transactions", Lower: true}, {Name: "WAL flushes", Lower: true}},
			What:     "What the run of the case `plan` asks of the database, counted between the program and the database, with BEGIN and COMMIT. The list is below.",
			prepare:  func(ctx context.Context, h *harness) error { return h.preparePlans(ctx) },
			measure:  func(ctx context.Context, h *harness, _ string) (Sample, error) { return h.countStatements(ctx) },
		},
		{
			Name: "queued-runs", Title: "many queued runs", Contenders: []string{ours}, rounds: 1,
			Measures: []Measure{
				{Name: "10 queued, 1 worker, step", Unit: "ms", Lower: true}, {Name: "10 queued, 1 worker, statements for each step", Lower: true},
				{Name: "10 queued, 4 workers, step", Unit: "ms", Lower: true}, {Name: "10 queued, 4 workers, statements for each step", Lower: true},
				{Name: "10 queued, 16 workers, step", Unit: "ms", Lower: true}, {Name: "10 queued, 16 workers, statements for each step", Lower: true},
				{Name: "many queued, 1 worker, step", Unit: "ms", Lower: true}, {Name: "many queued, 1 worker, statements for each step", Lower: true},
				{Name: "many queued, 4 workers, step", Unit: "ms", Lower: true}, {Name: "many queued, 4 workers, statements for each step", Lower: true},
				{Name: "many queued, 16 workers, step", Unit: "ms", Lower: true}, {Name: "many queued, 16 workers, statements for each step", Lower: true},
			},
			What: "Runs of the case `plan`, one at a time, while other runs are queued: 10, and then 100,000 (10,000 with `BENCH=short`), whose messages workers have received and parked, because their workspace has another run. The time of a run without its 100 ms for each of its five steps. " +
				"A relay between the program and the database counts the statements; those that as many idle workers send in the same time are subtracted.",
			prepare: func(ctx context.Context, h *harness) error { return h.preparePlans(ctx) },
			measure: func(ctx context.Context, h *harness, _ string) (Sample, error) { return h.queuedRuns(ctx) },
		},
		{
			Name: "many-messages", Title: "250,000 messages", Contenders: []string{ours}, rounds: 1,
			Measures: []Measure{{Name: "memory before", Unit: "MB", Lower: true}, {Name: "memory after", Unit: "MB", Lower: true}, {Name: "goroutines more", Lower: true, Growth: true}, {Name: "descriptors more", Lower: true, Growth: true}},
			What:     "One worker with 4 slots and prefetch 64, without results: its resident memory (RSS) without garbage after the first tenth and after all (50,000 with `BENCH=short`). `make soak` does it with a million.",
			measure:  func(ctx context.Context, h *harness, _ string) (Sample, error) { return h.manyMessages(ctx) },
		},
	}
	for _, f := range faults {
		list = append(list, recoveryCase(f))
	}
	return list
}

func logCase(name string, secrets int) Case {
	return Case{
		Name: name, Title: fmt.Sprintf("log of 1 GiB, %d secrets", secrets), Contenders: []string{floor, ours}, rounds: 3,
		Measures: []Measure{{Unit: "MB/s"}, {Name: "processor time", Unit: "MB/cpu-s"}, {Name: "more memory", Unit: "MB", Lower: true, Growth: true}},
		What: "The output of a program on its way into a step's log, 32 KiB at a time (128 MiB in all with `BENCH=short`): decoded, each secret masked in all its forms, hashed and written. " +
			"The floor hashes and writes. MB/cpu-s are per second of processor time, which another program does not change.",
		measure: func(ctx context.Context, h *harness, name string) (Sample, error) {
			return h.logText(ctx, name, secrets)
		},
	}
}

// setting is how the workers of a case are set up.
type setting struct {
	slots, prefetch   int
	results, newTable bool
	// folder, workspace and service are for the floor's steps.
	folder, workspace, service string
}

func (s setting) String() string {
	text := fmt.Sprintf("%d slots, prefetch %d", s.slots, s.prefetch)
	if s.slots == 1 {
		text = fmt.Sprintf("1 slot, prefetch %d", s.prefetch)
	}
	if s.results {
		text += ", results"
	}
	if s.newTable {
		text += " in a new table"
	}
	return text
}

// how is how Celery's worker is set up.
type how struct {
	pool, driver string
	slots        int
}

func (w how) String() string {
	text := w.pool
	if w.driver != "" {
		text += ", " + w.driver
	}
	if w.pool == "solo" {
		text += ", 1 slot"
	}
	return text
}

type pilotKey struct {
	setting   setting
	contender string
}

// pilot is the outcome of short samples.
type pilot struct {
	rate float64
	how  how
}

// slowest is the least rate of the pilots with a setting, in tasks a second.
func (h *harness) slowest(s setting) float64 {
	rate := math.Inf(1)
	for key, p := range h.pilots {
		if key.setting == s {
			rate = min(rate, p.rate)
		}
	}
	return rate
}

// Choice is a pilot of Celery, for the report.
type Choice struct {
	Setting string `json:"setting"`
	How     string `json:"how"`
	// Rates are those of its samples; 0 for one that was too slow.
	Rates []float64 `json:"tasks_per_second"`
	Best  bool      `json:"best"`
	how   how
}

// rate is that of the slowest sample: a setting that stands still now and then is only
// as fast as that.
func (c Choice) rate() float64 { return slices.Min(c.Rates) }

// confirmations is how many samples the setting must have that is used.
const confirmations = 5

// makePilots finds out how many tasks fill a sample of each contender, and in which
// of its pools Celery is fastest.
func (h *harness) makePilots(ctx context.Context, s setting) (err error) {
	defer func() {
		if err != nil { // the next case with this setting tries again
			maps.DeleteFunc(h.pilots, func(key pilotKey, _ pilot) bool { return key.setting == s })
		}
	}()
	for key := range h.pilots {
		if key.setting == s {
			return nil
		}
	}
	for _, name := range []string{floor, ours} {
		if !h.has(name) {
			continue
		}
		rate, err := h.pilotRate(ctx, name, how{slots: s.slots}, s)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		h.pilots[pilotKey{s, name}] = pilot{rate: rate, how: how{slots: s.slots}}
	}
	if !h.has(celery) {
		return nil
	}
	used := s
	used.newTable = false
	if known, found := h.pilots[pilotKey{used, celery}]; found {
		h.pilots[pilotKey{s, celery}] = known // the table makes no other setting the best
		return nil
	}
	best, err := h.chooseCelery(ctx, s)
	if err != nil {
		return err
	}
	h.pilots[pilotKey{s, celery}] = best
	return nil
}

// chooseCelery tries each pool and driver of Celery once. It then repeats the fastest
// until one has enough samples and is still the fastest.
func (h *harness) chooseCelery(ctx context.Context, s setting) (pilot, error) {
	drivers := []string{""}
	if s.results {
		drivers = []string{"psycopg2", "psycopg"}
	}
	var tried []Choice
	sample := func(c *Choice) error {
		h.deadline = time.Now().Add(pilotTimeout)
		rate, err := h.pilotRate(ctx, celery, c.how, s)
		h.deadline = time.Time{}
		if err != nil {
			return fmt.Errorf("celery (%s): %w", c.How, err)
		}
		fmt.Fprintf(h.Output, "  pilot: celery (%s): %s tasks/s\n", c.How, format(rate))
		c.Rates = append(c.Rates, rate)
		return nil
	}
	for _, pool := range []string{"solo", "prefork", "threads"} {
		for _, driver := range drivers {
			w := how{pool: pool, driver: driver, slots: s.slots}
			if pool == "solo" {
				w.slots = 1
			}
			tried = append(tried, Choice{Setting: s.String(), How: w.String(), how: w})
			if err := sample(&tried[len(tried)-1]); err != nil {
				return pilot{}, err
			}
		}
	}
	for {
		best := &tried[0]
		for i := range tried {
			if tried[i].rate() > best.rate() {
				best = &tried[i]
			}
		}
		switch {
		case best.rate() == 0:
			return pilot{}, fmt.Errorf("celery has run no %d tasks within %s in any pool", pilotTasks, pilotTimeout)
		case len(best.Rates) >= confirmations:
			best.Best = true
			h.choices = append(h.choices, tried...)
			return pilot{rate: best.rate(), how: best.how}, nil
		}
		if err := sample(best); err != nil {
			return pilot{}, err
		}
	}
}

// pilotTimeout bounds the pilot of one of Celery's settings, and pilotTasks is the
// size of its first sample. Some pools open a connection for each result.
const (
	pilotTimeout = 20 * time.Second
	pilotTasks   = 20
)

var errTooSlow = errors.New("too slow for a pilot")

// pilotRate is measured twice: the first sample says how many tasks the second
// needs. One is enough if that would be as many again.
func (h *harness) pilotRate(ctx context.Context, name string, w how, s setting) (rate float64, err error) {
	tasks := pilotTasks
	for range 2 {
		sample, err := h.throughput(ctx, name, w, s, tasks)
		if errors.Is(err, errTooSlow) {
			// 0 for the first sample. A later one has stood still: it cannot have been
			// faster than this.
			return min(rate, float64(tasks)/pilotTimeout.Seconds()), h.restoreTable(ctx)
		}
		if err != nil {
			return 0, err
		}
		rate = sample.Values[0]
		if tasks = int(rate * min(1, h.seconds)); tasks <= pilotTasks {
			break
		}
	}
	return rate, nil
}

// running is a sample while its contender runs.
type running struct {
	*process
	queue  string
	ids    ids
	work   databaseWork
	tasks  int // how many were sent
	stored bool
	// transient messages are not written to disk.
	transient bool
}

// open begins a sample with a new queue, into which before publishes, and starts the
// contender.
func (h *harness) open(ctx context.Context, name string, w how, s setting, before func(*running) error) (*running, error) {
	h.sequence++
	r := &running{queue: fmt.Sprintf("bench-%d", h.sequence), ids: ids{prefix: fmt.Sprintf("%08x", h.sequence)}, stored: s.results, transient: h.transient}
	if err := h.servers.declare(r.queue); err != nil {
		return nil, err
	}
	if s.newTable {
		if _, err := h.servers.db.Exec(ctx, `
			ALTER TABLE celery_taskmeta RENAME TO kept;
			CREATE TABLE celery_taskmeta (LIKE kept INCLUDING ALL)`); err != nil {
			return nil, err
		}
	}
	if err := before(r); err != nil {
		return nil, err
	}
	var err error
	if r.work, err = h.servers.work(ctx); err != nil {
		return nil, err
	}
	r.process, err = h.start(name, contender.Spec{
		Broker: h.servers.broker.URL, Database: h.servers.database.URL, Queue: r.queue,
		Slots: w.slots, Prefetch: s.prefetch, Results: s.results, Pool: w.pool, Driver: w.driver, Folder: s.folder, Workspace: s.workspace, Service: s.service,
	})
	return r, err
}

// finish stops the contender, checks that it has done all of its work, and adds to
// the sample what the database did.
func (h *harness) finish(ctx context.Context, r *running, s setting, sample *Sample) error {
	if err := r.stop(); err != nil {
		return err
	}
	left, err := h.servers.remove(r.queue)
	if err != nil {
		return err
	}
	// Several slots may take messages in another order than that of the queue, so
	// that the last mark may overtake a few tasks, which go back to the queue now.
	if left >= s.slots {
		return fmt.Errorf("%d messages are left in the queue", left)
	}
	if s.results {
		n, err := h.servers.stored(ctx, r.ids.prefix)
		if err != nil {
			return err
		}
		if n < r.tasks-left {
			return fmt.Errorf("%d results of %d tasks are stored: %s", n, r.tasks-left, r.output)
		}
		work, err := h.servers.work(ctx)
		if err != nil {
			return err
		}
		sample.Database = work.since(r.work, r.tasks)
	}
	if s.newTable {
		return h.restoreTable(ctx)
	}
	if s.results {
		return h.servers.tidy(ctx, r.ids.prefix)
	}
	return nil
}

// restoreTable puts the table back in place of a new one, if there is one.
func (h *harness) restoreTable(ctx context.Context) error {
	_, err := h.servers.db.Exec(ctx, `
		DO $$ BEGIN
		    IF to_regclass('kept') IS NOT NULL THEN
		        DROP TABLE celery_taskmeta;
		        ALTER TABLE kept RENAME TO celery_taskmeta;
		    END IF;
		END $$`)
	return err
}

// task is the next message of a sample.
func (r *running) task(task string, argument int64) amqp.Publishing {
	r.tasks++
	m := message(task, r.ids.new(), argument, nil, r.stored)
	if r.transient {
		m.DeliveryMode = amqp.Transient
	}
	return m
}

// warmUp is how many tasks run before a measurement begins.
func warmUp(tasks int) int { return max(5, tasks/10) }

// throughput lets a contender empty a queue: first some tasks to warm up, then a
// mark, then those that are measured, then a mark.
func (h *harness) throughput(ctx context.Context, name string, w how, s setting, tasks int) (sample Sample, err error) {
	r, err := h.open(ctx, name, w, s, func(r *running) error {
		var messages []amqp.Publishing
		for _, n := range []int{warmUp(tasks), tasks} {
			for range n {
				messages = append(messages, r.task(contender.Noop, 3))
			}
			messages = append(messages, r.task(contender.Mark, 0))
		}
		return h.servers.publish(ctx, r.queue, messages...)
	})
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	begin, err := r.mark(ctx)
	if err != nil {
		return sample, err
	}
	before := h.usage(r.process)
	end, err := r.mark(ctx)
	if err != nil {
		return sample, err
	}
	sample.CPU = h.usage(r.process).perTask(before, tasks)
	sample.Values = []float64{float64(tasks) / end.Sub(begin).Seconds()}
	return sample, h.finish(ctx, r, s, &sample)
}

const chainLength = 10

// chainHop runs one chain after the other and takes the median of their times.
func (h *harness) chainHop(ctx context.Context, name string, w how, s setting) (sample Sample, err error) {
	r, err := h.open(ctx, name, w, s, func(*running) error { return nil })
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	chain := func() (time.Duration, error) {
		if err := h.servers.publish(ctx, r.queue, chainOf(chainLength, r.queue, r.ids.new(), s.results)); err != nil {
			return 0, err
		}
		r.tasks += chainLength
		begin, err := r.mark(ctx)
		if err != nil {
			return 0, err
		}
		end, err := r.mark(ctx)
		return end.Sub(begin), err
	}
	for range h.sizes().least { // to warm up
		if _, err := chain(); err != nil {
			return sample, err
		}
	}
	var hops []float64
	before, measured := h.usage(r.process), r.tasks
	for began := time.Now(); len(hops) < h.sizes().least || time.Since(began).Seconds() < h.seconds; {
		took, err := chain()
		if err != nil {
			return sample, err
		}
		hops = append(hops, took.Seconds()*1000/(chainLength-1))
	}
	sample.CPU = h.usage(r.process).perTask(before, r.tasks-measured)
	sample.Values = []float64{percentile(hops, 50)}
	return sample, h.finish(ctx, r, s, &sample)
}

// pickUp publishes at a fixed rate, in tasks a second, for so many seconds.
func (h *harness) pickUp(ctx context.Context, name string, w how, s setting, rate, seconds float64) (sample Sample, err error) {
	r, err := h.open(ctx, name, w, s, func(r *running) error {
		messages := []amqp.Publishing{}
		for range warmUp(0) {
			messages = append(messages, r.task(contender.Noop, 3))
		}
		return h.servers.publish(ctx, r.queue, append(messages, r.task(contender.Mark, 0))...)
	})
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	if _, err := r.mark(ctx); err != nil {
		return sample, err
	}
	channel, err := h.servers.conn.Channel() // without confirms: nothing waits
	if err != nil {
		return sample, err
	}
	defer channel.Close()
	tasks := max(50, int(rate*seconds))
	before := h.usage(r.process)
	began := time.Now()
	for i := range tasks {
		time.Sleep(time.Until(began.Add(time.Duration(float64(i) / rate * float64(time.Second)))))
		if err := channel.PublishWithContext(ctx, "", r.queue, true, false, r.task(contender.Timed, time.Now().UnixNano())); err != nil {
			return sample, err
		}
	}
	// Through the same channel, so that it arrives last.
	if err := channel.PublishWithContext(ctx, "", r.queue, true, false, r.task(contender.Mark, 0)); err != nil {
		return sample, err
	}
	if _, err := r.mark(ctx); err != nil {
		return sample, err
	}
	sample.CPU = h.usage(r.process).perTask(before, tasks)
	if err := h.finish(ctx, r, s, &sample); err != nil {
		return sample, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ages) != tasks {
		return sample, fmt.Errorf("%d of %d tasks have run", len(r.ages), tasks)
	}
	ages := make([]float64, len(r.ages))
	for i, age := range r.ages {
		ages[i] = age.Seconds() * 1000
	}
	sample.Values = []float64{percentile(ages, 50), percentile(ages, 99)}
	return sample, nil
}

// ready starts a contender for a queue with one task.
func (h *harness) ready(ctx context.Context, name string, w how, s setting) (sample Sample, err error) {
	var began time.Time
	r, err := h.open(ctx, name, w, s, func(r *running) error {
		err := h.servers.publish(ctx, r.queue, r.task(contender.Mark, 0))
		began = time.Now()
		return err
	})
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	at, err := r.mark(ctx)
	if err != nil {
		return sample, err
	}
	sample.CPU = h.usage(r.process).perTask(usage{}, 1)
	delete(sample.CPU, "broker") // they have worked before, too
	delete(sample.CPU, "database")
	sample.Values = []float64{at.Sub(began).Seconds() * 1000}
	return sample, h.finish(ctx, r, s, &sample)
}

// memory compares a contender's memory before and after it has worked.
func (h *harness) memory(ctx context.Context, name string, w how, s setting, tasks int) (sample Sample, err error) {
	r, err := h.open(ctx, name, w, s, func(r *running) error {
		return h.servers.publish(ctx, r.queue, r.task(contender.Mark, 0))
	})
	if err != nil {
		return sample, err
	}
	defer r.end(&err)
	send := func(n int) error {
		var messages []amqp.Publishing
		for range n {
			messages = append(messages, r.task(contender.Noop, 3))
		}
		return h.servers.publish(ctx, r.queue, append(messages, r.task(contender.Mark, 0))...)
	}
	measure := func() error {
		if _, err := r.mark(ctx); err != nil {
			return err
		}
		sample.Values = append(sample.Values, memoryOf(r.pid())/1e6)
		return nil
	}
	if err := measure(); err != nil {
		return sample, err
	}
	if err := send(tasks); err != nil {
		return sample, err
	}
	if err := measure(); err != nil {
		return sample, err
	}
	return sample, h.finish(ctx, r, s, &sample)
}

// percentile returns the smallest value that p percent of the values do not exceed.
func percentile(values []float64, p float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	if len(sorted) == 0 {
		return math.NaN()
	}
	return sorted[max(0, int(math.Ceil(p/100*float64(len(sorted))))-1)]
}

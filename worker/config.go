package worker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/results"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Config configures a [Worker]. Queues, routes and defaults must be equal to
// those of the Python workers that it replaces or runs beside: the worker that
// publishes the next task of a chain decides where it goes, by its own routes
// and default queue (docs/celery.md#routing).
type Config struct {
	// Broker is Celery's broker_url: an address as kombu reads it (amqp://,
	// pyamqp:// or amqps://), or several separated by ";", tried in turn until
	// one answers. A missing part gets kombu's default. Special characters in a
	// password are literal, except those that end it. The options heartbeat,
	// ssl_ca_certs, ssl_certfile and ssl_keyfile are applied. Required, unless
	// Transport is set.
	Broker string
	// TLS is the configuration for amqps:// brokers; files that Broker names are
	// then ignored. Nil means: use these files, or else the system's root
	// certificates. Without a ServerName, the certificate is verified for the host of
	// the URL as it is written; that of localhost may also be for 127.0.0.1, where the
	// connection goes.
	TLS *tls.Config

	// Transport, if it is set, is used in place of the broker that Broker names: that
	// of package broker/memory in tests, or one that this package does not have.
	// Broker, TLS and Heartbeat are then not used.
	Transport broker.Broker

	// Queues are the names of the queues to consume. At least one is required.
	Queues []string
	// TaskQueues declare queues, those that are consumed as well as those that
	// the worker only publishes to. A queue that is not listed is declared as
	// Celery declares a missing one: durable, with a direct exchange and a
	// routing key that both have the queue's name. If one is a quorum queue, the
	// worker also declares what Celery's producers need to delay messages for those
	// of Queues whose exchange is not direct (docs/celery.md#delayed-delivery).
	TaskQueues []Queue
	// RefuseUnknownQueues turns Celery's task_create_missing_queues off. A
	// queue in Queues that TaskQueues lacks is then a configuration error, and a
	// signature with such a queue cannot be published.
	RefuseUnknownQueues bool

	// DefaultQueue is the queue of tasks for which neither the signature nor a
	// route gives a queue. Defaults to the first of Queues.
	DefaultQueue string
	// DefaultExchange is the exchange of TaskQueues without Exchange. Defaults
	// to DefaultQueue.
	DefaultExchange string
	// DefaultRoutingKey is the routing key of TaskQueues without RoutingKey.
	// Defaults to the name of the queue.
	DefaultRoutingKey string
	// TaskRoutes choose the destination of tasks that this worker publishes, by
	// the task's name. The first match applies, exact names before patterns.
	// Queue, exchange and routing key in a signature take precedence.
	TaskRoutes []Route

	// Slots is the number of tasks that run at the same time. Defaults to 1.
	Slots int
	// Prefetch is how many unacknowledged messages of each consumed queue the
	// broker sends to this worker: Celery's worker_prefetch_multiplier times
	// worker_concurrency. Those beyond Slots wait in this process, where no other
	// worker can take them. Defaults to Slots; a smaller value is raised to Slots.
	Prefetch int
	// Node is the worker's name in result rows, as name@host. Defaults to
	// celery@HOSTNAME.
	Node string

	// Results stores the results, for instance a backend of package
	// results/postgres. Nil means that none are stored: AsyncResult.get then waits
	// until its own timeout.
	Results results.Backend
	// ResultExpires is Celery's result_expires: the age at which results are removed by
	// the task celery.backend_cleanup, which Celery's beat sends once a day. The worker
	// has that task if Results is a [results.Cleaner], such as the backend of package
	// results/postgres, and the program has not registered one of that name. Defaults to
	// one day, as in Celery; negative means that results never expire: the task then
	// removes nothing.
	ResultExpires time.Duration
	// TrackStarted stores a STARTED row when a task begins.
	TrackStarted bool
	// StoreErrorsEvenIfIgnored stores FAILURE, RETRY and REVOKED rows even for tasks
	// whose results are ignored: Celery's task_store_errors_even_if_ignored. The row of
	// a task that succeeds after a retry stays RETRY then, since no SUCCESS is stored.
	StoreErrorsEvenIfIgnored bool

	// TimeLimit applies where neither the message nor the registration of the
	// task gives a limit. Zero means no limit.
	TimeLimit protocol.TimeLimit
	// MaxETA is how many delayed messages (with a future ETA, or in a pause) the
	// worker keeps per queue without reducing what it receives: each raises the
	// total prefetch count by one. Beyond that, delayed messages use up Prefetch. So
	// does each of them on RabbitMQ's queues with x-single-active-consumer, where no
	// consumer can be added: set Prefetch to more than can be delayed there.
	// Defaults to 1000.
	MaxETA int

	// Unregistered chooses what happens to messages of tasks without a handler
	// in this worker. Defaults to RejectUnregistered.
	Unregistered Unregistered
	// Undecodable chooses what happens to messages whose body is not JSON or
	// cannot be decompressed. Defaults to RejectUndecodable.
	Undecodable Undecodable

	// DeadLetterQueue receives every message that would be rejected because it
	// cannot be decoded, its task is not registered or has reached [MaxStarts]:
	// unchanged, with the headers [HeaderReason], [HeaderQueue] and [HeaderTime]
	// added. The worker declares it as durable if it does not exist. Empty means that the worker
	// rejects such messages as Celery does; a dead-letter exchange of the queue,
	// if there is one, then receives them.
	DeadLetterQueue string

	// StartTimeout is how long Run tries to make the first connection.
	// Afterwards it reconnects without a time limit. Defaults to 30 s; negative
	// means one attempt per broker.
	StartTimeout time.Duration
	// Heartbeat is the interval between the signs of life that the worker and the
	// broker exchange, as the worker proposes it. The worker notices a dead connection
	// after one and a half intervals. Defaults to the longest heartbeat option in
	// Broker, or 10 s.
	Heartbeat time.Duration
	// RecordTimeout is how long a connected worker tries to publish a task's
	// follow-up messages and to store its result before it requeues the task's
	// message. Time without a connection does not count, nor does time in which
	// the broker accepts no messages. Defaults to 5 min.
	RecordTimeout time.Duration
	// ShutdownTimeout is how long running tasks may continue after Run's context
	// has ended. Defaults to 1 h; negative cancels them at once.
	ShutdownTimeout time.Duration
	// StopTimeout is how long handlers have to return, and the worker to record
	// what they return, after the shutdown has cancelled their context. Nine
	// tenths of it are for the handlers. Defaults to 10 s.
	StopTimeout time.Duration
	// BeforeStopped, if set, is called once at the end of a shutdown, when no
	// task runs any more and Publish still works. It is not called when Run could
	// not begin to consume. It is the place to hand work
	// over to other workers. The log line "worker has stopped" gets the returned
	// values as slog arguments. Its context has a deadline: the time that is left
	// of ShutdownTimeout and StopTimeout, but at least 0.5 s and at most 10 s.
	// StopNow shortens it to 1 s.
	BeforeStopped func(ctx context.Context) []any
	// HardLimitGrace is how long a handler may take to return after the hard
	// time limit has ended its context. After that the worker records the
	// failure without waiting for the handler. Defaults to 15 s.
	HardLimitGrace time.Duration

	// ErrorClasses give errors that handlers return their classes in Python, after those
	// of the task's own option [ErrorClasses].
	ErrorClasses []ErrorClass
	// OnError, if set, is called after each attempt that has failed, also when the task
	// will be retried: for a service that collects errors, for instance. The outcome is
	// recorded by then. ctx is not the handler's, which may have ended. The attempt's slot
	// is free when OnError returns. A panic is logged.
	OnError func(ctx context.Context, f TaskFailure)

	// Logger gets the worker's log lines: the end of each task at level Info, or
	// Warn if it failed, lost connections at Warn, and the begin of consuming at
	// Debug (see [Worker.Started]). Nil discards them.
	Logger *slog.Logger
	// Metrics registers the worker's collectors. Nil means no metrics. Workers
	// of one process need registerers with different labels.
	Metrics prometheus.Registerer
	// Now returns the current time. Defaults to time.Now.
	Now func() time.Time
}

// Queue is the declaration of a queue with its exchange and binding, like
// kombu's Queue (docs/celery.md#queues-and-exchanges). All are durable. Only Name is
// required. See [broker.Queue] for its fields.
type Queue = broker.Queue

// Route gives tasks whose name matches a destination.
type Route struct {
	// Task is a name, or, if it has a *, a pattern as in Python's fnmatch: * stands
	// for any text, ? for one character, [a-c] for one of a set and [!a-c] for any
	// other. As in Celery, ? and [ mean themselves in a text without a *.
	Task string
	// Queue is the name of a queue. Alternatively, Exchange and RoutingKey are
	// used as given.
	Queue      string
	Exchange   string
	RoutingKey string
}

// Unregistered is what a worker does with messages of tasks without a handler
// (docs/celery.md#bad-messages).
type Unregistered int

const (
	// RejectUnregistered rejects the message without requeue and stores
	// FAILURE NotRegistered, as Celery does.
	RejectUnregistered Unregistered = iota
	// RequeueUnregistered requeues the message after a pause of 5 s, for another
	// worker that has the task. If no worker has it, this repeats for ever.
	RequeueUnregistered
)

// Undecodable is what a worker does with messages whose body it cannot decode. As
// in Celery, no result is stored for them: AsyncResult.get waits until its own
// timeout (docs/celery.md#bad-messages).
type Undecodable int

const (
	// RejectUndecodable rejects without requeue, so that a dead-letter
	// exchange can receive the message.
	RejectUndecodable Undecodable = iota
	// AckUndecodable acknowledges, as Celery does: the message is lost.
	AckUndecodable
)

// WithDefaults returns a copy in which every unset field has its default.
func (c Config) WithDefaults() Config {
	if c.DefaultQueue == "" && len(c.Queues) > 0 {
		c.DefaultQueue = c.Queues[0]
	}
	if c.DefaultExchange == "" {
		c.DefaultExchange = c.DefaultQueue
	}
	if c.Slots == 0 {
		c.Slots = 1
	}
	c.Prefetch = max(c.Prefetch, c.Slots)
	if c.Node == "" {
		c.Node = "celery@" + hostname()
	}
	if c.MaxETA == 0 {
		c.MaxETA = 1000
	}
	setDuration(&c.ResultExpires, 24*time.Hour)
	setDuration(&c.StartTimeout, 30*time.Second)
	if brokers, err := address.ParseBrokers(c.Broker); err == nil && c.Heartbeat == 0 {
		for _, b := range brokers {
			c.Heartbeat = max(c.Heartbeat, b.Heartbeat)
		}
	}
	setDuration(&c.Heartbeat, 10*time.Second)
	setDuration(&c.RecordTimeout, 5*time.Minute)
	setDuration(&c.ShutdownTimeout, time.Hour)
	setDuration(&c.StopTimeout, 10*time.Second)
	setDuration(&c.HardLimitGrace, 15*time.Second)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	return c
}

func setDuration(d *time.Duration, value time.Duration) {
	if *d == 0 {
		*d = value
	}
}

// Validate returns an error that names every invalid field with its value, or
// nil. It connects to nothing, but reads the certificate files in Broker.
func (c Config) Validate() error {
	var problems []error
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }

	transport, invalid := c.transport()
	if c.Broker == "" && c.Transport == nil {
		bad("Broker is empty: give an amqp:// URL")
	} else if invalid != nil {
		bad("Broker is %w", invalid)
	}
	if len(c.Queues) == 0 {
		bad("Queues is empty: give at least one queue to consume")
	}
	declared := map[string]bool{}
	for _, q := range c.TaskQueues {
		if declared[q.Name] {
			bad("TaskQueues names queue %q twice", q.Name)
		}
		declared[q.Name] = true
		if q.Name == "" || len(q.Name) > 255 || len(q.Exchange) > 255 || len(q.RoutingKey) > 255 {
			bad("TaskQueues: queue %q needs a name of 1 to 255 bytes, and exchange and routing key of at most 255", q.Name)
		}
		switch q.ExchangeType {
		case "", "direct", "topic", "fanout", "headers":
		default:
			bad("TaskQueues: queue %q has exchange type %q, want direct, topic, fanout or headers", q.Name, q.ExchangeType)
		}
		if err := transport.CheckQueue(q); err != nil {
			bad("TaskQueues: queue %q: %w", q.Name, err)
		}
	}
	if len(c.DeadLetterQueue) > 255 {
		bad("DeadLetterQueue is a name of %d bytes, want at most 255", len(c.DeadLetterQueue))
	}
	consumed := map[string]bool{}
	for _, name := range c.Queues {
		if name == "" || len(name) > 255 {
			bad("Queues has the name %q, want 1 to 255 bytes", name)
		}
		if consumed[name] {
			bad("Queues names %q twice", name)
		}
		consumed[name] = true
		if name != "" && name == c.DeadLetterQueue {
			bad("DeadLetterQueue is %q, which this worker consumes: its messages would circulate for ever", name)
		}
		if c.RefuseUnknownQueues && !declared[name] {
			bad("Queues names %q, which TaskQueues does not declare, and RefuseUnknownQueues is set", name)
		}
	}
	for _, r := range c.TaskRoutes {
		if r.Task == "" {
			bad("TaskRoutes has a route without a task name")
		}
		if r.Queue == "" && (r.Exchange == "" || r.RoutingKey == "") {
			bad("TaskRoutes: the route of %q names neither a queue nor both exchange and routing key", r.Task)
		}
	}
	for _, class := range c.ErrorClasses {
		if class.Match == nil || class.Type == "" {
			bad("ErrorClasses has a class %q without Match or Type", class.Type)
		}
	}
	if c.Slots < 0 || c.Slots > 65535 {
		bad("Slots is %d, want 1 to 65535", c.Slots)
	}
	if c.Prefetch < 0 || c.Prefetch > 65535 {
		bad("Prefetch is %d, want 1 to 65535", c.Prefetch)
	}
	if c.MaxETA < 0 || c.MaxETA+max(c.Slots, c.Prefetch) > 65535 {
		bad("MaxETA is %d, want 0 to 65535 together with Slots and Prefetch", c.MaxETA)
	}
	if c.Node != "" && !nodeName.MatchString(c.Node) {
		bad("Node is %q, want name@host", c.Node)
	}
	if c.TimeLimit.Hard < 0 || c.TimeLimit.Soft < 0 {
		bad("TimeLimit is %v/%v, want no negative value", c.TimeLimit.Soft, c.TimeLimit.Hard)
	}
	for name, d := range map[string]time.Duration{"Heartbeat": c.Heartbeat, "RecordTimeout": c.RecordTimeout, "StopTimeout": c.StopTimeout, "HardLimitGrace": c.HardLimitGrace} {
		if d < 0 {
			bad("%s is %v, want a positive duration", name, d)
		}
	}
	if len(problems) == 0 {
		return nil
	}
	return fmt.Errorf("worker configuration: %w", errors.Join(problems...))
}

var nodeName = regexp.MustCompile(`^[^@\s]+@[^@\s]+$`)

func hostname() string {
	name, err := os.Hostname()
	if err != nil || strings.TrimSpace(name) == "" {
		return "localhost"
	}
	return name
}

package worker

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Config says where a worker's tasks come from and how it treats them. Queues,
// routes and defaults must be those of the Python workers that it replaces or
// stands beside: a chain's later links go to the *publishing* worker's default
// route (docs/celery.md#routing).
type Config struct {
	// Broker is Celery's broker_url: an address as kombu reads it (amqp://,
	// pyamqp:// or amqps://), or several separated by ";", tried in turn until
	// one answers. A missing part has kombu's default, what stands in a
	// password counts literally unless it ends it, and the options heartbeat,
	// ssl_ca_certs, ssl_certfile and ssl_keyfile are honoured. Required.
	Broker string
	// TLS is used for brokers that are reached by TLS, and wins over the files
	// that Broker names. Nil means those, or the system's roots, and the host
	// name of the URL.
	TLS *tls.Config

	// Queues are the names of the queues to consume. At least one is required.
	Queues []string
	// TaskQueues say how queues are declared, consumed or only published to.
	// A queue that is not listed is declared as Celery declares a missing
	// one: durable, with a direct exchange and a routing key of its own name.
	TaskQueues []Queue
	// RefuseUnknownQueues turns Celery's task_create_missing_queues off: a
	// queue in Queues that TaskQueues lacks is then a start error, and a
	// signature that names one cannot be published.
	RefuseUnknownQueues bool

	// DefaultQueue is where tasks go whose signature and route name no
	// queue. Defaults to the first of Queues.
	DefaultQueue string
	// DefaultExchange is the exchange of TaskQueues that name none. Defaults
	// to DefaultQueue.
	DefaultExchange string
	// DefaultRoutingKey is the key of TaskQueues that name none. Defaults to
	// the name of the queue.
	DefaultRoutingKey string
	// TaskRoutes send tasks by name; the first that fits is taken, exact
	// names before patterns. What a signature says itself wins.
	TaskRoutes []Route

	// Slots is the number of tasks that run at once. Defaults to 1.
	Slots int
	// Prefetch is how many messages of each consumed queue the broker hands
	// out before one is acknowledged: Celery's multiplier times concurrency.
	// What is more than Slots waits here, unseen by other workers. Defaults to
	// Slots, and is never less.
	Prefetch int
	// Node is the worker's name in result rows, as name@host. Defaults to
	// celery@ and the host's name.
	Node string

	// Results keeps the results. Nil means that none are kept.
	Results ResultBackend
	// TrackStarted stores a STARTED row when a task begins.
	TrackStarted bool
	// StoreErrorsEvenIfIgnored stores FAILURE rows also for tasks whose
	// results are ignored.
	StoreErrorsEvenIfIgnored bool

	// TimeLimit applies to tasks for which neither the message nor the
	// registration gives a limit. Zero means none.
	TimeLimit protocol.TimeLimit
	// MaxETA bounds how many messages with a future ETA are held in memory,
	// per queue; each of them raises the prefetch count by one. More wait in
	// the queue. Defaults to 1000.
	MaxETA int

	// Unregistered says what happens to tasks that have no handler here.
	// Defaults to RejectUnregistered.
	Unregistered Unregistered
	// Undecodable says what happens to bodies that are no JSON or cannot be
	// decompressed. Defaults to RejectUndecodable.
	Undecodable Undecodable

	// DeadLetterQueue, if set, gets every message that would be rejected
	// because it cannot be decoded or its task is not registered: the message
	// as it came, to which [HeaderReason], [HeaderQueue] and [HeaderTime] are
	// added. It is declared durable if it does not exist. Empty means that
	// such messages are rejected, as Celery does, for a dead-letter exchange
	// of the queue.
	DeadLetterQueue string

	// StartTimeout is how long Run keeps trying to reach a broker at first;
	// later losses are mended without limit. Defaults to 30 s; negative means
	// one attempt on each broker.
	StartTimeout time.Duration
	// Heartbeat is asked of the broker. A connection that died without a word
	// is noticed after one and a half of them. Defaults to the longest that
	// Broker names, or 10 s.
	Heartbeat time.Duration
	// SettleTimeout is how long a connected worker keeps trying to publish
	// what follows a task and to store its result before it hands the message
	// back to the broker. Defaults to 5 min.
	SettleTimeout time.Duration
	// ShutdownTimeout is how long running tasks may go on once Run's context
	// has ended. Defaults to 1 h; negative means not at all.
	ShutdownTimeout time.Duration
	// StopTimeout is how long tasks have to return after their context was
	// cancelled at shutdown. Defaults to 10 s.
	StopTimeout time.Duration
	// BeforeStopped, if set, is called once at the end of a shutdown, when no
	// task runs any more and Publish still works: for what this worker leaves to
	// others. What it returns goes to the log line "worker has stopped", as
	// slog takes it. Its context ends with what is left of ShutdownTimeout and
	// StopTimeout, after 10 s at the most, and a second after StopNow; it
	// always has half a second.
	BeforeStopped func(ctx context.Context) []any
	// HardLimitGrace is how long a handler may take to return after its hard
	// time limit, at which its context ends, before the task fails without it.
	// Defaults to 15 s.
	HardLimitGrace time.Duration

	// Logger gets one line per event that an operator may care about.
	// Defaults to discarding.
	Logger *slog.Logger
	// Metrics gets the collectors of this worker. Nil means none.
	Metrics prometheus.Registerer
	// Now tells the time. Defaults to time.Now.
	Now func() time.Time
}

// Queue is a declaration, as kombu's Queue
// (docs/celery.md#queues-and-exchanges). All queues are durable.
type Queue struct {
	// Name is required.
	Name string
	// Exchange the queue is bound to. Defaults to Config.DefaultExchange.
	Exchange string
	// ExchangeType is direct, topic, fanout or headers. Defaults to direct.
	ExchangeType string
	// RoutingKey of the binding. Defaults to Config.DefaultRoutingKey.
	RoutingKey string
	// Type is the argument x-queue-type: classic or quorum. Empty
	// means that the argument is absent, as Celery declares unless told.
	Type string
	// Arguments of queue.declare. Integers are sent as 32 bits wherever they
	// fit, as Python does.
	Arguments map[string]any
	// BindingArguments of queue.bind.
	BindingArguments map[string]any
	// ConsumerArguments of basic.consume, for instance x-priority.
	ConsumerArguments map[string]any
	// Passive declares nothing: the queue must exist, in whatever shape.
	Passive bool
}

// Route sends tasks whose name fits to a destination.
type Route struct {
	// Task is a name, or a pattern in which * stands for any text, ? for one
	// character and [abc] for one of a set.
	Task string
	// Queue is a name; or Exchange and RoutingKey are used as they are.
	Queue      string
	Exchange   string
	RoutingKey string
}

// Unregistered is a choice for tasks without a handler
// (docs/celery.md#bad-messages).
type Unregistered int

const (
	// RejectUnregistered rejects the message without requeue and stores
	// FAILURE NotRegistered, as Celery does.
	RejectUnregistered Unregistered = iota
	// RequeueUnregistered gives the message back, after a pause, for another
	// worker that knows the task. If there is none, it comes back for ever.
	RequeueUnregistered
)

// Undecodable is a choice for bodies that are not JSON.
type Undecodable int

const (
	// RejectUndecodable rejects without requeue, so that a dead-letter
	// exchange can catch the message.
	RejectUndecodable Undecodable = iota
	// AckUndecodable acknowledges, as Celery does.
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
	setDuration(&c.StartTimeout, 30*time.Second)
	if brokers, err := c.brokers(); err == nil && c.Heartbeat == 0 {
		for _, b := range brokers {
			c.Heartbeat = max(c.Heartbeat, b.Heartbeat)
		}
	}
	setDuration(&c.Heartbeat, 10*time.Second)
	setDuration(&c.SettleTimeout, 5*time.Minute)
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

// brokers are the addresses in Broker. The error shows no password.
func (c Config) brokers() ([]address.Broker, error) { return address.ParseBrokers(c.Broker) }

// Validate names every field that cannot be worked with, and its value.
func (c Config) Validate() error {
	var problems []error
	bad := func(format string, args ...any) { problems = append(problems, fmt.Errorf(format, args...)) }

	if c.Broker == "" {
		bad("Broker is empty: give an amqp:// URL")
	} else if brokers, err := c.brokers(); err != nil {
		bad("Broker is %s: %w", address.MaskBrokers(c.Broker), err)
	} else if c.TLS == nil {
		for _, b := range brokers {
			if _, err := b.TLSConfig(); err != nil {
				bad("Broker is %s: %w", b.Masked(), err)
			}
		}
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
		for _, arguments := range []map[string]any{q.arguments(), q.BindingArguments, q.ConsumerArguments} {
			if _, err := amqpTable(arguments); err != nil {
				bad("TaskQueues: queue %q: %w", q.Name, err)
			}
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
			bad("DeadLetterQueue is %q, which is consumed here: its messages would go round for ever", name)
		}
		if c.RefuseUnknownQueues && !declared[name] {
			bad("Queues names %q, which TaskQueues does not declare, and RefuseUnknownQueues is set", name)
		}
	}
	for _, r := range c.TaskRoutes {
		if r.Task == "" {
			bad("TaskRoutes has a route without a task name")
		}
		if _, err := path.Match(r.Task, ""); err != nil {
			bad("TaskRoutes: %q is not a pattern: %w", r.Task, err)
		}
		if r.Queue == "" && (r.Exchange == "" || r.RoutingKey == "") {
			bad("TaskRoutes: the route of %q names neither a queue nor both exchange and routing key", r.Task)
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
		bad("TimeLimit is %v/%v, want none negative", c.TimeLimit.Soft, c.TimeLimit.Hard)
	}
	for name, d := range map[string]time.Duration{"Heartbeat": c.Heartbeat, "SettleTimeout": c.SettleTimeout, "StopTimeout": c.StopTimeout, "HardLimitGrace": c.HardLimitGrace} {
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

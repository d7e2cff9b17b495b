// Package broker says what a worker needs of a message broker. Package broker/amqp
// does it with RabbitMQ. A note at each method says how Redis will do it, with the
// keys that kombu uses there, so that Python workers can share its queues.
//
// A connection is never repaired: when a part of it fails, all of it is lost, and its
// user opens another one. A worker has two. A [Consumer] receives and settles; a
// [Publisher] publishes. A broker that lacks memory or disk space may read nothing
// from connections that publish, and settling must go on then.
//
// Many goroutines may use a connection at once. Every call ends with its context, or
// when the connection is lost.
package broker

import (
	"context"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Broker opens connections to one broker, or to the first that answers of several.
type Broker interface {
	// OpenConsumer connects and declares queues, with their exchanges and bindings.
	// The error is a [ConnectError], or a [MismatchError] when the broker has a
	// declaration with other properties.
	//
	// Redis: one connection for commands, and one for BRPOP, which blocks. A list
	// needs no declaration: SADD adds the binding to _kombu.binding.EXCHANGE.
	OpenConsumer(ctx context.Context, queues []Queue) (Consumer, error)
	// OpenPublisher connects.
	//
	// Redis: one connection for commands.
	OpenPublisher(ctx context.Context) (Publisher, error)
	// Inspect connects and checks queues. It creates nothing and takes no message.
	// The error says why the check was not possible; what is wrong with a queue is
	// in its QueueInspection.
	//
	// Redis: TYPE and LLEN of the lists of each queue, SISMEMBER of its binding, and
	// ACL DRYRUN of the commands that a worker sends.
	Inspect(ctx context.Context, queues []Queue) (Inspection, error)
	// CheckQueue returns an error if a declaration cannot be sent. It does not
	// connect.
	//
	// Redis: an exchange of type headers is an error.
	CheckQueue(q Queue) error
	// CheckMessage returns an [UnsendableError] if a message cannot be sent. It does
	// not connect.
	//
	// Redis: nil, since the message becomes a JSON text of up to 512 MiB.
	CheckMessage(m protocol.Publishing) error
}

// Connection is what a Consumer and a Publisher have in common.
type Connection interface {
	// Place names the broker in logs and errors, as host:port/vhost.
	Place() string
	// Lost is closed when the connection is lost or closed. Err is the reason then.
	//
	// Redis: a command that fails, or that has no answer in time, loses both
	// connections of a Consumer.
	Lost() <-chan struct{}
	Err() error
	// Close closes the connection. Messages that are not settled go back to their
	// queues. It returns when nothing is delivered any more.
	//
	// Redis: the messages stay in the hash unacked; Close returns them to their lists
	// by the script of Requeue. After a crash kombu's rule does it, in whatever worker
	// looks first: those whose time in unacked_index is older than the visibility
	// timeout.
	Close()
}

// Consumer is a connection that receives messages and settles them.
type Consumer interface {
	Connection
	// Subscribe begins to receive the messages of a queue. The broker sends at most
	// limit messages that are not settled. It calls deliver for each, in the order of
	// the queue; deliver does not wait for the message's end, except for one with
	// PassOn. When the broker ends the subscription, the connection is lost.
	//
	// Redis: a goroutine that waits until fewer than limit are not settled, and then
	// takes one message from the lists of the queue's priorities. A crash after
	// kombu's BRPOP loses it. So a script takes it and adds it to unacked and
	// unacked_index. While the lists are empty, the goroutine tries again every
	// second, and at once when it sees a message: BLMOVE from a list to the same end
	// of the same list waits for one and moves none.
	Subscribe(ctx context.Context, q Queue, limit int, deliver func(Delivery)) (Subscription, error)
	// Depth asks how many messages are ready in a queue: those that no worker has
	// received. It is a [MismatchError] when the queue does not exist.
	//
	// Redis: the sum of LLEN. A list that does not exist is empty, and no error.
	Depth(ctx context.Context, queue string) (int, error)
	// Consumers asks how many consumers a queue has. The broker may take any time
	// to answer. It is an error when this connection adds or ends one meanwhile.
	//
	// Redis: the server does not know it. Consumers of this package will keep their
	// names in a sorted set with the time. Those of Python do not, so that Other is
	// always at least 1: no worker may wrongly consider itself alone.
	Consumers(ctx context.Context, queue string) (Consumers, error)
}

// Getter is a Consumer that can take single messages without a subscription, as AMQP's
// basic.get does.
type Getter interface {
	Consumer
	// Get takes the first ready message of a queue, and says how many are ready behind
	// it. ok is false if none is ready. The error is a [MismatchError] when the queue
	// does not exist or cannot be used like this; the connection is lost then.
	//
	// Redis: the script of Subscribe, once.
	Get(ctx context.Context, q Queue) (d Delivery, behind int, ok bool, err error)
}

// Subscription is the receiving of a queue on a connection.
type Subscription interface {
	// Delay says how many of the messages that are not settled only wait for a time:
	// the broker sends about that many more than the limit. There is one call of it at a
	// time.
	//
	// Redis: adds the number to the limit.
	Delay(ctx context.Context, messages int)
	// Stop ends the subscription. What was delivered can still be settled. When Stop
	// returns, either nothing more is delivered, or ctx has ended or the connection is
	// lost.
	//
	// Redis: ends the goroutine.
	Stop(ctx context.Context)
}

// Delivery is a message that the broker has given to this connection.
type Delivery struct {
	// Message is the message with its address, as it came.
	Message protocol.Delivery
	// Returns is how often the queue has counted the message as returned to it, and
	// ReturnLimit after how many of them it drops the message; 0 means never.
	//
	// Redis: both are 0. Message.Redelivered is the field redelivered of the
	// message's delivery_info, which the script of Requeue sets.
	Returns, ReturnLimit int
	// PassOn is set if the broker sends nothing else to the goroutine that calls deliver
	// until this message is settled: then deliver may return when the message's task has
	// ended, which saves a change of goroutines. It calls PassOn before it settles the
	// message without returning at once, or before it ends its goroutine: another
	// goroutine receives from then on. Further calls do nothing.
	//
	// Redis: nil.
	PassOn func()
	Receipt
}

// Receipt settles one delivery, by one call of Ack, Reject or Requeue. They do not wait
// for the broker. If one fails, the connection is lost, and the message goes back to
// its queue; on a lost connection they do nothing.
type Receipt interface {
	// Ack says that the message is done.
	//
	// Redis: ZREM from unacked_index and HDEL from unacked, in one transaction.
	Ack()
	// Reject drops the message, or gives it to the queue's dead-letter exchange.
	//
	// Redis: as Ack.
	Reject()
	// Requeue returns the message to its queue.
	//
	// Redis: a script that does as Ack and RPUSHes the message, marked as
	// redelivered, to the end of its list from which the next one is taken.
	Requeue()
	// StillUnacked asks whether the message is still unsettled: nil means that this
	// was true at a moment during the call, and that until then the broker had
	// given the message to no other consumer.
	//
	// Redis: a script that renews the time in unacked_index if the message is there.
	StillUnacked(ctx context.Context) error
	// Copy returns the message as a publication to its queue and to no other, without
	// what the broker has added to it.
	//
	// Redis: the message with a new delivery_tag.
	Copy() protocol.Publishing
}

// Publisher is a connection that publishes.
type Publisher interface {
	Connection
	// Publish publishes a message and waits until the broker has it: nil means that
	// it is in a queue. What the broker says about a message is told to its caller
	// alone:
	//
	//   - ErrUnroutable: no queue takes it.
	//   - an [UnsendableError]: it cannot be sent.
	//   - ErrUnreachable: the connection was lost. Then, and when ctx ends first, the
	//     message may or may not be in a queue.
	//
	// If declare is not nil, Publish declares this queue first, once on this
	// connection, and again when it was deleted. A queue that exists with other
	// properties is used as it is. Without an Exchange, the queue is declared alone.
	//
	// While the broker accepts no messages, Publish waits.
	//
	// Redis: LPUSH to the list of queue and priority, or to those that
	// _kombu.binding.EXCHANGE names, by the rules of the exchange's type;
	// ErrUnroutable if there is none. The answer is the confirm. A server that
	// answers OOM accepts no messages: Publish tries again.
	Publish(ctx context.Context, m protocol.Publishing, declare *Queue) error
	// Broadcast publishes a message to everybody who listens at m.Exchange, as
	// Celery's remote control does. ErrUnroutable: nobody listens.
	//
	// Redis: PUBLISH to /DB.EXCHANGE; the answer is the number of listeners.
	Broadcast(ctx context.Context, m protocol.Publishing) error
	// Blocked is for how long, in total, the broker has accepted no messages on this
	// connection.
	//
	// Redis: the time from an answer OOM to the next LPUSH that succeeds.
	Blocked() time.Duration
}

// Publication is a message for a [BatchPublisher], with the arguments of Publish.
type Publication struct {
	Message protocol.Publishing
	Declare *Queue
}

// BatchPublisher is a Publisher that can send several messages before it waits for the
// broker. A worker whose Publisher is none publishes one by one.
type BatchPublisher interface {
	Publisher
	// PublishAll does for each message what Publish does, and returns its error, or nil,
	// for each. The messages are sent in their order, except for one that the broker does
	// not take at first. An error of one message does not keep the others from being
	// sent.
	//
	// Redis: a pipeline.
	PublishAll(ctx context.Context, messages []Publication) []error
}

// Consumers is how many consumers a queue has, as the broker counts them.
type Consumers struct {
	// Own are those of this worker, Other those of all other programs: other
	// workers of this package as well as Python workers. Own may be too low, but not
	// too high; Other may be too high, but not too low: the consumers of a lost
	// connection count until the broker notices the loss.
	Own, Other int
}

// Inspection is the result of [Broker.Inspect].
type Inspection struct {
	// Broker is the broker that answered, as host:port/vhost.
	Broker string
	// Server is the broker's product name and version.
	Server string
	// Queues has one element for each queue.
	Queues []QueueInspection
	// PublishErr is the error with which a task could not publish its follow-ups,
	// and the worker no copy of a message, or nil: compare with ErrPermission.
	PublishErr error
}

// QueueInspection describes a queue.
type QueueInspection struct {
	// Name and Exchange are those of the queue's declaration.
	Name, Exchange string
	// Exists and ExchangeExists say whether queue and exchange exist at the
	// broker. A worker creates those that do not.
	Exists, ExchangeExists bool
	// Type is the type of the queue, such as classic or quorum, or "" if the broker
	// did not report it.
	Type string
	// Messages is the number of ready messages, Consumers that of all consumers.
	Messages, Consumers int
	// Err is the error with which a worker would fail because of this queue, or nil:
	// compare with ErrMismatch and ErrPermission.
	Err error
}

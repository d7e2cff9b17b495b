// Package amqp is the [broker.Broker] for RabbitMQ, 3.10 to 4.3. All that a worker
// knows of channels, frames, field tables and quorum queues is here and in package
// worker/internal/wire.
//
// # Files
//
// connect.go dials, notices the loss of a connection, and lets each call of
// amqp091-go end with its context. consume.go has the consumers of a queue, settle.go
// a delivery until it is settled, publish.go the publications with their confirms,
// declare.go the declarations, delays.go those for Celery's delayed delivery, inspect.go
// the checks of an operator. table.go converts headers.
package amqp

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/address"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/internal/wire"
)

// Config says where the brokers are.
type Config struct {
	// Addresses are one or several addresses as kombu reads them, separated by ";".
	// They are tried in turn until one answers. Required.
	Addresses string
	// TLS is the configuration for amqps:// addresses. Nil means: the files that an
	// address names, or else the system's root certificates.
	TLS *tls.Config
	// Heartbeat is the interval that is proposed to the broker. Required.
	Heartbeat time.Duration
	// Name is the name of the connections at the broker, and begins the tags of
	// consumers.
	Name string
	// Delays says that Celery's producers delay messages for queues whose exchange is
	// not direct, by queues in the broker: OpenConsumer declares those, too. Celery does
	// this where a queue of its configuration is a quorum queue
	// (docs/celery.md#delayed-delivery).
	Delays bool
	// Logger gets a line when the broker accepts no messages, when it does again, when
	// a queue is used whose declaration differs, and when the queues of Delays cannot be
	// declared. Required.
	Logger *slog.Logger
}

// Validate returns an error for each address that cannot be used. It contains no
// password. It connects to nothing, but reads the certificate files of the addresses.
func (c Config) Validate() error {
	addresses, err := address.ParseBrokers(c.Addresses)
	if err != nil {
		return fmt.Errorf("%s: %w", address.MaskBrokers(c.Addresses), err)
	}
	var problems []error
	for _, at := range addresses {
		if c.TLS != nil {
			break
		}
		if _, err := at.TLSConfig(); err != nil {
			problems = append(problems, fmt.Errorf("%s: %w", at.Masked(), err))
		}
	}
	return errors.Join(problems...)
}

// Broker opens connections. [New] makes one.
type Broker struct{ cfg Config }

var _ broker.Broker = (*Broker)(nil)

// New returns a Broker. It connects to nothing.
func New(cfg Config) *Broker { return &Broker{cfg: cfg} }

// CheckQueue returns an error if an argument of the queue has no type in AMQP.
func (*Broker) CheckQueue(q broker.Queue) error {
	for _, arguments := range []map[string]any{declareArguments(q), q.BindingArguments, q.ConsumerArguments} {
		if _, err := amqpTable(arguments); err != nil {
			return err
		}
	}
	return nil
}

// CheckMessage returns a [broker.UnsendableError] if AMQP cannot carry the message.
func (*Broker) CheckMessage(m protocol.Publishing) error {
	_, err := amqpPublishing(m, wire.FrameSize)
	return err
}

package worker

import (
	"context"
	"errors"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Inspection is the result of [Worker.Inspect].
type Inspection struct {
	// Broker is the broker that answered, as host:port/vhost.
	Broker string
	// Server is the broker's product name and version.
	Server string
	// Queues has one element for each of Config.Queues.
	Queues []QueueInspection
}

// QueueInspection describes one of the queues of Config.Queues.
type QueueInspection struct {
	// Name and Exchange are those of the queue's declaration.
	Name, Exchange string
	// Exists and ExchangeExists say whether queue and exchange exist at the
	// broker. Run creates those that do not.
	Exists, ExchangeExists bool
	// Messages is the number of ready messages, Consumers that of all consumers.
	Messages, Consumers int
	// Err is the error with which Run would fail because of this queue, or nil:
	// compare with ErrMismatch and ErrPermission.
	Err error
}

// Inspect connects to the broker once and checks the consumed queues, without
// consuming or creating anything. It declares only queues and exchanges that
// exist, so that the broker compares their properties with the configured ones.
// The error says why the check was not possible; problems of single queues are
// in QueueInspection.Err. It needs no Run.
func (w *Worker) Inspect(ctx context.Context) (Inspection, error) {
	s, err := w.connect(ctx)
	if err != nil {
		return Inspection{}, err
	}
	defer s.close()
	product, _ := s.conn.Properties["product"].(string)
	version, _ := s.conn.Properties["version"].(string)
	found := Inspection{Broker: s.broker, Server: product + " " + version}
	for _, name := range w.cfg.Queues {
		queue, err := w.routes.queue(name)
		if err != nil {
			return found, err
		}
		inspected, err := s.inspect(queue)
		if err != nil {
			return found, err
		}
		found.Queues = append(found.Queues, inspected)
	}
	return found, nil
}

func (s *session) inspect(q Queue) (QueueInspection, error) {
	found := QueueInspection{Name: q.Name, Exchange: q.Exchange}
	arguments, err := amqpTable(q.arguments())
	if err != nil {
		return found, err
	}
	defer s.guard("an inspection")()
	// Each call has a channel of its own, because the broker closes a channel when
	// it refuses a declaration.
	call := func(method func(ch *amqp.Channel) error) error {
		ch, err := s.conn.Channel()
		if err != nil {
			return err
		}
		defer ch.Close()
		return method(ch)
	}
	exists := func(declarePassive func(ch *amqp.Channel) error) (bool, error) {
		err := call(declarePassive)
		var refused *amqp.Error
		if errors.As(err, &refused) && refused.Code == amqp.NotFound {
			return false, nil
		}
		return err == nil, err
	}
	found.ExchangeExists, err = exists(func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(q.Exchange, q.ExchangeType, true, false, false, false, nil)
	})
	if err == nil && found.ExchangeExists && !q.Passive {
		err = call(func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(q.Exchange, q.ExchangeType, true, false, false, false, nil)
		})
	}
	if err == nil {
		found.Exists, err = exists(func(ch *amqp.Channel) error {
			state, err := ch.QueueDeclarePassive(q.Name, true, false, false, false, nil)
			found.Messages, found.Consumers = state.Messages, state.Consumers
			return err
		})
	}
	if err == nil && found.Exists && !q.Passive {
		err = call(func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare(q.Name, true, false, false, false, arguments)
			return err
		})
	}
	if err == nil && q.Passive && !found.Exists {
		err = &amqp.Error{Code: amqp.NotFound, Reason: fmt.Sprintf("NOT_FOUND - no queue '%s'", q.Name), Server: true}
	}
	if err != nil {
		found.Err = s.declareError(q, err)
		if errors.Is(found.Err, ErrUnreachable) {
			return found, found.Err
		}
	}
	return found, nil
}

package worker

import (
	"context"
	"errors"
	"fmt"

	amqp "github.com/rabbitmq/amqp091-go"
)

// Inspection is what a worker would find at the broker.
type Inspection struct {
	// Broker is host:port/vhost of the one that answered, Server its name and
	// version.
	Broker, Server string
	Queues         []QueueInspection
}

// QueueInspection is one of the queues of Config.Queues.
type QueueInspection struct {
	Name, Exchange string
	// Exists and ExchangeExists say whether they are there; Run makes what is
	// not.
	Exists, ExchangeExists bool
	// Messages wait in it, Consumers take from it.
	Messages, Consumers int
	// Err says why Run could not use it, as Run would: compare with
	// ErrMismatch and ErrPermission.
	Err error
}

// Inspect looks at the broker as Run would, once and without consuming or
// making anything: only what is there already is declared, which the broker
// answers with its opinion. The error says why it could not be asked.
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
	// Each question has a channel of its own, as a refusal closes it.
	ask := func(question func(ch *amqp.Channel) error) error {
		ch, err := s.conn.Channel()
		if err != nil {
			return err
		}
		defer ch.Close()
		return question(ch)
	}
	there := func(question func(ch *amqp.Channel) error) (bool, error) {
		err := ask(question)
		var refused *amqp.Error
		if errors.As(err, &refused) && refused.Code == amqp.NotFound {
			return false, nil
		}
		return err == nil, err
	}
	found.ExchangeExists, err = there(func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(q.Exchange, q.ExchangeType, true, false, false, false, nil)
	})
	if err == nil && found.ExchangeExists && !q.Passive {
		err = ask(func(ch *amqp.Channel) error {
			return ch.ExchangeDeclare(q.Exchange, q.ExchangeType, true, false, false, false, nil)
		})
	}
	if err == nil {
		found.Exists, err = there(func(ch *amqp.Channel) error {
			state, err := ch.QueueDeclarePassive(q.Name, true, false, false, false, nil)
			found.Messages, found.Consumers = state.Messages, state.Consumers
			return err
		})
	}
	if err == nil && found.Exists && !q.Passive {
		err = ask(func(ch *amqp.Channel) error {
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

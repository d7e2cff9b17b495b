package worker

import (
	"cmp"
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
	// PublishErr says why a task could not send the next one, its result's
	// callbacks or a message that goes back to its queue; compare with
	// ErrPermission.
	PublishErr error
}

// QueueInspection is one of the queues of Config.Queues.
type QueueInspection struct {
	Name, Exchange string
	// Exists and ExchangeExists say whether they are there; Run makes what is
	// not.
	Exists, ExchangeExists bool
	// Type is classic, quorum or stream, "" if it could not be found out.
	Type string
	// Messages wait in it, Consumers take from it.
	Messages, Consumers int
	// Err says why Run could not use it, as Run would: compare with
	// ErrMismatch and ErrPermission.
	Err error
}

// Inspect looks at the broker as Run would, once and without consuming or
// making anything: only what is there already is declared, which the broker
// answers with its opinion. Rights that are needed only later are asked for by
// requests that the broker judges and then cannot carry out. The error says why
// it could not be asked.
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
	found.PublishErr = s.inspectPublishing(ctx)
	if errors.Is(found.PublishErr, ErrUnreachable) {
		return found, found.PublishErr
	}
	return found, nil
}

// inspectPublishing sends a message to the default exchange that no queue can
// get: it is returned, and kept nowhere.
func (s *session) inspectPublishing(ctx context.Context) error {
	defer s.guard("an inspection")()
	ch, err := s.conn.Channel()
	if err != nil {
		return s.lostBecause("an inspection", err)
	}
	defer ch.Close()
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	ch.NotifyReturn(make(chan amqp.Return, 1))
	if err := ch.Confirm(false); err != nil {
		return s.lostBecause("an inspection", err)
	}
	confirmed, err := ch.PublishWithDeferredConfirmWithContext(ctx, "", "mm-orchestrator.inspect."+newID(), true, false, amqp.Publishing{})
	if err != nil {
		return s.lostBecause("an inspection", err)
	}
	if acked, err := confirmed.WaitContext(ctx); acked || err != nil {
		return err
	}
	refused := <-closed
	switch {
	case refused == nil:
		return s.lostBecause("an inspection", amqp.ErrClosed)
	case refused.Code != amqp.AccessRefused:
		return s.lostBecause("an inspection", refused)
	}
	return fmt.Errorf("%w: publishing at %s: give the user write permission on the default exchange, amq.default, by which a task sends the next one (RabbitMQ: %s)",
		ErrPermission, s.broker, brokerText(refused))
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
	if err == nil && found.Exists && found.ExchangeExists && !q.Passive {
		// To remove a binding that is not there takes the rights that it takes
		// to bind, and does nothing.
		err = ask(func(ch *amqp.Channel) error {
			return ch.QueueUnbind(q.Name, "mm-orchestrator.inspect."+newID(), q.Exchange, nil)
		})
	}
	if err == nil && found.Exists {
		found.Err, err = s.inspectConsuming(q, ask)
	}
	if err == nil && found.Exists {
		found.Type, err = inspectType(q, ask)
	}
	if err != nil {
		found.Err = s.declareError(q, err)
		if errors.Is(found.Err, ErrUnreachable) {
			return found, found.Err
		}
	}
	return found, nil
}

// inspectConsuming asks to consume with a priority that is no number: the
// broker looks at the user's rights first, and then refuses the priority.
func (s *session) inspectConsuming(q Queue, ask func(func(*amqp.Channel) error) error) (refusal, err error) {
	err = ask(func(ch *amqp.Channel) error {
		_, err := ch.Consume(q.Name, "", false, false, false, false, amqp.Table{"x-priority": "none"})
		return err
	})
	var refused *amqp.Error
	switch {
	case !errors.As(err, &refused):
		return nil, err
	case refused.Code == amqp.AccessRefused:
		return fmt.Errorf("%w: consuming queue %q at %s: give the user read permission on it (RabbitMQ: %s)", ErrPermission, q.Name, s.broker, brokerText(refused)), nil
	case refused.Code == amqp.PreconditionFailed:
		return nil, nil
	}
	return nil, err
}

// inspectType finds the type of a queue that is declared as ours. Where ours
// names none, a virtual host's default may have made it any.
func inspectType(q Queue, ask func(func(*amqp.Channel) error) error) (string, error) {
	if q.Type != "" {
		return q.Type, nil
	}
	if q.Passive {
		return "", nil
	}
	q.Type = "quorum"
	arguments, err := amqpTable(q.arguments())
	if err != nil {
		return "", err
	}
	err = ask(func(ch *amqp.Channel) error {
		_, err := ch.QueueDeclare(q.Name, true, false, false, false, arguments)
		return err
	})
	var refused *amqp.Error
	switch {
	case err == nil:
		return q.Type, nil
	case !errors.As(err, &refused):
		return "", err
	case refused.Code != amqp.PreconditionFailed:
		return "", nil
	}
	difference := mismatch(q, refused)
	if difference.Argument != "x-queue-type" {
		return "", nil
	}
	return cmp.Or(difference.Current, "classic"), nil
}

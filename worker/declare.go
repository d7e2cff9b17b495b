package worker

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// declare makes exchange, queue and binding as every Celery process does
// before it uses a queue (docs/celery.md#queues-and-exchanges). The error is a
// *MismatchError when something of another shape is there already; further
// bindings of the queue do not matter.
func (s *session) declare(q Queue) error {
	s.declareMu.Lock()
	defer s.declareMu.Unlock()
	if s.declared[q.Name] {
		return nil
	}
	defer s.guard("a declaration")()
	// A refusal closes the channel, so it is one of its own.
	ch, err := s.conn.Channel()
	if err != nil {
		return s.lostBecause("declaring", err)
	}
	defer ch.Close()
	if err := declareOn(ch, q); err != nil {
		return s.declareError(q, err)
	}
	s.declared[q.Name] = true
	return nil
}

// leaveDeclared takes a queue as it is, for the rest of the session.
func (s *session) leaveDeclared(name string) {
	s.declareMu.Lock()
	defer s.declareMu.Unlock()
	s.declared[name] = true
}

func declareOn(ch *amqp.Channel, q Queue) error {
	if q.Passive {
		_, err := ch.QueueDeclarePassive(q.Name, true, false, false, false, nil)
		return err
	}
	arguments, err := amqpTable(q.arguments())
	if err != nil {
		return err
	}
	binding, err := amqpTable(q.BindingArguments)
	if err != nil {
		return err
	}
	if err := ch.ExchangeDeclare(q.Exchange, q.ExchangeType, true, false, false, false, nil); err != nil {
		return err
	}
	if _, err := ch.QueueDeclare(q.Name, true, false, false, false, arguments); err != nil {
		return err
	}
	return ch.QueueBind(q.Name, q.RoutingKey, q.Exchange, false, binding)
}

// lostBecause wraps an error of the connection; what failed is retried on the
// next one.
func (s *session) lostBecause(what string, err error) error {
	return fmt.Errorf("%w: %s: %s: %w", ErrUnreachable, s.broker, what, err)
}

func (s *session) declareError(q Queue, err error) error {
	var refused *amqp.Error
	if !errors.As(err, &refused) {
		return s.lostBecause(fmt.Sprintf("declaring queue %q", q.Name), err)
	}
	switch refused.Code {
	case amqp.PreconditionFailed:
		return mismatch(q, refused)
	case amqp.NotFound:
		return &MismatchError{What: "queue", Name: q.Name, Exists: "nowhere", Want: "nothing (it is only to be found)",
			Cure: "Create the queue, or turn Passive off.", Broker: brokerText(refused)}
	case amqp.AccessRefused:
		return fmt.Errorf("%w: declaring queue %q at %s: give the user configure, write and read permission on it and on exchange %q (RabbitMQ: %s)",
			ErrPermission, q.Name, s.broker, q.Exchange, brokerText(refused))
	case amqp.ResourceLocked:
		return &MismatchError{What: "queue", Name: q.Name, Exists: "and is exclusive to another connection", Want: "it for everybody",
			Cure: "Stop that connection, or delete the queue.", Broker: brokerText(refused)}
	}
	if refused.Server {
		return fmt.Errorf("declaring queue %q at %s was refused (RabbitMQ: %s)", q.Name, s.broker, brokerText(refused))
	}
	return s.lostBecause(fmt.Sprintf("declaring queue %q", q.Name), refused)
}

func brokerText(err *amqp.Error) string { return fmt.Sprintf("%d %s", err.Code, err.Reason) }

// inequivalent is how RabbitMQ words a difference; it has no other way to
// tell which argument differs.
var inequivalent = regexp.MustCompile(`inequivalent arg '([^']*)' for (queue|exchange) '([^']*)' in vhost '[^']*': received (.+) but current is (.+)$`)

func mismatch(q Queue, refused *amqp.Error) *MismatchError {
	e := &MismatchError{What: "queue", Name: q.Name, Exists: "in another shape", Want: wanted(q),
		Cure: "Make TaskQueues say what exists, or delete the queue.", Broker: brokerText(refused)}
	parts := inequivalent.FindStringSubmatch(refused.Reason)
	if parts == nil {
		return e
	}
	e.Argument, e.What, e.Name = parts[1], parts[2], parts[3]
	e.Current = argumentValue(parts[5])
	e.Exists = fmt.Sprintf("with arguments {%s: %s}", e.Argument, e.Current)
	if e.Current == "" {
		e.Exists = fmt.Sprintf("without argument %s", e.Argument)
	}
	switch {
	case e.What == "exchange":
		e.Exists = fmt.Sprintf("with %s %s", e.Argument, e.Current)
		e.Want = "type " + q.ExchangeType + ", durable"
		e.Cure = "Set ExchangeType or Exchange of the queue in TaskQueues, or delete the exchange."
	case e.Argument == "durable", e.Argument == "auto_delete", e.Argument == "exclusive":
		e.Exists = fmt.Sprintf("with %s %s", e.Argument, e.Current)
		e.Want = "it durable"
		e.Cure = "Delete the queue."
	case e.Argument == "x-queue-type":
		e.Cure = "Set Type of the queue in TaskQueues, or delete the queue."
	default:
		e.Cure = "Set Arguments of the queue in TaskQueues, or delete the queue."
	}
	return e
}

var valueOfType = regexp.MustCompile(`^the value '(.*)' of type '[^']*'$`)

// argumentValue reads RabbitMQ's way to print a value: none, 'x', or
// "the value 'x' of type 't'".
func argumentValue(text string) string {
	if parts := valueOfType.FindStringSubmatch(text); parts != nil {
		return parts[1]
	}
	if text == "none" {
		return ""
	}
	return strings.Trim(text, "'")
}

func wanted(q Queue) string {
	arguments := q.arguments()
	if len(arguments) == 0 {
		return "none"
	}
	names := make([]string, 0, len(arguments))
	for name, value := range arguments {
		names = append(names, fmt.Sprintf("%s: %v", name, value))
	}
	slices.Sort(names)
	return "{" + strings.Join(names, ", ") + "}"
}

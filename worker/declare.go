package worker

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"
)

// declare declares exchange, queue and binding, once per connection, as every
// Celery process does before it uses a queue
// (docs/celery.md#queues-and-exchanges). It reports whether it has done so now. The
// error is a *MismatchError when the queue or the exchange exists with other
// properties. Additional bindings do no harm.
func (c *connection) declare(ctx context.Context, q Queue) (declared bool, err error) {
	declared, err = ask(ctx, c, callOptions{what: "a declaration", turn: c.declaring}, func() (bool, error) {
		if c.declared[q.Name] {
			return false, nil
		}
		// The broker closes the channel when it refuses a declaration, so that each
		// has a channel of its own.
		ch, err := c.conn.Channel()
		if err != nil {
			return false, err
		}
		defer ch.Close()
		if err := declareOn(ch, q); err != nil {
			return true, err
		}
		c.declared[q.Name] = true
		return true, nil
	})
	if err != nil && ctx.Err() == nil {
		err = c.declareError(q, err)
	}
	return declared, err
}

// acceptDeclaration uses a queue with the properties that it has at the broker,
// for the rest of the connection.
func (c *connection) acceptDeclaration(ctx context.Context, name string) error {
	return c.call(ctx, callOptions{turn: c.declaring}, func() error {
		c.declared[name] = true
		return nil
	})
}

// undeclare forgets that a queue was declared.
func (c *connection) undeclare(ctx context.Context, name string) {
	_ = c.call(ctx, callOptions{turn: c.declaring}, func() error {
		delete(c.declared, name)
		return nil
	})
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

// connectionError wraps a failure of the connection as ErrUnreachable, which
// callers retry on the next session.
func (c *connection) connectionError(what string, err error) error {
	return fmt.Errorf("%w: %s: %s: %w", ErrUnreachable, c.broker, what, err)
}

func (c *connection) declareError(q Queue, err error) error {
	var refused *amqp.Error
	if !errors.As(err, &refused) {
		return c.connectionError(fmt.Sprintf("declaring queue %q", q.Name), err)
	}
	switch refused.Code {
	case amqp.PreconditionFailed:
		return mismatch(q, refused)
	case amqp.NotFound:
		cure := "Create the queue."
		if q.Passive {
			cure = "Create the queue, or turn Passive off, so that the worker declares it."
		}
		return &MismatchError{What: "queue", Name: q.Name, Cure: cure, Broker: brokerText(refused)}
	case amqp.AccessRefused:
		return fmt.Errorf("%w: declaring queue %q at %s: give the user configure, write and read permission on it and on exchange %q (RabbitMQ: %s)",
			ErrPermission, q.Name, c.broker, q.Exchange, brokerText(refused))
	case amqp.ResourceLocked:
		return &MismatchError{What: "queue", Name: q.Name, Exists: "as an exclusive queue of another connection", Want: "a shared queue",
			Cure: "Stop that connection, or delete the queue.", Broker: brokerText(refused)}
	}
	if refused.Server {
		return fmt.Errorf("declaring queue %q at %s was refused (RabbitMQ: %s)", q.Name, c.broker, brokerText(refused))
	}
	return c.connectionError(fmt.Sprintf("declaring queue %q", q.Name), refused)
}

func brokerText(err *amqp.Error) string { return fmt.Sprintf("%d %s", err.Code, err.Reason) }

// differencePattern matches RabbitMQ's text about a difference. The protocol has
// no field that says which argument differs.
var differencePattern = regexp.MustCompile(`inequivalent arg '([^']*)' for (queue|exchange) '([^']*)' in vhost '[^']*': received (.+) but current is (.+)$`)

func mismatch(q Queue, refused *amqp.Error) *MismatchError {
	e := &MismatchError{What: "queue", Name: q.Name, Exists: "with other properties", Want: argumentsText(q),
		Cure: "Declare it in TaskQueues as it exists, or delete the queue.", Broker: brokerText(refused)}
	parts := differencePattern.FindStringSubmatch(refused.Reason)
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
		e.Want = "a durable queue"
		e.Cure = "Delete the queue."
	case e.Argument == "x-queue-type":
		e.Cure = "Set Type of the queue in TaskQueues, or delete the queue."
	default:
		e.Cure = "Set Arguments of the queue in TaskQueues, or delete the queue."
	}
	return e
}

var typedValue = regexp.MustCompile(`^the value '(.*)' of type '[^']*'$`)

// argumentValue parses a value as RabbitMQ prints it: none, 'x', or
// "the value 'x' of type 't'".
func argumentValue(text string) string {
	if parts := typedValue.FindStringSubmatch(text); parts != nil {
		return parts[1]
	}
	if text == "none" {
		return ""
	}
	return strings.Trim(text, "'")
}

// argumentsText describes the arguments with which the worker declares a queue.
func argumentsText(q Queue) string {
	arguments := q.arguments()
	if len(arguments) == 0 {
		return "no arguments"
	}
	names := make([]string, 0, len(arguments))
	for name, value := range arguments {
		names = append(names, fmt.Sprintf("%s: %v", name, value))
	}
	slices.Sort(names)
	return "arguments {" + strings.Join(names, ", ") + "}"
}

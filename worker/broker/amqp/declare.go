package amqp

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// declare declares a queue on a channel of its own, which the broker closes when it
// refuses. The error is a *broker.MismatchError when the queue or its exchange exists
// with other properties. Additional bindings do no harm.
func (c *connection) declare(ctx context.Context, q broker.Queue) error {
	err := c.call(ctx, callOptions{what: "a declaration"}, func() error {
		ch, err := c.conn.Channel()
		if err != nil {
			return err
		}
		defer ch.Close()
		return declareOn(ch, q)
	})
	if err != nil && ctx.Err() == nil {
		err = c.declareError(q, err)
	}
	return err
}

// declareOn declares exchange, queue and binding, as every Celery process does before
// it uses a queue (docs/celery.md#queues-and-exchanges).
func declareOn(ch *amqp.Channel, q broker.Queue) error {
	if q.Passive {
		_, err := ch.QueueDeclarePassive(q.Name, true, false, false, false, nil)
		return err
	}
	arguments, err := amqpTable(declareArguments(q))
	if err != nil {
		return err
	}
	binding, err := amqpTable(q.BindingArguments)
	if err != nil {
		return err
	}
	if q.Exchange != "" {
		if err := ch.ExchangeDeclare(q.Exchange, q.ExchangeType, true, false, false, false, nil); err != nil {
			return err
		}
	}
	if _, err := ch.QueueDeclare(q.Name, true, false, false, false, arguments); err != nil || q.Exchange == "" {
		return err
	}
	return ch.QueueBind(q.Name, q.RoutingKey, q.Exchange, false, binding)
}

func (c *connection) declareError(q broker.Queue, err error) error {
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
		return &broker.MismatchError{What: "queue", Name: q.Name, Cure: cure, Broker: "RabbitMQ: " + brokerText(refused)}
	case amqp.AccessRefused:
		return fmt.Errorf("%w: declaring queue %q at %s: give the user configure, write and read permission on it and on exchange %q (RabbitMQ: %s)",
			broker.ErrPermission, q.Name, c.place, q.Exchange, brokerText(refused))
	case amqp.ResourceLocked:
		return &broker.MismatchError{What: "queue", Name: q.Name, Exists: "as an exclusive queue of another connection", Want: "a shared queue",
			Cure: "Stop that connection, or delete the queue.", Broker: "RabbitMQ: " + brokerText(refused)}
	}
	if refused.Server {
		return fmt.Errorf("declaring queue %q at %s was refused (RabbitMQ: %s)", q.Name, c.place, brokerText(refused))
	}
	return c.connectionError(fmt.Sprintf("declaring queue %q", q.Name), refused)
}

func brokerText(err *amqp.Error) string { return fmt.Sprintf("%d %s", err.Code, err.Reason) }

// differencePattern matches RabbitMQ's text about a difference. The protocol has
// no field that says which argument differs.
var differencePattern = regexp.MustCompile(`inequivalent arg '([^']*)' for (queue|exchange) '([^']*)' in vhost '[^']*': received (.+) but current is (.+)$`)

func mismatch(q broker.Queue, refused *amqp.Error) *broker.MismatchError {
	e := &broker.MismatchError{What: "queue", Name: q.Name, Exists: "with other properties", Want: argumentsText(q),
		Cure: "Declare it in TaskQueues as it exists, or delete the queue.", Broker: "RabbitMQ: " + brokerText(refused)}
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
func argumentsText(q broker.Queue) string {
	arguments := declareArguments(q)
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

// declareArguments returns the arguments of queue.declare.
func declareArguments(q broker.Queue) map[string]any {
	arguments := maps.Clone(q.Arguments)
	if q.Type != "" {
		if arguments == nil {
			arguments = map[string]any{}
		}
		arguments["x-queue-type"] = q.Type
	}
	return arguments
}

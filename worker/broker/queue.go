package broker

// Queue is the declaration of a queue with its exchange and binding, like
// kombu's Queue (docs/celery.md#queues-and-exchanges). All are durable.
type Queue struct {
	// Name is required.
	Name string
	// Exchange is the exchange that the queue is bound to. Defaults to
	// Config.DefaultExchange of the worker.
	Exchange string
	// ExchangeType is direct, topic, fanout or headers. Defaults to direct.
	ExchangeType string
	// RoutingKey is the key of the binding. Defaults to
	// Config.DefaultRoutingKey of the worker.
	RoutingKey string
	// Type is the type of the queue where the broker has several: RabbitMQ's are
	// classic and quorum. Empty leaves the choice to the broker, as Celery does by
	// default.
	Type string
	// Arguments are further ones of the declaration, such as x-max-priority. Integers
	// that fit are sent with 32 bits, as Python sends them.
	Arguments map[string]any
	// BindingArguments are those of the binding.
	BindingArguments map[string]any
	// ConsumerArguments are those of the worker's consumers, such as x-priority.
	ConsumerArguments map[string]any
	// Passive means that the worker does not declare the queue. It must exist;
	// its properties are not compared.
	Passive bool
}

// WithDefaults returns a copy whose exchange and routing key, where they are unset, are
// those of a queue that Celery creates: both are the queue's name.
func (q Queue) WithDefaults() Queue {
	if q.Exchange == "" {
		q.Exchange = q.Name
	}
	if q.ExchangeType == "" {
		q.ExchangeType = "direct"
	}
	if q.RoutingKey == "" {
		q.RoutingKey = q.Name
	}
	return q
}

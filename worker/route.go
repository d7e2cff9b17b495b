package worker

import (
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// router chooses the destination of the messages that this worker publishes
// (docs/celery.md#routing).
type router struct {
	queues        map[string]Queue
	refuseUnknown bool
	defaultQueue  string
	exact         map[string]Route
	patterns      []patternRoute
}

// patternRoute is a route whose Task is a pattern.
type patternRoute struct {
	glob  glob
	route Route
}

func newRouter(cfg Config) router {
	r := router{
		queues:        map[string]Queue{},
		refuseUnknown: cfg.RefuseUnknownQueues,
		defaultQueue:  cfg.DefaultQueue,
		exact:         map[string]Route{},
	}
	for _, q := range cfg.TaskQueues {
		if q.Exchange == "" {
			q.Exchange = cfg.DefaultExchange
		}
		if q.RoutingKey == "" {
			q.RoutingKey = cfg.DefaultRoutingKey
		}
		r.queues[q.Name] = q.WithDefaults()
	}
	// A default queue that is not in TaskQueues has the default exchange and
	// routing key.
	if _, listed := r.queues[cfg.DefaultQueue]; !listed {
		q := Queue{Name: cfg.DefaultQueue, Exchange: cfg.DefaultExchange, RoutingKey: cfg.DefaultRoutingKey}
		r.queues[q.Name] = q.WithDefaults()
	}
	for _, route := range cfg.TaskRoutes {
		// Celery takes a key for a pattern only if it has a star (celery/app/routes.py,
		// MapRoute).
		if strings.Contains(route.Task, "*") {
			r.patterns = append(r.patterns, patternRoute{newGlob(route.Task), route})
		} else if _, earlier := r.exact[route.Task]; !earlier {
			r.exact[route.Task] = route
		}
	}
	return r
}

// queue returns the declaration of the named queue, or a default one if it is not
// configured and unknown queues are allowed.
func (r router) queue(name string) (Queue, error) {
	if q, ok := r.queues[name]; ok {
		return q, nil
	}
	if r.refuseUnknown {
		return Queue{}, fmt.Errorf("queue %q is not in TaskQueues, and RefuseUnknownQueues is set", name)
	}
	return Queue{Name: name}.WithDefaults(), nil
}

// destination is where a message is published. queue is declared first.
type destination struct {
	exchange, routingKey string
	queue                Queue
}

// resolve returns the destination of a message of the named task. The signature's
// own destination takes precedence over the routes, and these over the default
// queue.
func (r router) resolve(task string, own protocol.Destination) (destination, error) {
	d := own
	if route, ok := r.route(task); ok {
		if d.Queue == "" {
			d.Queue = route.Queue
		}
		if d.Exchange == "" {
			d.Exchange = route.Exchange
		}
		if d.RoutingKey == "" {
			d.RoutingKey = route.RoutingKey
		}
	}
	if d.Queue == "" {
		d.Queue = r.defaultQueue
	}
	queue, err := r.queue(d.Queue)
	if err != nil {
		return destination{}, err
	}
	to := destination{queue: queue}
	switch {
	case d.Exchange != "" && d.RoutingKey != "":
		to.exchange, to.routingKey = d.Exchange, d.RoutingKey
	case queue.ExchangeType == "direct":
		// The default exchange with the queue's name as the routing key reaches
		// the queue whatever its binding is, as Celery publishes.
		to.exchange, to.routingKey = "", queue.Name
	default:
		to.exchange, to.routingKey = d.Exchange, d.RoutingKey
		if to.exchange == "" {
			to.exchange = queue.Exchange
		}
		if to.routingKey == "" {
			to.routingKey = queue.RoutingKey
		}
	}
	return to, nil
}

func (r router) route(task string) (Route, bool) {
	if route, ok := r.exact[task]; ok {
		return route, true
	}
	for _, pattern := range r.patterns {
		if pattern.glob.match(task) {
			return pattern.route, true
		}
	}
	return Route{}, false
}

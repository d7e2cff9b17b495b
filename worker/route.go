package worker

import (
	"fmt"
	"maps"
	"path"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// router decides where messages of this worker's own go
// (docs/celery.md#routing).
type router struct {
	queues        map[string]Queue
	refuseUnknown bool
	defaultQueue  string
	exact         map[string]Route
	patterns      []Route
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
		r.queues[q.Name] = q.withDefaults()
	}
	// A default queue that is not listed has the default exchange and key.
	if _, listed := r.queues[cfg.DefaultQueue]; !listed {
		q := Queue{Name: cfg.DefaultQueue, Exchange: cfg.DefaultExchange, RoutingKey: cfg.DefaultRoutingKey}
		r.queues[q.Name] = q.withDefaults()
	}
	for _, route := range cfg.TaskRoutes {
		if strings.ContainsAny(route.Task, "*?[") {
			r.patterns = append(r.patterns, route)
		} else if _, earlier := r.exact[route.Task]; !earlier {
			r.exact[route.Task] = route
		}
	}
	return r
}

func (q Queue) withDefaults() Queue {
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

// arguments of queue.declare, the type included.
func (q Queue) arguments() map[string]any {
	arguments := maps.Clone(q.Arguments)
	if q.Type != "" {
		if arguments == nil {
			arguments = map[string]any{}
		}
		arguments["x-queue-type"] = q.Type
	}
	return arguments
}

// queue is the declaration of a name, made up if it is not configured.
func (r router) queue(name string) (Queue, error) {
	if q, ok := r.queues[name]; ok {
		return q, nil
	}
	if r.refuseUnknown {
		return Queue{}, fmt.Errorf("queue %q is not in TaskQueues, and RefuseUnknownQueues is set", name)
	}
	return Queue{Name: name}.withDefaults(), nil
}

// way is where a message goes and which queue is declared before.
type way struct {
	exchange, routingKey string
	queue                Queue
}

// resolve finds the way of a message of the named task. What the signature
// says (own) goes before the routes, and these before the default queue.
func (r router) resolve(task string, own protocol.Destination) (way, error) {
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
		return way{}, err
	}
	w := way{queue: queue}
	switch {
	case d.Exchange != "" && d.RoutingKey != "":
		w.exchange, w.routingKey = d.Exchange, d.RoutingKey
	case queue.ExchangeType == "direct":
		// A direct exchange is passed by: the default exchange and the
		// queue's name reach it whatever its binding.
		w.exchange, w.routingKey = "", queue.Name
	default:
		w.exchange, w.routingKey = d.Exchange, d.RoutingKey
		if w.exchange == "" {
			w.exchange = queue.Exchange
		}
		if w.routingKey == "" {
			w.routingKey = queue.RoutingKey
		}
	}
	return w, nil
}

func (r router) route(task string) (Route, bool) {
	if route, ok := r.exact[task]; ok {
		return route, true
	}
	for _, route := range r.patterns {
		// fnmatch knows no separators, so names must not hold path.Match's.
		name, pattern := strings.ReplaceAll(task, "/", "\x00"), strings.ReplaceAll(route.Task, "/", "\x00")
		if ok, err := path.Match(pattern, name); err == nil && ok {
			return route, true
		}
	}
	return Route{}, false
}

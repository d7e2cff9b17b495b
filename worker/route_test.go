package worker

import (
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

func TestResolve(t *testing.T) {
	t.Parallel()
	r := newRouter(Config{
		DefaultQueue:    "orders",
		DefaultExchange: "ex",
		TaskQueues: []Queue{
			{Name: "mail", Exchange: "shop", RoutingKey: "mail.send"},
			{Name: "news", Exchange: "topics", ExchangeType: "topic", RoutingKey: "news.#"},
		},
		TaskRoutes: []Route{
			{Task: "a.*", Queue: "mail"},
			{Task: "a.exact", Queue: "exact"},
			{Task: "a/b.*", Exchange: "x", RoutingKey: "k"},
			{Task: "t.[ab]?*", Queue: "news"},
			{Task: "n.[ab]?", Queue: "mail"},
			{Task: "u.[!a]*", Queue: "mail"},
		},
	}.WithDefaults())
	type destination = protocol.Destination
	for _, c := range []struct {
		task                   string
		own                    destination
		exchange, key, declare string
	}{
		{"none", destination{}, "", "orders", "orders"},
		{"none", destination{Queue: "mail"}, "", "mail", "mail"},
		{"none", destination{Queue: "made up"}, "", "made up", "made up"},
		{"none", destination{Exchange: "e", RoutingKey: "k"}, "e", "k", "orders"},
		{"none", destination{RoutingKey: "k"}, "", "orders", "orders"},
		{"none", destination{Exchange: "e"}, "", "orders", "orders"},
		{"none", destination{Queue: "news"}, "topics", "news.#", "news"},
		{"none", destination{Queue: "news", RoutingKey: "news.x"}, "topics", "news.x", "news"},
		{"a.b", destination{}, "", "mail", "mail"},
		{"a.b", destination{Queue: "orders"}, "", "orders", "orders"},
		{"a.exact", destination{}, "", "exact", "exact"},
		{"a/b.c", destination{}, "x", "k", "orders"},
		{"t.bc", destination{}, "topics", "news.#", "news"},
		{"t.c", destination{}, "", "orders", "orders"},
		{"n.[ab]?", destination{}, "", "mail", "mail"},
		{"n.bc", destination{}, "", "orders", "orders"},
		{"u.add", destination{}, "", "orders", "orders"},
		{"u.sub", destination{}, "", "mail", "mail"},
	} {
		got, err := r.resolve(c.task, c.own)
		if err != nil || got.exchange != c.exchange || got.routingKey != c.key || got.queue.Name != c.declare {
			t.Errorf("%s %+v: got %q %q declaring %q, %v; want %q %q declaring %q", c.task, c.own,
				got.exchange, got.routingKey, got.queue.Name, err, c.exchange, c.key, c.declare)
		}
	}
	if q := r.queues["orders"]; q.Exchange != "ex" || q.RoutingKey != "orders" {
		t.Errorf("default queue is %+v", q)
	}
	r.refuseUnknown = true
	if _, err := r.resolve("none", destination{Queue: "made up"}); err == nil {
		t.Error("an unknown queue was accepted")
	}
}

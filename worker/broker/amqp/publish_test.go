package amqp_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

func newPublisher(t *testing.T) (broker.Publisher, broker.Consumer) {
	t.Helper()
	b := amqp.New(amqp.Config{Addresses: devenv.Broker(t), Heartbeat: 10 * time.Second, Name: "test@shop", Logger: workertest.Logger(t)})
	c, err := b.OpenConsumer(t.Context(), []broker.Queue{{Name: "orders", Exchange: "orders", ExchangeType: "direct", RoutingKey: "orders"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	p, err := b.OpenPublisher(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p, c
}

func publication(id, exchange, key string) protocol.Publishing {
	return protocol.Publishing{Task: "shop.add", TaskID: id, Exchange: exchange, RoutingKey: key,
		Properties: protocol.Properties{CorrelationID: id, ContentType: "application/json"}, Body: []byte("[]")}
}

// Of many messages at once, on one channel, each caller is told what became of its own:
// a queue has it, no queue has taken it, or its exchange is missing, which makes the
// broker close the channel.
func TestEachCallerIsToldAboutItsOwnMessage(t *testing.T) {
	t.Parallel()
	p, c := newPublisher(t)
	const each = 100
	var all sync.WaitGroup
	for i := range each {
		for kind, m := range map[string]protocol.Publishing{
			"good":    publication(fmt.Sprint("good-", i), "orders", "orders"),
			"nowhere": publication(fmt.Sprint("nowhere-", i), "orders", "elsewhere"),
			// Not all of them, so that the channel lives for a while in between.
			"missing": publication(fmt.Sprint("missing-", i), fmt.Sprint("missing-", i/10), "orders"),
			// Two messages with one id are in flight.
			"twice": publication(fmt.Sprint("twice-", i%10), "orders", "elsewhere"),
		} {
			all.Go(func() {
				err := p.Publish(t.Context(), m, nil)
				if kind == "good" && err != nil {
					t.Errorf("%s: %v, want it in its queue", m.TaskID, err)
				}
				if kind != "good" && (!errors.Is(err, broker.ErrUnroutable) || !strings.Contains(err.Error(), m.TaskID)) {
					t.Errorf("%s: %v, want ErrUnroutable with its id", m.TaskID, err)
				}
			})
		}
		all.Go(func() {
			m := publication(fmt.Sprint("twice-", i%10), "orders", "orders")
			if err := p.Publish(t.Context(), m, nil); err != nil {
				t.Errorf("%s: %v, want it in its queue", m.TaskID, err)
			}
		})
	}
	all.Wait()
	if n, err := c.Depth(t.Context(), "orders"); n < 2*each || err != nil {
		t.Errorf("%d messages in the queue, %v; want at least %d", n, err, 2*each)
	}
}

// The broker closes a channel because of a missing exchange. Later messages to this
// exchange close no channel that other messages use, until there is the exchange.
func TestMissingExchangeClosesTheSharedChannelOnce(t *testing.T) {
	t.Parallel()
	p, _ := newPublisher(t)
	publish := func(exchange string, want error) {
		t.Helper()
		if err := p.Publish(t.Context(), publication("id", exchange, "orders"), nil); !errors.Is(err, want) {
			t.Errorf("exchange %q: %v, want %v", exchange, err, want)
		}
	}
	publish("late", broker.ErrUnroutable)
	publish("orders", nil)
	shared := amqp.SharedChannel(p)
	for range 3 {
		publish("late", broker.ErrUnroutable)
		publish("orders", nil)
	}
	if amqp.SharedChannel(p) != shared {
		t.Error("a message to an exchange that is known to be missing has closed the shared channel")
	}
	if err := p.Publish(t.Context(), publication("id", "late", "orders"),
		&broker.Queue{Name: "orders", Exchange: "late", ExchangeType: "direct", RoutingKey: "orders"}); err != nil {
		t.Errorf("after its declaration: %v", err)
	}
	if amqp.KnownMissing(p, "late") {
		t.Error("an exchange that exists now still counts as missing: each message to it would open a channel")
	}
}

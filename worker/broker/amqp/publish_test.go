package amqp_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	amqp091 "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker/amqp"
	"github.com/moonladderstudios/mm-orchestrator/worker/workertest"
)

// newPublisher returns also another program's channel to the same broker.
func newPublisher(t *testing.T) (broker.Publisher, broker.Consumer, *amqp091.Channel) {
	t.Helper()
	address := devenv.Broker(t)
	b := amqp.New(amqp.Config{Addresses: address, Heartbeat: 10 * time.Second, Name: "test@shop", Logger: workertest.Logger(t)})
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
	conn, err := amqp091.Dial(address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return p, c, ch
}

func publication(id, exchange, key string) protocol.Publishing {
	return protocol.Publishing{Task: "shop.add", TaskID: id, Exchange: exchange, RoutingKey: key,
		Properties: protocol.Properties{CorrelationID: id, ContentType: "application/json"}, Body: []byte("[]")}
}

// Of many messages at once, on one channel, each caller is told what became of its own:
// a queue has it, no queue has taken it, or its exchange is missing. An exchange that was
// there before makes the broker close the channel.
func TestEachCallerIsToldAboutItsOwnMessage(t *testing.T) {
	t.Parallel()
	p, c, other := newPublisher(t)
	const each = 100
	for i := range each / 10 {
		if i%2 == 0 {
			continue // never there
		}
		exchange := fmt.Sprint("missing-", i)
		if err := other.ExchangeDeclare(exchange, "direct", false, false, false, false, nil); err != nil {
			t.Fatal(err)
		}
		if err := p.Publish(t.Context(), publication(exchange, exchange, "elsewhere"), nil); !errors.Is(err, broker.ErrUnroutable) {
			t.Fatal(err)
		}
		if err := other.ExchangeDelete(exchange, false, false); err != nil {
			t.Fatal(err)
		}
	}
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

// The broker closes a channel because of a missing exchange. Messages to an exchange that
// no message has reached use no channel that others use. One that is deleted later closes
// that channel once.
func TestMissingExchangesAndTheSharedChannel(t *testing.T) {
	t.Parallel()
	p, _, other := newPublisher(t)
	publish := func(exchange string, want error) {
		t.Helper()
		if err := p.Publish(t.Context(), publication("id", exchange, "orders"), nil); !errors.Is(err, want) {
			t.Errorf("exchange %q: %v, want %v", exchange, err, want)
		}
	}
	publish("", nil)
	shared := amqp.SharedChannel(p)
	for range 3 {
		publish("late", broker.ErrUnroutable)
		publish("orders", nil)
	}
	if amqp.SharedChannel(p) != shared {
		t.Error("a message to an exchange that was never there has closed the shared channel")
	}
	if err := p.Publish(t.Context(), publication("id", "late", "orders"),
		&broker.Queue{Name: "orders", Exchange: "late", ExchangeType: "direct", RoutingKey: "orders"}); err != nil {
		t.Errorf("after its declaration: %v", err)
	}
	if !amqp.KnownPresent(p, "late") {
		t.Error("an exchange that exists now still counts as missing: each message to it would open a channel")
	}
	if err := other.ExchangeDelete("late", false, false); err != nil {
		t.Fatal(err)
	}
	publish("late", broker.ErrUnroutable)
	publish("orders", nil)
	shared = amqp.SharedChannel(p)
	publish("late", broker.ErrUnroutable)
	publish("orders", nil)
	if amqp.SharedChannel(p) != shared {
		t.Error("a message to an exchange that was deleted has closed the shared channel twice")
	}
}

// Of messages that are published together, one whose exchange is missing neither makes
// others come twice nor changes their order.
func TestMissingExchangeAmongMessagesTogether(t *testing.T) {
	t.Parallel()
	p, c, other := newPublisher(t)
	const each = 30
	var all []broker.Publication
	for i := range each {
		all = append(all,
			broker.Publication{Message: publication(fmt.Sprint("default-", i), "", "orders")},
			broker.Publication{Message: publication(fmt.Sprint("missing-", i), "missing", "orders")},
			broker.Publication{Message: publication(fmt.Sprint("orders-", i), "orders", "orders")})
	}
	for i, err := range p.(broker.BatchPublisher).PublishAll(t.Context(), all) {
		if missing := all[i].Message.Exchange == "missing"; missing != errors.Is(err, broker.ErrUnroutable) || !missing && err != nil {
			t.Errorf("%s: %v", all[i].Message.TaskID, err)
		}
	}
	if n, err := c.Depth(t.Context(), "orders"); n != 2*each || err != nil {
		t.Fatalf("%d messages in the queue, %v; want %d", n, err, 2*each)
	}
	for i := range each {
		for _, want := range []string{fmt.Sprint("default-", i), fmt.Sprint("orders-", i)} {
			if d, _, err := other.Get("orders", true); err != nil || d.CorrelationId != want {
				t.Fatalf("got %s, %v; want %s", d.CorrelationId, err, want)
			}
		}
	}
}

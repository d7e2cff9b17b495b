// Package brokertest tests implementations of package broker: what a worker relies on
// holds for each of them.
package brokertest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// Subject is an implementation under test.
type Subject struct {
	// Open returns a broker without queues. Every call returns the same one during a
	// test, and another one in another test.
	Open func(t *testing.T) broker.Broker
	// Disconnect loses every connection of it.
	Disconnect func(t *testing.T, b broker.Broker)
}

// patience bounds every wait for something that must happen.
const patience = 30 * time.Second

// Test runs all tests.
func (s Subject) Test(t *testing.T) {
	for name, test := range map[string]func(*env){
		"messages arrive in order, up to the limit": (*env).limit,
		"delayed messages make room":                (*env).delay,
		"a requeued message comes again":            (*env).requeue,
		"a rejected message is gone":                (*env).reject,
		"a copy reaches its queue alone":            (*env).copy,
		"a stopped subscription delivers nothing":   (*env).stop,
		"a lost connection gives messages back":     (*env).lost,
		"a closed connection gives messages back":   (*env).close,
		"no queue takes a message":                  (*env).unroutable,
		"a publication declares its queue":          (*env).declare,
		"messages that are published together":      (*env).together,
		"a fanout reaches each of its queues once":  (*env).fanout,
		"a broadcast that nobody hears":             (*env).broadcast,
		"questions about queues":                    (*env).questions,
		"single messages are taken":                 (*env).get,
		"an inspection changes nothing":             (*env).inspect,
		"a call ends with its context":              (*env).context,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := &env{T: t, subject: s, broker: s.Open(t)}
			e.publisher = opened(t, e.broker.OpenPublisher)
			test(e)
		})
	}
}

// env is the environment of one test.
type env struct {
	*testing.T
	subject   Subject
	broker    broker.Broker
	publisher broker.Publisher
	probes    int
}

func opened[C broker.Connection](t *testing.T, open func(context.Context) (C, error)) C {
	t.Helper()
	c, err := open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func (e *env) consumer(queues ...broker.Queue) broker.Consumer {
	e.Helper()
	return opened(e.T, func(ctx context.Context) (broker.Consumer, error) { return e.broker.OpenConsumer(ctx, queues) })
}

// queue is a declaration as Celery makes it.
func queue(name string) broker.Queue { return broker.Queue{Name: name}.WithDefaults() }

// receiver has the deliveries of a subscription.
type receiver struct {
	e *env
	broker.Subscription
	deliveries chan broker.Delivery
}

func (e *env) subscribe(c broker.Consumer, q broker.Queue, limit int) receiver {
	e.Helper()
	r := receiver{e: e, deliveries: make(chan broker.Delivery, 100)}
	var err error
	if r.Subscription, err = c.Subscribe(e.Context(), q, limit, func(d broker.Delivery) { r.deliveries <- d }); err != nil {
		e.Fatal(err)
	}
	return r
}

// next returns the next delivery, which must be the message with this id.
func (r receiver) next(id string) broker.Delivery {
	r.e.Helper()
	select {
	case d := <-r.deliveries:
		if got := d.Message.Properties.CorrelationID; got != id {
			r.e.Fatalf("message %s arrived, want %s", got, id)
		}
		return d
	case <-time.After(patience):
		r.e.Fatalf("message %s did not arrive", id)
		panic("unreachable")
	}
}

// none checks that nothing has arrived, once the broker had the time for it: a message
// that was published after all others has arrived elsewhere.
func (r receiver) none() {
	r.e.Helper()
	r.e.probes++
	q := queue(fmt.Sprint("probe", r.e.probes))
	probe := r.e.subscribe(r.e.consumer(q), q, 1)
	r.e.publish("", q.Name, "probe")
	probe.next("probe").Ack()
	select {
	case d := <-r.deliveries:
		r.e.Fatalf("message %s arrived, want none", d.Message.Properties.CorrelationID)
	default:
	}
}

func message(exchange, key, id string) protocol.Publishing {
	return protocol.Publishing{Task: "shop.add", TaskID: id, Exchange: exchange, RoutingKey: key,
		Headers:    map[string]any{"id": id, "retries": int32(0)},
		Properties: protocol.Properties{CorrelationID: id, ContentType: "application/json", DeliveryMode: 2},
		Body:       []byte("[]")}
}

func (e *env) publish(exchange, key, id string) {
	e.Helper()
	if err := e.publisher.Publish(e.Context(), message(exchange, key, id), nil); err != nil {
		e.Fatal(err)
	}
}

func (e *env) wantLost(c broker.Connection) {
	e.Helper()
	select {
	case <-c.Lost():
	case <-time.After(patience):
		e.Fatal("the connection is not lost")
	}
	if c.Err() == nil {
		e.Error("a lost connection has no reason")
	}
}

func (e *env) limit() {
	q := queue("q")
	c := e.consumer(q)
	for i := range 5 {
		e.publish("", "q", fmt.Sprint(i))
	}
	r := e.subscribe(c, q, 2)
	first := r.next("0")
	second := r.next("1")
	r.none()
	m := first.Message
	if m.Redelivered || string(m.Body) != "[]" || m.Headers["id"] != "0" || m.RoutingKey != "q" || m.Properties.ContentType != "application/json" {
		e.Errorf("the message has changed: %+v", m)
	}
	first.Ack()
	r.next("2").Ack()
	second.Ack()
	r.next("3").Ack()
	r.next("4").Ack()
}

func (e *env) delay() {
	q := queue("q")
	r := e.subscribe(e.consumer(q), q, 1)
	for i := range 4 {
		e.publish("", "q", fmt.Sprint(i))
	}
	first := r.next("0")
	r.none()
	r.Delay(e.Context(), 1)
	second := r.next("1")
	r.none()
	second.Ack()
	third := r.next("2")
	r.Delay(e.Context(), 0)
	third.Ack()
	first.Ack()
	r.next("3").Ack()
	r.none()
}

func (e *env) requeue() {
	q := queue("q")
	r := e.subscribe(e.consumer(q), q, 1)
	e.publish("", "q", "a")
	r.next("a").Requeue()
	again := r.next("a")
	if !again.Message.Redelivered {
		e.Error("a requeued message is not marked as redelivered")
	}
	again.Ack()
	r.none()
}

func (e *env) reject() {
	q := queue("q")
	r := e.subscribe(e.consumer(q), q, 1)
	e.publish("", "q", "a")
	e.publish("", "q", "b")
	r.next("a").Reject()
	r.next("b").Ack()
	r.none()
}

func (e *env) copy() {
	bound, other := queue("q"), broker.Queue{Name: "other", Exchange: "q", ExchangeType: "direct", RoutingKey: "q"}
	c := e.consumer(bound, other)
	r, elsewhere := e.subscribe(c, bound, 2), e.subscribe(c, other, 2)
	e.publish("q", "q", "a")
	elsewhere.next("a").Ack()
	d := r.next("a")
	again := d.Copy()
	again.Headers["copy"] = true
	if err := e.publisher.Publish(e.Context(), again, nil); err != nil {
		e.Fatal(err)
	}
	d.Ack()
	got := r.next("a")
	if got.Message.Redelivered || got.Message.Headers["copy"] != true || got.Message.Headers["id"] != "a" || got.Returns != 0 {
		e.Errorf("the copy is %+v", got)
	}
	if _, changed := d.Message.Headers["copy"]; changed {
		e.Error("the copy shares its headers with the message")
	}
	got.Ack()
	elsewhere.none()
}

func (e *env) stop() {
	q := queue("q")
	r := e.subscribe(e.consumer(q), q, 2)
	e.publish("", "q", "a")
	d := r.next("a")
	r.Stop(e.Context())
	e.publish("", "q", "b")
	r.none()
	r.Delay(e.Context(), 10)
	r.none()
	d.Ack()
	next := e.subscribe(e.consumer(q), q, 2)
	next.next("b").Ack()
	next.none()
}

func (e *env) lost() {
	q := queue("q")
	c := e.consumer(q)
	r := e.subscribe(c, q, 2)
	e.publish("", "q", "a")
	e.publish("", "q", "b")
	first, second := r.next("a"), r.next("b")
	e.subject.Disconnect(e.T, e.broker)
	e.wantLost(c)
	e.wantLost(e.publisher)
	if err := first.StillUnacked(e.Context()); err == nil {
		e.Error("a delivery of a lost connection is still unacknowledged")
	}
	first.Ack() // has no effect
	second.Requeue()
	if _, err := c.Depth(e.Context(), "q"); !errors.Is(err, broker.ErrUnreachable) {
		e.Errorf("a question on a lost connection: %v, want ErrUnreachable", err)
	}
	if _, err := c.Subscribe(e.Context(), q, 1, func(broker.Delivery) {}); !errors.Is(err, broker.ErrUnreachable) {
		e.Errorf("a subscription on a lost connection: %v, want ErrUnreachable", err)
	}
	if err := e.publisher.Publish(e.Context(), message("", "q", "c"), nil); !errors.Is(err, broker.ErrUnreachable) {
		e.Errorf("a publication on a lost connection: %v, want ErrUnreachable", err)
	}
	e.publisher = opened(e.T, e.broker.OpenPublisher)
	next := e.subscribe(e.consumer(q), q, 2)
	for _, id := range []string{"a", "b"} {
		d := next.next(id)
		if !d.Message.Redelivered {
			e.Errorf("message %s is not marked as redelivered", id)
		}
		d.Ack()
	}
	next.none()
}

func (e *env) close() {
	q := queue("q")
	c := e.consumer(q)
	r := e.subscribe(c, q, 1)
	e.publish("", "q", "a")
	r.next("a")
	c.Close()
	e.wantLost(c)
	c.Close() // a second one does nothing
	e.subscribe(e.consumer(q), q, 1).next("a").Ack()
}

func (e *env) unroutable() {
	q := queue("q")
	e.consumer(q)
	for _, m := range []protocol.Publishing{message("", "nowhere", "a"), message("missing", "q", "b"), message("q", "another", "c")} {
		// Beside it, a message that a queue takes.
		good := make(chan error)
		go func() { good <- e.publisher.Publish(e.Context(), message("", "q", "good"), nil) }()
		if err := e.publisher.Publish(e.Context(), m, nil); !errors.Is(err, broker.ErrUnroutable) {
			e.Errorf("exchange %q, key %q: %v, want ErrUnroutable", m.Exchange, m.RoutingKey, err)
		}
		if err := <-good; err != nil {
			e.Errorf("beside it: %v", err)
		}
	}
}

// together is for publishers that can publish messages together.
func (e *env) together() {
	together, can := e.publisher.(broker.BatchPublisher)
	if !can {
		return
	}
	q, late := queue("q"), queue("late")
	c := e.consumer(q)
	const many = 300
	var messages []broker.Publication
	for i := range many {
		messages = append(messages, broker.Publication{Message: message("", "q", fmt.Sprint(i))})
	}
	for i, err := range together.PublishAll(e.Context(), messages) {
		if err != nil {
			e.Errorf("message %d: %v", i, err)
		}
	}
	r := e.subscribe(c, q, 10)
	for i := range many {
		r.next(fmt.Sprint(i)).Ack()
	}
	r.none()
	// Each is told about itself.
	messages = []broker.Publication{
		{Message: message("", "q", "first")}, {Message: message("", "nowhere", "lost")}, {Message: message("q", "q", "second")},
		{Message: message("late", "late", "declared"), Declare: &late}, {Message: message("missing", "q", "lost too")}, {Message: message("", "q", "third")},
	}
	for i, err := range together.PublishAll(e.Context(), messages) {
		id := messages[i].Message.TaskID
		if lost := strings.HasPrefix(id, "lost"); lost != errors.Is(err, broker.ErrUnroutable) || !lost && err != nil {
			e.Errorf("message %s: %v", id, err)
		}
	}
	// A missing exchange can make the broker forget what it has confirmed: a message may come twice.
	want := []string{"first", "second", "third"}
	seen := map[string]bool{}
	for len(seen) < len(want) {
		select {
		case d := <-r.deliveries:
			seen[d.Message.Properties.CorrelationID] = true
			d.Ack()
		case <-time.After(patience):
			e.Fatalf("%v arrived, want %v", seen, want)
		}
	}
	if n, err := c.Depth(e.Context(), "late"); n < 1 || err != nil {
		e.Errorf("the declared queue has %d messages, %v", n, err)
	}
	ended, cancel := context.WithCancelCause(e.Context())
	why := errors.New("enough")
	cancel(why)
	for _, err := range together.PublishAll(ended, messages) {
		if err != nil && !errors.Is(err, why) && !errors.Is(err, broker.ErrUnroutable) {
			e.Errorf("with an ended context: %v", err)
		}
	}
	e.subject.Disconnect(e.T, e.broker)
	e.wantLost(e.publisher)
	for i, err := range together.PublishAll(e.Context(), messages) {
		if !errors.Is(err, broker.ErrUnreachable) {
			e.Errorf("message %s on a lost connection: %v, want ErrUnreachable", messages[i].Message.TaskID, err)
		}
	}
}

func (e *env) declare() {
	bound, alone := queue("bound"), broker.Queue{Name: "alone"}
	for range 2 {
		for _, declared := range []struct {
			queue    broker.Queue
			exchange string
		}{{bound, "bound"}, {alone, ""}} {
			if err := e.publisher.Publish(e.Context(), message(declared.exchange, declared.queue.Name, "m"), &declared.queue); err != nil {
				e.Fatal(err)
			}
		}
	}
	c := e.consumer()
	for _, name := range []string{"bound", "alone"} {
		if n, err := c.Depth(e.Context(), name); n != 2 || err != nil {
			e.Errorf("queue %s has %d messages, %v; want 2", name, n, err)
		}
	}
	// It exists with another type of exchange: it is used as it is.
	other := bound
	other.ExchangeType = "fanout"
	another := opened(e.T, e.broker.OpenPublisher)
	if err := another.Publish(e.Context(), message("bound", "bound", "m"), &other); err != nil {
		e.Error(err)
	}
	var mismatch *broker.MismatchError
	if _, err := e.broker.OpenConsumer(e.Context(), []broker.Queue{other}); !errors.As(err, &mismatch) || mismatch.Name != "bound" {
		e.Errorf("a consumer with another declaration: %v, want a MismatchError", err)
	}
	passive := broker.Queue{Name: "absent", Passive: true}
	if _, err := e.broker.OpenConsumer(e.Context(), []broker.Queue{passive}); !errors.As(err, &mismatch) || mismatch.Name != "absent" {
		e.Errorf("a passive queue that does not exist: %v, want a MismatchError", err)
	}
}

func (e *env) fanout() {
	one := broker.Queue{Name: "one", Exchange: "all", ExchangeType: "fanout", RoutingKey: "one"}
	again, two, other := one, one, queue("other")
	again.RoutingKey = "another binding"
	two.Name, two.RoutingKey = "two", "two"
	c := e.consumer(one, again, two, other)
	receivers := []receiver{e.subscribe(c, one, 2), e.subscribe(c, two, 2), e.subscribe(c, other, 2)}
	e.publish("all", "no key matters", "a")
	receivers[0].next("a").Ack()
	receivers[1].next("a").Ack()
	for _, r := range receivers {
		r.none()
	}
}

func (e *env) broadcast() {
	m := message("everybody", "", "a")
	if err := e.publisher.Broadcast(e.Context(), m); !errors.Is(err, broker.ErrUnroutable) {
		e.Errorf("nobody listens: %v, want ErrUnroutable", err)
	}
}

func (e *env) questions() {
	q := queue("q")
	c, other := e.consumer(q), e.consumer(q)
	r := e.subscribe(c, q, 1)
	e.subscribe(other, q, 1).Stop(e.Context())
	for i := range 3 {
		e.publish("", "q", fmt.Sprint(i))
	}
	d := r.next("0")
	if n, err := c.Depth(e.Context(), "q"); n != 2 || err != nil {
		e.Errorf("%d messages are ready, %v; want 2", n, err)
	}
	if got, err := c.Consumers(e.Context(), "q"); err != nil || got.Own < 1 || got.Other != 0 {
		e.Errorf("consumers: %+v, %v; want one of its own", got, err)
	}
	if got, err := other.Consumers(e.Context(), "q"); err != nil || got.Own != 0 || got.Other < 1 {
		e.Errorf("consumers for another connection: %+v, %v; want one other", got, err)
	}
	if err := d.StillUnacked(e.Context()); err != nil {
		e.Errorf("the delivery is unacknowledged: %v", err)
	}
	if _, err := c.Depth(e.Context(), "absent"); !errors.Is(err, broker.ErrMismatch) {
		e.Errorf("a queue that does not exist: %v, want ErrMismatch", err)
	}
	// The connection is usable after the refusal, for questions too.
	if n, err := c.Depth(e.Context(), "q"); n != 2 || err != nil {
		e.Errorf("after the refusal %d messages are ready, %v; want 2", n, err)
	}
	d.Ack()
	r.next("1").Ack()
	r.next("2").Ack()
}

func (e *env) get() {
	q := queue("q")
	c, ok := e.consumer(q).(broker.Getter)
	if !ok {
		e.Skip("no Getter")
	}
	get := func(c broker.Getter, id string, behind int) broker.Delivery {
		e.Helper()
		d, left, ok, err := c.Get(e.Context(), q)
		if err != nil || ok != (id != "") || d.Message.Properties.CorrelationID != id || left != behind {
			e.Fatalf("message %q, %d behind, %v, %v; want %q and %d", d.Message.Properties.CorrelationID, left, ok, err, id, behind)
		}
		return d
	}
	get(c, "", 0)
	for _, id := range []string{"a", "b", "c", "d"} {
		e.publish("", "q", id)
	}
	get(c, "a", 3)
	b := get(c, "b", 2)
	get(c, "c", 1)
	get(c, "d", 0)
	get(c, "", 0)
	b.Ack()
	c.Close()
	again := e.consumer(q).(broker.Getter)
	r := e.subscribe(again, q, 10)
	for _, id := range []string{"a", "c", "d"} {
		d := r.next(id)
		if !d.Message.Redelivered {
			e.Errorf("message %s is not marked as redelivered", id)
		}
		d.Ack()
	}
	r.none()
	if _, _, _, err := again.Get(e.Context(), queue("missing")); !errors.Is(err, broker.ErrMismatch) {
		e.Errorf("a queue that does not exist: %v, want ErrMismatch", err)
	}
}

func (e *env) inspect() {
	there, absent := queue("there"), queue("absent")
	c := e.consumer(there)
	e.publish("", "there", "a")
	for range 2 {
		found, err := e.broker.Inspect(e.Context(), []broker.Queue{there, absent})
		if err != nil || len(found.Queues) != 2 || found.PublishErr != nil {
			e.Fatalf("%+v, %v", found, err)
		}
		if q := found.Queues[0]; !q.Exists || !q.ExchangeExists || q.Messages != 1 || q.Err != nil {
			e.Errorf("a queue that exists: %+v", q)
		}
		if q := found.Queues[1]; q.Exists || q.ExchangeExists || q.Err != nil {
			e.Errorf("a queue that does not exist: %+v", q)
		}
	}
	e.subscribe(c, there, 1).next("a").Ack()
}

func (e *env) context() {
	q := queue("q")
	c := e.consumer(q)
	ended, end := context.WithCancelCause(e.Context())
	why := errors.New("the caller waits no longer")
	end(why)
	if err := e.publisher.Publish(ended, message("", "q", "a"), &q); err != nil && !errors.Is(err, why) {
		e.Errorf("a publication: %v, want the cause of its context", err)
	}
	if _, err := e.broker.OpenPublisher(ended); err == nil {
		e.Error("a connection was opened after the end of its context")
	}
	if _, err := c.Depth(e.Context(), "q"); err != nil {
		e.Errorf("the connection is usable afterwards: %v", err)
	}
}

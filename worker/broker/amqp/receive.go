package amqp

import (
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"
)

// receivers are the goroutines that receive for a subscription, one for each consumer.
// That of a consumer with a limit of one may stay in deliver until its message is settled,
// since the broker sends nothing else. Another goroutine takes its place if it is to
// receive before: see broker.Delivery.PassOn.
type receivers struct {
	mu sync.Mutex
	// delivering are the messages for which a goroutine may stay in deliver, with what
	// another one would receive.
	delivering map[*receipt]<-chan amqp.Delivery
	// ending is set when the subscription ends. No goroutine stays in deliver any more.
	ending bool
}

// receive delivers what a consumer receives, until there is nothing more, or another
// goroutine does it.
func (sub *subscription) receive(deliveries <-chan amqp.Delivery, limit int) {
	for d := range deliveries {
		delivery := sub.consumer.delivery(sub.queue, d)
		r := delivery.Receipt.(*receipt)
		if limit == 1 && sub.mayStay(r, deliveries) {
			delivery.PassOn = func() { sub.passOn(r) }
			sub.deliver(delivery)
			if !sub.returned(r) {
				return
			}
			continue
		}
		sub.deliver(delivery)
	}
	sub.receiving.Done()
}

// mayStay reports whether the goroutine may stay in deliver.
func (sub *subscription) mayStay(r *receipt, deliveries <-chan amqp.Delivery) bool {
	sub.receivers.mu.Lock()
	defer sub.receivers.mu.Unlock()
	if sub.receivers.ending {
		return false
	}
	if sub.receivers.delivering == nil {
		sub.receivers.delivering = map[*receipt]<-chan amqp.Delivery{}
	}
	sub.receivers.delivering[r] = deliveries
	return true
}

// returned reports whether the goroutine still receives after deliver.
func (sub *subscription) returned(r *receipt) bool {
	sub.receivers.mu.Lock()
	defer sub.receivers.mu.Unlock()
	_, receives := sub.receivers.delivering[r]
	delete(sub.receivers.delivering, r)
	return receives
}

// passOn lets another goroutine receive.
func (sub *subscription) passOn(r *receipt) {
	sub.receivers.mu.Lock()
	defer sub.receivers.mu.Unlock()
	if deliveries, receives := sub.receivers.delivering[r]; receives {
		delete(sub.receivers.delivering, r)
		go sub.receive(deliveries, 1)
	}
}

// passOnAll makes deliver return at once from now on, as far as those who wait for the
// goroutines that receive can see.
func (sub *subscription) passOnAll() {
	sub.receivers.mu.Lock()
	defer sub.receivers.mu.Unlock()
	sub.receivers.ending = true
	for r, deliveries := range sub.receivers.delivering {
		delete(sub.receivers.delivering, r)
		go sub.receive(deliveries, 1)
	}
}

package amqp

import (
	"time"

	"github.com/moonladderstudios/mm-orchestrator/worker/broker"
)

// SharedChannel identifies the channel that most messages of a connection share.
func SharedChannel(p broker.Publisher) any {
	own := p.(*publisher)
	own.mu.Lock()
	defer own.mu.Unlock()
	return own.shared
}

// WaitForQuestion waits until a question is on its way to the broker.
func WaitForQuestion(c broker.Consumer) {
	for len(c.(*consumer).queryTurn) == 0 {
		time.Sleep(time.Millisecond)
	}
}

// ChangeConsumers does what adding or cancelling a consumer does at first.
func ChangeConsumers(s broker.Subscription) { s.(*subscription).changed(0) }

// SetCallTimeout changes how long the broker may leave a call unanswered.
func SetCallTimeout(c broker.Consumer, timeout time.Duration) {
	c.(*consumer).callTimeout = timeout
}

// KnownPresent reports whether messages to an exchange share a channel, because a message
// has reached the exchange.
func KnownPresent(p broker.Publisher, exchange string) bool {
	own := p.(*publisher)
	own.mu.Lock()
	defer own.mu.Unlock()
	return own.present[exchange]
}

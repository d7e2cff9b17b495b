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

// SetCallTimeout changes how long the broker may leave a call unanswered.
func SetCallTimeout(c broker.Consumer, timeout time.Duration) {
	c.(*consumer).callTimeout = timeout
}

package worker

import (
	dto "github.com/prometheus/client_model/go"
)

// BreakChannel makes the broker close the channel that consumes with 406, as it
// does when a delivery has been unacknowledged for too long.
func (w *Worker) BreakChannel() error {
	s, err := w.link.get(w.lifecycle.record)
	if err != nil {
		return err
	}
	return s.Consumer.(interface{ BreakChannel() error }).BreakChannel()
}

// Reconnects is how many sessions were lost.
func (w *Worker) Reconnects() int { return count(w.metrics.reconnects) }

// Attached is how many deliveries were repeated ones.
func (w *Worker) Attached() int { return count(w.metrics.attached) }

func count(c interface{ Write(*dto.Metric) error }) int {
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		return -1
	}
	return int(m.GetCounter().GetValue())
}

// Received is how many messages were delivered.
func (w *Worker) Received() int { return count(w.metrics.received) }

// HeaderCopy marks the copy of a message.
const HeaderCopy = headerCopy

// Block marks the connection as blocked, as connection.blocked does when the
// broker has a memory or disk alarm.
func (w *Worker) Block() error {
	s, err := w.link.get(w.lifecycle.record)
	if err != nil {
		return err
	}
	s.Consumer.(interface{ SetBlocked(bool) }).SetBlocked(true)
	return nil
}

// BlockPublisher does the same to the connection that publishes, until unblock is
// called.
func (w *Worker) BlockPublisher() (unblock func(), err error) {
	p, err := w.publishing.get(w.lifecycle.record)
	if err != nil {
		return nil, err
	}
	block := p.(interface{ SetBlocked(bool) }).SetBlocked
	block(true)
	return func() { block(false) }, nil
}

// ParseRate reads the text of a [RateLimit].
var ParseRate = parseRate

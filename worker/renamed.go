package worker

import (
	"maps"
	"slices"
)

// renamed copies messages under other ids: the defect planted.PublishTwice.
func renamed(messages []outgoing) []outgoing {
	copies := slices.Clone(messages)
	for i := range copies {
		m := &copies[i].message
		m.TaskID = m.TaskID[:len(m.TaskID)-4] + "dead"
		m.Headers = maps.Clone(m.Headers)
		m.Headers["id"], m.Properties.CorrelationID = m.TaskID, m.TaskID
	}
	return copies
}

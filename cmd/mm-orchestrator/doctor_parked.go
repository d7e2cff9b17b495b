package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

// parked tells of messages that are in the database and in no queue, where a
// Python worker does not look. While workers of this program live that is as it
// should be, but an operator may be about to stop them.
func (d *doctor) parked(ctx context.Context) []verdict {
	rows, err := d.db.ListParked(ctx, "")
	if errors.Is(err, store.ErrSchema) {
		return ok("none: the schema mm_orchestrator is still to be made")
	}
	if err != nil {
		return failed(err)
	}
	workers, err := d.db.ListWorkers(ctx, "")
	if errors.Is(err, store.ErrSchema) {
		workers, err = nil, nil // an older schema knows no workers
	}
	if err != nil {
		return failed(err)
	}
	if len(rows) == 0 {
		return ok("no message waits in the database")
	}
	live := map[string][]string{}
	for _, w := range workers {
		live[w.Queue] = append(live[w.Queue], w.Node)
	}
	var queues []string
	count := map[string]int{}
	for _, row := range rows {
		if count[row.Queue]++; count[row.Queue] == 1 {
			queues = append(queues, row.Queue)
		}
	}
	var verdicts []verdict
	for _, queue := range queues {
		if nodes := live[queue]; len(nodes) > 0 {
			verdicts = append(verdicts, ok("%d messages of queue %q wait in the database for their runs' turn; %s publishes them", count[queue], queue, strings.Join(nodes, " or "))...)
			continue
		}
		command := orchestrator.ReturnCommand
		if queue != d.config.Queue {
			command += " --queue " + queue
		}
		// First the one that needs somebody to act.
		verdicts = append([]verdict{{statusNote, fmt.Sprintf("%d messages of queue %q wait in the database, and no worker of this program lives that would publish them", count[queue], queue),
			"Start mm-orchestrator worker. Or, before a Python worker takes over, run `" + command + "`"}}, verdicts...)
	}
	return verdicts
}

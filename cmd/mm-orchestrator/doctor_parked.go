package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator"
)

// parked notes messages that are in the database and in no queue, where a Python
// worker never finds them. While a worker of this program is alive it publishes
// them in turn, so that is ok.
func (d *doctor) parked(ctx context.Context) []verdict {
	rows, err := d.db.ListParked(ctx, "")
	if errors.Is(err, store.ErrSchema) {
		return ok("none: schema mm_orchestrator does not exist yet")
	}
	if err != nil {
		return failed(err)
	}
	workers, err := d.db.ListWorkers(ctx, "")
	if errors.Is(err, store.ErrSchema) {
		workers, err = nil, nil // an older schema has no table of workers
	}
	if err != nil {
		return failed(err)
	}
	if len(rows) == 0 {
		return ok("no message is parked in the database")
	}
	alive := map[string][]string{}
	for _, w := range workers {
		alive[w.Queue] = append(alive[w.Queue], w.Node)
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
		if nodes := alive[queue]; len(nodes) > 0 {
			verdicts = append(verdicts, ok("%d messages of queue %q are parked until their runs' turn; %s will publish them", count[queue], queue, strings.Join(nodes, " or "))...)
			continue
		}
		command := orchestrator.ReturnCommand
		if queue != d.config.Queue {
			command += " --queue " + queue
		}
		// The note comes first: it needs an operator to act.
		verdicts = append([]verdict{{statusNote, fmt.Sprintf("%d messages of queue %q are parked in the database, and no mm-orchestrator worker is alive to publish them", count[queue], queue),
			"Start `mm-orchestrator worker`. Before you start a Python worker instead, run `" + command + "`"}}, verdicts...)
	}
	return verdicts
}

// pause notes the open pauses of queues, under which no new run begins.
func (d *doctor) pause(ctx context.Context) []verdict {
	pauses, err := d.db.ListPauses(ctx, store.PauseFilter{})
	if errors.Is(err, store.ErrSchema) {
		return ok("none: the schema mm_orchestrator has no pauses yet")
	}
	if err != nil {
		return failed(err)
	}
	if len(pauses) == 0 {
		return ok("no queue is paused")
	}
	verdicts := make([]verdict, len(pauses))
	for i, pause := range pauses {
		command := "mm-orchestrator resume"
		if pause.Queue != d.config.Queue {
			command += " --queue " + pause.Queue
		}
		verdicts[i] = verdict{statusNote, pause.Text() + "; no new run begins", "To end the pause, run `" + command + "`"}
	}
	return verdicts
}

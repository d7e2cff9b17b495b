package worker

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Logger returns the worker's logger for a handler. Each of its lines has the keys
// task_id, task, root_id and attempt, which is 1 for the first one. Outside of a handler
// it is [slog.Default]. Each call makes a logger: a handler with many lines keeps it.
func Logger(ctx context.Context) *slog.Logger {
	if task := TaskFromContext(ctx); task != nil && task.logger != nil {
		return task.logger(task.Message)
	}
	return slog.Default()
}

// taskLogger is what Logger returns to the handler of a message.
func (w *Worker) taskLogger(m *protocol.Message) *slog.Logger {
	return w.taskLog(m).With("attempt", m.Retries+1)
}

// protocolHeaders are the headers that Celery itself writes or that the broker adds. All
// others are the producer's.
var protocolHeaders = map[string]bool{
	"lang": true, "task": true, "id": true, "shadow": true, "eta": true, "expires": true, "group": true, "group_index": true,
	"retries": true, "timelimit": true, "root_id": true, "parent_id": true, "argsrepr": true, "kwargsrepr": true, "origin": true,
	"ignore_result": true, "replaced_task_nesting": true, "stamped_headers": true, "stamps": true, "compression": true,
	"taskset": true, "utc": true, "chain": true, "chord": true, "callbacks": true, "errbacks": true, "correlation_id": true, "reply_to": true,
	"x-death": true, "x-delivery-count": true, "x-acquired-count": true, headerCopy: true,
}

// CustomHeaders returns the headers that the producer has added to those of Celery's
// protocol: Python's request.headers. It is a copy. The values are as in Message.Headers.
func (t *Task) CustomHeaders() map[string]any {
	custom := map[string]any{}
	for name, value := range t.Headers {
		if !protocolHeaders[name] && !strings.HasPrefix(name, "x-first-death-") && !strings.HasPrefix(name, "x-last-death-") {
			custom[name] = value
		}
	}
	return custom
}

// limited returns a handler's context with the end of its time limit: the soft one, or
// the hard one if there is no soft one or if it is shorter.
func limited(work context.Context, limit protocol.TimeLimit) (context.Context, context.CancelFunc) {
	switch {
	case limit.Soft > 0 && (limit.Hard <= 0 || limit.Soft < limit.Hard):
		return context.WithDeadlineCause(work, time.Now().Add(limit.Soft), ErrSoftTimeLimit)
	case limit.Hard > 0:
		return context.WithDeadlineCause(work, time.Now().Add(limit.Hard), ErrTimeLimit)
	}
	return work, func() {}
}

// TaskFailure is what Config.OnError is told about an attempt that has failed.
type TaskFailure struct {
	// Task is the task, as its handler has received it.
	Task *Task
	// State is FAILURE, or RETRY when the worker runs the task again.
	State string
	// Exception and Traceback are what a caller in Python sees. A retry without a reason
	// has no exception.
	Exception *protocol.Exception
	Traceback string
	// Err is the error that the handler returned, for errors.Is and errors.As. A panic is
	// an error, too. It may also say why the worker could not run the task, or could not
	// publish what follows it.
	Err error
	// Panicked says that the handler has panicked.
	Panicked bool
	// Duration is how long the handler ran.
	Duration time.Duration
}

// reportFailure calls Config.OnError. Its panic is only logged: the outcome is recorded.
func (w *Worker) reportFailure(ctx context.Context, task *Task, o outcome) {
	if w.cfg.OnError == nil || o.kind != outcomeFailure && o.kind != outcomeRetry {
		return
	}
	defer func() {
		if p := recover(); p != nil {
			w.taskLog(task.Message).Error("Config.OnError has panicked", "error", p, "stack", goStack())
		}
	}()
	f := TaskFailure{Task: task, State: protocol.StateFailure, Traceback: o.failed.traceback, Err: o.failed.err, Duration: o.duration}
	if o.kind == outcomeRetry {
		f.State = protocol.StateRetry
	}
	f.Exception = o.failed.stored()
	var panicked *panicError
	f.Panicked = errors.As(o.failed.err, &panicked)
	w.cfg.OnError(ContextWithTask(ctx, task), f)
}

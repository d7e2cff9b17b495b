package worker

import (
	"context"

	"github.com/moonladderstudios/mm-orchestrator/results"
)

// cleanupTask is the task that Celery's beat sends every day at 4 o'clock if results do not
// expire by themselves (celery/beat.py, install_default_entries). Every Celery worker has
// it (celery/app/builtins.py).
const cleanupTask = "celery.backend_cleanup"

// addCleanup registers [cleanupTask] if the result backend can do it, unless the program
// has registered it. The caller has locked w.mu.
func (w *Worker) addCleanup() {
	cleaner, can := w.cfg.Results.(results.Cleaner)
	if _, own := w.tasks[cleanupTask]; own || !can {
		return
	}
	w.tasks[cleanupTask] = w.wrapped(registration{classes: w.cfg.ErrorClasses, handler: HandlerFunc(func(ctx context.Context, _ *Task) (any, error) {
		age := w.cfg.ResultExpires
		if age < 0 {
			return nil, nil
		}
		removed, err := cleaner.Cleanup(ctx, age)
		if err == nil {
			Logger(ctx).Info("old results are removed", "results", removed, "older_than", age)
		}
		return nil, err
	})})
}

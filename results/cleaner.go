package results

import (
	"context"
	"time"
)

// Cleaner is a [Backend] that keeps outcomes until it is told to remove old ones. A worker
// with such a backend has Celery's task celery.backend_cleanup, which Celery's beat sends
// once a day: see worker.Config.ResultExpires. A backend whose outcomes expire by
// themselves need not be one.
type Cleaner interface {
	Backend
	// Cleanup removes the outcomes of tasks that ended longer ago than age, and returns
	// how many.
	Cleanup(ctx context.Context, age time.Duration) (removed int64, err error)
}

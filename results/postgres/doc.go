// Package postgres is Celery's database result backend, db+postgresql://: it stores
// outcomes in the table celery_taskmeta, where Python's AsyncResult reads them, and
// reads what Python workers have stored there (docs/celery.md#result-table).
//
//	backend, err := postgres.Open(ctx, "db+postgresql://user:password@host/database")
//	…
//	defer backend.Close()
//
// It works with tables that Celery 5.4 to 5.7 have made, with and without
// result_extended. [Open] creates the tables if there are none. [New] uses a pool
// that the program has already.
//
// While the server restarts or fails over, calls retry for [Config.RetryFor].
package postgres

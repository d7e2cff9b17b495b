// Package store is PostgreSQL: every SQL statement and every transaction of
// the program.
//
// It owns MoonMind's tables as far as a worker writes them (contract
// moonmind.md 6 to 8 and 11), Celery's table celery_taskmeta
// (celery-worker.md 6.1), and the schema mm_orchestrator, in which it keeps
// what the shared tables have no room for: claims on steps and the outcome of
// each. One method is one transaction. It knows neither AMQP nor docker nor
// what a step does.
package store

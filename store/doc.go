// Package store is PostgreSQL: every SQL statement and every transaction of
// the program.
//
// It owns MoonMind's tables as far as a worker writes them
// (docs/moonmind.md#tables), Celery's table celery_taskmeta
// (docs/celery.md#result-table), and the schema mm_orchestrator, in which it
// keeps what the shared tables have no room for: claims on steps and the
// outcome of each. One method is one transaction. It knows neither AMQP nor
// docker nor what a step does.
//
// # Claims
//
// A step is run by the worker that holds the claim on its attempt (table
// mm_orchestrator.claims). The holder is alive while a session of its own holds
// a PostgreSQL advisory lock: a killed process frees it at once, a live one
// is never taken for dead because of a clock. Two things are needed to take a
// claim over: the broker delivers the step's message to somebody else, and the
// holder's lock is free for Config.TakeoverGrace without a break. That is
// enough for a live worker whose sessions were ended, or whose server was
// started again, since others count from when they have a session themselves:
// it tries every 200 ms, and no try to reach the server takes over a second.
// Should a live worker be cut off from the database for longer than that, its
// claim's token no longer fits and it can record nothing. So that it does
// nothing either, [Store.LockConfirmedAt] tells it how long it may be sure of its claim.
// A claim that nobody else asks for stays its own, for as long as its server is
// away.
//
// One step of a run is run at a time: a claim keeps every other step of the run
// waiting, whoever sent it, until the claim is over by the same two signs (see
// decide). A claim that a worker has without knowing it, because the answer was
// lost, it gives back when the database is there again.
//
// The claim also keeps which commands of the attempt have ended. Whoever takes
// the attempt over goes on behind them; a new attempt begins with none.
//
// # Locks
//
// Begin and finish lock the step's state rows, then the run, then the claim,
// all in this order, which is also that of MoonMind's API and Python worker.
package store

// Package store has every SQL statement and every transaction of the program.
//
// It reads and writes MoonMind's tables as far as a worker needs them
// (docs/moonmind.md#tables), Celery's table celery_taskmeta
// (docs/celery.md#result-table), and the schema mm_orchestrator, for what the
// shared tables have no room for, such as claims on steps and their outcomes. One
// method is one transaction. The package knows neither AMQP nor docker nor what a
// step does.
//
// # Claims
//
// The worker that runs a step has the claim on its attempt (table
// mm_orchestrator.claims). The worker is alive while a session of its own has a
// PostgreSQL advisory lock. When the process is killed the server frees the lock at
// once, and no difference between clocks makes a live worker look dead.
//
// Another worker takes a claim over only after two signs: the broker has delivered
// the step's message to it, and the holder's lock was free for
// Config.TakeoverGrace without a break. This grace is enough for a live worker
// whose session was ended, or whose server was restarted. That worker tries to
// connect every 200 ms, and no try takes more than a second, while the other
// worker's count starts only when it has a session itself.
//
// A live worker that cannot reach the database for longer may lose its claim. Its
// token then no longer matches, so that it can record nothing. To end its commands
// in time, it asks [Store.LockConfirmedAt] how long it can be sure of its claim. If
// no other worker gets the step's message, it keeps the claim for as long as the
// database is unreachable.
//
// One step of a run runs at a time. A claim makes every other step of the run wait,
// whoever sent it, until the claim has ended or the same two signs are there (see
// decide). If the answer to a commit was lost, and the worker has a claim without
// knowing it, the Store releases the claim when the database answers again.
//
// The claim also records which commands of the attempt have ended. A worker that
// takes the attempt over continues after them. A new attempt starts with the first
// command.
//
// # Locks
//
// Begin and finish lock the step's state rows, then the run, then the claim, then
// the workspace. MoonMind's API and Python worker use the same order.
package store

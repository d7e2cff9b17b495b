// Package chaos injects faults into workers, connections and servers, and checks
// that the result for a user is the same as without faults.
//
// A campaign is a sequence of trials. A seed and its number alone define a trial,
// so that a failed one can be repeated by itself. A trial publishes one run to
// real worker processes of a real broker and database, injects its faults at the
// chosen points (package faultpoint) or times, and waits for the end of the run.
// Then it checks the run's rows, Celery's results, the artifacts on disk, the
// ledger of effects (package ledger), and what is left in queue, tables and as
// processes. The kind Mixed has Celery's Python workers beside ours. Lanes run
// trials at the same time. A lane has a virtual host, a database, a workspace and
// workers of its own, and keeps them from trial to trial.
//
// A campaign without findings is worth something only if it can find defects. The
// proof builds workers with one known defect each (package defects), and fails if
// a trial meant for a defect does not find it.
package chaos

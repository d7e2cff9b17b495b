// Package chaos breaks workers, connections and servers on purpose, and checks
// that nothing which a user can see differs from a run that met no fault.
//
// A campaign is a sequence of trials, each made from a seed and its number
// alone, so that one that fails can be repeated by itself. A trial publishes
// one run to real worker processes of a real broker and database, lets its
// faults happen at the chosen moments (package faultpoint) or times, waits for
// the end, and judges: the run's rows, Celery's results, the artifacts on disk,
// the ledger of effects (package ledger), what is left in queue and tables, and
// the processes that are left. The kind Mixed has workers of Celery in Python
// beside ours. Lanes carry trials out side by side; a lane has
// a virtual host, a database and a workspace of its own, and its workers live on from
// trial to trial.
//
// What a campaign finds is only worth something if it would have found it: the
// proof builds workers with a known defect each (package defects), and fails when
// a trial meant for one does not turn red.
package chaos

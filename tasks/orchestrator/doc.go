// Package orchestrator is the repair of one compose service: the tasks
// execute_plan_step and health_check of MoonMind's orchestrator worker, the
// state machine around a step, and the six steps analyze, patch, build,
// restart, verify and rollback (docs/moonmind.md#state-rows,
// docs/moonmind.md#commands).
//
// The commands of a step run one after the other, and the end of each is on
// record before the next one starts. A step that another worker has left
// unfinished goes on behind the last one that had ended, with its exit code,
// and in its log.
//
// A step ends by itself, at a time limit, when its run is revoked, when the
// worker stops, and when the worker is cut off from everybody while others
// consume its queue (cutoff.go has the time line). A second worker that is
// started on the queue during such an outage does not count yet: it takes the
// step over, and if it is in another pid namespace, while a command of the
// first still runs, which ends when the database is back for the first.
//
// It decides what a step does and says. What is recorded is left to package
// store, files to artifacts, containers to compose, messages to worker.
package orchestrator

// Package orchestrator repairs one compose service. It has the tasks
// execute_plan_step and health_check of MoonMind's orchestrator worker, the
// state machine around a step, and the six steps analyze, patch, build,
// restart, verify and rollback (docs/moonmind.md#state-rows,
// docs/moonmind.md#commands).
//
// A delivery goes through these files, in this order:
//
//   - handler.go translates between a worker's task and Execute.
//   - delivery.go asks the database what becomes of the message: it runs the step,
//     it answers with a recorded end, or the message has no effect.
//   - attempt.go runs the step once: it starts the watch, lets the step work, and
//     records the end or gives up the claim.
//   - watch.go ends the work for one of its causes, isolation.go judges one of them.
//   - steprun.go has what an execution of a step needs, and calls the step. Each step
//     has a file, such as patch.go.
//   - command.go runs a step's commands with their log, journal.go records which of
//     them have ended, and runner.go starts the programs.
//   - outcome.go turns the end of the work into what is recorded.
//
// What a step does about the change of its run, in the order of a run:
//
//   - preflight.go looks, before the first effect, whether all is there.
//   - record.go loads and saves the record of the change: each act is recorded
//     before it is done.
//   - files.go and pin.go keep what was before: the workspace, and the image.
//   - judge.go looks at the service, and verdict.go says whether it is healthy.
//   - restorefiles.go and restoreimage.go put back what was before.
//   - resume.go makes the change again for a retry, and changes.go removes what is
//     kept of runs that are over.
//   - ownservice.go leaves to a helper container what would stop this worker.
//
// Besides, sweep.go publishes parked messages and ends lost runs, and leave.go
// returns parked messages when the last worker of a queue stops.
//
// The commands of a step run one after the other. The journal records the end of
// each before the next one starts. A worker that takes over an unfinished step
// continues after the last command that had ended: it uses the recorded exit
// code and appends to the same log.
//
// A step ends by itself, at a time limit, when its run is revoked, when the
// worker stops, when another worker has taken it over, and when the worker can
// reach neither database nor broker while others consume its queue (isolation.go
// has the time line). One case remains in which two workers run commands of one
// step: a second worker that starts on the queue during such an outage is not
// known to the first, takes the step over, and cannot end the first one's
// command if it is in another pid namespace. The first ends its command when it
// can reach the database again.
//
// The package decides what a step does and which message it has. Package store
// records that, artifacts has the files, compose the containers, and worker the
// messages.
package orchestrator

// Package speckit runs the three tasks of MoonMind's Spec workflow chain
// (docs/spec-workflow.md): discover_next_phase finds the next open task of a
// feature in its tasks.md, submit_codex_job has Codex do it, and apply_and_publish
// publishes what Codex has changed.
//
// Each task returns the context of the chain, a JSON object that is the first
// argument of the next task. Package store has the rows and the claims, package
// artifacts the files. The package knows no broker.
//
// handler.go translates between a worker's task and this package, attempt.go has
// what the three tasks share, and discover.go, submit.go and publish.go one task
// each. codex.go and codexcloud.go have Codex do a task, in a clone (repository.go) or
// in Codex Cloud, and prompt.go says what it is asked. tasksmd.go reads tasks.md, route.go chooses the queue of a message,
// skills.go applies MoonMind's skills policy, and object.go reads and writes JSON
// as Python does.
package speckit

// Package orchestrator is the repair of one compose service: the tasks
// execute_plan_step and health_check of MoonMind's orchestrator worker, the
// state machine around a step, and the six steps analyze, patch, build,
// restart, verify and rollback (contract moonmind.md 6 to 11).
//
// It decides what a step does and says. What is recorded is left to package
// store, files to artifacts, containers to compose, messages to worker.
package orchestrator

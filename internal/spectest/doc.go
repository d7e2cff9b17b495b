// Package spectest compares runs of the Spec workflow in test mode with what MoonMind's
// Python worker has left (docs/spec-workflow.md). It is for tests that see a run from
// inside, and for those that see it from outside.
package spectest

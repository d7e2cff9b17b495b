// Package preflight finds out within seconds whether a run of the Spec workflow can
// work: whether Codex can be started and has a login, and whether GitHub accepts the
// token for the run's repository.
//
// It decides nothing about a run: tasks/speckit records what is found and fails the run.
// A check changes nothing, neither at GitHub nor in the working tree.
package preflight

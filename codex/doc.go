// Package codex has the program codex work on a repository: [Exec] runs it in a clone on
// this machine, [Cloud] gives the work to Codex Cloud and waits for it.
//
// Both say how it has ended by a [Result]: that is no error of Go, because each way needs
// another answer from an operator. The package decides nothing about runs and keeps no
// state: package tasks/speckit records what happened, and does not ask again for what has
// ended.
//
// Codex is told apart by what it prints. events.go reads its JSON lines, and classify.go
// its messages: the program has no codes for what went wrong.
package codex

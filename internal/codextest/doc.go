// Package codextest stands in for what Codex speaks to, so that tests, the demo and
// the chaos harness run the real `codex` program without an account: [Model] answers
// like the Responses API of a model, on loopback, by a [Script].
//
// The real program sends its login to its maker's servers only. For `codex cloud` the
// package therefore has a stand-in of the program, [Cloud], with the command lines and
// the output of the real one.
package codextest

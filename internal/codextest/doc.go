// Package codextest stands in for what Codex speaks to, so that tests, the demo and
// the chaos harness run the real `codex` program without an account: [Model] answers
// like the Responses API of a model, on loopback, by a [Script].
package codextest

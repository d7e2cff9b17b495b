// Package metrics counts what happens to runs and steps, and shows it:
// StatsD datagrams with MoonMind's names and formats (docs/moonmind.md#statsd),
// Prometheus metrics, and the listener that serves them together with the
// answers to health probes.
//
// Counting never blocks and never fails its caller: a StatsD server that is
// slow, gone or unknown to DNS costs datagrams and nothing else. The package
// knows nothing of ours; what a health probe is told is given to it as a
// function.
package metrics

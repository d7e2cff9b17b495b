// Package metrics counts runs and steps and exposes the counts: as StatsD
// datagrams with MoonMind's names and formats (docs/moonmind.md#statsd), and as
// Prometheus metrics. Its HTTP listener serves the Prometheus metrics and the
// health probes.
//
// Counting never blocks and never fails: if the StatsD server is slow,
// unreachable or unknown to DNS, datagrams are dropped. The package imports no
// other package of this module; the caller passes the health checks as
// functions.
package metrics

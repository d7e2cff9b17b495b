// Package metrics counts: StatsD datagrams with MoonMind's names and formats
// (contract moonmind.md 14), and the names of our Prometheus metrics.
//
// It never blocks and never fails its caller.
package metrics

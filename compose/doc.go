// Package compose builds and parses docker compose command lines, finds the
// compose program, and reads the state of a project's containers from the
// docker engine.
//
// The functions for command lines are pure. The compose program runs as a child
// process; its code is not linked. The package knows nothing of runs, plans or
// tables.
package compose

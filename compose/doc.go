// Package compose is docker compose and the engine behind it: which services
// a project has, how its command lines look, and what state its containers
// are in.
//
// Command lines are made by pure functions; the compose program itself is
// run, never linked. It knows nothing of runs, plans or tables.
package compose

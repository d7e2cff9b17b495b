//go:build race

package orchestrator

// raceEnabled says that the race detector multiplies the memory.
const raceEnabled = true

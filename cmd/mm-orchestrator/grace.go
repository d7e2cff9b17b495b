package main

import "time"

// grace divides the time between the request to stop and the end of the process.
type grace struct {
	// Finish is how long running steps may continue.
	Finish time.Duration
	// Stop is the time after Finish: to end the programs of the steps that still
	// run, and to return their messages to the queue.
	Stop time.Duration
	// Kill is the part of Stop after which programs get SIGKILL.
	Kill time.Duration
}

// splitGrace divides the configured time so that the process has ended when it is
// over: a supervisor configured with the same time does not kill it. Stop is a
// quarter of it, at most ten seconds, and at least what it takes to return the
// messages.
func splitGrace(whole time.Duration) grace {
	stop := min(max(whole/4, 900*time.Millisecond), 10*time.Second)
	return grace{Finish: max(whole-stop, 0), Stop: stop, Kill: stop / 2}
}

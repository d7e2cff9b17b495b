package main

import "time"

// grace is how the time between the request to stop and the end of the
// process is spent.
type grace struct {
	// Finish is left to running steps to end by themselves.
	Finish time.Duration
	// Stop is left to steps that are ended: to their programs, and to hand
	// their messages back.
	Stop time.Duration
	// Kill is the part of Stop after which programs get SIGKILL.
	Kill time.Duration
}

// splitGrace spends the configured time, so that the process is gone when it
// is over: a supervisor that is told the same time does not kill it before. The
// tail is a quarter of it, ten seconds at the most, and never so short that
// nothing could be handed back.
func splitGrace(whole time.Duration) grace {
	stop := min(max(whole/4, 900*time.Millisecond), 10*time.Second)
	return grace{Finish: max(whole-stop, 0), Stop: stop, Kill: stop / 2}
}

package change

import "time"

// Usage is what the steps of a run have taken of its limits. It is recorded only for a
// run that has limits.
type Usage struct {
	// Attempt is that of the steps. A retried run has another one, and starts anew.
	Attempt int `json:"attempt"`
	// Time, Output and Disk are of the steps that have ended: how long they have
	// worked, how many bytes their commands have written, and by how many bytes the
	// files have grown.
	Time   time.Duration `json:"time,omitempty"`
	Output int64         `json:"output,omitempty"`
	Disk   int64         `json:"disk,omitempty"`
	// Step is the step that has begun last, DiskBefore the size of the files at its
	// beginning; both are for a worker that takes the step over.
	Step       string `json:"step,omitempty"`
	DiskBefore int64  `json:"diskBefore,omitempty"`
}

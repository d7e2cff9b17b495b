package change

import "time"

// A Helper is a container that runs a command of the run in place of the worker,
// because the command replaces the worker's own container.
type Helper struct {
	// Name is the name of the helper's container.
	Name string `json:"name"`
	// Step, Attempt and Command say which command: the number counts those of the
	// step, from 1; 0 is what the step does itself.
	Step    string `json:"step"`
	Attempt int    `json:"attempt"`
	Command int    `json:"command"`
	// Container is the id of the worker's container that is to be replaced, Image
	// that of the helper's image.
	Container string `json:"container"`
	Image     string `json:"image"`
	// At is the time of the record, before the helper is started.
	At time.Time `json:"at"`
}

// Acts says that the helper acts for this command. It may be called with nil.
func (h *Helper) Acts(step string, attempt, command int) bool {
	return h.ActsIn(step, attempt) && h.Command == command
}

// ActsIn says that the helper acts in this step. It may be called with nil.
func (h *Helper) ActsIn(step string, attempt int) bool {
	return h != nil && h.Step == step && h.Attempt == attempt
}

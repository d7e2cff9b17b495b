package change

// Files is the change of a run in the workspace.
type Files struct {
	// Workspace is the absolute path of the folder that the plan's commands work
	// in, Top that of the work tree around it.
	Workspace string `json:"workspace"`
	Top       string `json:"top"`
	// Baseline is the id of the state before the run, for Load.
	Baseline string `json:"baseline"`
	// Change is the id of what the run's own commands have altered, for LoadChange;
	// "" while that is not known. Then everything that differs from the baseline
	// counts as the run's, once Began is set.
	Change string `json:"change,omitempty"`
	// Began says that a command of the run may have run since the baseline.
	Began bool `json:"began,omitempty"`
	// Violated says that the change has violations, which are undone or about to be.
	Violated bool `json:"violated,omitempty"`
	// Edits says that the run's own commands alter nothing: its change are the edits
	// that were not committed before it, compared with the commit Head.
	Edits bool   `json:"edits,omitempty"`
	Head  string `json:"head,omitempty"`
	// Deployed says that a step has begun that uses the files.
	Deployed bool `json:"deployed,omitempty"`
}

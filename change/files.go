package change

// Files is the change of a run in the workspace.
type Files struct {
	// Workspace is the absolute path of the folder that the plan's commands work
	// in, Top that of the work tree around it.
	Workspace string `json:"workspace"`
	Top       string `json:"top"`
	// Baseline is the id of the state before the run, for Load. Without it, Missing
	// says why there is none: only the plan's own commands can undo the change.
	Baseline string `json:"baseline,omitempty"`
	Missing  string `json:"missing,omitempty"`
	// WithoutPatch says that the plan has no patch: another step has captured the
	// workspace, and no allow-list counts.
	WithoutPatch bool `json:"withoutPatch,omitempty"`
	// Applied says that the plan's diff was applied.
	Applied bool `json:"applied,omitempty"`
	// Change is the id of what the run has altered, for LoadChange; "" while that is
	// not known. Then everything that differs from the baseline counts as the run's.
	Change string `json:"change,omitempty"`
	// Altered says that this change is not empty: the run's commands, or the edits that
	// it deploys, have altered something.
	Altered bool `json:"altered,omitempty"`
	// Violated says that the change has violations; ViolationsUndone, that they are
	// undone.
	Violated         bool `json:"violated,omitempty"`
	ViolationsUndone bool `json:"violationsUndone,omitempty"`
	// Edits says that the run's own commands alter nothing: its change are the edits
	// that were not committed before it, compared with HEAD.
	Edits bool `json:"edits,omitempty"`
	// Deployed says that a step has begun that uses the files.
	Deployed bool `json:"deployed,omitempty"`
	// Restored says that a rollback has brought all of it back. The next step that
	// changes something makes a new record.
	Restored bool `json:"restored,omitempty"`
}

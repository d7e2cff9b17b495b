package preflight

// Status is a label of the columns codex_status and github_status of
// workflow_credential_audits.
type Status string

const (
	// Valid: the task can work.
	Valid Status = "valid"
	// Invalid: there is no credential, it is refused, or it could not be checked.
	Invalid Status = "invalid"
	// ExpiresSoon: the task can work, but not for long. Of Codex only: the enum of
	// GitHub's column does not have it, so there the message says it.
	ExpiresSoon Status = "expires_soon"
	// ScopeMissing: GitHub knows the token, but it may not do what a run needs. Of
	// GitHub only.
	ScopeMissing Status = "scope_missing"
)

// Fails reports whether the task cannot work.
func (s Status) Fails() bool { return s == Invalid || s == ScopeMissing }

// A Finding is what a check has found about one service.
type Finding struct {
	Status Status
	// Message says what was found, and after a failure what to do. It has no secret.
	Message string
}

// LoginStatus is a label of the column codex_preflight_status.
type LoginStatus string

const (
	LoginSkipped LoginStatus = "skipped"
	LoginPassed  LoginStatus = "passed"
	LoginFailed  LoginStatus = "failed"
)

// NoVolume is MoonMind's message for a worker without a volume with Codex's login.
const NoVolume = "Codex auth volume not configured for this worker."

// A Login is what the check of the volume with Codex's login has found, in MoonMind's
// words (docs/spec-workflow.md#login-check).
type Login struct {
	Status  LoginStatus
	Message string
	// ExitCode is that of `codex login status`, nil if it did not end by itself.
	ExitCode *int
	// Output is what it has printed, at most 64 KiB.
	Output string
}

// A Report is what a check has found. The finding of a part that was not asked for is
// zero.
type Report struct {
	Codex, GitHub Finding
	Login         Login
}

// A Request says what to check.
type Request struct {
	// Repository is the run's, as owner/name.
	Repository string
	// Codex says that Codex is checked. A task that only publishes does not need it.
	Codex bool
	// Volume is the volume with Codex's login, "" for none.
	Volume string
	// Fresh says that a finding from before does not count.
	Fresh bool
}

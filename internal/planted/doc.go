// Package planted puts known defects into the program, to prove that the chaos
// harness (internal/chaos) finds them.
//
// Bug guards one. In an ordinary build it is the constant false, so that
// nothing of the defect is in the program. Built with the tag chaosbug, the one
// that the environment names is there.
package planted

// The defects.
const (
	// AckBeforeSettle acknowledges when the handler has returned, before
	// anybody was told of the outcome.
	AckBeforeSettle = "ack-before-settle"
	// PublishAfterResult stores the result first, and takes a stored success
	// as a sign that everything was published.
	PublishAfterResult = "publish-after-result"
	// PublishUnconfirmed does not wait for the broker to take a message.
	PublishUnconfirmed = "publish-unconfirmed"
	// PublishTwice publishes every next link a second time, with an id of its
	// own.
	PublishTwice = "publish-twice"
	// ErrbackLost forgets the error callbacks of a failure whose result is
	// stored already.
	ErrbackLost = "errback-lost"
	// FinishUnfenced records an end whoever holds the claim.
	FinishUnfenced = "finish-unfenced"
	// OutcomeForgotten records the end of a step without its outcome.
	OutcomeForgotten = "outcome-forgotten"
	// BeginUnclaimed starts a step without taking the claim.
	BeginUnclaimed = "begin-unclaimed"
	// ClaimStolen takes a claim whose holder is alive.
	ClaimStolen = "claim-stolen"
	// ClaimKept never takes over the claim of a dead worker.
	ClaimKept = "claim-kept"
	// StartsUncounted forgets how often a step was started.
	StartsUncounted = "starts-uncounted"
	// ProgressIgnored forgets, when a step is taken over, which of its commands
	// have ended.
	ProgressIgnored = "progress-ignored"
	// RollbackUnchecked runs a rollback whatever state its run is in.
	RollbackUnchecked = "rollback-unchecked"
	// RollbackRepeated runs a rollback again that has ended.
	RollbackRepeated = "rollback-repeated"
	// ArtifactsInserted registers artifacts without regard to those of an
	// earlier attempt.
	ArtifactsInserted = "artifacts-inserted"
	// CutOffIgnored lets a worker's commands go on that is cut off from broker
	// and database, and lets a successor leave them alone.
	CutOffIgnored = "cut-off-ignored"
	// NeverAlone kills the commands of a worker that is cut off also where
	// nobody else could take its step over.
	NeverAlone = "never-alone"
	// CommandsSurvive leaves commands running when the worker dies.
	CommandsSurvive = "commands-survive"
	// ParkUnstored acknowledges the message of a run that has to wait without
	// keeping it.
	ParkUnstored = "park-unstored"
	// HoldIgnored starts a step though another run has the workspace.
	HoldIgnored = "hold-ignored"
	// HoldKept lets a run that has ended keep the workspace.
	HoldKept = "hold-kept"
	// HoldDropped lets a run that has failed give the workspace up before it is
	// rolled back.
	HoldDropped = "hold-dropped"
	// LostKept never ends a run that was lost.
	LostKept = "lost-kept"
)

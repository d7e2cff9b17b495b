package faultpoint

// Point is the name of a moment. In a name, "before" means that the operation
// has not started; "after", or a past participle, means that it is complete, as
// far as this process knows.
type Point string

// The connections of a worker. These points have no subject.
const (
	// ConnectionLost: the worker has noticed the loss of its connection to the
	// broker. ConnectionRestored: it has a new connection, with all its
	// consumers.
	ConnectionLost     Point = "connection.lost"
	ConnectionRestored Point = "connection.restored"
	// SessionLost: the worker has noticed the loss of the database session that
	// proves it alive. SessionEstablished: it has a session, with its worker
	// lock.
	SessionLost        Point = "session.lost"
	SessionEstablished Point = "session.established"
)

// A delivery, in package worker. Subject: the task's id and the repr of its
// arguments.
const (
	// ConsumerTook: a consumer's loop has taken a message, and takes no other
	// before it has passed this one on. Subject: the task's id.
	ConsumerTook Point = "consumer.took"
	// DeliveryReceived: the worker has received a message and not read it.
	DeliveryReceived Point = "delivery.received"
	// DeliveryDecoded: the worker has decoded the message and has a handler
	// for it.
	DeliveryDecoded Point = "delivery.decoded"
	// DeliveryDropped: the worker drops the delivery, because its connection
	// was lost before it had a slot, or because the worker stops.
	DeliveryDropped Point = "delivery.dropped"
	// SlotTaken: the delivery has a slot; nothing outside of the worker shows
	// it.
	SlotTaken Point = "slot.taken"
	// TaskAttached: the delivery is a repetition of one whose task is running
	// in this worker.
	TaskAttached Point = "task.attached"
	// TaskStarting: the worker is about to call the handler.
	TaskStarting Point = "task.starting"
	// TaskReturned: the handler has returned; nothing has been published,
	// stored or acknowledged.
	TaskReturned Point = "task.returned"
	// PublishBefore: the worker is about to publish a follow-up.
	PublishBefore Point = "publish.before"
	// PublishSent: the message is written to the connection and not confirmed.
	// Subject: the id of the published task.
	PublishSent Point = "publish.sent"
	// PublishConfirmed: the broker has confirmed the message.
	PublishConfirmed Point = "publish.confirmed"
	// ResultBefore and ResultStored are before and after storing the Celery
	// result, LaterBefore and LaterStored before and after storing the results
	// of chain steps that will never run.
	ResultBefore Point = "result.before"
	ResultStored Point = "result.stored"
	LaterBefore  Point = "later-results.before"
	LaterStored  Point = "later-results.stored"
	// SettleBefore and SettleAfter are before and after sending the ack, nack
	// or reject.
	SettleBefore Point = "settle.before"
	SettleAfter  Point = "settle.after"
)

// A step, in package tasks/orchestrator. Subject: the run's id and the step. A task of
// the Spec workflow reaches StepDecided, StepBegun, StepWorked, FinishAfter, StepAnswered,
// ReleaseBefore and ReleaseAfter too; its subject is the run's id and the task.
const (
	// StepDecided: the store has answered whether the step is to be run.
	StepDecided Point = "step.decided"
	// StepBegun: the worker has the claim and has done nothing of the step.
	StepBegun Point = "step.begun"
	// ArtifactsOpened: the run's directory exists and is open.
	ArtifactsOpened Point = "artifacts.opened"
	// OtherConsumersKnown: the broker has answered, for the first time in a
	// step, whether the queue has other consumers.
	OtherConsumersKnown Point = "other-consumers.known"
	// Isolated: neither server has answered for too long, and the worker is
	// about to kill the step's commands.
	Isolated Point = "worker.isolated"
	// CommandBefore: the worker is about to start a command. The subject of
	// this and the next two points ends with the command's Number in its step.
	CommandBefore Point = "command.before"
	// CommandAfter: the command has ended by itself; only this process knows
	// its exit code. CommandRecorded: its end is recorded, and it will not run
	// again.
	CommandAfter    Point = "command.after"
	CommandRecorded Point = "command.recorded"
	// ArtifactBefore and ArtifactWritten are before and after a finished log
	// gets its name.
	ArtifactBefore  Point = "artifact.before"
	ArtifactWritten Point = "artifact.written"
	// StepWorked: the step's work is complete and nothing is recorded.
	StepWorked Point = "step.worked"
	// FinishAfter: the step's end is recorded.
	FinishAfter Point = "finish.after"
	// StepAnswered: the step had ended earlier, and the worker returns its
	// recorded outcome.
	StepAnswered Point = "step.answered"
	// ReleaseBefore and ReleaseAfter are before and after giving up the claim
	// on a step that has not ended.
	ReleaseBefore Point = "release.before"
	ReleaseAfter  Point = "release.after"
	// ParkedTaken: the worker is about to publish a parked message.
	ParkedTaken Point = "parked.taken"
	// ParkedPublished: the broker has the message, and the database still has
	// it too.
	ParkedPublished Point = "parked.published"
	// LostBefore: a run seems lost, and the worker ends it if it still does.
	// LostFailed: the run is ended; its rollback, if it has one, is parked.
	LostBefore Point = "lost.before"
	LostFailed Point = "lost.failed"
)

// A transaction, in package store. Subject: the run's id and the step, or the
// task's id.
const (
	// BeginBefore: the transaction has not started.
	BeginBefore Point = "begin.before"
	// BeginLocked: states and run are locked and read; nothing is written.
	BeginLocked Point = "begin.locked"
	// BeginWritten: state, run and claim are written and committed next, in one round
	// trip.
	BeginWritten Point = "begin.written"
	// BeginCommitted: other sessions see the step in progress.
	BeginCommitted Point = "begin.committed"
	// ParkWritten: a message that has to wait is written to the table and not
	// committed; the broker has it too. ParkCommitted: both have it.
	ParkWritten   Point = "park.written"
	ParkCommitted Point = "park.committed"
	// HolderSuspected: the worker that has the claim seems dead, and is given
	// time to answer.
	HolderSuspected Point = "holder.suspected"
	// FinishBefore, FinishLocked, FinishWritten and FinishCommitted are as for
	// begin.
	FinishBefore    Point = "finish.before"
	FinishLocked    Point = "finish.locked"
	FinishWritten   Point = "finish.written"
	FinishCommitted Point = "finish.committed"
	// SpecWriteBefore, SpecWriteWritten and SpecWriteCommitted are as for begin, for each
	// write of a task of the Spec workflow, also of its progress.
	SpecWriteBefore    Point = "spec-write.before"
	SpecWriteWritten   Point = "spec-write.written"
	SpecWriteCommitted Point = "spec-write.committed"
	// ChangeBefore and ChangeRecorded are before and after the record of what the
	// run changes is written and committed.
	ChangeBefore   Point = "change.before"
	ChangeRecorded Point = "change.recorded"
	// AuditBefore and AuditRecorded are before and after records are appended to the
	// audit trail on their own: what they announce has not happened. The subject ends
	// with the kind of the first.
	AuditBefore   Point = "audit.before"
	AuditRecorded Point = "audit.recorded"
	// ApprovalBefore: a step is about to check its approval against the workspace.
	// ApprovalChecked: it may act, and has done nothing. ApprovalRefused: the run
	// waits for an approval, and its message is not acknowledged.
	ApprovalBefore  Point = "approval.before"
	ApprovalChecked Point = "approval.checked"
	ApprovalRefused Point = "approval.refused"
	// ResultWritten: the Celery result is sent to the database, and whether it is
	// committed is not known.
	ResultWritten Point = "result.written"
	// ResultCommitted: other sessions see the result.
	ResultCommitted Point = "result.committed"
)

// A task of the Spec workflow, in package tasks/speckit. Subject: run id and task.
const (
	// CodexCloneBefore and CodexCloned are before and after the clone in which Codex
	// works.
	CodexCloneBefore Point = "codex-clone.before"
	CodexCloned      Point = "codex-clone.cloned"
	// CodexStarting: the stage is recorded, and codex is about to be started, or the task
	// about to be submitted to Codex Cloud.
	CodexStarting Point = "codex.starting"
	// CodexPrinted: codex has printed a line, or Codex Cloud has another state of the task.
	// The subject ends with the number of the line.
	CodexPrinted Point = "codex.printed"
	// CodexSubmitted: Codex Cloud has the task, and its id is not recorded.
	CodexSubmitted Point = "codex.submitted"
	// CodexExited: codex has ended, and nothing of it is recorded.
	CodexExited Point = "codex.exited"
	// CodexStored: the patch is stored in the run's directory, and not recorded.
	CodexStored Point = "codex.stored"
	// CodexRecorded: how codex has ended is recorded, and the task goes on.
	CodexRecorded Point = "codex.recorded"
	// PublishFetching and PublishFetched are before and after the clone to which the patch
	// is applied.
	PublishFetching Point = "publish.fetching"
	PublishFetched  Point = "publish.fetched"
	// PublishCommitRecorded: the commit is made and recorded, and nobody else has it.
	PublishCommitRecorded Point = "publish.commit-recorded"
	// PublishPushing: the branch is about to be pushed. PublishPushedBranch: it may be
	// pushed, and nothing of that is recorded. PublishPushRecorded: that is recorded.
	PublishPushing      Point = "publish.pushing"
	PublishPushedBranch Point = "publish.pushed"
	PublishPushRecorded Point = "publish.push-recorded"
	// PublishOpening: the pull request is about to be opened. PublishOpened: it may be
	// open, and that is not recorded. PublishOpenRecorded: that is recorded.
	PublishOpening      Point = "publish.opening"
	PublishOpened       Point = "publish.opened"
	PublishOpenRecorded Point = "publish.open-recorded"
)

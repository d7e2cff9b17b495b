package faultpoint

// Point is the name of a moment. "before" means that nothing of what the name
// says has happened, "after" that all of it has, as far as this process knows.
type Point string

// The connections of a worker. No subject.
const (
	// ConnectionLost: the worker knows that its connection to the broker is
	// gone. Consuming: it has a new one with all its consumers.
	ConnectionLost Point = "connection.lost"
	Consuming      Point = "consuming"
	// SessionLost: the database session that proves the worker alive is gone.
	// SessionHeld: it has one, with its lock.
	SessionLost Point = "session.lost"
	SessionHeld Point = "session.held"
)

// A delivery, in package worker. Subject: the task's id and the repr of its
// arguments.
const (
	// ConsumerTook: a consumer's loop has a message in hand, and takes no other
	// before it has passed it on. Subject: the task's id.
	ConsumerTook Point = "consumer.took"
	// DeliveryReceived: the broker has handed a message over; nothing was read.
	DeliveryReceived Point = "delivery.received"
	// DeliveryDecoded: it is a task that is registered here.
	DeliveryDecoded Point = "delivery.decoded"
	// DeliveryDropped: it is not this worker's any more: its connection was lost
	// before it had a slot, or the worker stops.
	DeliveryDropped Point = "delivery.dropped"
	// SlotTaken: it may run; nobody knows yet that it does.
	SlotTaken Point = "slot.taken"
	// TaskAttached: the delivery repeats a task that runs here.
	TaskAttached Point = "task.attached"
	// TaskStarting: the handler will be called next.
	TaskStarting Point = "task.starting"
	// TaskReturned: the handler has returned; nobody was told.
	TaskReturned Point = "task.returned"
	// PublishBefore: a message that follows will be published next.
	PublishBefore Point = "publish.before"
	// PublishSent: it was written to the connection and is not confirmed.
	// Subject: the id of the published task.
	PublishSent Point = "publish.sent"
	// PublishConfirmed: the broker has taken it.
	PublishConfirmed Point = "publish.confirmed"
	// ResultBefore and ResultStored stand around storing the Celery result,
	// LaterBefore and LaterStored around the results of links that will never
	// run.
	ResultBefore Point = "result.before"
	ResultStored Point = "result.stored"
	LaterBefore  Point = "later-results.before"
	LaterStored  Point = "later-results.stored"
	// SettleBefore and SettleAfter stand around telling the broker.
	SettleBefore Point = "settle.before"
	SettleAfter  Point = "settle.after"
)

// A step, in package tasks/orchestrator. Subject: the run's id and the step.
const (
	// StepDecided: the store has answered whether the step is to be run.
	StepDecided Point = "step.decided"
	// StepBegun: the claim is ours; nothing of the step has been done.
	StepBegun Point = "step.begun"
	// ArtifactsOpened: the run's directory is there.
	ArtifactsOpened Point = "artifacts.opened"
	// OthersKnown: the broker has told, for the first time in a step, whether
	// others consume its queue.
	OthersKnown Point = "others.known"
	// CutOff: neither server has answered for too long; the step's commands are
	// being killed.
	CutOff Point = "cut.off"
	// CommandBefore: a command will be started next. The subject of this and
	// the next two ends with the command's Number among those of its step.
	CommandBefore Point = "command.before"
	// CommandAfter: it has ended by itself; its exit code is known to nobody
	// else. CommandRecorded: its end is on record, and it is not run again.
	CommandAfter    Point = "command.after"
	CommandRecorded Point = "command.recorded"
	// ArtifactBefore and ArtifactWritten stand around putting a finished log
	// in its place.
	ArtifactBefore  Point = "artifact.before"
	ArtifactWritten Point = "artifact.written"
	// StepWorked: everything of the step is done and nothing recorded.
	StepWorked Point = "step.worked"
	// FinishAfter: its end is recorded.
	FinishAfter Point = "finish.after"
	// StepAnswered: the step had ended before, its outcome is answered again.
	StepAnswered Point = "step.answered"
	// ReleaseBefore and ReleaseAfter stand around giving up the claim on a
	// step that is not over.
	ReleaseBefore Point = "release.before"
	ReleaseAfter  Point = "release.after"
	// UnparkTaken: a parked message will be published next.
	UnparkTaken Point = "unpark.taken"
	// UnparkPublished: the broker has it, and so has the database.
	UnparkPublished Point = "unpark.published"
	// LostBefore: a run seems lost, and is ended next if it still does.
	// LostFailed: it was ended; its rollback is parked, if it has one.
	LostBefore Point = "lost.before"
	LostFailed Point = "lost.failed"
)

// A transaction, in package store. Subject: the run's id and the step, or the
// task's id.
const (
	// BeginBefore: nothing was asked.
	BeginBefore Point = "begin.before"
	// BeginLocked: states and run are locked and read, nothing is written.
	BeginLocked Point = "begin.locked"
	// BeginWritten: state, run and claim are written, not committed.
	BeginWritten Point = "begin.written"
	// BeginCommitted: readers see the step in progress.
	BeginCommitted Point = "begin.committed"
	// ParkWritten: a message that has to wait is stored, not committed, and
	// still the broker's too. ParkCommitted: it is in both places.
	ParkWritten   Point = "park.written"
	ParkCommitted Point = "park.committed"
	// HolderSuspected: the step's worker seems dead, and is given time.
	HolderSuspected Point = "holder.suspected"
	// FinishBefore, FinishLocked, FinishWritten, FinishCommitted: as for begin.
	FinishBefore    Point = "finish.before"
	FinishLocked    Point = "finish.locked"
	FinishWritten   Point = "finish.written"
	FinishCommitted Point = "finish.committed"
	// ResultWritten: the Celery result is written, not committed.
	ResultWritten Point = "result.written"
	// ResultCommitted: readers see it.
	ResultCommitted Point = "result.committed"
)

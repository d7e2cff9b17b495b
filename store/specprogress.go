package store

// SpecProgress is what a task of the Spec workflow has done so far, as its claim has it.
// A worker that takes the task over goes on from there (docs/spec-workflow.md#progress).
// What is nil has not begun.
type SpecProgress struct {
	// Codex is that of submit_codex_job.
	Codex *CodexProgress `json:"codex,omitempty"`
	// Publish is that of apply_and_publish.
	Publish *PublishProgress `json:"publish,omitempty"`
}

// CodexStage is the last stage that submit_codex_job has reached. A stage is recorded
// before what it says begins, or after it has ended, as its comment says.
type CodexStage string

const (
	// CodexStarted: the program is started after this was recorded. A worker that finds
	// this stage does not know how far it came, and starts it again in a new clone.
	CodexStarted CodexStage = "started"
	// CodexSubmitting: the task is submitted to Codex Cloud after this was recorded. A
	// worker that finds this stage looks for the task and submits it only if there is
	// none.
	CodexSubmitting CodexStage = "submitting"
	// CodexSubmitted: Codex Cloud has the task TaskID, which is waited for.
	CodexSubmitted CodexStage = "submitted"
	// CodexEnded: Codex has ended as Outcome says, and log and patch are stored.
	CodexEnded CodexStage = "ended"
)

// CodexProgress is the progress of submit_codex_job.
type CodexProgress struct {
	Stage CodexStage `json:"stage"`
	// Runs counts how often Codex was started, or the task submitted.
	Runs int `json:"runs"`
	// BaseCommit is the commit of the repository from which Codex starts, "" if that is
	// not known.
	BaseCommit string `json:"base_commit,omitempty"`
	// KnownTasks are the tasks that Codex Cloud had before the submission.
	KnownTasks []string `json:"known_tasks,omitempty"`
	// TaskID is Codex's: of a thread, or of a task of Codex Cloud.
	TaskID string `json:"task_id,omitempty"`
	// Outcome is how Codex has ended, in the words of package codex, and Message what it
	// said. Both are set with CodexEnded.
	Outcome string `json:"outcome,omitempty"`
	Message string `json:"message,omitempty"`
	// InputTokens and OutputTokens are what the model has read and written, 0 if that is
	// not known.
	InputTokens  int64 `json:"input_tokens,omitempty"`
	OutputTokens int64 `json:"output_tokens,omitempty"`
	// ChangedFiles counts the files of the patch, 0 if that is not known.
	ChangedFiles int `json:"changed_files,omitempty"`
	// Log is the file with Codex's output, and Patch that with its change, nil for none.
	Log   *SpecArtifact `json:"log,omitempty"`
	Patch *SpecArtifact `json:"patch,omitempty"`
}

// PublishStage is the last stage that apply_and_publish has reached. A stage is recorded
// before what it says begins, or after it has ended, as its comment says.
type PublishStage string

const (
	// PublishCommitted: the commit is pushed after this was recorded. A worker that finds
	// this stage looks whether the branch has the commit.
	PublishCommitted PublishStage = "committed"
	// PublishPushed: the branch has the commit. The pull request is opened after this was
	// recorded; a worker that finds this stage looks whether it exists.
	PublishPushed PublishStage = "pushed"
	// PublishOpened: the pull request exists.
	PublishOpened PublishStage = "opened"
	// PublishNothing: the base branch has the change already. There is no commit.
	PublishNothing PublishStage = "nothing"
)

// PublishProgress is the progress of apply_and_publish.
type PublishProgress struct {
	Stage PublishStage `json:"stage"`
	// Branch is the one with the change, Base the one to which it goes, and BaseCommit the
	// commit of that to which the patch was applied.
	Branch     string `json:"branch"`
	Base       string `json:"base"`
	BaseCommit string `json:"base_commit"`
	// Commit is the one with the change. Files are the names of the first files that it
	// changes, and ChangedFiles counts all.
	Commit       string   `json:"commit,omitempty"`
	Files        []string `json:"files,omitempty"`
	ChangedFiles int      `json:"changed_files,omitempty"`
	// PullRequest is the number of the pull request, and URL its address for people.
	PullRequest int    `json:"pull_request,omitempty"`
	URL         string `json:"url,omitempty"`
	// Applied, Pushed and Response are the files about these stages, nil for none.
	Applied  *SpecArtifact `json:"applied,omitempty"`
	Pushed   *SpecArtifact `json:"pushed,omitempty"`
	Response *SpecArtifact `json:"response,omitempty"`
}

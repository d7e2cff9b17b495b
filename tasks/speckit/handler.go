package speckit

import "github.com/moonladderstudios/mm-orchestrator/worker"

// The names of the tasks (docs/spec-workflow.md#tasks).
const (
	TaskDiscover = "spec_workflow_runs.discover_next_phase"
	TaskSubmit   = "spec_workflow_runs.submit_codex_job"
	TaskPublish  = "spec_workflow_runs.apply_and_publish"
)

// Register makes the worker run the three tasks, and route submit and publish as
// MoonMind does when it publishes them.
func (s *Speckit) Register(w *worker.Worker) {
	worker.Handle(w, TaskDiscover, s.discover)
	worker.Handle(w, TaskSubmit, s.submit, worker.Prepare(s.prepare))
	worker.Handle(w, TaskPublish, s.publish, worker.Prepare(s.prepare))
}

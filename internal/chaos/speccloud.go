package chaos

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
)

// cloudEnvironment is the environment of Codex Cloud of all lanes.
const cloudEnvironment = "env_chaos"

// cloudStates is how many states of a task the worker sees in each trial: pending, and
// ready.
const cloudStates = 2

// The faults of Codex Cloud.
const (
	// cloudLost: the task is made, and the client program fails before it prints its id.
	cloudLost = "the answer of Codex Cloud to a new task is lost"
	// cloudLong: the worker looks three times before the task has ended.
	cloudLong = "Codex Cloud takes long"
)

// makeCloud makes the stand-in of Codex Cloud and of its client program. The worker gets
// a program around it, which has a login, adds each submission to the ledger, and waits
// after one while the file hold exists.
func (s *specLane) makeCloud(l *lane) (err error) {
	folder := filepath.Join(l.folder, "codex-cloud")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	if s.cloud, err = codextest.NewCloud(folder, codextest.CloudScript{}); err != nil {
		return err
	}
	script := fmt.Sprintf(`#!/bin/sh
{ env; echo "$@"; } >> '%s'
case "$1 $2" in
"login status")
	echo 'Logged in using ChatGPT' >&2
	exit 0 ;;
"cloud exec") exec '%s' '%s' - - 1 run codex "$0" begun "$@" ;;
"begun cloud")
	shift
	'%s' "$@"
	code=$?
	sleep 0.1
	while [ -e '%s' ]; do sleep 0.05; done
	exit $code ;;
esac
exec '%s' "$@"
`, s.calls, l.config.programs.ledger, l.ledger, s.cloud.Program(), s.hold, s.cloud.Program())
	s.programs[cloudCodex] = filepath.Join(folder, "client")
	return os.WriteFile(s.programs[cloudCodex], []byte(script), 0o755)
}

// prepareCloud says what the task of a run changes, and which fault there is.
func (s *specLane) prepareCloud(r run, fault string) error {
	return s.cloud.Change(func(state *codextest.CloudState) {
		text := changedText(r.ID)
		state.Script = codextest.CloudScript{Polls: 1, State: "READY", Diff: fmt.Sprintf(
			"diff --git a/%[1]s b/%[1]s\nnew file mode 100644\n--- /dev/null\n+++ b/%[1]s\n@@ -0,0 +1 @@\n+%[2]s", changedFile(r.ID), text)}
		switch fault {
		case cloudLost:
			state.Script.FailAfter = "http error: create_task failed: error sending request"
		case cloudLong:
			state.Script.Polls = 2
		}
		// Somebody else has tasks there.
		state.NewTask(cloudEnvironment, "main", "Somebody else's task")
	})
}

// cloudTasks are the tasks of a run in Codex Cloud.
func (s *specLane) cloudTasks(r run) (list []codextest.CloudTask, err error) {
	state, err := s.cloud.State()
	for _, task := range state.Tasks {
		if strings.Contains(task.Prompt, r.ID) {
			list = append(list, task)
		}
	}
	return list, err
}

// judgeCloud checks that Codex Cloud has got the task once, whatever has happened.
func (l *lane) judgeCloud(o *outcome) error {
	if o.trial.Case != cloudCodex {
		return nil
	}
	tasks, err := l.spec.cloudTasks(o.run)
	switch {
	case len(tasks) > 1:
		o.report(doubled, "Codex Cloud has %d tasks of the run, want 1", len(tasks))
	case len(tasks) == 0:
		o.report(wrong, "Codex Cloud has no task of the run")
	}
	return err
}

package orchestrator

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
)

// appCheckLimit bounds one run of an application check.
const appCheckLimit = 30 * time.Second

// appCheckGrace is the time between SIGTERM and SIGKILL when a check is ended: the
// verification has to end too.
const appCheckGrace = 100 * time.Millisecond

// appCheckOutput bounds how much of its output is kept, in bytes.
const appCheckOutput = 64 << 10

// checkApp runs the operator's check of the service, if there is one. It is run like
// a command of a plan: without a shell, only an allowed program, ended with all its
// processes at its limit and when ctx ends. It returns "" for success, else what is
// wrong.
func (j *judge) checkApp(ctx context.Context) string {
	command := j.run.profile.Verify.AppCheck
	if len(command) == 0 {
		return ""
	}
	limited, cancel := context.WithTimeoutCause(ctx, appCheckLimit, fmt.Errorf("it took longer than %s", appCheckLimit))
	defer cancel()
	output := &tailBuffer{limit: appCheckOutput}
	runner := *j.run.runner
	runner.program.Grace = min(runner.program.Grace, appCheckGrace)
	code, failure := runner.runTrusted(limited, artifacts.Resolve(j.run.config.Workspace), command, output, output, nil)
	problem := ""
	switch {
	case failure == nil && code == 0:
	case limited.Err() != nil:
		problem = context.Cause(limited).Error()
	case failure != nil:
		problem = failure.Error()
	default:
		problem = fmt.Sprintf("it ended with code %d", code)
	}
	ended := j.run.commandRecord(audit.CommandEnded, 0, j.run.config.Workspace, command)
	if ended.Text = "application check"; problem == "" || failure == nil && limited.Err() == nil {
		ended.Command.Exit = &code
	} else {
		ended.Command.Ended = problem
	}
	if last := fmt.Sprint(code, problem); last != j.appRecorded {
		j.appRecorded = last
		j.run.audit(ended)
	}
	text := j.run.clean(formatCommand(command))
	if problem == "" {
		j.log.Line("[Application check " + text + ": it succeeded]")
		return ""
	}
	problem = "Application check " + text + " failed: " + problem
	j.log.Line("[" + j.run.clean(problem) + "]")
	if last := lastLines(j.run.clean(string(output.kept))); last != "" {
		for line := range strings.Lines(last) {
			j.log.Line("[Application check: " + strings.TrimRight(line, "\r\n") + "]")
		}
		problem += "\n" + last
	}
	return problem
}

// tailBuffer keeps the end of what is written to it, by several goroutines.
type tailBuffer struct {
	mu    sync.Mutex
	kept  []byte
	limit int
}

func (b *tailBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kept = append(b.kept, p...)
	if over := len(b.kept) - b.limit; over > 0 {
		b.kept = append(b.kept[:0], b.kept[over:]...)
	}
	return len(p), nil
}

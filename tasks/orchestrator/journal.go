package orchestrator

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

const (
	// recordTimeout is how long a step waits until the end of a command is
	// recorded. After that it continues, and catchUp tries again.
	recordTimeout = time.Second
	// maxRecordPause is the longest pause between two attempts to record what a
	// step has done or is about to do.
	maxRecordPause = 5 * time.Second
)

// A journal records which commands of a step have ended, so that none of them is
// run again if the worker dies. It also has what earlier workers have recorded.
type journal struct {
	steps Steps
	claim store.Claim
	log   *slog.Logger
	// endWork ends the work of the step, see watch.
	endWork func(endCause)
	// found is what earlier workers have recorded, nil for nothing.
	found *store.Progress
	// previousWorker is the last of them, "" if unknown.
	previousWorker string

	// Only the step's goroutine uses the fields from here to excerpt.
	workspace string
	commands  [][]string
	// next is the number of commands that were run or skipped so far; skipped is
	// how many at the beginning are not run again.
	next, skipped int
	// continued says that the log has what earlier workers have written to it;
	// excerpt is the output of the last command that ended under them.
	continued bool
	excerpt   artifacts.Excerpt

	mu     sync.Mutex // guards latest and behind
	latest store.Progress
	// behind says that latest is not recorded yet, and that catchUp runs.
	behind   bool
	catching sync.WaitGroup // catchUp
	closed   context.Context
	stop     context.CancelFunc
}

func (o *Orchestrator) openJournal(log *slog.Logger, begun store.Start, endWork func(endCause)) *journal {
	j := &journal{
		steps: o.config.Steps, claim: begun.Claim, log: log, endWork: endWork,
		found: begun.Progress, previousWorker: begun.PreviousWorker,
	}
	j.closed, j.stop = context.WithCancel(context.Background())
	return j
}

// close stops catchUp and waits for its end. A record that is missing then is not
// needed: the step records its own end next.
func (j *journal) close() {
	j.stop()
	j.catching.Wait()
}

// setCommands sets the step's commands, in their order. If they are not those of
// which earlier workers have recorded the ends, all of them are run.
func (j *journal) setCommands(workspace string, commands [][]string) {
	j.workspace, j.commands = workspace, commands
	if j.found == nil {
		return
	}
	if n := j.found.Commands; n < 1 || n > len(commands) || j.digest(n) != j.found.Digest {
		j.log.Warn("recorded commands are not those of the plan, the step runs from its beginning", "ended", j.found.Commands)
		j.found = nil
		return
	}
	j.skipped = j.found.Commands
}

// digest identifies the workspace and the first n commands.
func (j *journal) digest(n int) string {
	// Texts always encode.
	text, _ := json.Marshal(append([][]string{{j.workspace}}, j.commands[:n]...))
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// recordExit records that the command at next has ended by itself. The runner
// calls it at once, before the output is complete.
func (j *journal) recordExit(code int, logSize int64) {
	faultpoint.Hit(faultpoint.CommandAfter, j.claim.RunID, string(j.claim.Step), faultpoint.Number(j.next))
	j.put(store.Progress{Commands: j.next, Digest: j.digest(j.next), ExitCode: code, EndedAt: time.Now().UTC(), LogSize: logSize})
}

// endedAt is when the command at next has ended by itself, or otherwise.
func (j *journal) endedAt(otherwise time.Time) time.Time {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.latest.Commands == j.next {
		return j.latest.EndedAt
	}
	return otherwise
}

// recordOutput records that the log has the complete output of the command at
// next, which failed. A later worker then reports the failure with the same text.
func (j *journal) recordOutput(logEnd int64) {
	j.mu.Lock()
	progress := j.latest
	j.mu.Unlock()
	if progress.Commands == j.next { // the command was not killed
		progress.LogEnd = logEnd
		j.put(progress)
	}
}

// put makes progress the latest, and waits up to recordTimeout until it is
// recorded.
func (j *journal) put(progress store.Progress) {
	j.mu.Lock()
	j.latest = progress
	behind := j.behind
	j.mu.Unlock()
	if behind {
		return // catchUp records the latest
	}
	// Not the step's context: also a worker that stops has to record this.
	attempt, cancel := context.WithTimeout(context.Background(), recordTimeout)
	defer cancel()
	if j.record(attempt, progress) {
		return
	}
	j.mu.Lock()
	j.behind = true
	j.mu.Unlock()
	j.catching.Go(j.catchUp)
}

// record writes progress to the database. It returns false if a later attempt may
// succeed.
func (j *journal) record(ctx context.Context, progress store.Progress) bool {
	err := j.steps.RecordProgress(ctx, j.claim, progress)
	switch {
	case err == nil:
		faultpoint.Hit(faultpoint.CommandRecorded, j.claim.RunID, string(j.claim.Step), faultpoint.Number(progress.Commands))
		return true
	case errors.Is(err, store.ErrClaimLost):
		j.log.Warn("step was taken over by another worker, ending it here", "error", err)
		j.endWork(endCause{takenOver, err})
		return true
	case j.closed.Err() != nil:
		return true
	}
	retry := mayRecover(err)
	j.log.Warn("end of a command is not recorded, the command would run again if the worker died now", "commands", progress.Commands, "retry", retry, "error", err)
	return !retry
}

// catchUp retries until the latest progress is recorded or the journal is closed.
func (j *journal) catchUp() {
	retryWrite(j.closed, maxRecordPause, func() bool {
		for {
			j.mu.Lock()
			progress := j.latest
			j.mu.Unlock()
			if !j.record(j.closed, progress) {
				return false
			}
			j.mu.Lock()
			j.behind = progress != j.latest
			behind := j.behind
			j.mu.Unlock()
			if !behind {
				return true
			}
		}
	})
}

// note is the line about earlier workers in the step's log, "" for none. helped
// says that a helper acts for the step.
func (j *journal) note(helped bool) string {
	if j.claim.Starts < 2 {
		return ""
	}
	worker := "An earlier worker"
	if j.previousWorker != "" {
		worker = "Worker " + j.previousWorker
	}
	text := fmt.Sprintf("[%s has left this step unfinished; this is start %d of it.", worker, j.claim.Starts)
	switch {
	case j.skipped == 0 && helped:
		return text + " A helper container has gone on with it; its output follows.]"
	case j.skipped == 0:
		return text + " It is run from its beginning.]"
	case j.skipped == 1:
		text += " Its first command had ended, and is not run again."
	default:
		text += fmt.Sprintf(" Its first %d commands had ended, and are not run again.", j.skipped)
	}
	if !j.continued {
		text += " What was logged is lost."
	}
	return text + "]"
}

// isLogged says that the log already has the lines before the next command, and
// its output.
func (j *journal) isLogged() bool { return j.continued && j.next < j.skipped }

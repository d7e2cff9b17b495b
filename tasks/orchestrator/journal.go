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
	// recordTime is how long a step waits for the record of a command's end.
	// After that it goes on, and the record follows when it can.
	recordTime = time.Second
	// recordPause and longestRecordPause are between two tries of a record that
	// could not be written; in between they double.
	recordPause        = 100 * time.Millisecond
	longestRecordPause = 5 * time.Second
)

// A journal keeps on record which commands of a step have ended, so that none
// of them is run again when the worker dies, and knows which had ended under
// the workers before.
type journal struct {
	steps Steps
	claim store.Claim
	log   *slog.Logger
	// lost ends the work of a step that was taken over, at once.
	lost context.CancelCauseFunc
	// found is what the workers before have recorded, nil for nothing, and
	// before is the last of them.
	found  *store.Progress
	before string

	// Of the step's goroutine.
	workspace string
	commands  [][]string
	// next is the position of the command that comes next; skipped is how
	// many at the beginning are not run again.
	next, skipped int
	// continued says that the log holds what the workers before have written;
	// excerpt is what the last command that had ended said.
	continued bool
	excerpt   artifacts.Excerpt

	mu     sync.Mutex
	latest store.Progress
	// behind says that latest is not on record, and that late works on it.
	behind bool
	late   sync.WaitGroup
	closed context.Context
	stop   context.CancelFunc
}

func (o *Orchestrator) openJournal(log *slog.Logger, begun store.Start, lost context.CancelCauseFunc) *journal {
	j := &journal{
		steps: o.config.Steps, claim: begun.Claim, log: log, lost: lost,
		found: begun.Progress, before: begun.PreviousWorker,
	}
	j.closed, j.stop = context.WithCancel(context.Background())
	return j
}

// close gives up a record that could not be written so far: the end of the
// step makes it needless.
func (j *journal) close() {
	j.stop()
	j.late.Wait()
}

// plan tells the journal the step's commands in their order. Commands that are
// not those of which an end is on record are all run.
func (j *journal) plan(workspace string, commands [][]string) {
	j.workspace, j.commands = workspace, commands
	if j.found == nil {
		return
	}
	if n := j.found.Commands; n < 1 || n > len(commands) || j.digest(n) != j.found.Digest {
		j.log.Warn("commands that have ended are not those of the plan, it is run from its beginning", "ended", j.found.Commands)
		j.found = nil
		return
	}
	j.skipped = j.found.Commands
}

// digest is that of the first commands.
func (j *journal) digest(n int) string {
	// Texts, which do not fail.
	text, _ := json.Marshal(append([][]string{{j.workspace}}, j.commands[:n]...))
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:])
}

// exited records that the command which came last has ended. It is called
// the moment that this is known.
func (j *journal) exited(code int, logSize int64) {
	faultpoint.Hit(faultpoint.CommandAfter, j.claim.RunID, string(j.claim.Step), faultpoint.Number(j.next))
	j.put(store.Progress{Commands: j.next, Digest: j.digest(j.next), ExitCode: code, EndedAt: time.Now().UTC(), LogSize: logSize})
}

// failed records that the output of the command which came last, and failed,
// is in the log: a failure that is told again is told in the same words.
func (j *journal) failed(logEnd int64) {
	j.mu.Lock()
	progress := j.latest
	j.mu.Unlock()
	if progress.Commands == j.next { // it was not killed
		progress.LogEnd = logEnd
		j.put(progress)
	}
}

// put makes progress the latest, and waits a while for it to be recorded.
func (j *journal) put(progress store.Progress) {
	j.mu.Lock()
	j.latest = progress
	behind := j.behind
	j.mu.Unlock()
	if behind {
		return // it is recorded with what was not before
	}
	// Also when the worker stops: what has ended has ended.
	try, cancel := context.WithTimeout(context.Background(), recordTime)
	defer cancel()
	if j.record(try, progress) {
		return
	}
	j.mu.Lock()
	j.behind = true
	j.mu.Unlock()
	j.late.Go(j.catchUp)
}

// record writes to the database. False means that trying later is of use.
func (j *journal) record(ctx context.Context, progress store.Progress) bool {
	err := j.steps.RecordProgress(ctx, j.claim, progress)
	switch {
	case err == nil:
		faultpoint.Hit(faultpoint.CommandRecorded, j.claim.RunID, string(j.claim.Step), faultpoint.Number(progress.Commands))
		return true
	case errors.Is(err, store.ErrClaimLost):
		j.log.Warn("step was taken over, it ends here", "error", err)
		j.lost(err)
		return true
	case j.closed.Err() != nil:
		return true
	}
	again := errors.Is(err, store.ErrUnavailable) || errors.Is(err, store.ErrSchema) || errors.Is(err, context.DeadlineExceeded)
	j.log.Warn("end of a command is not on record, it would be run again if the worker died now", "commands", progress.Commands, "again", again, "error", err)
	return !again
}

// catchUp records what could not be recorded, and what has come since.
func (j *journal) catchUp() {
	pause := recordPause
	for {
		timer := time.NewTimer(pause)
		select {
		case <-j.closed.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		j.mu.Lock()
		progress := j.latest
		j.mu.Unlock()
		if !j.record(j.closed, progress) {
			pause = min(2*pause, longestRecordPause)
			continue
		}
		j.mu.Lock()
		done := progress == j.latest
		j.behind = !done
		j.mu.Unlock()
		if done {
			return
		}
		pause = 0
	}
}

// startLog starts the log of a step that runs commands, or goes on with that
// of the worker before. It says so when the step was begun before.
func (s *stepRun) startLog(name, workspace string, commands [][]string) (*artifacts.Log, *Failure) {
	j := s.journal
	j.plan(workspace, commands)
	var log *artifacts.Log
	err := artifacts.ErrNoLog
	if j.skipped > 0 {
		log, err = s.dir.Continue(name, j.found.LogSize, j.found.LogEnd)
		j.continued = err == nil
	}
	if errors.Is(err, artifacts.ErrNoLog) {
		log, err = s.dir.Log(name)
	}
	if err != nil {
		return nil, artifactError(err)
	}
	if j.continued {
		j.excerpt = log.Excerpt(j.found.LogSize)
	}
	if note := j.note(); note != "" {
		s.log.Info("step goes on where the worker before has left it", "commands", j.skipped, "log_found", j.continued, "worker", j.before)
		log.Line(note)
	}
	return log, nil
}

// note is what the log says of the workers before.
func (j *journal) note() string {
	if j.claim.Starts < 2 {
		return ""
	}
	worker := "An earlier worker"
	if j.before != "" {
		worker = "Worker " + j.before
	}
	text := fmt.Sprintf("[%s has left this step unfinished; this is start %d of it.", worker, j.claim.Starts)
	switch {
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

// shows says whether the log already has what belongs before the next command.
func (j *journal) shows() bool { return j.continued && j.next < j.skipped }

// command runs the step's next command with its output in the log, under a
// headline. A command whose end is on record is not run again: its exit code
// counts as it was. Both it and the output are to be looked at only without a
// failure.
func (s *stepRun) command(ctx context.Context, log *artifacts.Log, workspace, headline string, command []string) (int, artifacts.Excerpt, *Failure) {
	j := s.journal
	if !j.shows() {
		log.Line(headline)
	}
	j.next++
	if j.next <= j.skipped {
		code := 0
		if j.next == j.skipped {
			code = j.found.ExitCode
		}
		if !j.continued {
			log.Line(fmt.Sprintf("[ended before with code %d]", code))
		}
		return code, j.excerpt, nil
	}
	output, size := log.Output(), log.Size()
	if cause := context.Cause(ctx); cause != nil {
		return 0, output.Close(), ended(command, cause)
	}
	faultpoint.Hit(faultpoint.CommandBefore, s.runID, string(s.step), faultpoint.Number(j.next))
	code, failure := s.runner.run(ctx, workspace, command, output.Stdout, output.Stderr, func(code int) { j.exited(code, size) })
	excerpt := output.Close()
	if failure == nil && code != 0 {
		j.failed(log.Size())
	}
	return code, excerpt, failure
}

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/store"
)

// showRun shows a run from tasks.md to a pull request.
func (s *specDemo) showRun(ctx context.Context) error {
	_, err := s.submit(ctx, features[0], "from tasks.md to a pull request", 1)
	return err
}

// showKilledRun shows a run whose worker is killed twice, and what is left at its end.
func (s *specDemo) showKilledRun(ctx context.Context) error {
	s.holdCodex.Store(true)
	s.holdPull.Store(true)
	run, err := s.submit(ctx, features[1], "two workers are killed", 2)
	if err != nil {
		return err
	}
	s.screen.print("")
	s.screen.print(s.screen.bold("$ git diff main " + run.Branch))
	diff, err := s.github.Git(ctx, repository, "diff", "main", run.Branch)
	if err != nil {
		return err
	}
	s.indent(diff)
	s.screen.print("")
	s.screen.print(s.screen.bold("pull requests of " + repository))
	for _, p := range s.github.Pulls(repository) {
		s.screen.print(fmt.Sprintf("  #%d %s  %s → %s  “%s”", p.Number, p.State, p.Head, p.Base, p.Title))
	}
	s.screen.print("")
	s.screen.print(s.screen.bold("$ mm-orchestrator spec runs " + run.ID[:8]))
	text, err := s.spec(ctx, "runs", run.ID[:8])
	if err != nil {
		return err
	}
	s.indent(text)
	return nil
}

func (s *specDemo) indent(text string) {
	for line := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		s.screen.print(strings.TrimRight("  "+line, " "))
	}
}

// spec runs mm-orchestrator spec.
func (s *specDemo) spec(ctx context.Context, args ...string) (string, error) {
	command := s.command(ctx, append([]string{"spec"}, args...)...)
	var stderr bytes.Buffer
	command.Stderr = &stderr
	text, err := command.Output()
	s.printed.Write(text)
	s.printed.Write(stderr.Bytes())
	if err != nil {
		return "", fmt.Errorf("mm-orchestrator spec %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(text), nil
}

// submit begins a run, follows it to its end, and checks that it has left one branch
// with one commit, and one pull request.
func (s *specDemo) submit(ctx context.Context, f feature, note string, codexRuns int) (run store.SpecRunRow, err error) {
	s.screen.print("")
	s.screen.print(s.screen.bold("$ mm-orchestrator spec submit " + f.name + " --repository " + repository))
	text, err := s.spec(ctx, "submit", f.name, "--repository", repository, "--json")
	if err != nil {
		return run, err
	}
	var submitted struct {
		RunID string `json:"run_id"`
	}
	if err := json.Unmarshal([]byte(text), &submitted); err != nil {
		return run, err
	}
	id := submitted.RunID
	s.artifacts = filepath.Join(s.root, "var", "artifacts", "spec_workflows", id)
	s.screen.print(fmt.Sprintf("run %.8s  %s  (%s)   artifacts: %s", id, f.name, note, s.short(s.artifacts)))
	turns, pushes, since := s.model.Turns(), s.pushes(), time.Now()
	if run, err = s.follow(ctx, id); err != nil {
		return run, err
	}
	if run.Status != store.SpecRunSucceeded {
		return run, fmt.Errorf("run %s ended as %s, not as succeeded: %s; the worker's log is %s", id, run.Status, run.Failure, s.short(s.workerLog))
	}
	commits, err := s.github.Git(ctx, repository, "rev-list", "main.."+run.Branch)
	if err != nil {
		return run, err
	}
	pulls := 0
	for _, p := range s.github.Pulls(repository) {
		if p.Head == run.Branch {
			pulls++
		}
	}
	turns, pushes = s.model.Turns()-turns, s.pushes()-pushes
	s.screen.print(fmt.Sprintf("succeeded in %s: %s, %s, %s, %s", seconds(time.Since(since)), count(turns, "run of codex", "runs of codex"),
		count(len(strings.Fields(commits)), "commit", "commits"), count(pushes, "push", "pushes"), count(pulls, "pull request", "pull requests")))
	if turns != codexRuns || len(strings.Fields(commits)) != 1 || pushes != 1 || pulls != 1 {
		return run, fmt.Errorf("run %s was to end with %s, 1 commit, 1 push and 1 pull request", id, count(codexRuns, "run of codex", "runs of codex"))
	}
	return run, nil
}

// pushes counts those that the git server has got.
func (s *specDemo) pushes() int {
	return len(s.github.Requests("POST /" + repository + ".git/git-receive-pack"))
}

// follow polls the tables and prints each task once it has ended, until the run has
// ended. It kills the worker where the stand-ins wait for that.
func (s *specDemo) follow(ctx context.Context, id string) (run store.SpecRunRow, err error) {
	printed := map[store.SpecTask]bool{}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		detail, err := s.store.FindSpecRun(ctx, id)
		if err != nil {
			return run, err
		}
		run = detail.Run
		for _, t := range detail.Tasks {
			if t.StartedAt == nil || t.FinishedAt == nil || printed[t.Task] {
				continue
			}
			printed[t.Task] = true
			s.screen.print(fmt.Sprintf("  %s %s %s %s", pad(string(t.Task), 20), s.screen.mark(string(t.Status)), pad(seconds(t.FinishedAt.Sub(*t.StartedAt)), 8), specNote(t, run)))
		}
		if run.FinishedAt != nil && run.Doing == nil {
			return run, nil
		}
		if run.Doing != nil {
			s.screen.progress(string(run.Doing.Task), time.Since(run.Doing.Since), s.lastOf(run.Doing.Task))
		}
		select {
		case <-s.codexReached:
			s.holdCodex.Store(false)
			err = s.kill(ctx, "submit_codex_job", "while codex works, after its first command")
		case <-s.pullReached:
			err = s.kill(ctx, "apply_and_publish", "after the push, and before GitHub has opened the pull request")
		case <-s.workerEnded:
			err = fmt.Errorf("the worker ended; its log is %s", s.short(s.workerLog))
		case <-ctx.Done():
			err = ctx.Err()
		case <-tick.C:
		}
		if err != nil {
			return run, err
		}
	}
}

// lastOf is the last line of the log of a task that is running.
func (s *specDemo) lastOf(task store.SpecTask) string {
	pattern := map[store.SpecTask]string{store.SpecSubmit: "codex_*.jsonl", store.SpecPublish: "gh_push.log"}[task]
	logs, err := filepath.Glob(filepath.Join(s.artifacts, pattern))
	if err != nil || len(logs) == 0 {
		return ""
	}
	return lastLine(logs[len(logs)-1]) // codex_1.jsonl, then codex_1_2.jsonl
}

// kill kills the worker, and starts another one.
func (s *specDemo) kill(ctx context.Context, task, when string) error {
	pid := s.worker.Process.Pid
	if err := s.worker.Process.Kill(); err != nil {
		return err
	}
	<-s.workerEnded
	s.screen.print(fmt.Sprintf("  %s %s kill -9 %d (worker-%d) %s", pad(task, 20), s.screen.paint("31", "✗"), pid, s.workers, when))
	return s.startWorker(ctx)
}

// specNote is what a task has done, read from its row.
func specNote(t store.SpecTaskRow, run store.SpecRunRow) string {
	var payload struct {
		TaskID       string `json:"taskId"`
		Title        string `json:"title"`
		LineNumber   int    `json:"lineNumber"`
		Summary      string `json:"summary"`
		CodexRuns    int    `json:"codexRuns"`
		ChangedFiles int    `json:"changedFiles"`
	}
	if err := json.Unmarshal(t.Payload, &payload); err != nil || t.Status != store.SpecSucceeded {
		return t.Message
	}
	switch t.Task {
	case store.SpecDiscover:
		return fmt.Sprintf("line %d of tasks.md: %s %s", payload.LineNumber, payload.TaskID, payload.Title)
	case store.SpecSubmit:
		again := ""
		if payload.CodexRuns > 1 {
			again = " (again, since the first died with its worker)"
		}
		return fmt.Sprintf("codex ran %s%s, %s: “%s”", count(payload.CodexRuns, "time", "times"), again, count(payload.ChangedFiles, "file", "files"), payload.Summary)
	}
	return fmt.Sprintf("%s → %s", run.Branch, run.PRURL)
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

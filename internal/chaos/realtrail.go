package chaos

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/ledger"
	"github.com/moonladderstudios/mm-orchestrator/internal/moonmind"
)

// Who approves runs of kind Real, and the key for `runs approve`.
const (
	approver, role = "ops-417", "sre"
	encryptionKey  = "key of the API"
)

// gate gives the lane's service the trial's approval gate until remove is called: the
// lane's next trial may be of a kind whose runs nobody approves.
func (l *lane) gate(ctx context.Context) (remove func() error, err error) {
	if l.trial.Gate == "" {
		return func() error { return nil }, nil
	}
	remove = func() error { return moonmind.SetGate(context.WithoutCancel(ctx), l.pool, "none") }
	return remove, moonmind.SetGate(ctx, l.pool, l.trial.Gate)
}

// approve does what POST …/approvals does before the run's message is published. A gate
// that requires pre-verify wants another approval after the pause.
func (l *lane) approve(ctx context.Context, run string) error {
	if l.trial.Gate == "" {
		return nil
	}
	return moonmind.Approve(ctx, l.pool, run)
}

// approvePaused approves a run that has paused before verify, by the command that an
// operator uses.
func (l *lane) approvePaused(ctx context.Context) error {
	if l.trial.Gate != preVerify {
		return nil
	}
	paused, err := l.rows(ctx, `
		SELECT r.id::text FROM orchestrator_runs AS r JOIN mm_orchestrator.approvals AS a ON a.run_id = r.id
		WHERE r.status = 'awaiting_approval' AND a.paused_at IS NOT NULL`)
	if err != nil || len(paused) == 0 {
		return err
	}
	w := l.workers[0]
	command := exec.CommandContext(ctx, l.config.programs.worker, "runs", "approve", paused[0], "--by", approver, "--role", role)
	command.Env, command.Dir = append(slices.Concat(w.environ, w.settings), "MM_CHAOS_DIR="), l.folder // no trap is for this process
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("runs approve: %w: %s", err, bytes.TrimSpace(text))
	}
	return nil
}

// An atKill is what there was right after a worker was killed.
type atKill struct {
	stage stage
	// ledger, acts and state are read before the trail.
	ledger []ledger.Record
	acts   []string
	state  changetest.State
	trail  trail
	// hasTrail says that there is one.
	hasTrail bool
}

func (k atKill) String() string {
	if k.stage.Point == "" {
		return fmt.Sprintf("when the worker was killed after %s", k.stage.After)
	}
	return "when the worker was killed at " + k.stage.place()
}

// lookAtKill reads, in a trial of kind Real, what the run has done so far, and then
// what its trail has. So a worker that goes on meanwhile does no harm.
func (l *lane) lookAtKill(ctx context.Context, o *outcome, s stage) (err error) {
	if o.trial.Kind != Real {
		return nil
	}
	k := atKill{stage: s}
	if k.ledger, err = ledger.Read(l.ledger, o.run.ID); err != nil {
		return err
	}
	if k.acts, err = l.readActs(o.run.ID); err != nil {
		return err
	}
	if k.state, err = o.watch.Look(ctx); err != nil {
		// A command of the killed worker goes on, and files vanish.
		if k.state, err = o.watch.Look(ctx); err != nil {
			return err
		}
	}
	k.trail, k.hasTrail, err = l.readTrail(ctx, o.run.ID)
	o.kills = append(o.kills, k)
	return err
}

// readActs returns the calls of docker that change something, "STEP ARGUMENTS".
func (l *lane) readActs(run string) (acts []string, err error) {
	text, err := os.ReadFile(l.real.acts)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		mark, call, _ := strings.Cut(strings.TrimSpace(line), " ") // WORKER/RUN/STEP/N
		if parts := strings.Split(mark, "/"); len(parts) == 4 && parts[1] == run {
			acts = append(acts, parts[2]+" "+call)
		}
	}
	return acts, nil
}

// has says that a trail has a record of one of these kinds in one of these steps.
func (t trail) has(kinds []audit.Kind, steps ...string) bool {
	return slices.ContainsFunc(t.records, func(r audit.Record) bool {
		return slices.Contains(kinds, r.Kind) && (len(steps) == 0 || slices.Contains(steps, r.Step))
	})
}

// paths returns the files that records of a kind are about, with what is said last.
func (t trail) paths(kind audit.Kind) map[string]audit.File {
	found := map[string]audit.File{}
	for _, r := range t.records {
		if r.Kind == kind && r.File != nil {
			found[r.File.Path] = *r.File
		}
	}
	return found
}

// changedFiles lists the files that differ in two states, without those of git.
func changedFiles(before, after changetest.State) (paths []string) {
	for _, line := range changetest.Differences(before, after, func(name string) bool {
		return !strings.HasPrefix(name, "file ") || strings.HasPrefix(name, "file .git/") || strings.Contains(name, "/.git/")
	}) {
		path, _, _ := strings.Cut(strings.TrimPrefix(line, "file "), ": ")
		if text := before["file "+path] + after["file "+path]; strings.HasPrefix(text, "-") {
			paths = append(paths, path)
		}
	}
	return paths
}

// judgeAtKill checks that the trail has, at the moment of a kill, the intent of
// everything that was done.
func (o *outcome) judgeAtKill(k atKill) {
	if !k.hasTrail {
		if len(k.ledger) > 0 || len(k.acts) > 0 {
			o.report(wrong, "%s, there is no audit trail, and commands had run: %q", k, k.acts)
		}
		return
	}
	for _, finding := range k.trail.report.Findings {
		o.report(wrong, "%s, audit trail: %s", k, finding)
	}
	o.judgeAnnounced(k.trail, k.ledger, k.String())
	for _, act := range k.acts {
		step, call, _ := strings.Cut(act, " ")
		if !k.trail.has([]audit.Kind{audit.CommandStarted, audit.ContainerChanging}, step) {
			o.report(wrong, "%s, the audit trail does not announce what %s did: docker %s", k, step, call)
		}
	}
	head, before := o.watch.Before()
	commands, files := []audit.Kind{audit.CommandStarted}, []audit.Kind{audit.FilesChanging}
	if paths := changedFiles(before, k.state); len(paths) > 0 && !k.trail.has(commands, "patch", "build") && !k.trail.has(files) {
		o.report(wrong, "%s, files were altered, and the audit trail does not announce it: %q", k, paths)
	}
	wasChanged := len(k.trail.paths(audit.FileChanged)) > 0
	if k.stage.Step == "rollback" && wasChanged && len(changedFiles(head, k.state)) == 0 && !k.trail.has(files, "rollback") {
		o.report(wrong, "%s, files were brought back, and the audit trail does not announce it", k)
	}
	target := "container " + o.watch.Target() + " "
	for _, line := range changetest.Differences(before, k.state, func(name string) bool {
		return name != target+"id" && !strings.HasPrefix(name, "image ")
	}) {
		if !k.trail.has(commands, "build", "restart") && !k.trail.has([]audit.Kind{audit.ContainerChanging}) {
			o.report(wrong, "%s, the audit trail does not announce what has changed this: %s", k, line)
		}
	}
}

// judgeRealTrail compares the trail of a run that has ended with what has happened.
func (l *lane) judgeRealTrail(ctx context.Context, o *outcome, status string) error {
	t, found, err := l.readTrail(ctx, o.run.ID)
	if err != nil || !found {
		return err // judgeTrail reports it
	}
	if err := l.judgeCopy(o, t); err != nil {
		return err
	}
	for _, k := range o.kills {
		o.judgeAtKill(k)
	}
	o.judgeCommands(t)
	o.judgeFiles(t, status)
	o.judgeContainers(t, status)
	granted := slices.ContainsFunc(t.records, func(r audit.Record) bool {
		return r.Kind == audit.ApprovalGranted && r.Approval.Approver == approver && r.Approval.Role == role
	})
	if must := o.trial.Gate == preRun || o.trial.Gate == preVerify && o.reached("verify"); granted != must && (must || o.trial.Gate == "") {
		o.report(wrong, "the audit trail has the approver: %t", granted)
	}
	// What an auditor does.
	archive := filepath.Join(l.folder, fmt.Sprintf("trial-%d.zip", o.trial.Number))
	for _, args := range [][]string{{"audit", "verify", o.run.ID}, {"runs", "export", o.run.ID, "-o", archive}} {
		if err := l.workers[0].run(ctx, args...); err != nil {
			o.report(wrong, "%v", err)
		}
	}
	return nil
}

// reached says that the run came to a step.
func (o *outcome) reached(step string) bool { return o.wantState(step) != "pending " }

// judgeCommands checks that each command has its arguments, and the exit code of the
// execution that counted.
func (o *outcome) judgeCommands(t trail) {
	ended := map[commandOf]audit.Command{}
	for _, r := range t.records {
		switch {
		case r.Command == nil || r.Command.Number == 0:
		case r.Kind == audit.CommandStarted && len(r.Command.Argv) < 4:
			o.report(wrong, "audit trail: command %d of %s is %q", r.Command.Number, r.Step, r.Command.Argv)
		case r.Kind == audit.CommandEnded:
			ended[commandOf{r.Step, r.Command.Number}] = *r.Command
		}
	}
	for _, r := range o.ledger {
		if r.Event != ledger.End {
			continue
		}
		command, found := ended[commandOf{r.Step, r.Command}]
		failing := o.run.Shape.FailAt == r.Step && o.run.Shape.failing(r.Step) == r.Command
		if failing && r.Step == "restart" {
			continue // the command succeeds, and the container does not start
		}
		switch {
		case !found:
			o.report(wrong, "audit trail: command %d of %s has ended, and has no record of that", r.Command, r.Step)
		case command.Exit == nil, (*command.Exit != 0) != failing:
			o.report(wrong, "audit trail: command %d of %s ended %+v, and fails %t", r.Command, r.Step, command, failing)
		}
	}
}

// judgeFiles checks the files' checksums.
func (o *outcome) judgeFiles(t trail, status string) {
	head, before := o.watch.Before()
	after := o.watch.After()
	changed, restored := t.paths(audit.FileChanged), t.paths(audit.FileRestored)
	same := func(v *audit.Version, state string) bool {
		if v == nil || state == "" {
			return (v == nil) == (state == "")
		}
		fields := strings.Fields(state)
		return strings.HasPrefix(v.SHA256, fields[len(fields)-1])
	}
	for _, k := range o.kills {
		for _, path := range changedFiles(before, k.state) {
			_, isChanged := changed[path]
			_, isRestored := restored[path]
			named := slices.ContainsFunc(t.records, func(r audit.Record) bool { return r.Kind == audit.SetAside && strings.Contains(r.Text, path) })
			if !isChanged && !isRestored && !named {
				o.report(wrong, "%s was altered %s, and no record of the audit trail names it", path, k)
			}
		}
	}
	if status == "succeeded" {
		for _, path := range changedFiles(head, after) {
			f, found := changed[path]
			if !found || !same(f.Before, head["file "+path]) || !same(f.After, after["file "+path]) {
				o.report(wrong, "audit trail: file %s is %+v (%t), want %s, then %s", path, f, found, head["file "+path], after["file "+path])
			}
		}
		return
	}
	for path := range changed {
		f, found := restored[path]
		if o.trial.Workspace == changetest.Deployed && !o.reached("build") {
			continue // the operator's edits stay
		}
		if !found || !same(f.After, after["file "+path]) && !same(f.After, head["file "+path]) {
			o.report(wrong, "audit trail: file %s was altered, and is restored to %+v (%t), want %s", path, f.After, found, after["file "+path])
		}
	}
}

// judgeContainers checks the ids of images and containers.
func (o *outcome) judgeContainers(t trail, status string) {
	_, before := o.watch.Before()
	after := o.watch.After()
	target := "container " + o.watch.Target() + " "
	for _, line := range changetest.Differences(before, after, func(name string) bool { return !strings.HasPrefix(name, "image ") }) {
		name, _, _ := strings.Cut(strings.TrimPrefix(line, "image "), ": ")
		if !slices.ContainsFunc(t.records, func(r audit.Record) bool {
			return r.Kind == audit.ImageBuilt && r.Image.Before == before["image "+name] && r.Image.After == after["image "+name]
		}) {
			o.report(wrong, "audit trail: no image-built with the ids of %s", line)
		}
	}
	if was, is := before[target+"id"], after[target+"id"]; was != is && !slices.ContainsFunc(t.records, func(r audit.Record) bool {
		return r.Kind == audit.ContainerReplaced && r.Container.Before == was && r.Container.After == is && r.Container.ImageAfter == after[target+"image"]
	}) {
		o.report(wrong, "audit trail: no container-replaced with %s and %s", was, is)
	}
	if status != "succeeded" && o.reached("restart") && !t.has([]audit.Kind{audit.ContainerRestored}, "rollback") {
		o.report(wrong, "audit trail: images and containers are as before, and no record says so")
	}
}

// judgeCopy checks that the worker's copy of the trail is there, and the same.
func (l *lane) judgeCopy(o *outcome, t trail) error {
	path := filepath.Join(l.real.trails, o.run.ID+".jsonl")
	for deadline := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		text, err := os.ReadFile(path)
		switch {
		case err == nil && bytes.Equal(text, t.text):
			return nil
		case time.Now().Before(deadline):
		case err != nil:
			o.report(wrong, "a second after the end, there is no copy of the audit trail")
			return nil
		default:
			o.report(wrong, "the copy of the audit trail has %d bytes, the trail %d", len(text), len(t.text))
			return nil
		}
	}
}

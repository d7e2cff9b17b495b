package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/changetest/command"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/faultpoint"
)

// realPlaces are where trials of kind Real kill a worker: the places of the steps
// that use the work tree or the engine.
var realPlaces = func() (all []place) {
	for _, p := range places {
		switch {
		case p.step == "analyze" || len(p.before) > 0 || p.takes > 0,
			// Its rollback has no command of the plan.
			p.step == "rollback" && (p.command > 0 || p.point == faultpoint.CommandBefore || p.point == faultpoint.CommandAfter || p.point == faultpoint.CommandRecorded):
		default:
			all = append(all, p)
		}
	}
	// What a step records before it acts, one after the other.
	for _, p := range at(withCommand, nil, false, faultpoint.AuditBefore, faultpoint.AuditRecorded, faultpoint.ChangeBefore, faultpoint.ChangeRecorded) {
		for p.occurrence = 1; p.occurrence <= 2 || p.occurrence == 3 && p.step != "build"; p.occurrence++ {
			all = append(all, p)
		}
	}
	for _, gate := range []string{preRun, preVerify} {
		for _, p := range at([]string{"patch", "build", "restart", "verify"}, nil, false, faultpoint.ApprovalBefore, faultpoint.ApprovalChecked, faultpoint.ApprovalRefused) {
			if p.gate = gate; (gate == preVerify) == (p.step == "verify") && (p.point != faultpoint.ApprovalRefused || p.step == "verify") {
				all = append(all, p)
			}
		}
	}
	return all
}()

// The requirements of approval gates.
const preRun, preVerify = "pre-run", "pre-verify"

// One in realRound trials of kind Real kills at any time, the others at a place.
const realRound = 3

// realTrials is how many trials of kind Real reach every place.
var realTrials = (len(realPlaces)*realRound + realRound - 2) / (realRound - 1)

// realTimeout bounds the waits for a run of kind Real: builds and containers take
// their time on a busy machine.
const realTimeout = 5 * time.Minute

// realKinds are the workspaces of trials of kind Real.
var realKinds = []changetest.WorkspaceKind{changetest.Clean, changetest.Deployed, changetest.Beside, changetest.Submodule}

// real makes the trial one with real git and real compose.
func (t *Trial) real(random *rand.Rand, turn int) {
	t.Workspace = realKinds[random.IntN(len(realKinds))]
	t.Shape.Real, t.Shape.FailAt = true, ""
	t.Standby = random.IntN(2) == 0
	t.Gate = []string{"", preRun, preVerify}[random.IntN(3)]
	if random.IntN(4) > 0 {
		t.Shape.FailAt = []string{"patch", "build", "restart", "verify"}[random.IntN(4)]
	}
	if turn%realRound == realRound-1 {
		t.Stages = []stage{{After: time.Duration(random.IntN(9000)) * time.Millisecond, Do: kill}}
	} else {
		order := rand.New(rand.NewPCG(t.Seed, 1)).Perm(len(realPlaces))
		p := realPlaces[order[(turn-turn/realRound)%len(order)]]
		t.shapeFor(p, random)
		if p.gate != "" {
			t.Gate = p.gate
		}
		t.Stages = []stage{p.stage(kill)}
	}
	if random.IntN(3) == 0 {
		// Soon, because the rollback may be over then.
		t.Stages = append(t.Stages, stage{After: time.Duration(random.IntN(2500)) * time.Millisecond, Do: kill})
	}
}

// realProject is the compose project of a lane, for trials of kind Real.
type realProject struct {
	*changetest.Project
	engine *changetest.Engine
	// settings are those of the workers.
	settings []string
	scripts  string
	// acts is the file with the calls of docker that change something, trails the folder
	// with the workers' copies of audit trails.
	acts, trails string
	// up says that the containers are as they must be before a trial.
	up bool
}

// makeReal makes the lane's project, once.
func (l *lane) makeReal(ctx context.Context) error {
	if l.real != nil {
		return nil
	}
	engine, err := changetest.OpenEngine()
	if err != nil {
		return err
	}
	service, err := os.ReadFile(l.config.programs.real.Service)
	if err != nil {
		return err
	}
	folder := filepath.Join(l.folder, "real")
	name := fmt.Sprintf("mmchaos%d-%s", os.Getpid(), l.name)
	project, err := changetest.NewProject(ctx, engine, folder, name, l.config.programs.real.Compose, service)
	if err != nil {
		return err
	}
	l.real = &realProject{Project: project, engine: engine, scripts: filepath.Join(folder, "scripts"), acts: filepath.Join(folder, "acts"), trails: filepath.Join(folder, "trails")}
	l.remove = append(l.remove, func(ctx context.Context) error {
		return errors.Join(project.Close(ctx), engine.Close())
	})
	if err := os.MkdirAll(l.real.scripts, 0o755); err != nil {
		return err
	}
	docker, err := exec.LookPath("docker")
	if err != nil {
		return err
	}
	// The ledger gets what build and restart do, and nothing that looks only.
	script := fmt.Sprintf(`#!/bin/sh
case " $* " in
*' up '* | *' build '* | *' rm '* | *' create '* | *' start '* | *' stop '*) echo "$MM_ORCHESTRATOR_STEP $*" >> '%s' ;;
esac
case "$MM_ORCHESTRATOR_STEP $*" in
*/build/*' build '* | */restart/*' up '*) exec '%s' '%s' - - 1 run docker '%s' "$@" ;;
esac
exec '%s' "$@"
`, l.real.acts, l.config.programs.ledger, l.ledger, docker, docker)
	bin := filepath.Join(folder, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bin, "docker"), []byte(script), 0o755); err != nil {
		return err
	}
	l.real.settings = append([]string{
		"PATH=" + bin + ":" + filepath.Dir(l.config.programs.ledger) + ":" + os.Getenv("PATH"),
		"WORKSPACE_ROOT=" + project.Workspace,
		"DOCKER_HOST=" + os.Getenv("DOCKER_HOST"),
		"MM_ORCHESTRATOR_ROLLBACK=restore",
		"MM_ORCHESTRATOR_QUIET_PERIOD=1s",
		"MM_ORCHESTRATOR_AUDIT_DIR=" + l.real.trails,
		"ENCRYPTION_MASTER_KEY=" + encryptionKey,
	}, project.Environment()...)
	return nil
}

// watchReal prepares the work tree of a trial.
func (l *lane) watchReal(ctx context.Context, o *outcome) (err error) {
	if !l.real.up {
		if err := l.real.Up(ctx); err != nil {
			return err
		}
		l.real.up = true
	}
	if err := l.real.engine.RemovePins(ctx, l.real.Name); err != nil {
		return err
	}
	random := rand.New(rand.NewPCG(o.trial.Seed, uint64(o.trial.Number)))
	o.watch, err = l.real.Watch(ctx, o.trial.Workspace, random, l.realChange(o.trial))
	return err
}

// realChange is what the run of a trial deploys.
func (l *lane) realChange(t Trial) []command.Act {
	return l.real.Change(t.Shape.FailAt, fmt.Sprintf("trial %d", t.Number))
}

// realPlan returns the plan of the current trial.
func (l *lane) realPlan(id string, s shape) ([]byte, error) {
	var commands [][]string
	for n := 1; n <= s.commands("patch"); n++ {
		command, err := l.realScript(n)
		if err != nil {
			return nil, err
		}
		recorded := []string{filepath.Base(l.config.programs.ledger), l.ledger, id, "patch", strconv.Itoa(n), "run", filepath.Base(command[0])}
		commands = append(commands, append(recorded, command...))
	}
	return marshalPlan(l.real.Plan(commands))
}

// realScript writes the script of a command of patch, and returns the command. The
// first command alters the files, unless the run deploys the operator's edits.
func (l *lane) realScript(number int) ([]string, error) {
	t := l.trial
	var acts []command.Act
	if number == 1 && t.Workspace != changetest.Deployed {
		acts = l.realChange(t)
	}
	if t.Shape.FailAt == "patch" && t.Shape.failing("patch") == number {
		acts = append(acts, command.Act{Do: command.Exit, Code: 3})
	}
	path := filepath.Join(l.real.scripts, fmt.Sprintf("%d-%d.json", t.Number, number))
	return []string{l.config.programs.real.Command, "act", path}, command.WriteScript(path, acts)
}

// judgeReal compares what a run has left of the project with what was there before.
func (l *lane) judgeReal(ctx context.Context, o *outcome, status string) error {
	if o.watch == nil {
		return nil
	}
	rows, err := l.rows(ctx, `SELECT plan_step::text || ':' || plan_step_status::text FROM spec_workflow_task_states WHERE orchestrator_run_id = $1`, o.run.ID)
	if err != nil {
		return err
	}
	var differences []string
	if status == "succeeded" {
		differences, err = o.watch.Changed(ctx)
	} else {
		differences, err = o.watch.TakenBack(ctx, changetest.EndOf(strings.Join(rows, " "), filepath.Join(l.artifacts, o.run.ID)))
	}
	if err == nil {
		err = l.judgeRealTrail(ctx, o, status)
	}
	for i, line := range differences {
		if i == 10 {
			o.report(altered, "and %d more differences", len(differences)-i)
			break
		}
		o.report(altered, "%s; workspace: %s", line, o.trial.Workspace)
	}
	return err
}

// buildReal builds the programs for trials of kind Real.
func buildReal(ctx context.Context, module, folder string) (changetest.Programs, error) {
	compose := os.Getenv(devenv.EnvCompose)
	if compose == "" {
		return changetest.Programs{}, fmt.Errorf("trials of kind %s need a docker-compose program in %s: make chaos sets it", Real, devenv.EnvCompose)
	}
	return changetest.BuildTools(ctx, module, folder, compose)
}

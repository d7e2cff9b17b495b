package orchestrator

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/audit"
	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/policy"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
)

// Subject returns what the looks before a run look at, for a configuration
// without a run: all that workers need for any run.
func Subject(config Config) preflight.Subject {
	config = config.WithDefaults()
	r := newRunner(config)
	s := preflight.Subject{
		Workspace: artifacts.Resolve(config.Workspace), Environ: config.Environ,
		Find:    func(program string) string { return lookPath(program, config.Environ, config.Workspace) },
		Compose: r.compose, PinDirectory: config.PinDirectory, DiskReserve: config.DiskReserve, Redact: config.Redactor.String, SettingName: config.SettingName, Logger: config.Logger,
	}
	if root, err := config.Artifacts.Root(); err == nil {
		s.ArtifactDirectory = root
	}
	// Tests have engines that only answer what a step asks.
	if engine, isReal := config.Engine.(preflight.Engine); isReal {
		s.Engine = engine
	}
	s.Projects = policyProjects(config.Policy, s.Workspace)
	return s
}

// policyProjects are the compose projects of the policy's services, with these.
func policyProjects(p *policy.Policy, workspace string) []preflight.Project {
	var projects []preflight.Project
	for _, name := range p.Names() {
		service := p.Services[name]
		at := slices.IndexFunc(projects, func(known preflight.Project) bool { return known.Target.Project == service.ComposeProject })
		if at < 0 {
			at = len(projects)
			target, _ := compose.ParseTarget(compose.BuildCommand(service.ComposeProject, service.ComposeService))
			projects = append(projects, preflight.Project{Target: target, Dir: workspace})
		}
		if !slices.Contains(projects[at].Services, service.ComposeService) {
			projects[at].Services = append(projects[at].Services, service.ComposeService)
		}
	}
	return projects
}

// LogLooks looks at all that a worker needs for any run, and logs what would make
// runs fail. It is for the worker's start, and ends no worker: an operator may
// mend it while the worker runs, and each run looks again.
func (o *Orchestrator) LogLooks(ctx context.Context) {
	refused, notes := preflight.Refusals(preflight.Run(ctx, preflight.Limit, Subject(o.config).Looks()))
	if ctx.Err() != nil {
		return // the worker stops: the looks did not end
	}
	for _, result := range refused {
		o.log.Warn("runs will be refused until this is repaired", "check", result.Look, "found", result.Found, "cure", result.Cure)
	}
	for _, result := range notes {
		o.log.Info("runs work, but check this", "check", result.Look, "found", result.Found, "cure", result.Cure)
	}
}

// lockPatience is how long a git that works when the run begins may keep its lock.
const lockPatience = time.Second

// preflight looks whether all that the run needs is there, before its first
// effect, and before the first one after a rollback has taken all back: it does
// nothing in a run that has had one. The failure says all that is wrong, and how
// to mend it; then the run has changed nothing.
//
// It belongs to the first step that changes something, and not to analyze: that
// may be long ago, when the run has waited for its workspace or for an approval,
// and a Python worker may have carried it out.
func (s *stepRun) preflight(ctx context.Context, log *artifacts.Log, workspace string) *Failure {
	files, image := s.record.Files, s.record.Image
	if files != nil && !files.Restored || image != nil && !image.Restored || s.record.Helper != nil || s.ranElsewhere || s.journal.found != nil {
		return s.recordRefused(ctx, false)
	}
	failure := s.look(ctx, workspace, s.step == store.StepPatch)
	if failure == nil {
		return s.recordRefused(ctx, false)
	}
	if context.Cause(ctx) == nil {
		log.Line(failure.Error())
		if unrecorded := s.recordRefused(ctx, true); unrecorded != nil {
			s.log.Error("the run is refused, and its rollback will run the plan's commands", "error", unrecorded)
		}
	}
	return failure
}

// recordRefused records whether the run was refused when there was nothing to take
// back. Only a rollback by the plan's commands has to know: any other finds nothing
// in the record.
func (s *stepRun) recordRefused(ctx context.Context, refused bool) *Failure {
	if !s.config.RollbackCommands || s.record.Refused == refused {
		return nil
	}
	s.record.Refused = refused
	return s.saveRecord(ctx)
}

// look looks at all that the rest of the run needs, from this step on; files says
// that this step changes files of the workspace.
func (s *stepRun) look(ctx context.Context, workspace string, files bool) *Failure {
	began := time.Now()
	results := preflight.Run(ctx, preflight.Limit, s.looks(workspace, files))
	if cause := context.Cause(ctx); cause != nil {
		return commandError("The step was ended before its first command: " + cause.Error())
	}
	refused, notes := preflight.Refusals(results)
	for _, note := range notes {
		s.log.Info("found before the run", "check", note.Look, "found", note.Found, "cure", note.Cure)
	}
	if len(refused) == 0 {
		return nil
	}
	s.log.Warn("run refused before it changed anything", "reasons", len(refused), "took", time.Since(began).Round(time.Millisecond))
	failure := commandError(cut(s.clean(preflight.Refusal(refused))))
	if files {
		_, commands := s.projects(stepsFrom(s.step))
		for _, planned := range commands {
			if failure := s.runner.check(planned.dir, planned.command); failure != nil && failure.rule != "" {
				s.auditRefused(planned.dir, planned.command, failure)
			}
		}
	}
	s.audit(refusedRecord(audit.Refused, "preflight", failure))
	return failure
}

// stepsFrom are the steps that change something, from this one on.
func stepsFrom(step store.Step) []store.Step {
	steps := []store.Step{store.StepPatch, store.StepBuild, store.StepRestart}
	return steps[max(0, slices.Index(steps, step)):]
}

func (s *stepRun) looks(workspace string, files bool) []preflight.Look {
	subject := Subject(s.config)
	subject.Workspace, subject.ArtifactDirectory = workspace, s.dir.Dir()
	subject.Answers = s.answers
	subject.Owner, subject.LockPatience, subject.Removable = s.runner.owner, lockPatience, s.removes
	var commands []plannedCommand
	subject.Projects, commands = s.projects(stepsFrom(s.step))

	looks := []preflight.Look{subject.LookAtWorkspace(), subject.LookAtArtifacts(), subject.LookAtDisk()}
	if files {
		looks = append(looks, subject.LooksAtGit()...)
		looks = append(looks, s.lookAtPrograms(commands))
	}
	if len(subject.Projects) > 0 {
		looks = append(looks, subject.LookAtComposeEngine(), subject.LookAtServices())
		if subject.Engine != nil {
			looks = append(looks, subject.LookAtEngine(), subject.LookAtTarget())
		}
	}
	return looks
}

// removes says whether removeStaleLocks removes a lock file before the step's
// first command.
func (s *stepRun) removes(lock change.GitLock) bool {
	pid, known := lock.User()
	return s.afterKill && pid == 0 && known && !lock.ModTime.Before(s.runStartedAt)
}

// A plannedCommand is a command that a step of the plan will run.
type plannedCommand struct {
	step    store.Step
	dir     string
	command []string
}

// projects returns the commands of build and restart, among steps, and the compose
// projects that they are about. A step of the plan that cannot be read is left
// out: it will say so itself.
func (s *stepRun) projects(steps []store.Step) (projects []preflight.Project, commands []plannedCommand) {
	for _, step := range steps {
		var missing []string
		switch step {
		case store.StepBuild:
			missing = compose.BuildCommand(s.profile.ComposeProject, s.profile.ComposeService)
		case store.StepRestart:
			missing = compose.UpCommand(s.profile.ComposeProject, s.profile.ComposeService)
		default:
			continue
		}
		params, failure := s.plan.find(step)
		if failure != nil {
			continue
		}
		of := stepRun{Orchestrator: s.Orchestrator, params: params}
		dir, failure := of.workspace()
		if failure != nil {
			continue
		}
		command, failure := of.commandParameter(missing)
		if failure != nil || len(command) == 0 {
			continue
		}
		commands = append(commands, plannedCommand{step, dir, command})
		target, isCompose := compose.ParseTarget(command)
		if !isCompose {
			continue
		}
		same := slices.IndexFunc(projects, func(p preflight.Project) bool {
			return p.Dir == dir && slices.Equal(p.Target.Prefix, target.Prefix)
		})
		if same < 0 {
			same = len(projects)
			projects = append(projects, preflight.Project{Target: target, Dir: dir})
		}
		for _, service := range target.Services {
			if !slices.Contains(projects[same].Services, service) {
				projects[same].Services = append(projects[same].Services, service)
			}
		}
	}
	return projects, commands
}

// lookAtPrograms looks whether later steps of the plan can start their programs.
func (s *stepRun) lookAtPrograms(commands []plannedCommand) preflight.Look {
	return preflight.Look{Name: "programs", At: "the search for programs", Do: func(context.Context) []preflight.Result {
		var results []preflight.Result
		var found []string
		for _, planned := range commands {
			program := s.runner.compose.Resolve(planned.command)[0]
			if failure := s.runner.check(planned.dir, planned.command); failure != nil {
				results = append(results, preflight.Result{Status: preflight.Refuse, Found: "step " + string(planned.step) + " of the plan cannot be run: " + failure.Error()})
				continue
			}
			if _, failure := s.runner.find(planned.command, program, planned.dir); failure != nil {
				if _, isCompose := compose.ParseTarget(planned.command); isCompose {
					continue // the look at compose says so
				}
				results = append(results, preflight.Result{Status: preflight.Refuse, Found: "step " + string(planned.step) + " of the plan cannot be run: " + failure.Error()})
			}
			found = append(found, program)
		}
		if len(results) == 0 {
			results = append(results, preflight.Result{Status: preflight.OK, Found: "found " + strings.Join(found, ", ")})
		}
		return results
	}}
}

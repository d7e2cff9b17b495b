package changetest

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest/command"
)

// program is the name under which plans run package command.
const program = "mm-change"

// A scenario is what a case does: the run's own change, the faults, the plan.
type scenario struct {
	// change is what the run deploys: acts of the plan's command, or the operator's
	// edits.
	change []command.Act
	// script is the plan's command, with a turn for each execution.
	script command.Script
	traps  []command.Trap
	// scripts are the commands of other steps in place of compose, by step.
	scripts map[string]command.Script
	// parameters are those of the plan's steps.
	parameters map[string]map[string]any
	// killIn is the step in which the harness kills the worker, "" for none, some
	// milliseconds after its begin.
	killIn    string
	killAfter int
}

func write1(path, text string) command.Act {
	return command.Act{Do: command.Write, Path: path, Text: text}
}

func add(path, text string) command.Act {
	return command.Act{Do: command.Append, Path: path, Text: text}
}

func sleep(milliseconds int) command.Act {
	return command.Act{Do: command.Sleep, Milliseconds: milliseconds}
}

var (
	kill = command.Act{Do: command.Kill}
	fail = command.Act{Do: command.Exit, Code: 3}
	hang = sleep(60_000)
)

// limitSeconds is the time limit of a step that is to reach it.
const limitSeconds = 1.5

// newScenario makes the scenario of a case for a project.
func (p *Project) newScenario(c Case, random *rand.Rand, docker string) scenario {
	s := scenario{parameters: p.Plan([][]string{{"git", "status", "--short"}})}
	healthcheck := s.parameters["verify"]["healthcheck"].(map[string]any)
	healthcheck["timeoutSeconds"] = 3
	// What the run deploys, unless a fault says otherwise, is never healthy.
	s.change = []command.Act{add(requirements, fmt.Sprintf("unhealthy\n# case %d\n", c.Number))}
	disturb := p.disturbance(c, docker)
	// own is the plan's command. Without it the plan alters nothing.
	own := c.Workspace != Deployed
	turn := func(acts ...command.Act) []command.Act {
		if own {
			return append(append([]command.Act{}, s.change...), acts...)
		}
		return acts
	}
	finally := func(step string, acts ...command.Act) []command.Act {
		if c.Step == step {
			return append(append([]command.Act{}, disturb...), acts...)
		}
		return acts
	}
	// trap sets a trap for the command of build or restart.
	trap := func(step string, t command.Trap) {
		t.Program, t.Step, t.Args = "docker", step, []string{map[string]string{"build": "build", "restart": "up"}[step]}
		s.traps = append(s.traps, t)
	}
	limit := func(step string) { s.parameters[step]["timeoutSeconds"] = limitSeconds }
	switch c.Step + " " + string(c.Fault) {
	case "analyze kill":
		s.killIn, s.killAfter = "analyze", random.IntN(30)
		s.script.Turns = [][]command.Act{turn(append(disturb, fail)...)}
	case "patch error":
		s.script.Turns = [][]command.Act{turn(append(disturb, fail)...)}
	case "patch kill":
		s.script.Turns = [][]command.Act{turn(kill, sleep(random.IntN(1500))), turn(append(disturb, fail)...)}
	case "patch killed three times":
		s.script.Turns = [][]command.Act{turn(kill, sleep(random.IntN(300))), turn(kill), append(disturb, kill)}
	case "patch time limit":
		s.script.Turns = [][]command.Act{turn(append(disturb, hang)...)}
		limit("patch")
	case "patch violation":
		s.script.Turns = [][]command.Act{turn(append(p.violation(random), disturb...)...)}
	case "build error":
		trap("build", command.Trap{Before: finally("build", fail)})
	case "build kill":
		trap("build", command.Trap{During: []command.Act{sleep(random.IntN(600)), kill}})
		trap("build", command.Trap{Before: finally("build", fail)})
	case "build time limit":
		if random.IntN(2) == 0 {
			trap("build", command.Trap{Before: finally("build", hang)})
		} else {
			trap("build", command.Trap{After: finally("build", hang)})
			s.parameters["build"]["timeoutSeconds"] = 2 * limitSeconds
		}
	case "build bad image":
		s.change = []command.Act{add(dockerfile, "COPY nothing-of-this-name /x\n")}
		trap("build", command.Trap{After: finally("build")})
	case "build violation":
		if random.IntN(2) == 0 {
			s.ownCommand("build", append(p.violation(random), disturb...))
		} else {
			trap("build", command.Trap{Before: p.trackedViolation(random), After: finally("build")})
		}
	case "restart error":
		if random.IntN(2) == 0 {
			trap("restart", command.Trap{Before: finally("restart", fail)})
		} else {
			trap("restart", command.Trap{After: finally("restart", fail)})
		}
	case "restart kill":
		trap("restart", command.Trap{During: []command.Act{sleep(random.IntN(900)), kill}, After: disturb})
		trap("restart", command.Trap{After: disturb}) // of the repetition
	case "restart time limit":
		switch random.IntN(3) {
		case 0:
			trap("restart", command.Trap{Before: finally("restart", hang)})
		case 1:
			trap("restart", command.Trap{After: finally("restart", hang)})
			s.parameters["restart"]["timeoutSeconds"] = 3 * limitSeconds
		default: // in the middle of its work
			trap("restart", command.Trap{Before: disturb})
			s.parameters["restart"]["timeoutSeconds"] = 0.2 + 0.6*random.Float64()
		}
		if s.parameters["restart"]["timeoutSeconds"] == nil {
			limit("restart")
		}
	case "restart bad image":
		s.change = []command.Act{add(dockerfile, "ENTRYPOINT [\"/nothing-of-this-name\"]\n")}
		trap("restart", command.Trap{After: finally("restart")})
	case "restart violation":
		if random.IntN(2) == 0 {
			s.ownCommand("restart", append(p.violation(random), disturb...))
		} else {
			trap("restart", command.Trap{Before: p.trackedViolation(random), After: finally("restart")})
		}
	case "verify error":
		s.change = []command.Act{add(requirements, fmt.Sprintf("# case %d\n", c.Number))}
		healthcheck["expectedStatus"] = 418
	case "verify kill":
		s.killIn, s.killAfter = "verify", random.IntN(1500)
	case "verify time limit":
		healthcheck["timeoutSeconds"] = 30
		limit("verify")
	case "verify bad image":
		s.change = []command.Act{write1(requirements, "httpx==0.28.1\n")} // without what the service needs
	case "verify left behind":
		s.script.Turns = [][]command.Act{turn(command.Act{Do: command.Later, Milliseconds: 100 + random.IntN(3000), Args: []string{"sh", "-c", "echo late >>" + guide + "; echo late >late.txt"}})}
	}
	if c.Step == "verify" && len(disturb) > 0 {
		trap("restart", command.Trap{After: disturb})
	}
	if own && s.script.Turns == nil {
		s.script.Turns = [][]command.Act{turn()}
	}
	if c.Disturbance == RollbackCut {
		s.cutRollback(random)
	}
	return s
}

// Change returns what a run deploys that is to fail in a step, "" for none. text
// makes it differ from other runs.
func (p *Project) Change(failAt, text string) []command.Act {
	note := add(requirements, "# "+text+"\n")
	switch failAt {
	case "build":
		return []command.Act{note, add(dockerfile, "COPY nothing-of-this-name /x\n")}
	case "restart":
		return []command.Act{note, add(dockerfile, "ENTRYPOINT [\"/nothing-of-this-name\"]\n")}
	case "verify":
		return []command.Act{note, add(requirements, "unhealthy\n")}
	}
	return []command.Act{note}
}

// Plan returns the parameters of the steps of a plan for service api that runs these
// commands in patch.
func (p *Project) Plan(commands [][]string) map[string]map[string]any {
	api := []string{"docker", "compose", "--project-name", p.Name}
	build, up := append(api[:4:4], "build", "api"), append(api[:4:4], "up", "-d", "--no-deps", "api")
	return map[string]map[string]any{
		"analyze": {"instruction": "Keep going", "workspace": ".", "logArtifact": "analyze.log"},
		"patch": {"workspace": ".", "diffArtifact": "patch.diff", "commands": commands, "allowlist": []string{
			"api_service/Dockerfile", "api_service/Dockerfile.*", "api_service/pyproject.toml", "api_service/requirements*.txt", "pyproject.toml"}},
		"build":   {"logArtifact": "build.log", "command": build},
		"restart": {"logArtifact": "restart.log", "command": up, "restartTimeoutSeconds": 60},
		"verify": {"logArtifact": "verify.log", "healthcheck": map[string]any{
			"url": fmt.Sprintf("http://127.0.0.1:%d/health", p.Port), "method": "GET", "timeoutSeconds": 5, "intervalSeconds": 0.3, "expectedStatus": 200,
		}},
		"rollback": {"logArtifact": "rollback.log", "strategies": []any{
			map[string]any{"type": "git-revert", "commands": [][]string{{"git", "reset", "--hard", "HEAD"}}},
			map[string]any{"type": "rebuild", "commands": [][]string{build, up}}}},
	}
}

// disturbance returns the acts that disturb the rollback, at the time when the step
// fails.
func (p *Project) disturbance(c Case, docker string) []command.Act {
	switch c.Disturbance {
	case Pruned:
		// A filter keeps prune away from what others have in the same engine.
		prune := func(what, label string, options ...string) command.Act {
			args := append([]string{docker, what, "prune", "--force", "--filter", "label=" + label + "=" + p.Name}, options...)
			return command.Act{Do: command.Exec, Args: args}
		}
		images := []command.Act{prune("image", Label, "--all"), prune("image", baseLabel, "--all")}
		if !c.prunesContainers() {
			return images
		}
		return append([]command.Act{prune("container", "mm-orchestrator.project"), prune("container", "com.docker.compose.project")}, images...)
	case BaseGone:
		return []command.Act{{Do: command.Exec, Args: []string{docker, "image", "rm", p.base()}}}
	case NoNetwork:
		return []command.Act{{Do: command.Get, Text: p.assets.url("/off")}}
	}
	return nil
}

// cutRollback kills the worker in its rollback: at a call of docker or git, or at any
// time.
func (s *scenario) cutRollback(random *rand.Rand) {
	trap := command.Trap{Program: "docker", Step: "rollback", Times: 1 + random.IntN(2)}
	switch random.IntN(5) {
	case 0:
		trap.Before = []command.Act{kill}
	case 1:
		trap.During = []command.Act{sleep(random.IntN(700)), kill}
	case 2:
		trap.After = []command.Act{kill}
	case 3:
		trap.Program, trap.Skip = "git", random.IntN(12)
		trap.During = []command.Act{kill}
	default:
		if s.killIn == "" {
			s.killIn, s.killAfter = "rollback", random.IntN(1200)
			return
		}
		trap.During = []command.Act{sleep(random.IntN(300)), kill}
	}
	s.traps = append(s.traps, trap)
}

// ownCommand makes the command of a step one that is not compose.
func (s *scenario) ownCommand(step string, acts []command.Act) {
	if s.scripts == nil {
		s.scripts = map[string]command.Script{}
	}
	s.scripts[step] = command.Script{Turns: [][]command.Act{acts}}
}

// runGit is an act: git without the operator's hooks.
func runGit(args ...string) command.Act {
	return command.Act{Do: command.Exec, Args: append([]string{"git", "-c", "user.name=run", "-c", "user.email=run@localhost", "-c", "core.hooksPath=/dev/null"}, args...)}
}

// trackedViolation is a violation of files that git tracks, or of the repository. A
// compose command is judged by these alone: containers write other files.
func (p *Project) trackedViolation(random *rand.Rand) []command.Act {
	all := [][]command.Act{
		{add(guide, "of the run\n")},
		{{Do: command.Chmod, Path: "README.md", Mode: 0o755}},
		{{Do: command.Chmod, Path: "docs", Mode: 0o700}},
		{{Do: command.Remove, Path: "data"}},
		{{Do: command.Symlink, Path: "scripts/link.sh", Target: "/etc/hostname"}},
		{write1(".git/hooks/post-checkout", "#!/bin/sh\nexit 1\n"), {Do: command.Chmod, Path: ".git/hooks/post-checkout", Mode: 0o755}},
		{runGit("config", "core.pager", "false")},
		{runGit("commit", "--quiet", "--all", "--message", "of the run")},
		{runGit("update-ref", "refs/heads/of-the-run", "HEAD")},
		{runGit("update-index", "--assume-unchanged", "data/crlf.txt")},
		{runGit("rm", "--quiet", "--force", "docs/with space.txt")},
	}
	return choose(random, all)
}

// choose returns one to three of the lists.
func choose(random *rand.Rand, all [][]command.Act) (acts []command.Act) {
	for range 1 + random.IntN(3) {
		acts = append(acts, all[random.IntN(len(all))]...)
	}
	return acts
}

// violation returns acts that alter what the allow-list does not have.
func (p *Project) violation(random *rand.Rand) []command.Act {
	git := runGit
	all := [][]command.Act{
		{add(guide, "of the run\n")},
		{write1("new/file.txt", "of the run\n")},
		{write1(".env", "TOKEN=of-the-run\n")},
		{{Do: command.Chmod, Path: "README.md", Mode: 0o755}},
		{{Do: command.Chmod, Path: "docs", Mode: 0o700}},
		{write1(".git/hooks/post-checkout", "#!/bin/sh\nexit 1\n"), {Do: command.Chmod, Path: ".git/hooks/post-checkout", Mode: 0o755}},
		{git("config", "core.pager", "false")},
		{{Do: command.Symlink, Path: requirements, Target: "../README.md"}},
		{{Do: command.Symlink, Path: "scripts/link.sh", Target: "/etc/hostname"}},
		{{Do: command.Hardlink, Path: "api_service/requirements-2.txt", Target: "README.md"}, add("api_service/requirements-2.txt", "through the other name\n")},
		{{Do: command.Rename, Path: "README.md", Target: "api_service/requirements-of-readme.txt"}},
		{{Do: command.Remove, Path: "data"}},
		{{Do: command.Mkdir, Path: "empty/folder"}},
		{{Do: command.Fifo, Path: "pipe"}},
		{git("commit", "--quiet", "--all", "--message", "of the run")},
		{git("update-ref", "refs/heads/of-the-run", "HEAD")},
		{git("checkout", "--quiet", "-b", "of-the-run-too")},
		{git("update-index", "--assume-unchanged", "data/crlf.txt")},
		{git("add", "--all", "--force")},
		{git("rm", "--quiet", "--force", "docs/with space.txt")},
		{git("stash", "--quiet")},
		{git("tag", "--delete", "v1")},
		{{Do: command.Exec, Args: []string{"git", "init", "--quiet", "nested"}}, write1("nested/file.txt", "of the run\n")},
		{write1(".git/info/exclude", "*\n"), write1("hidden.txt", "of the run\n")},
	}
	return choose(random, all)
}

// plan writes script and traps, and returns the plan as the API would store it.
func (s scenario) plan(folder string) ([]byte, error) {
	if err := os.RemoveAll(folder); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return nil, err
	}
	for n, trap := range s.traps {
		if err := writeJSON(command.TrapFile(folder, n), trap); err != nil {
			return nil, err
		}
	}
	if len(s.script.Turns) > 0 {
		path := filepath.Join(folder, "script.json")
		if err := writeJSON(path, s.script); err != nil {
			return nil, err
		}
		s.parameters["patch"]["commands"] = [][]string{{program, "act", path}}
	}
	for step, script := range s.scripts {
		path := filepath.Join(folder, step+".json")
		if err := writeJSON(path, script); err != nil {
			return nil, err
		}
		s.parameters[step]["command"] = []string{program, "act", path}
	}
	var steps []any
	for _, step := range []string{"analyze", "patch", "build", "restart", "verify", "rollback"} {
		steps = append(steps, map[string]any{"name": step, "parameters": s.parameters[step]})
	}
	return json.Marshal(steps)
}

func writeJSON(path string, value any) error {
	text, err := json.MarshalIndent(value, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

package orchestrator

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/policy/programs"
)

// A refused command line fails its step before anything of it starts.
func TestRefusedCommandsStartNothing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ step, want string }{
		{`{"name": "build", "parameters": {"command": ["docker", "run", "-v", "/:/host", "alpine"]}}`,
			"Command not allowed: docker run -v /:/host alpine (docker.runs): docker run starts a program of the plan's choice, with the machine's folders if the plan wants them. " +
				`To permit it, the service's overrides in the policy file need {command: docker run, options: ["*"], reason: …} (see build.log)`},
		{`{"name": "restart", "parameters": {"command": ["docker", "compose", "-f", "/etc/x", "up", "-d", "api"]}}`,
			"Command not allowed: docker compose -f /etc/x up -d api (path.outside): /etc/x is not below the workspace WORKSPACE. " +
				`To permit it, the service's overrides in the policy file need {command: docker compose, options: ["*"], reason: …} (see restart.log)`},
		{`{"name": "patch", "parameters": {"commands": [["docker", "ps"], ["git", "-c", "alias.x=!docker ps", "x"]]}}`,
			"Command not allowed: git -c alias.x=!docker ps x (git.setting): setting alias.x can make git start a program or work elsewhere. " +
				`To permit it, the service's overrides in the policy file need {command: git, options: ["-c="], reason: …} (see patch.log)`},
	} {
		b := newTestEnv(t)
		b.config.Permissions = nil
		b.repository()
		ran := filepath.Join(b.bin, "ran")
		b.program("docker", "touch "+ran)
		b.plan("[" + test.step + "]")
		step, _, _ := strings.Cut(strings.TrimPrefix(test.step, `{"name": "`), `"`)
		failure, outcome := b.fail(step)
		same(t, "text", failure.Error(), strings.ReplaceAll(test.want, "WORKSPACE", b.workspace))
		if len(outcome.Artifacts) == 0 {
			t.Errorf("%s has no log", step)
		}
		if _, err := os.Stat(ran); err == nil {
			t.Errorf("%s: docker was started", test.step)
		}
	}
}

func TestPermittedCommandsRun(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.program("docker", "echo $1")
	b.config.Permissions = []programs.Permission{{Command: "docker run", Options: []string{"*"}}}
	b.plan(`[{"name": "build", "parameters": {"command": ["docker", "run", "-v", "/:/host", "alpine"]}}]`)
	b.succeed("build")
	same(t, "log", b.artifact("build.log"), "$ docker run -v /:/host alpine\nrun")
}

// The settings of a repository start no program, whatever a plan's git command does. The
// same settings start it without the worker's: otherwise the test would show nothing.
func TestSettingsOfTheRepositoryStartNothing(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		command  string
		settings [][2]string
		// harmless says that git starts no program for the command anyway; the
		// settings are tried all the same.
		harmless bool
	}{
		{"git status --short", [][2]string{{"core.fsmonitor", "PROGRAM"}}, false},
		{"git diff", [][2]string{{"diff.external", "PROGRAM"}}, false},
		{"git diff HEAD", [][2]string{{"diff.x.command", "PROGRAM"}}, false},
		{"git diff HEAD", [][2]string{{"diff.x.textconv", "PROGRAM"}}, false},
		{"git --no-pager log -p", [][2]string{{"diff.x.textconv", "PROGRAM"}}, false},
		{"git show HEAD", [][2]string{{"diff.x.textconv", "PROGRAM"}}, false},
		{"git blame a.x", [][2]string{{"diff.x.textconv", "PROGRAM"}}, false},
		{"git -c user.name=diff diff-index -p HEAD", [][2]string{{"diff.x.command", "PROGRAM"}}, true},
		{"git checkout -b other", [][2]string{{"core.hooksPath", "HOOKS"}}, false},
		{"git reset --hard HEAD", [][2]string{{"core.fsmonitor", "PROGRAM"}, {"core.hooksPath", "HOOKS"}}, false},
		{"git revert HEAD", [][2]string{{"core.editor", "PROGRAM"}, {"core.hooksPath", "HOOKS"}}, false},
		{"git log -1 --format=%s", [][2]string{{"gpg.program", "PROGRAM"}, {"log.showSignature", "true"}}, true},
		{"git log -1", [][2]string{{"core.pager", "PROGRAM"}, {"pager.log", "PROGRAM"}}, true},
		{"git stash show", [][2]string{{"diff.external", "PROGRAM"}}, true},
		{"git add -A", [][2]string{{"core.fsmonitor", "PROGRAM"}}, false},
	} {
		for _, judged := range []bool{false, true} {
			b := newTestEnv(t)
			ran := filepath.Join(b.bin, "ran")
			b.program("evil", "touch "+ran+"; cat")
			b.program("post-checkout", "touch "+ran)
			b.program("post-commit", "touch "+ran)
			b.program("post-index-change", "touch "+ran)
			b.repository()
			b.file(".gitattributes", "*.x diff=x\n")
			b.file("a.x", "1\n")
			b.git("add", ".")
			b.git("commit", "--quiet", "--message", "x")
			b.file("a.x", "2\n")
			if strings.Contains(test.command, "revert") {
				b.git("commit", "--quiet", "--all", "--message", "y")
			}
			for _, setting := range test.settings {
				b.git("config", setting[0], strings.NewReplacer("PROGRAM", filepath.Join(b.bin, "evil"), "HOOKS", b.bin).Replace(setting[1]))
			}
			os.Remove(ran)
			command := strings.Fields(test.command)
			if judged {
				r := newRunner(b.config.WithDefaults())
				r.allowed = []string{"git"}
				if _, failure := r.run(t.Context(), b.workspace, command, &lockedBuffer{}, &lockedBuffer{}, nil); failure != nil {
					t.Errorf("%s: %s", test.command, failure)
				}
			} else {
				cmd := exec.Command("git", command[1:]...)
				cmd.Dir, cmd.Env = b.workspace, b.config.Environ
				cmd.Run()
			}
			_, err := os.Stat(ran)
			if started := err == nil; started != (!judged && !test.harmless) {
				t.Errorf("%s with %v, judged %v: program started %v", test.command, test.settings, judged, started)
			}
		}
	}
}

// Variables of git in the worker's environment lead a plan's git to no other
// repository and no other program.
func TestVariablesOfGitDoNotReachPlans(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.repository()
	b.file("file", "x")
	ran := filepath.Join(b.bin, "ran")
	b.program("evil", "touch "+ran)
	evil := filepath.Join(b.bin, "evil")
	b.config.Environ = append(b.config.Environ, "GIT_DIR=/nowhere", "GIT_WORK_TREE=/", "GIT_INDEX_FILE=/nowhere/index", "GIT_EXTERNAL_DIFF="+evil,
		"GIT_EXEC_PATH="+b.bin, "GIT_TRACE="+filepath.Join(b.workspace, "trace"), "GIT_CONFIG_PARAMETERS='core.fsmonitor="+evil+"'",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=status.short", "GIT_CONFIG_VALUE_0=true")
	var out lockedBuffer
	r := newRunner(b.config.WithDefaults())
	r.allowed = []string{"git"}
	code, failure := r.run(t.Context(), b.workspace, []string{"git", "status"}, &out, &out, nil)
	if failure != nil || code != 0 {
		t.Fatal(code, failure, out.String())
	}
	// The setting is the operator's, and stays.
	same(t, "output", out.String(), "?? file\n")
	if _, err := os.Stat(ran); err == nil {
		t.Error("a program was started")
	}
}

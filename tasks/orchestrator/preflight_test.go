package orchestrator

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/compose"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/tasks/orchestrator/preflight"
)

// A brokenEnv is an environment in which one thing is broken before a run begins.
type brokenEnv struct {
	*testEnv
	t *testing.T
	// engine is the address of the docker engine, docker the plan's words before
	// compose's own.
	engine, docker string
	// files are options of the compose program.
	files string
	// service is the one that the plan is about.
	service string
	// unreached says that this process does not reach the engine that compose does.
	unreached bool
	// strip has texts that differ in each run, and what stands for them.
	strip []string
}

// conflict makes two commits that contradict each other, on main and on other.
func (b *brokenEnv) conflict() {
	b.git("checkout", "-q", "-b", "other")
	b.commit("README", "theirs\n", "theirs")
	b.git("checkout", "-q", "main")
	b.commit("README", "ours\n", "ours")
}

func (b *brokenEnv) commit(name, text, message string) {
	b.file(name, text)
	b.git("add", name)
	b.git("commit", "-q", "-m", message)
}

// stops runs a git command that stops in the middle.
func (b *brokenEnv) stops(args ...string) {
	b.t.Helper()
	cmd := exec.Command("git", args...)
	cmd.Dir, cmd.Env = b.workspace, b.config.Environ
	if out, err := cmd.CombinedOutput(); err == nil {
		b.t.Fatalf("git %v did not stop: %s", args, out)
	}
}

// compose replaces the compose file.
func (b *brokenEnv) compose(text string) { b.commit("docker-compose.yaml", text, "compose") }

// without takes programs out of the PATH.
func (b *brokenEnv) without(programs ...string) {
	b.t.Helper()
	for _, name := range []string{"sh", "git", "docker"} {
		at, err := exec.LookPath(name)
		if err != nil || strings.Contains(" "+strings.Join(programs, " ")+" ", " "+name+" ") {
			continue
		}
		if err := os.Symlink(at, filepath.Join(b.bin, name)); err != nil {
			b.t.Fatal(err)
		}
	}
	b.config.Environ = append(b.config.Environ, "PATH="+b.bin)
}

// serve answers as a docker engine.
func (b *brokenEnv) serve(answer http.HandlerFunc) {
	server := httptest.NewServer(answer)
	b.t.Cleanup(server.Close)
	b.engine = strings.Replace(server.URL, "http:", "tcp:", 1)
	b.strip = append(b.strip, b.engine, "ENGINE")
}

// deaf listens, accepts, and never answers.
func (b *brokenEnv) deaf() {
	b.t.Helper()
	// Not in the folder of the test: the path of a socket must be short.
	dir, err := os.MkdirTemp("", "mm-")
	if err != nil {
		b.t.Fatal(err)
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		b.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			defer connection.Close()
		}
	}()
	b.t.Cleanup(func() {
		listener.Close()
		<-done
		os.RemoveAll(dir)
	})
	b.engine = "unix://" + filepath.Join(dir, "s")
	b.strip = append(b.strip, b.engine, "ENGINE")
}

// plugin makes compose a plugin of the docker program.
func (b *brokenEnv) plugin() {
	b.t.Helper()
	config := filepath.Join(filepath.Dir(b.workspace), "docker")
	if err := os.MkdirAll(filepath.Join(config, "cli-plugins"), 0o755); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Symlink(devenv.Compose(b.t), filepath.Join(config, "cli-plugins", "docker-compose")); err != nil {
		b.t.Fatal(err)
	}
	b.config.Environ = append(b.config.Environ, "DOCKER_CONFIG="+config)
	b.config.Compose = compose.Program{}
}

// stale leaves a lock of a git that is gone.
func (b *brokenEnv) stale(path string) {
	b.t.Helper()
	path = filepath.Join(b.workspace, path)
	old := time.Now().Add(-3 * time.Hour)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Chtimes(path, old, old); err != nil {
		b.t.Fatal(err)
	}
}

func (b *brokenEnv) rename(from, to string) {
	b.t.Helper()
	if err := os.Rename(from, to); err != nil {
		b.t.Fatal(err)
	}
}

func (b *brokenEnv) mkdir(name string) {
	b.t.Helper()
	if err := os.Mkdir(filepath.Join(b.workspace, name), 0o755); err != nil {
		b.t.Fatal(err)
	}
}

// working starts a git that waits for the message of a commit, and so has the lock
// of the index until the editor ends, or the test.
func (b *brokenEnv) working(editor string) {
	b.t.Helper()
	b.program("editor", "echo >&2; "+editor)
	cmd := exec.Command("git", "commit", "-q", "--allow-empty", "-a")
	cmd.Dir, cmd.Env = b.workspace, append(b.config.Environ, "GIT_EDITOR=editor")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	waits, err := cmd.StderrPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
	if _, err := waits.Read(make([]byte, 1)); err != nil {
		b.t.Fatal(err)
	}
	b.strip = append(b.strip, fmt.Sprint(cmd.Process.Pid), "PID")
}

// damage replaces what a file of the workspace has.
func (b *brokenEnv) damage(name, text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.workspace, name), []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
}

const composeFile = "services:\n  web:\n    image: mm-no-such-image\n  other:\n    image: mm-no-such-image\n"

// A situation is one in which a run is refused.
type situation struct {
	name  string
	spoil func(b *brokenEnv)
}

// broken are situations in which a run is refused. testdata/refusals.txt has the
// texts.
var broken = []situation{
	{"no workspace", func(b *brokenEnv) { b.rename(b.workspace, b.workspace+".away") }},
	{"the workspace is a file", func(b *brokenEnv) {
		b.rename(b.workspace, b.workspace+".away")
		b.damage("", "x")
	}},
	{"no repository", func(b *brokenEnv) { b.rename(b.workspace+"/.git", b.workspace+".git") }},
	{"a bare repository", func(b *brokenEnv) { b.git("config", "core.bare", "true") }},
	{"the git directory", func(b *brokenEnv) { b.config.Workspace += "/.git" }},
	{"the repository of a work tree is gone", func(b *brokenEnv) {
		b.rename(b.workspace+"/.git", b.workspace+".git")
		b.damage(".git", "gitdir: /nowhere/at/all\n")
	}},
	{"bad line in the configuration", func(b *brokenEnv) { b.damage(".git/config", "[core\n") }},
	{"damaged index", func(b *brokenEnv) { b.damage(".git/index", "DIRC damaged") }},
	{"the commit is gone", func(b *brokenEnv) {
		b.rename(b.workspace+"/.git/objects", b.workspace+".objects")
		b.mkdir(".git/objects")
	}},
	{"lock of the index", func(b *brokenEnv) { b.stale(".git/index.lock") }},
	{"lock of HEAD", func(b *brokenEnv) { b.stale(".git/HEAD.lock") }},
	{"lock in a submodule", func(b *brokenEnv) {
		b.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", b.workspace, "sub")
		b.git("commit", "-q", "-m", "sub")
		b.stale(".git/modules/sub/index.lock")
	}},
	{"a git that works", func(b *brokenEnv) { b.working("sleep 600") }},
	{"merge with conflicts", func(b *brokenEnv) { b.conflict(); b.stops("merge", "other") }},
	{"merge without conflicts", func(b *brokenEnv) {
		b.git("checkout", "-q", "-b", "other")
		b.commit("new", "x", "theirs")
		b.git("checkout", "-q", "main")
		b.git("merge", "-q", "--no-ff", "--no-commit", "other")
	}},
	{"rebase", func(b *brokenEnv) { b.conflict(); b.stops("rebase", "other") }},
	{"rebase by apply", func(b *brokenEnv) { b.conflict(); b.stops("rebase", "--apply", "other") }},
	{"am", func(b *brokenEnv) {
		b.conflict()
		b.git("format-patch", "-q", "-1", "-o", filepath.Dir(b.workspace), "other")
		b.stops("am", "-q", filepath.Join(filepath.Dir(b.workspace), "0001-theirs.patch"))
	}},
	{"cherry-pick", func(b *brokenEnv) { b.conflict(); b.stops("cherry-pick", "other") }},
	{"cherry-pick of several", func(b *brokenEnv) {
		b.conflict()
		b.commit("README", "more\n", "more")
		b.stops("cherry-pick", "main~1", "other")
		b.git("checkout", "-q", "HEAD", "README")
		b.git("commit", "-q", "--allow-empty", "-m", "by hand")
	}},
	{"revert", func(b *brokenEnv) { b.conflict(); b.commit("README", "more\n", "more"); b.stops("revert", "main~1") }},
	{"bisect", func(b *brokenEnv) { b.conflict(); b.git("bisect", "start") }},
	{"conflicts of a stash", func(b *brokenEnv) {
		b.file("README", "stashed\n")
		b.git("stash", "-q")
		b.commit("README", "ours\n", "ours")
		b.stops("stash", "pop")
	}},
	{"merge in a linked work tree", func(b *brokenEnv) {
		b.conflict()
		linked := filepath.Join(filepath.Dir(b.workspace), "linked")
		b.git("worktree", "add", "-q", "--detach", linked)
		b.config.Workspace, b.workspace = linked, linked
		b.stops("merge", "other")
	}},
	{"no git", func(b *brokenEnv) { b.without("git") }},
	{"no docker", func(b *brokenEnv) { b.config.Compose = compose.Program{}; b.without("docker") }},
	{"no compose plugin", func(b *brokenEnv) {
		b.plugin()
		b.config.Environ = append(b.config.Environ, "DOCKER_CONFIG=/nowhere")
	}},
	{"the configured compose program is missing", func(b *brokenEnv) { b.config.Compose.Standalone = "/nowhere/docker-compose" }},
	{"no compose file", func(b *brokenEnv) { b.git("rm", "-q", "docker-compose.yaml"); b.git("commit", "-q", "-m", "x") }},
	{"the compose file is no YAML", func(b *brokenEnv) { b.compose("services:\n web: [") }},
	{"unknown key", func(b *brokenEnv) { b.compose("services:\n  web:\n    imag: x\n") }},
	{"a variable that must be set", func(b *brokenEnv) { b.compose("services:\n  web:\n    image: ${TAG:?set TAG to a release}\n") }},
	{"included file is missing", func(b *brokenEnv) { b.compose("include: [more.yaml]\n" + composeFile) }},
	{"extends a service that is missing", func(b *brokenEnv) { b.compose("services:\n  web:\n    extends: {service: base}\n") }},
	{"depends on a service that is missing", func(b *brokenEnv) { b.compose("services:\n  web:\n    image: x\n    depends_on: [db]\n") }},
	{"the plan's compose file is missing", func(b *brokenEnv) { b.files = "--file deploy.yaml" }},
	{"service is missing", func(b *brokenEnv) { b.service = "ghost" }},
	{"service is in another file", func(b *brokenEnv) {
		b.commit("small.yaml", "services:\n  other:\n    image: x\n", "small")
		b.files = "--file small.yaml"
	}},
	{"no engine", func(b *brokenEnv) { b.engine = "unix:///nowhere/docker.sock" }},
	{"the engine's port is closed", func(b *brokenEnv) { b.engine = "tcp://127.0.0.1:1" }},
	{"the engine hangs", func(b *brokenEnv) { b.deaf() }},
	{"the engine hangs after the ping", func(b *brokenEnv) {
		b.serve(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasSuffix(r.URL.Path, "/_ping") {
				<-r.Context().Done()
			}
			w.Header().Set("API-Version", "1.41")
		})
	}},
	{"a proxy forbids containers", func(b *brokenEnv) {
		b.serve(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("API-Version", "1.41")
			if !strings.HasSuffix(r.URL.Path, "/_ping") {
				http.Error(w, "<html><body><h1>403 Forbidden</h1>Request forbidden by administrative rules.</body></html>", http.StatusForbidden)
			}
		})
	}},
	{"unknown docker context", func(b *brokenEnv) { b.plugin(); b.docker = "docker --context elsewhere" }},
	{"program of the build is not allowed", func(b *brokenEnv) {
		b.plan(`[{"name": "patch"}, {"name": "build", "parameters": {"command": ["sh", "-c", "make"]}}]`)
	}},
	{"program of the restart is missing", func(b *brokenEnv) {
		b.config.Programs = []string{"kamal"}
		b.plan(`[{"name": "patch"}, {"name": "restart", "parameters": {"command": ["kamal", "app", "boot"]}}]`)
	}},
	{"disk is full", func(b *brokenEnv) { b.config.DiskReserve = 1 << 60 }},
	{"three at once", func(b *brokenEnv) {
		b.conflict()
		b.stops("merge", "other")
		b.stale(".git/index.lock")
		b.service = "ghost"
	}},
}

// Each broken situation refuses the run before its first effect, within the
// limit, with its cause and its cure, and nothing has changed.
func TestABrokenEnvironmentRefusesTheRun(t *testing.T) {
	t.Parallel()
	want := refusals(t)
	for _, test := range broken {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newBrokenEnv(t)
			test.spoil(b)
			b.begin()
			before := tree(t, filepath.Dir(b.workspace), b.base)
			began := time.Now()
			failure, outcome := b.fail("patch")
			// The rest of the step takes time too, and a busy machine more of it.
			if took := time.Since(began); took > 5*preflight.Limit {
				t.Errorf("refused after %s", took)
			}
			same(t, "text", b.shown(failure.Error()), want[test.name]+" (see patch.log)")
			same(t, "log", b.artifact("patch.log")+" (see patch.log)", failure.Error())
			same(t, "artifacts", paths(outcome), "metrics:patch.log")
			same(t, "the state after", tree(t, filepath.Dir(b.workspace), b.base), before)

			// The rollback that follows has nothing to take back, and no need of what is
			// broken. Above all it does not run the plan's commands.
			b.succeed("rollback")
			const nothing = "[The run has changed nothing: there is nothing to take back.]\ntree: as before the run (0 files restored, 0 set aside)"
			if log := b.artifact("rollback.log"); !strings.HasSuffix(log, nothing) { // before it, what is to do about a lock
				t.Errorf("rollback.log is\n%s", log)
			}
			same(t, "the state after the rollback", tree(t, filepath.Dir(b.workspace), b.base), before)
		})
	}
}

// A missing environment file is found before the run if compose tells of it: older
// versions do so only when they create the container.
func TestAMissingEnvironmentFileRefusesTheRun(t *testing.T) {
	t.Parallel()
	b := newBrokenEnv(t)
	b.compose("services:\n  web:\n    image: x\n    env_file: web.env\n  other:\n    image: x\n    env_file: other.env\n")
	b.begin()
	hash := exec.Command(devenv.Compose(t), "config", "--hash", "web")
	hash.Dir, hash.Env = b.workspace, b.config.Environ
	if hash.Run() == nil {
		b.succeed("patch")
		return
	}
	failure, _ := b.fail("patch")
	same(t, "text", b.shown(failure.Error()), "Run refused before it changed anything: compose cannot configure service web: …. Put the missing file in its place, or correct the compose file (see patch.log)")
	b.file("web.env", "A=b\n")
	b.git("add", "web.env")
	b.git("commit", "-q", "-m", "web.env")
	b.succeed("patch") // that another service's is missing does not matter
}

// A run is not refused for what does not concern it, or passes by itself.
func TestAnotherEnvironmentRefusesNoRun(t *testing.T) {
	t.Parallel()
	for _, test := range []situation{
		{"nothing", func(*brokenEnv) {}},
		{"uncommitted edits", func(b *brokenEnv) {
			b.file("pyproject.toml", "x")
			b.git("add", "pyproject.toml")
			b.file("pyproject.toml", "y")
		}},
		{"a service whose profile is not active", func(b *brokenEnv) { b.compose(composeFile + "    profiles: [extra]\n"); b.service = "other" }},
		{"an engine that only compose reaches", func(b *brokenEnv) { b.unreached = true }},
		{"no commit yet", func(b *brokenEnv) {
			b.git("update-ref", "-d", "HEAD")
			b.git("rm", "-q", "--cached", "README", "docker-compose.yaml")
			b.file(".git/info/exclude", "*\n")
		}},
		{"a git that soon ends", func(b *brokenEnv) { b.working(`sleep 0.3; kill $PPID; rm .git/index.lock`) }},
		{"another program in git's place", func(b *brokenEnv) { b.program("git", "exit 0") }},
		{"no compose in the plan", func(b *brokenEnv) {
			b.without("docker")
			b.config.Compose = compose.Program{}
			b.plan(`[{"name": "patch", "parameters": {"commands": [["git", "status"]]}}, {"name": "build", "parameters": {"command": ["git", "version"]}}]`)
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			b := newBrokenEnv(t)
			test.spoil(b)
			b.begin()
			b.succeed("patch")
		})
	}
}

// refusals reads the texts, each below a line with its situation's name. W is the
// workspace, TOP the folder that it is in, … what another program has said.
func refusals(t *testing.T) map[string]string {
	t.Helper()
	data, err := os.ReadFile("testdata/refusals.txt")
	if err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{}
	for _, entry := range strings.Split(string(data), "\n# ")[1:] {
		name, text, _ := strings.Cut(entry, "\n")
		texts[name] = strings.TrimRight(text, "\n")
	}
	for name := range texts {
		if !slices.ContainsFunc(broken, func(s situation) bool { return s.name == name }) {
			t.Errorf("there is a text, but no test, of %q", name)
		}
	}
	return texts
}

func newBrokenEnv(t *testing.T) *brokenEnv {
	t.Helper()
	b := &brokenEnv{testEnv: newTestEnv(t), t: t, engine: os.Getenv("DOCKER_HOST"), docker: "docker", service: "web"}
	b.config.Compose = compose.Program{Standalone: devenv.Compose(t)}
	b.file("docker-compose.yaml", composeFile)
	b.repository()
	return b
}

// begin makes the plan and the engine of the run.
func (b *brokenEnv) begin() {
	b.t.Helper()
	host := b.engine
	if b.unreached {
		host = "unix:///nowhere/docker.sock"
	}
	engine, err := compose.NewEngine(compose.EngineConfig{Host: host})
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { engine.Close() })
	b.config.Engine = engine
	if b.engine != "" {
		b.config.Environ = append(b.config.Environ, "DOCKER_HOST="+b.engine)
	}
	words := strings.Fields(b.docker + " compose --project-name mm-broken " + b.files)
	line := func(more ...string) string {
		return `["` + strings.Join(append(words[:len(words):len(words)], more...), `", "`) + `"]`
	}
	if b.steps.run.Steps == nil {
		b.plan(`[{"name": "patch", "parameters": {"commands": [["git", "status", "--short"]]}},
			{"name": "build", "parameters": {"command": ` + line("build", b.service) + `}},
			{"name": "restart", "parameters": {"command": ` + line("up", "-d", "--no-deps", b.service) + `}}]`)
	}
	b.plan(strings.TrimSuffix(string(b.steps.run.Steps), "]") + `, {"name": "rollback", "parameters": {"strategies": [
		{"type": "git-revert", "commands": [["git", "reset", "--hard", "HEAD"]]},
		{"type": "rebuild", "commands": [` + line("build", b.service) + `, ` + line("up", "-d", "--no-deps", b.service) + `]}]}}]`)
}

// shown replaces what differs in each run.
func (b *brokenEnv) shown(text string) string {
	// What other programs say depends on their version.
	for _, between := range [][2]string{
		{" is not a git work tree: ", ". Mount"}, {"git cannot use the repository of W: ", ". Repair"}, {"git cannot read the index of W: ", ". If"},
		{"the commit of HEAD cannot be read in W: ", ". Repair"}, {"the compose file cannot be read: ", ". Correct"},
		{"compose cannot use the docker engine: ", ". Start"}, {"compose cannot use the docker engine: ", ". What stands"},
		{"compose cannot use the docker engine: ", ". docker context"}, {"compose cannot configure service web: ", ". Put"},
	} {
		before, rest, found := strings.Cut(text, strings.Replace(between[0], "W", b.workspace, 1))
		said, after, ends := strings.Cut(rest, between[1])
		if found && ends && said != "" {
			text = before + between[0] + "…" + between[1] + after
		}
	}
	text = regexp.MustCompile(`no answer within [0-9]+ s`).ReplaceAllString(text, "no answer within N s")
	text = regexp.MustCompile(`\bis (3h0m)?[0-9]+s old`).ReplaceAllString(text, "is ${1}Ns old")
	text = regexp.MustCompile(`has [0-9]+ MiB free`).ReplaceAllString(text, "has N MiB free")
	strip := append(b.strip, b.workspace, "W", filepath.Dir(b.workspace), "TOP", testRun, "RUN", devenv.Compose(b.t), "COMPOSE")
	return strings.NewReplacer(strip...).Replace(text)
}

// tree is the state of a folder, but for one folder in it: names, modes, times,
// links and content.
func tree(t testing.TB, root, without string) string {
	t.Helper()
	var text strings.Builder
	if err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case path == without:
			return fs.SkipDir
		case path == filepath.Dir(without):
			return nil // its time changes with what is left out
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		content := ""
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			content, err = os.Readlink(path)
		case info.Mode().IsRegular():
			data, failed := os.ReadFile(path)
			content, err = fmt.Sprintf("%x", sha256.Sum256(data)), failed
		}
		owner := info.Sys().(*syscall.Stat_t)
		fmt.Fprintf(&text, "%s %s %s %d %d %s\n", strings.TrimPrefix(path, root), info.Mode(), info.ModTime().UTC().Format(time.RFC3339Nano), owner.Uid, owner.Nlink, content)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return text.String()
}

// A retry after a rollback begins again: from whichever step, it is refused in the
// middle of a merge, and its rollback leaves the merge as it is.
func TestARetryAfterARollbackLooksAgain(t *testing.T) {
	t.Parallel()
	for _, step := range []string{"patch", "build", "restart"} {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			b := &brokenEnv{testEnv: newTestEnv(t), t: t}
			b.retried(true)
			record := b.recordedChange()
			record.Files.Restored = true
			var err error
			if b.steps.change.Record, err = record.Encode(); err != nil {
				t.Fatal(err)
			}
			b.plan(`[{"name":"patch","parameters":{"commands":[["git","status"]]}},` + strings.TrimPrefix(string(b.steps.run.Steps), "["))
			b.conflict()
			b.stops("merge", "other")
			before := tree(t, filepath.Dir(b.workspace), b.base)
			failure, _ := b.fail(step)
			if !strings.HasPrefix(failure.Error(), "Run refused before it changed anything: a merge is in progress in "+b.workspace) {
				t.Error(failure)
			}
			same(t, "the state after", tree(t, filepath.Dir(b.workspace), b.base), before)
			b.succeed("rollback")
			same(t, "the state after the rollback", tree(t, filepath.Dir(b.workspace), b.base), before)
		})
	}
}

// The plan's commands would delete the operator's edits, which a refused run has not
// touched. A run that is not refused, or no more, is rolled back by them.
func TestRefusedRunsAreNotRolledBackByCommands(t *testing.T) {
	t.Parallel()
	b := &brokenEnv{testEnv: newTestEnv(t), t: t}
	b.config.RollbackCommands = true
	b.repository()
	b.plan(`[{"name": "patch", "parameters": {"commands": [["git", "status"]], "allowlist": ["notes"]}},` + strings.TrimPrefix(resetPlan, "["))
	b.conflict()
	b.stops("merge", "other")
	b.file("notes", "the operator's\n")
	b.git("add", "notes")
	before := tree(t, filepath.Dir(b.workspace), b.base)
	failure, _ := b.fail("patch")
	if !strings.HasPrefix(failure.Error(), "Run refused before it changed anything: a merge is in progress in ") {
		t.Error(failure)
	}
	b.succeed("rollback")
	same(t, "rollback.log", b.artifact("rollback.log"), "[The run was refused before it changed anything, so that the plan's commands are not run: there is nothing to take back.]")
	same(t, "the state after", tree(t, filepath.Dir(b.workspace), b.base), before)

	b.git("merge", "--abort")
	b.file("notes", "of the run\n")
	b.git("add", "notes")
	b.steps.attempt = 2
	b.succeed("patch")
	b.succeed("rollback")
	if log := b.artifact("rollback.log"); !strings.Contains(log, "git reset --hard HEAD\nHEAD is now at ") {
		t.Errorf("rollback.log is %s", log)
	}
	// This retry is refused too, since the run was rolled back.
	b.steps.attempt = 3
	b.stops("merge", "other")
	b.file("README", "the operator's\n")
	before = tree(t, filepath.Dir(b.workspace), b.base)
	b.fail("patch")
	b.succeed("rollback")
	same(t, "the state after a refused retry", tree(t, filepath.Dir(b.workspace), b.base), before)
}

package orchestrator

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
)

// It kills a copy of this test program that runs a command, as the kernel's
// out-of-memory killer would.
func TestCommandsDieWithTheWorker(t *testing.T) {
	const variable = "ORCHESTRATOR_TEST_PID_FILE"
	if file := os.Getenv(variable); file != "" {
		b := newTestEnv(t)
		b.program("docker", `echo $$ > "`+file+`"; exec sleep 600`)
		b.plan(`[{"name": "build"}]`)
		b.fail("build")
		return
	}
	t.Parallel()
	file := filepath.Join(t.TempDir(), "pid")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	worker := exec.Command(self, "-test.run", "^TestCommandsDieWithTheWorker$")
	worker.Env = append(os.Environ(), variable+"="+file, "TMPDIR="+t.TempDir())
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(awaitFile(t, file))
	if err != nil {
		t.Fatal(err)
	}
	if err := worker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = worker.Wait()
	awaitEnd(t, pid)
}

func TestDockerComposeReplacesDocker(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.Environ = []string{"PATH=" + b.bin}
	b.program("docker-compose", `echo "$*"`)
	b.plan(`[{"name": "build"}]`)
	b.succeed("build")
	same(t, "log", b.artifact("build.log"), "$ docker compose --project-name moonmind build api\n--project-name moonmind build api")
}

func TestCommandsGetTheGivenEnvironmentOnly(t *testing.T) {
	t.Parallel()
	b := newTestEnv(t)
	b.config.Environ = []string{"PATH=" + b.bin, "GIVEN=x"}
	b.program("git", `echo "$GIVEN$HOME"`)
	b.plan(`[{"name": "build", "parameters": {"command": ["git"]}}]`)
	b.succeed("build")
	same(t, "log", b.artifact("build.log"), "$ git\nx")
}

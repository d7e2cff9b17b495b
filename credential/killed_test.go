//go:build linux

package credential_test

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/tasks/processes"
)

// A worker that is killed while a program prints a credential leaves nothing running: the
// kernel ends the program, and the next worker what that has started.
func TestAKilledWorkerLeavesNoProgram(t *testing.T) {
	const inside = "CREDENTIAL_TEST_KILLED"
	if dir := os.Getenv(inside); dir != "" {
		c := newCredential(t, "command:"+filepath.Join(dir, "vault"))
		_, err := c.Read(t.Context())
		t.Fatalf("the program has ended: %v", err)
	}
	t.Parallel()
	dir := t.TempDir()
	// What a program starts in a session of its own, such as an agent, ignores SIGTERM.
	text := "#!/bin/sh\nsetsid sh -c 'trap \"\" TERM; echo $$ >" + dir + "/agent.part; mv " + dir + "/agent.part " + dir + "/agent; while :; do sleep 1; done' &\necho $$ >" + dir + "/vault.part\nmv " + dir + "/vault.part " + dir + "/program\nwait\n"
	syscall.ForkLock.RLock()
	err := os.WriteFile(filepath.Join(dir, "vault"), []byte(text), 0o700)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	worker := exec.Command(own, "-test.run", "^"+t.Name()+"$")
	worker.Env = append(os.Environ(), inside+"="+dir)
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- worker.Wait() }()
	pids := map[string]int{}
	for _, name := range []string{"program", "agent"} {
		for pids[name] == 0 {
			if text, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				if pids[name], err = strconv.Atoi(strings.TrimSpace(string(text))); err != nil {
					t.Fatal(err)
				}
				break
			}
			select {
			case err := <-ended:
				t.Fatalf("the worker has ended: %v", err)
			case <-time.After(time.Millisecond):
			}
		}
	}
	if err := worker.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-ended
	awaitEnd(t, "the program", pids["program"])
	if !alive(pids["agent"]) {
		t.Error("the agent has ended by itself: the test shows nothing")
	}
	processes.EndLeftovers(slog.New(slog.NewTextHandler(t.Output(), nil)))
	awaitEnd(t, "the agent", pids["agent"])
}

// alive reports whether a process runs. A zombie whose parent has not looked does not.
func alive(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func awaitEnd(t *testing.T, what string, pid int) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); alive(pid); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s (pid %d) still runs", what, pid)
		}
	}
}

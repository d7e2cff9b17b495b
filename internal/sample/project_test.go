package sample

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The project must fail without its dependency and be healthy with it, and
// Remove must leave nothing in the engine.
func TestProjectFailsIsRepairedAndIsRemoved(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	service := filepath.Join(t.TempDir(), "service")
	if err := BuildService(ctx, "../..", service); err != nil {
		t.Fatal(err)
	}
	p, err := Create(ctx, Config{
		Module: "../..", Dir: filepath.Join(t.TempDir(), "project"), Name: fmt.Sprintf("mm-sample-test-%d", os.Getpid()),
		Service: service, Compose: devenv.Compose(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := p.Remove(ctx); err != nil {
			t.Error(err)
		}
		for what, args := range map[string][]string{
			"images":     {"image", "ls", "--all", "--quiet", "--filter", "label=" + Label + "=" + p.Name},
			"containers": {"ps", "--all", "--quiet", "--filter", "label=com.docker.compose.project=" + p.Name},
			"networks":   {"network", "ls", "--quiet", "--filter", "label=com.docker.compose.project=" + p.Name},
		} {
			if left, err := p.run(ctx, "docker", args); err != nil || left != "" {
				t.Errorf("%s after Remove: %q (%v)", what, left, err)
			}
		}
	})
	if err := p.Up(ctx); err != nil {
		t.Fatal(err)
	}
	await(t, "the service to say what is missing", func() bool {
		log, err := p.Compose(ctx, "logs", "api")
		return err == nil && strings.Contains(log, "No module named 'flask'")
	})
	if status, err := p.Git(ctx, "status", "--porcelain"); err != nil || status != "" {
		t.Errorf("git status of a new project: %q (%v)", status, err)
	}
	broken, err := p.Container(ctx, "api")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Require(Dependency); err != nil {
		t.Fatal(err)
	}
	if err := p.Up(ctx); err != nil {
		t.Fatal(err)
	}
	await(t, "the service to be healthy", func() bool {
		container, err := p.Container(ctx, "api")
		return err == nil && container.Health() == "healthy" && container.ID != broken.ID
	})
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("timeout: waiting for %s", what)
		}
	}
}

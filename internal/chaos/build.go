package chaos

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// programs are the paths of what a campaign runs.
type programs struct{ worker, ledger string }

// buildPrograms builds the worker with its fault points, and the ledger's
// program, into a folder. bugs adds the planted defects.
func buildPrograms(ctx context.Context, module, folder string, bugs bool) (programs, error) {
	p := programs{worker: filepath.Join(folder, "mm-orchestrator"), ledger: filepath.Join(folder, "chaos-ledger")}
	tags := "chaos"
	if bugs {
		tags += ",chaosbug"
	}
	for _, args := range [][]string{
		{"build", "-tags", tags, "-o", p.worker, "./cmd/mm-orchestrator"},
		{"build", "-o", p.ledger, "./internal/chaos/ledger/program"},
	} {
		command := exec.CommandContext(ctx, "go", args...)
		command.Dir = module
		command.Env = append(os.Environ(), "CGO_ENABLED=0")
		if text, err := command.CombinedOutput(); err != nil {
			return p, fmt.Errorf("go %v: %w: %s", args, err, bytes.TrimSpace(text))
		}
	}
	return p, nil
}

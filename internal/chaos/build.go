package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

	"github.com/moonladderstudios/mm-orchestrator/internal/changetest"
	"github.com/moonladderstudios/mm-orchestrator/internal/chaos/defects"
)

// programs are the paths of the programs that a campaign runs.
type programs struct {
	worker, ledger string
	// codex is the stand-in of codex for trials of the Spec workflow.
	codex string
	// real are those of trials of kind Real.
	real changetest.Programs
}

// buildPrograms builds the worker with its fault points, and the ledger's
// program, into a folder; for trials of kind Real also what those need.
func buildPrograms(ctx context.Context, module, folder string, kinds ...Kind) (programs, error) {
	p := programs{ledger: filepath.Join(folder, "chaos-ledger")}
	var err error
	if p.worker, err = buildWorker(ctx, module, folder); err != nil {
		return p, err
	}
	if slices.Contains(kinds, Real) {
		if p.real, err = buildReal(ctx, module, folder); err != nil {
			return p, err
		}
	}
	if slices.ContainsFunc(kinds, Kind.isSpec) {
		p.codex = filepath.Join(folder, "chaos-codex")
		if err := goBuild(ctx, module, "-o", p.codex, "./internal/codextest/execprogram"); err != nil {
			return p, err
		}
	}
	return p, goBuild(ctx, module, "-o", p.ledger, "./internal/chaos/ledger/program")
}

// buildDefects builds a worker with each of the defects and returns their
// paths by the defects' names.
func buildDefects(ctx context.Context, module, folder string, list []defects.Defect) (map[string]string, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	workers := map[string]string{}
	var failed []error
	var mu sync.Mutex
	var wait sync.WaitGroup
	// Linking takes most of the time and uses one core.
	free := make(chan struct{}, runtime.NumCPU())
	for _, d := range list {
		wait.Go(func() {
			free <- struct{}{}
			defer func() { <-free }()
			if ctx.Err() != nil {
				return
			}
			worker, err := buildDefect(ctx, module, filepath.Join(folder, "defects", d.Name), d)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				if ctx.Err() == nil {
					failed = append(failed, fmt.Errorf("defect %s: %w", d.Name, err))
				}
				cancel()
				return
			}
			workers[d.Name] = worker
		})
	}
	wait.Wait()
	if len(failed) == 0 && ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	return workers, errors.Join(failed...)
}

func buildDefect(ctx context.Context, module, folder string, d defects.Defect) (string, error) {
	overlay, err := d.Overlay(ctx, module, folder)
	if err != nil {
		return "", err
	}
	return buildWorker(ctx, module, folder, "-overlay", overlay)
}

func buildWorker(ctx context.Context, module, folder string, options ...string) (string, error) {
	worker := filepath.Join(folder, "mm-orchestrator")
	return worker, goBuild(ctx, module, append(options, "-tags", "chaos", "-o", worker, "./cmd/mm-orchestrator")...)
}

func goBuild(ctx context.Context, module string, args ...string) error {
	// Without symbols, because the workers of a proof would fill a small disk.
	command := exec.CommandContext(ctx, "go", append([]string{"build", "-buildvcs=false", "-ldflags=-s -w"}, args...)...)
	command.Dir = module
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %v: %w: %s", args, err, bytes.TrimSpace(text))
	}
	return nil
}

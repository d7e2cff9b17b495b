package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"go.uber.org/goleak"
)

// module is the root folder of the module, seen from this package's folder.
const module = "../.."

// buildFolder has the programs that all tests share; TestMain creates and removes
// it.
var buildFolder string

func TestMain(m *testing.M) {
	// Plans call the test programs through links to this test binary.
	if program, ok := programs[filepath.Base(os.Args[0])]; ok {
		os.Exit(program(os.Args[1:]))
	}
	folder, err := os.MkdirTemp("", "mm-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	buildFolder = folder
	code := m.Run()
	if err := os.RemoveAll(folder); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// workerProgram builds mm-orchestrator once and returns its path.
var workerProgram = sync.OnceValues(func() (string, error) {
	out := filepath.Join(buildFolder, "mm-orchestrator")
	command := exec.Command("go", "build", "-o", out, "./cmd/mm-orchestrator")
	command.Dir = module
	command.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := command.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the worker: %w: %s", err, bytes.TrimSpace(text))
	}
	return out, nil
})

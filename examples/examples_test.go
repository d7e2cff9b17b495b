package examples

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/results/postgres"
)

func build(t *testing.T, name string) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), name)
	if output, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "./"+name).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, output)
	}
	return program
}

// The worker runs what the chain calls, and finishes the report after it was told to stop.
func TestExamplesRun(t *testing.T) {
	t.Parallel()
	broker, database := devenv.Broker(t), strings.Replace(devenv.Database(t), "postgres://", "db+postgresql://", 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	worker := exec.CommandContext(ctx, build(t, "worker"), broker, database)
	worker.Stderr = os.Stderr
	out, err := worker.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := worker.Start(); err != nil {
		t.Fatal(err)
	}
	chain := exec.CommandContext(ctx, build(t, "chain"), broker, database)
	var stderr bytes.Buffer
	chain.Stderr = &stderr
	output, err := chain.Output()
	text, report, _ := strings.Cut(string(output), "report: ")
	if want := "chain: 113\nretries: 2\norder: 42\n"; err != nil || text != want {
		t.Errorf("chain prints %q, %v: %s\nwant %q", output, err, stderr.String(), want)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() && lines.Text() != "report begins" {
	}
	if err := worker.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	last := ""
	for lines.Scan() {
		last = lines.Text()
	}
	// Three tasks of the chain, three attempts, the order with its four tasks, the report.
	if err := worker.Wait(); err != nil || last != "attempts: 12" {
		t.Errorf("the worker ended with %v after %q", err, last)
	}
	results, err := postgres.Open(ctx, database)
	if err != nil {
		t.Fatal(err)
	}
	defer results.Close()
	rows, err := results.Load(ctx, strings.TrimSpace(report))
	if err != nil || rows[0].State != "SUCCESS" || string(rows[0].Value) != `"written"` {
		t.Errorf("the report is %+v, %v", rows, err)
	}
}

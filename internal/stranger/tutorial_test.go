package stranger

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

// The addresses on the pages, which the tests replace by their own.
const (
	broker   = "amqp://guest:guest@localhost:5672/"
	database = "db+postgresql+psycopg2://shop:shop@localhost:5432/shop"
)

// page is a page of the documentation whose programs are run.
type page struct {
	files map[string]string
	// outputs are the commands with what they print, in order.
	outputs [][2]string
}

// readPage takes the fenced blocks with a name apart: "go main.go" is a file,
// "text go run ." the output of a command.
func readPage(t *testing.T, name string) page {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(top(t), "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	p := page{files: map[string]string{}}
	var content strings.Builder
	language, title, inside := "", "", false
	for line := range strings.Lines(string(text)) {
		switch fence, isFence := strings.CutPrefix(line, "```"); {
		case !isFence:
			content.WriteString(line)
		case inside:
			inside = false
			switch {
			case title == "":
			case language == "text":
				p.outputs = append(p.outputs, [2]string{title, content.String()})
			default:
				p.files[title] = content.String()
			}
		default:
			inside = true
			language, title, _ = strings.Cut(strings.TrimSpace(fence), " ")
			content.Reset()
		}
	}
	if len(p.files) < 2 || len(p.outputs) == 0 {
		t.Fatalf("%s has %d files and %d outputs", name, len(p.files), len(p.outputs))
	}
	return p
}

func TestTheTutorialRunsAsWritten(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"5.4.0", "5.7.0"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			runPage(t, "library.md", devenv.Celery(t, version))
		})
	}
}

func TestTheProgramsForGoceleryRunAsWritten(t *testing.T) {
	t.Parallel()
	runPage(t, "from-gocelery.md", "python")
}

// runPage writes the files of a page, starts its worker, and compares what the other
// programs print with what the page says.
func runPage(t *testing.T, name, python string) {
	p := readPage(t, name)
	ownDatabase := strings.Replace(devenv.Database(t), "postgres://", "db+postgresql+psycopg2://", 1)
	addresses := strings.NewReplacer(broker, devenv.Broker(t), database, ownDatabase)
	folder := t.TempDir()
	for path, text := range p.files {
		path = filepath.Join(folder, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(addresses.Replace(text)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	command(t, folder, "go", "mod", "init", "example.com/shop")
	useThisModule(t, folder)
	command(t, folder, "go", "vet", "./...")
	command(t, folder, "go", "test", "./...")
	command(t, folder, "go", "build", "-o", "worker.program", ".")
	startWorker(t, folder)
	for _, output := range p.outputs {
		words := strings.Fields(output[0])
		if words[0] == "python" {
			words[0] = python
		}
		if got := command(t, folder, words[0], words[1:]...); got != output[1] {
			t.Errorf("%s printed:\n%s\nthe page says:\n%s", output[0], got, output[1])
		}
	}
}

// startWorker runs the worker of a page until the test ends, and stops it as a user
// does.
func startWorker(t *testing.T, folder string) {
	t.Helper()
	// Without the test's context, which ends before the clean-up and would kill it.
	cmd := exec.Command(filepath.Join(folder, "worker.program"))
	cmd.Dir = folder
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			t.Log(lines.Text())
		}
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		timer := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		<-read
		if err := cmd.Wait(); err != nil {
			t.Errorf("worker ended with %v", err)
		}
	})
}

package stranger

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
)

const module = "github.com/moonladderstudios/mm-orchestrator"

// top is the folder of this module.
func top(t *testing.T) string {
	t.Helper()
	folder, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	return folder
}

// command runs a command in a folder and returns what it wrote to its output.
func command(t *testing.T, folder, name string, args ...string) string {
	t.Helper()
	cmd := goCommand(t, folder, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, stdout.String(), stderr.String())
	}
	return stdout.String()
}

// goCommand makes a command for which this module stands in the place of the
// published one, and which downloads nothing.
func goCommand(t *testing.T, folder, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "GOFLAGS=-mod=mod", "GOPROXY=off", "GOWORK=off")
	return cmd
}

// useThisModule makes the module in a folder use this one. As go mod tidy does, it
// requires what this one requires, too, which a new machine may lack as far as no build
// needs it. Nothing else is downloaded.
func useThisModule(t *testing.T, folder string) {
	t.Helper()
	download := exec.CommandContext(t.Context(), "go", "mod", "download")
	download.Dir = top(t)
	if text, err := download.CombinedOutput(); err != nil {
		t.Fatalf("go mod download: %v\n%s", err, text)
	}
	var ours struct {
		Require []struct{ Path, Version string }
	}
	if err := json.Unmarshal([]byte(command(t, top(t), "go", "mod", "edit", "-json")), &ours); err != nil {
		t.Fatal(err)
	}
	edit := []string{"mod", "edit", "-require=" + module + "@v0.0.0", "-replace=" + module + "=" + top(t)}
	for _, needed := range ours.Require {
		edit = append(edit, "-require="+needed.Path+"@"+needed.Version)
	}
	command(t, folder, "go", edit...)
	sums, err := os.ReadFile(filepath.Join(top(t), "go.sum"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "go.sum"), sums, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestAProgramOutsideOfTheModule(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	if err := os.CopyFS(folder, os.DirFS(filepath.Join(top(t), "testdata", "stranger"))); err != nil {
		t.Fatal(err)
	}
	useThisModule(t, folder)
	command(t, folder, "go", "vet", "./...")
	command(t, folder, "go", "test", "./...")
	command(t, folder, "go", "build", "-o", "stranger", ".")
	got := command(t, folder, filepath.Join(folder, "stranger"), devenv.Broker(t), strings.Replace(devenv.Database(t), "postgres://", "db+postgresql://", 1))
	want := `add: 5
chain: 106
group: [10 23]
failure: OutOfStock('B')
stored: true shop.add [2, 3]
`
	if got != want {
		t.Errorf("it printed:\n%s\nwant:\n%s", got, want)
	}
	if internal := command(t, folder, "go", "list", "-f", `{{join .Imports "\n"}}`, "."); strings.Contains(internal, "/internal/") {
		t.Errorf("the program imports\n%s", internal)
	}
}

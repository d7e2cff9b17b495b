package devenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// oldestCompose is the oldest release that the project supports.
var oldestCompose = [2]int{2, 26}

// compose finds the compose program or builds the pinned one.
func (b *startup) compose(ctx context.Context) error {
	if b.given(EnvCompose) {
		return nil
	}
	for _, program := range composePrograms() {
		version, err := output(ctx, program, "version", "--short")
		if err == nil && atLeast(version, oldestCompose) {
			b.export(EnvCompose, program)
			b.progress.found("compose "+strings.TrimPrefix(version, "v"), program)
			return nil
		}
	}
	return b.buildCompose(ctx)
}

// composePrograms lists the paths where the program may be installed. The
// plugin of the docker command line is the same file and also runs by itself.
func composePrograms() []string {
	var programs []string
	if path, err := exec.LookPath("docker-compose"); err == nil {
		programs = append(programs, path)
	}
	config := os.Getenv("DOCKER_CONFIG")
	if home, err := os.UserHomeDir(); config == "" && err == nil {
		config = filepath.Join(home, ".docker")
	}
	for _, folder := range []string{config, "/usr/local/lib/docker", "/usr/local/libexec/docker",
		"/usr/lib/docker", "/usr/libexec/docker", "/opt/homebrew/lib/docker"} {
		path := filepath.Join(folder, "cli-plugins", "docker-compose")
		if _, err := os.Stat(path); err == nil {
			programs = append(programs, path)
		}
	}
	return programs
}

// atLeast compares versions such as "2.26.1-4" and "v5.6.0".
func atLeast(version string, oldest [2]int) bool {
	parts := strings.SplitN(strings.TrimPrefix(version, "v"), ".", 3)
	if len(parts) < 2 {
		return false
	}
	major, err := strconv.Atoi(parts[0])
	if err != nil {
		return false
	}
	minor, err := strconv.Atoi(parts[1])
	if err != nil {
		return false
	}
	return major > oldest[0] || major == oldest[0] && minor >= oldest[1]
}

// buildCompose builds the version that tools/compose pins and stores it in the
// cache.
func (b *startup) buildCompose(ctx context.Context) error {
	const module = "github.com/docker/compose/v5"
	source := filepath.Join(b.root, "tools", "compose")
	list := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", module)
	list.Dir = source
	version, err := captured(ctx, list)
	if err != nil {
		return err
	}
	unlock, err := b.cache.lock(ctx, "compose")
	if err != nil {
		return err
	}
	defer unlock()
	target := b.cache.path("bin", "docker-compose")
	if found, err := output(ctx, target, "version", "--short"); err == nil && "v"+strings.TrimPrefix(found, "v") == version {
		b.export(EnvCompose, target)
		b.progress.found("compose "+strings.TrimPrefix(version, "v"), "")
		return nil
	}
	w := b.progress.start("building", "compose "+version)
	defer w.failed()
	temporary := target + ".new"
	defer os.Remove(temporary)
	build := exec.Command("go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags", "-s -w -X "+module+"/internal.Version="+version, "-o", temporary, module+"/cmd")
	build.Dir = source
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := b.run(ctx, w, build); err != nil {
		return errors.Join(err, fmt.Errorf("no docker compose %d.%d or later is installed, and building one failed: install docker compose, or make Go's module proxy reachable",
			oldestCompose[0], oldestCompose[1]))
	}
	if err := os.Rename(temporary, target); err != nil {
		return err
	}
	b.export(EnvCompose, target)
	w.done("compose " + version)
	return nil
}

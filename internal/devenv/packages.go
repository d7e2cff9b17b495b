package devenv

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// debian installs the missing packages of the distribution in one apt-get,
// since dpkg has only one lock. Other parts continue meanwhile.
type debian struct {
	packages []string
	ready    chan struct{} // closed when apt-get has ended
	err      error
}

// canInstall reports whether this user can install packages.
func canInstall() bool {
	_, err := exec.LookPath("apt-get")
	return err == nil && os.Getuid() == 0
}

// planPackages determines the missing packages and starts to install them.
func (b *startup) planPackages(ctx context.Context) *debian {
	d := &debian{ready: make(chan struct{})}
	if !canInstall() {
		close(d.ready)
		return d
	}
	missing := func(programs ...string) bool {
		for _, program := range programs {
			if _, err := exec.LookPath(program); err != nil {
				return true
			}
		}
		return false
	}
	if b.wants("broker") && !b.Newest && !b.given(EnvBroker, EnvBrokerAPI) && findRabbitMQ() == "" {
		d.packages = append(d.packages, "rabbitmq-server")
	}
	if b.wants("database") && !b.Newest && !b.given(EnvDatabase) && findPostgreSQL() == "" {
		d.packages = append(d.packages, "postgresql")
	}
	if b.wants("database") && findPgBouncer() == "" {
		d.packages = append(d.packages, "pgbouncer")
	}
	if _, err := engineVersion(ctx); b.wants("engine") && err != nil && os.Getenv("DOCKER_HOST") == "" && missing("docker", "dockerd", "iptables") {
		d.packages = append(d.packages, "docker.io", "iptables")
	}
	if b.wants("python") && !b.given(EnvPythonRoot) && findPython(ctx) == "" {
		d.packages = append(d.packages, "python3-venv")
	}
	if b.wants("compiler") && missing("gcc") {
		d.packages = append(d.packages, "gcc", "libc6-dev")
	}
	if b.wants("compiler") && missing("git") {
		d.packages = append(d.packages, "git", "ca-certificates")
	}
	if b.wants("codex") && !b.given(EnvCodex) && missing("npm") && missing("codex") {
		d.packages = append(d.packages, "nodejs", "npm")
	}
	if (b.Newest || b.Images) && missing("mmdebstrap") {
		d.packages = append(d.packages, "mmdebstrap")
	}
	if len(d.packages) == 0 {
		close(d.ready)
		return d
	}
	go func() {
		defer close(d.ready)
		d.err = b.install(ctx, d.packages)
	}()
	return d
}

// wait waits until the package is installed. It returns at once if the package
// was not missing.
func (d *debian) wait(ctx context.Context, name string) error {
	wanted := false
	for _, p := range d.packages {
		wanted = wanted || p == name
	}
	if !wanted {
		return nil
	}
	select {
	case <-d.ready:
		return d.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// install installs packages and prevents their servers from starting.
func (b *startup) install(ctx context.Context, packages []string) error {
	unlock, err := b.cache.lock(ctx, "apt")
	if err != nil {
		return err
	}
	defer unlock()
	w := b.progress.start("installing", strings.Join(packages, " "))
	defer w.failed()
	restore, err := preventServerStart()
	if err != nil {
		return err
	}
	defer restore()

	apt := func(args ...string) error {
		cmd := exec.Command("apt-get", append([]string{"-o", "DPkg::Lock::Timeout=300", "-q", "-y"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C")
		return b.run(ctx, w, cmd)
	}
	install := append([]string{"install", "--no-install-recommends"}, packages...)
	if err := apt(append(install, dockerCommand(ctx, packages)...)...); err != nil {
		if ctx.Err() != nil {
			return err
		}
		// The package lists are missing, or older than the mirror.
		if err := apt("update"); err != nil {
			return fmt.Errorf("%w; run: apt-get update", err)
		}
		if err := apt(append(install, dockerCommand(ctx, packages)...)...); err != nil {
			return fmt.Errorf("%w; run: apt-get install --no-install-recommends %s", err, strings.Join(packages, " "))
		}
	}
	w.done(strings.Join(packages, " "))
	return nil
}

// dockerCommand adds the package of the docker command line if it is not part of
// docker.io, as in newer releases.
func dockerCommand(ctx context.Context, packages []string) []string {
	for _, p := range packages {
		if p == "docker.io" {
			if found, err := output(ctx, "apt-cache", "search", "--names-only", "^docker-cli$"); err == nil && found != "" {
				return []string{"docker-cli"}
			}
		}
	}
	return nil
}

// preventServerStart prevents package scripts from starting servers and from creating
// a PostgreSQL cluster. restore undoes it.
func preventServerStart() (restore func(), err error) {
	const policy = "/usr/sbin/policy-rc.d"
	const cluster = "/etc/postgresql-common/createcluster.d/mm-devenv.conf"
	old, readErr := os.ReadFile(policy)
	var mode fs.FileMode
	if info, err := os.Stat(policy); err == nil {
		mode = info.Mode()
	}
	undo := func() {
		os.Remove(cluster)
		os.Remove(filepath.Dir(cluster)) // only if it is empty
		if readErr != nil {
			os.Remove(policy)
			return
		}
		os.WriteFile(policy, old, mode)
		os.Chmod(policy, mode)
	}
	if readErr != nil && !errors.Is(readErr, fs.ErrNotExist) {
		return nil, readErr
	}
	// Exit code 101: action forbidden by policy.
	if err := os.WriteFile(policy, []byte("#!/bin/sh\nexit 101\n"), 0o755); err != nil {
		return nil, fmt.Errorf("keep servers from starting: %w", err)
	}
	if err := os.Chmod(policy, 0o755); err != nil {
		undo()
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cluster), 0o755); err != nil {
		undo()
		return nil, err
	}
	if err := os.WriteFile(cluster, []byte("create_main_cluster = false\n"), 0o644); err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

// compiler checks that gcc, for `go test -race`, and git, for the tests, are
// installed.
func (b *startup) compiler(ctx context.Context) error {
	for _, p := range []string{"gcc", "git"} {
		if err := b.debian.wait(ctx, p); err != nil {
			return err
		}
	}
	if _, err := exec.LookPath("git"); err != nil {
		return fmt.Errorf("git is missing: install it")
	}
	_, gcc := exec.LookPath("gcc")
	_, clang := exec.LookPath("clang")
	if gcc != nil && clang != nil {
		return fmt.Errorf("no C compiler, which Go's race detector needs: install gcc")
	}
	return nil
}

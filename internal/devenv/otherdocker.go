package devenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// suiteOfOldestCompose is the suite of Debian whose docker-compose is the oldest
// release that the project supports.
const suiteOfOldestCompose = "trixie"

// oldestComposeProgram provides a compose program of the oldest supported release:
// it unpacks Debian's package, without installing it.
func (b *startup) oldestComposeProgram(ctx context.Context) error {
	if b.given(EnvOldestCompose) {
		return nil
	}
	unlock, err := b.cache.lock(ctx, "oldest-compose")
	if err != nil {
		return err
	}
	defer unlock()
	wanted := fmt.Sprintf("%d.%d.", oldestCompose[0], oldestCompose[1])
	target := b.cache.path("bin", "docker-compose-oldest")
	if found, err := output(ctx, target, "version", "--short"); err == nil && strings.HasPrefix(strings.TrimPrefix(found, "v"), wanted) {
		b.export(EnvOldestCompose, target)
		b.progress.found("compose "+found, "")
		return nil
	}
	w := b.progress.start("downloading", "compose "+wanted+"x")
	defer w.failed()
	unpacked, err := b.unpackPackages(ctx, w, suiteOfOldestCompose, "docker-compose")
	if err == nil {
		err = copyFile(filepath.Join(unpacked, "usr", "libexec", "docker", "cli-plugins", "docker-compose"), target)
	}
	version := ""
	if err == nil {
		version, err = output(ctx, target, "version", "--short")
	}
	if err == nil && !strings.HasPrefix(version, wanted) {
		err = fmt.Errorf("the package docker-compose of Debian %s is version %s", suiteOfOldestCompose, version)
	}
	if err != nil {
		return errors.Join(err, fmt.Errorf("compose %sx cannot be had: set %s to the path of such a program", wanted, EnvOldestCompose))
	}
	b.export(EnvOldestCompose, target)
	w.done("compose " + version)
	return nil
}

// newestEngine provides the programs of the newest docker engine, of Debian's
// unstable suite, without installing them. They run beside the host's own runc.
func (b *startup) newestEngine(ctx context.Context) error {
	if b.given(EnvNewestEngine) {
		return nil
	}
	unlock, err := b.cache.lock(ctx, "newest-engine")
	if err != nil {
		return err
	}
	defer unlock()
	w := b.progress.start("downloading", "newest docker engine")
	defer w.failed()
	target := b.cache.path("newest-engine")
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	unpacked, err := b.unpackPackages(ctx, w, unstable, "docker.io", "containerd")
	if err != nil {
		return fmt.Errorf("%w; set %s to a folder with dockerd and containerd", err, EnvNewestEngine)
	}
	for _, folder := range []string{"bin", "sbin"} {
		programs, err := os.ReadDir(filepath.Join(unpacked, "usr", folder))
		if err != nil {
			return err
		}
		for _, program := range programs {
			if !program.Type().IsRegular() {
				continue // a link to a program of another package
			}
			if err := copyFile(filepath.Join(unpacked, "usr", folder, program.Name()), filepath.Join(target, program.Name())); err != nil {
				return err
			}
		}
	}
	version, err := output(ctx, filepath.Join(target, "dockerd"), "--version")
	if err != nil {
		return err
	}
	b.export(EnvNewestEngine, target)
	w.done(version)
	return nil
}

// unpackPackages downloads packages of a suite of Debian and unpacks them into one
// folder of their own.
func (b *startup) unpackPackages(ctx context.Context, w *work, suite string, names ...string) (string, error) {
	apt, err := b.aptOf(ctx, w, suite)
	if err != nil {
		return "", err
	}
	download := apt("apt-get", append([]string{"download"}, names...)...)
	if err := b.run(ctx, w, download); err != nil {
		return "", err
	}
	found, err := filepath.Glob(filepath.Join(download.Dir, "*.deb"))
	if err != nil {
		return "", err
	}
	folder := filepath.Join(download.Dir, "unpacked")
	for _, archive := range found {
		if _, err := output(ctx, "dpkg", "-x", archive, folder); err != nil {
			return "", err
		}
	}
	return folder, nil
}

// copyFile copies a program; a reader of the target never sees half of it.
func copyFile(from, to string) error {
	source, err := os.Open(from)
	if err != nil {
		return err
	}
	defer source.Close()
	temporary := to + ".new"
	defer os.Remove(temporary)
	target, err := os.OpenFile(temporary, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(target, source); err != nil {
		target.Close()
		return err
	}
	if err := target.Close(); err != nil {
		return err
	}
	return os.Rename(temporary, to)
}

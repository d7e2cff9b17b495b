package devenv

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// codexVersion is the release of Codex that tests run. Its output differs between
// releases.
const codexVersion = "0.171.0"

// codex finds the codex program, or installs the pinned release from npm.
func (b *startup) codex(ctx context.Context) error {
	if b.given(EnvCodex) {
		return nil
	}
	if path, err := exec.LookPath("codex"); err == nil && isCodex(ctx, path) {
		b.export(EnvCodex, path)
		b.progress.found("codex "+codexVersion, path)
		return nil
	}
	unlock, err := b.cache.lock(ctx, "codex")
	if err != nil {
		return err
	}
	defer unlock()
	target := b.cache.path("codex-" + codexVersion)
	program := filepath.Join(target, "node_modules", ".bin", "codex")
	if isCodex(ctx, program) {
		b.export(EnvCodex, program)
		b.progress.found("codex "+codexVersion, "")
		return nil
	}
	for _, p := range []string{"nodejs", "npm"} {
		if err := b.debian.wait(ctx, p); err != nil {
			return err
		}
	}
	if _, err := exec.LookPath("npm"); err != nil {
		return errors.New("no npm, which installs codex: install Node.js with npm, on Debian as root: apt-get install --no-install-recommends nodejs npm")
	}
	w := b.progress.start("installing", "codex "+codexVersion)
	defer w.failed()
	temporary := target + ".new"
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	defer os.RemoveAll(temporary)
	npm := exec.Command("npm", "install", "--prefix", temporary, "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "@openai/codex@"+codexVersion)
	if err := b.run(ctx, w, npm); err != nil {
		return fmt.Errorf("codex %s: %w; the registry that npm is set up for must be reachable", codexVersion, err)
	}
	if installed := filepath.Join(temporary, "node_modules", ".bin", "codex"); !isCodex(ctx, installed) {
		return fmt.Errorf("npm has installed codex, but %s --version does not answer with %s", installed, codexVersion)
	}
	if err := replace(temporary, target); err != nil {
		return err
	}
	b.export(EnvCodex, program)
	w.done("codex " + codexVersion)
	return nil
}

// isCodex reports whether a program is the pinned release.
func isCodex(ctx context.Context, program string) bool {
	version, err := output(ctx, program, "--version") // "codex-cli 0.171.0"
	return err == nil && strings.HasSuffix(version, " "+codexVersion)
}

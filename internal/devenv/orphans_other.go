//go:build !linux

package devenv

import (
	"os/exec"
	"syscall"
)

// adoptOrphans needs Linux; elsewhere only process groups are ended.
func adoptOrphans() (reap func(mine int), release func()) { return func(int) {}, func() {} }

// onlyZombies needs /proc, which only Linux has in this form.
func onlyZombies(int) bool { return false }

// dieWithUs needs Linux; elsewhere a killed test leaves its servers.
func dieWithUs(*exec.Cmd, syscall.Signal) {}

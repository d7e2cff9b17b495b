//go:build !linux

package devenv

import (
	"os/exec"
	"syscall"
)

// adoptOrphans needs Linux; elsewhere only process groups are ended.
func adoptOrphans() (bury func(mine int), release func()) { return func(int) {}, func() {} }

// onlyZombies cannot be told without /proc.
func onlyZombies(int) bool { return false }

// dieWithUs needs Linux; elsewhere a killed test leaves its servers.
func dieWithUs(*exec.Cmd, syscall.Signal) {}

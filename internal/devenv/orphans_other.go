//go:build !linux

package devenv

import "syscall"

// adoptOrphans needs Linux; elsewhere only process groups are ended.
func adoptOrphans() (reap func(mine int), release func()) { return func(int) {}, func() {} }

// onlyZombies needs /proc, which only Linux has in this form.
func onlyZombies(int) bool { return false }

// deathSignal needs Linux; elsewhere a killed test leaves its children.
func deathSignal(*syscall.SysProcAttr, syscall.Signal) {}

//go:build !linux

package e2e

import "syscall"

// dieWithUs needs Linux; elsewhere a killed test leaves its workers.
func dieWithUs(*syscall.SysProcAttr) {}

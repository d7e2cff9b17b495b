//go:build !linux

package e2e

import "syscall"

// dieWithUs: only Linux can.
func dieWithUs(*syscall.SysProcAttr) {}

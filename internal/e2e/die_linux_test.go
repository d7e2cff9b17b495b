package e2e

import "syscall"

// dieWithUs lets the kernel kill a worker whose test is killed.
func dieWithUs(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }

package e2e

import "syscall"

// dieWithUs makes the kernel kill the worker when its test is killed.
func dieWithUs(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }

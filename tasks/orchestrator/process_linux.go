package orchestrator

import "syscall"

// dieWithUs has the kernel kill a program when the thread that started it is
// gone.
func dieWithUs(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }

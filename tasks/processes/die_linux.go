package processes

import (
	"fmt"
	"syscall"
)

// dieWithUs has the kernel kill a program when the thread that started it is
// gone.
func dieWithUs(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }

// prSetChildSubreaper is PR_SET_CHILD_SUBREAPER of prctl(2).
const prSetChildSubreaper = 36

// takeOrphans makes the kernel give us what descendants of ours leave behind.
func takeOrphans() error {
	if _, _, errno := syscall.Syscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); errno != 0 {
		return fmt.Errorf("become the parent of orphans (prctl PR_SET_CHILD_SUBREAPER): %w", errno)
	}
	return nil
}

package processes

import (
	"fmt"
	"syscall"
)

// setParentDeathSignal makes the kernel kill a program when the thread that
// started it ends.
func setParentDeathSignal(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }

// prSetChildSubreaper is PR_SET_CHILD_SUBREAPER of prctl(2).
const prSetChildSubreaper = 36

// becomeSubreaper makes the kernel reparent orphaned descendants to this
// process.
func becomeSubreaper() error {
	if _, _, errno := syscall.Syscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); errno != 0 {
		return fmt.Errorf("become the parent of orphans (prctl PR_SET_CHILD_SUBREAPER): %w", errno)
	}
	return nil
}

package processes

import (
	"fmt"
	"syscall"
	"unsafe"
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

// Arguments of waitid(2).
const (
	pAll    = 0
	wExited = 0x4
	wNoHang = 0x1
	wNoWait = 0x1000000
	wAll    = 0x40000000
)

// hasNoChild says that this process has no child, dead or alive. It reaps none.
func hasNoChild() bool {
	var info [128]byte // siginfo_t
	for {
		_, _, errno := syscall.Syscall6(syscall.SYS_WAITID, pAll, 0, uintptr(unsafe.Pointer(&info)), wExited|wNoHang|wNoWait|wAll, 0, 0)
		if errno != syscall.EINTR {
			return errno == syscall.ECHILD
		}
	}
}

//go:build unix && !linux

package processes

import (
	"errors"
	"syscall"
)

// setParentDeathSignal does nothing: only Linux has this signal.
func setParentDeathSignal(*syscall.SysProcAttr) {}

func becomeSubreaper() error {
	return errors.New("only Linux can make a process the parent of orphans")
}

// hasNoChild does not know.
func hasNoChild() bool { return false }

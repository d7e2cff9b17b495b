//go:build unix && !linux

package processes

import (
	"errors"
	"syscall"
)

// dieWithUs: no other system than Linux has this.
func dieWithUs(*syscall.SysProcAttr) {}

func takeOrphans() error { return errors.New("orphans go to init on every system but Linux") }

//go:build linux && !arm

package artifacts

import (
	"os"
	"syscall"
)

// syncRangeWrite is SYNC_FILE_RANGE_WRITE, which package syscall does not name.
const syncRangeWrite = 2

// startWriting asks the system to begin to write a part of a file to disk, without
// waiting for it. This is only advice: an error of the disk, also one of this call,
// comes from the Sync at the end.
func startWriting(file *os.File, offset, size int64) {
	raw, err := file.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) { _ = syscall.SyncFileRange(int(fd), offset, size, syncRangeWrite) })
}

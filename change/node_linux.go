package change

import "syscall"

func makeNode(path string, mode uint32, device uint64) error {
	return syscall.Mknod(path, mode, int(device))
}

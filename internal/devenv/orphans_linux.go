package devenv

import (
	"os"
	"strconv"
	"strings"
	"syscall"
)

const prSetChildSubreaper = 36

// adoptOrphans makes us the parent of processes whose own parent dies, so that
// what a command leaves behind in other process groups can be found. release
// ends those that have come.
func adoptOrphans() (release func()) {
	before := children()
	// On an error orphans go to process 1, and only process groups are ended.
	syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	return func() {
		// Ending one process can orphan its children to us: look again until none come.
		for {
			found := false
			for pid := range children() {
				if before[pid] {
					continue
				}
				found = true
				syscall.Kill(pid, syscall.SIGKILL)
				var status syscall.WaitStatus
				syscall.Wait4(pid, &status, 0, nil)
			}
			if !found {
				syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 0, 0)
				return
			}
		}
	}
}

// children lists the processes whose parent we are.
func children() map[int]bool {
	found := map[int]bool{}
	own := strconv.Itoa(os.Getpid())
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		pid, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + entry.Name() + "/stat")
		if err != nil {
			continue
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) > 1 && fields[1] == own {
			found[pid] = true
		}
	}
	return found
}

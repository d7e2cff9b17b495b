package devenv

import (
	"os"
	"strconv"
	"strings"
	"syscall"
)

const prSetChildSubreaper = 36

// adoptOrphans makes this process the parent of descendants whose own parent
// dies, so that it can find what a command leaves behind in other process
// groups. reap waits for those that have died; without it a long command could
// fill the process table. It leaves out the process mine, which the caller
// waits for. release kills the adopted processes that are left.
func adoptOrphans() (reap func(mine int), release func()) {
	before := children()
	// If this fails, process 1 adopts orphans, and only process groups are ended.
	syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	reap = func(mine int) {
		for _, p := range processes() {
			if p.parent == os.Getpid() && p.state == "Z" && p.id != mine && !before[p.id] {
				syscall.Wait4(p.id, nil, syscall.WNOHANG, nil)
			}
		}
	}
	return reap, func() {
		// Killing a process can orphan its children to this one, so repeat until
		// there are none.
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

// children lists the child processes of this process.
func children() map[int]bool {
	found := map[int]bool{}
	for _, p := range processes() {
		if p.parent == os.Getpid() {
			found[p.id] = true
		}
	}
	return found
}

// onlyZombies reports whether the process group has no running process any
// more. Zombies may be left, which their parents have not waited for.
func onlyZombies(group int) bool {
	for _, p := range processes() {
		if p.group == group && p.state != "Z" && p.state != "X" {
			return false
		}
	}
	return true
}

// process is a line of /proc/PID/stat.
type process struct {
	id, parent, group int
	state             string
}

func processes() []process {
	var all []process
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		id, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + entry.Name() + "/stat")
		if err != nil {
			continue // the process has ended since the folder was read
		}
		// The program's name may contain blanks and parentheses, so the fields
		// are counted from its end.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		if len(fields) < 3 {
			continue
		}
		parent, _ := strconv.Atoi(fields[1])
		group, _ := strconv.Atoi(fields[2])
		all = append(all, process{id: id, parent: parent, group: group, state: fields[0]})
	}
	return all
}

// deathSignal makes the kernel send a signal to the child when this process dies.
// The kernel also sends it when the thread that forked ends; Go ends a thread
// only if a goroutine exits while locked to it.
func deathSignal(attributes *syscall.SysProcAttr, signal syscall.Signal) {
	attributes.Pdeathsig = signal
}

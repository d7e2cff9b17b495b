package devenv

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
)

const prSetChildSubreaper = 36

// adoptOrphans makes us the parent of processes whose own parent dies, so that
// what a command leaves behind in other process groups can be found. bury
// takes those that have died out of the table of processes, which a command of
// half an hour would fill: it is not for the process mine, which somebody
// waits for. release ends those that have come.
func adoptOrphans() (bury func(mine int), release func()) {
	before := children()
	// On an error orphans go to process 1, and only process groups are ended.
	syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0)
	bury = func(mine int) {
		for _, p := range processes() {
			if p.parent == os.Getpid() && p.state == "Z" && p.id != mine && !before[p.id] {
				syscall.Wait4(p.id, nil, syscall.WNOHANG, nil)
			}
		}
	}
	return bury, func() {
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
	for _, p := range processes() {
		if p.parent == os.Getpid() {
			found[p.id] = true
		}
	}
	return found
}

// onlyZombies tells that nothing in the process group runs any more, though
// entries of ended processes remain for parents that have not asked for them.
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
			continue // it has ended meanwhile
		}
		// The program's name may hold blanks and parentheses; fields go on after it.
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

// dieWithUs lets the child of a process group of its own get a signal when this
// process dies. The kernel sends it when the thread that forked ends, too; Go
// ends threads only for goroutines that die locked to theirs.
func dieWithUs(cmd *exec.Cmd, signal syscall.Signal) { cmd.SysProcAttr.Pdeathsig = signal }

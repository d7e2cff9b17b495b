//go:build unix

package processes

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A process as /proc shows it.
type process struct {
	pid, parent, group int
	// started is in clock ticks since the boot of the machine.
	started uint64
	name    string
	zombie  bool
}

// An identity names one process for good. The kernel uses a pid again, but with
// another start time.
type identity struct {
	pid     int
	started uint64
}

func (p process) identity() identity { return identity{p.pid, p.started} }

// readProcess returns false for a process that does not exist or has ended.
func readProcess(pid int) (process, bool) {
	// Not os.ReadFile: a search reads a file of each process, and that would take
	// twice as many system calls for each.
	file, err := syscall.Open("/proc/"+strconv.Itoa(pid)+"/stat", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return process{}, false
	}
	defer syscall.Close(file)
	var stat [1 << 10]byte // the kernel writes at most 52 numbers and a name of 64 bytes
	n, err := syscall.Read(file, stat[:])
	if err != nil {
		return process{}, false
	}
	return parseStat(stat[:n])
}

// parseStat reads /proc/PID/stat. The name in it may contain anything, also
// blanks and parentheses.
func parseStat(stat []byte) (process, bool) {
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return process{}, false
	}
	fields := strings.Fields(string(stat[end+1:]))
	if len(fields) < 20 {
		return process{}, false
	}
	p := process{name: string(stat[open+1 : end]), zombie: fields[0] == "Z" || fields[0] == "X"}
	var err [4]error
	p.pid, err[0] = strconv.Atoi(strings.TrimSpace(string(stat[:open])))
	p.parent, err[1] = strconv.Atoi(fields[1])
	p.group, err[2] = strconv.Atoi(fields[2])
	p.started, err[3] = strconv.ParseUint(fields[19], 10, 64)
	for _, e := range err {
		if e != nil {
			return process{}, false
		}
	}
	return p, true
}

// kthreadd is the pid of the parent of kernel threads, which have no program
// and no environment. In a container's pid namespace an ordinary process has
// this pid.
const kthreadd = 2

// list returns every process that this one can see, without kernel threads. It
// may miss processes that start or end while it reads.
func list() []process {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // the names read before an error are still of use
	var all []process
	for _, name := range names {
		if name[0] < '0' || name[0] > '9' {
			continue
		}
		if pid, err := strconv.Atoi(name); err == nil {
			if p, exists := readProcess(pid); exists && !(p.parent == kthreadd && p.group == 0) {
				all = append(all, p)
			}
		}
	}
	return all
}

// withDescendants returns the processes for which root is true, and all of
// their descendants.
func withDescendants(all []process, root func(process) bool) map[identity]process {
	children := map[int][]process{}
	for _, p := range all {
		children[p.parent] = append(children[p.parent], p)
	}
	found := map[identity]process{}
	var add func(process)
	add = func(p process) {
		if _, known := found[p.identity()]; known {
			return
		}
		found[p.identity()] = p
		for _, child := range children[p.pid] {
			add(child)
		}
	}
	for _, p := range all {
		if root(p) {
			add(p)
		}
	}
	return found
}

// environmentLimit bounds how much readMark reads of an environment, in bytes.
const environmentLimit = 4 << 20

// markOf returns the value of Variable in a process's environment. It is "" for
// a process without it and for one of another user.
//
// During an exec the environment is empty for a moment. So markOf reads an empty
// one again, twice.
func markOf(pid int) string {
	for range 3 {
		if mark, empty := readMark(pid); !empty {
			return mark
		}
		time.Sleep(time.Millisecond)
	}
	return ""
}

func readMark(pid int) (mark string, empty bool) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", false
	}
	defer file.Close()
	if info, err := file.Stat(); err != nil || !ownedByUs(info) {
		return "", false
	}
	environment, err := io.ReadAll(io.LimitReader(file, environmentLimit))
	if err != nil {
		return "", false
	}
	for variable := range bytes.SplitSeq(environment, []byte{0}) {
		if value, found := bytes.CutPrefix(variable, []byte(Variable+"=")); found {
			mark = string(value)
		}
	}
	return mark, len(environment) == 0
}

func ownedByUs(info os.FileInfo) bool {
	stat, known := info.Sys().(*syscall.Stat_t)
	return known && int(stat.Uid) == os.Geteuid()
}

// send signals exactly this process. The handle of package os stays with one
// process, whereas a pid may belong to another one by the time of the signal.
// The start time is compared after the handle was opened, because the pid may
// have changed hands before.
func (p process) send(signal syscall.Signal) error {
	handle, err := os.FindProcess(p.pid)
	if err != nil {
		return err
	}
	defer handle.Release()
	if now, exists := readProcess(p.pid); !exists || now.started != p.started {
		return os.ErrProcessDone
	}
	return handle.Signal(signal)
}

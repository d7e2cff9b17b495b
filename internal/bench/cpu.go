package bench

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// ticks is the unit of times in /proc, which is 1/100 s on all of Linux's
// architectures.
const ticks = 100

// proc is a line of /proc/PID/stat.
type proc struct {
	parent int
	// seconds is the processor time, with that of children that have ended.
	seconds float64
}

// processes reads all processes. Without /proc there are none.
func processes() map[int]proc {
	found := map[int]proc{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		// The name in parentheses may contain anything.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if len(fields) < 15 {
			continue
		}
		var p proc
		p.parent, _ = strconv.Atoi(fields[1])
		for _, field := range fields[11:15] { // utime, stime, and those of children
			n, _ := strconv.Atoi(field)
			p.seconds += float64(n) / ticks
		}
		found[pid] = p
	}
	return found
}

// eachBelow calls do for each process that is one of the roots or below it, with the
// root.
func eachBelow(roots map[int]string, do func(pid int, p proc, root string)) {
	all := processes()
	for pid, p := range all {
		for at := pid; at > 1; at = all[at].parent {
			if root, ok := roots[at]; ok {
				do(pid, p, root)
				break
			}
		}
	}
}

// usage is the processor time of several process trees, in seconds, by name. What
// descendants have used that ended is included.
type usage map[string]float64

// usage is that of a contender and of the servers. A server in a container has none.
func (h *harness) usage(p *process) usage {
	total := usage{}
	eachBelow(map[int]string{p.pid(): "worker", h.servers.broker.PID(): "broker", h.servers.database.PID(): "database"},
		func(_ int, p proc, name string) { total[name] += p.seconds })
	return total
}

// perTask returns the milliseconds for each of n tasks since before.
func (u usage) perTask(before usage, n int) map[string]float64 {
	each := map[string]float64{}
	for name := range u {
		each[name] = (u[name] - before[name]) * 1000 / float64(n)
	}
	return each
}

// openFiles is how many descriptors a process has.
func openFiles(pid int) int {
	files, _ := os.ReadDir("/proc/" + strconv.Itoa(pid) + "/fd")
	return len(files)
}

// memoryOf returns the memory of a process and its descendants in bytes. A page that
// several of them use is counted once.
func memoryOf(root int) (bytes float64) {
	eachBelow(map[int]string{root: ""}, func(pid int, _ proc, _ string) {
		kilobytes, _, _ := strings.Cut(firstOf("/proc/"+strconv.Itoa(pid)+"/smaps_rollup", "Pss"), " ")
		n, _ := strconv.ParseFloat(kilobytes, 64)
		bytes += n * 1024
	})
	return bytes
}

// residentOf returns a kind of a process's resident memory in bytes, as
// /proc/PID/status names it.
func residentOf(pid int, kind string) float64 {
	kilobytes, _, _ := strings.Cut(firstOf("/proc/"+strconv.Itoa(pid)+"/status", kind), " ")
	n, _ := strconv.ParseFloat(kilobytes, 64)
	return n * 1024
}

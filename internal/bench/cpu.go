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

// usage is the processor time of several process trees, in seconds, by name.
type usage map[string]float64

// measureUsage reads the processor time that the processes and all their
// descendants have used, those that have ended included. Without /proc, and for
// process 0, there is none.
func measureUsage(roots map[string]int) usage {
	parents, used := map[int]int{}, map[int]float64{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		// The name in parentheses may contain anything.
		_, rest, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')'):]), " ")
		fields := strings.Fields(rest)
		if len(fields) < 15 {
			continue
		}
		parents[pid], _ = strconv.Atoi(fields[1])
		for _, field := range fields[11:15] { // utime, stime, and those of children that have ended
			n, _ := strconv.Atoi(field)
			used[pid] += float64(n) / ticks
		}
	}
	names := map[int]string{}
	for name, pid := range roots {
		if pid != 0 {
			names[pid] = name
		}
	}
	total := usage{}
	for pid, seconds := range used {
		for at := pid; at > 1; at = parents[at] {
			if name, ok := names[at]; ok {
				total[name] += seconds
				break
			}
		}
	}
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

// usage is that of a contender and of the servers.
func (h *harness) usage(p *process) usage {
	return measureUsage(map[string]int{"worker": p.pid(), "broker": h.servers.broker.PID(), "database": h.servers.database.PID()})
}

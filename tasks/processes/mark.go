//go:build unix

package processes

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Variable is set in the environment of every program that a [Runner] runs. Its
// value is the mark WORKER/RUN/STEP/N: WORKER names the worker process, N counts
// its programs.
const Variable = "MM_ORCHESTRATOR_STEP"

// A workerProcess is the one that has started a program: number of its pid
// namespace, pid, start time. A pid from another namespace means nothing here,
// so such a process never counts as dead.
type workerProcess struct {
	namespace string
	identity
}

func (w workerProcess) String() string {
	return fmt.Sprintf("%s.%d.%d", w.namespace, w.pid, w.started)
}

// self is this process. Without /proc it cannot be named, and no process is
// found by its mark.
var self = sync.OnceValue(func() workerProcess {
	me, _ := readProcess(os.Getpid())
	return workerProcess{namespaceOf("self"), identity{os.Getpid(), me.started}}
})

func namespaceOf(process string) string {
	link, _ := os.Readlink("/proc/" + process + "/ns/pid") // "pid:[4026531836]"
	return strings.TrimSuffix(strings.TrimPrefix(link, "pid:["), "]")
}

// A mark is a parsed value of Variable.
type mark struct {
	worker    workerProcess
	run, step string
}

func parseMark(text string) (mark, bool) {
	parts := strings.Split(text, "/")
	if len(parts) != 4 {
		return mark{}, false
	}
	who := strings.Split(parts[0], ".")
	if len(who) != 3 || who[0] == "" {
		return mark{}, false
	}
	pid, err := strconv.Atoi(who[1])
	if err != nil || pid < 1 {
		return mark{}, false
	}
	started, err := strconv.ParseUint(who[2], 10, 64)
	if err != nil || started == 0 {
		return mark{}, false
	}
	return mark{workerProcess{who[0], identity{pid, started}}, parts[1], parts[2]}, true
}

// dead says that the worker ran in this pid namespace and has ended.
func (w workerProcess) dead() bool {
	if w.namespace != self().namespace {
		return false
	}
	now, exists := readProcess(w.pid)
	return !exists || now.zombie || now.started != w.started
}

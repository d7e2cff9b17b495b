//go:build unix

package processes

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// Variable is set in the environment of every program that is run. Its value
// is HOLDER/RUN/STEP/N: HOLDER names the worker process, N the program.
const Variable = "MM_ORCHESTRATOR_STEP"

// A holder is a worker process: number of its pid namespace, pid, start time.
// Pids mean nothing in another namespace, so that marks from there are never
// judged.
type holder struct {
	namespace string
	identity
}

func (h holder) String() string { return fmt.Sprintf("%s.%d.%d", h.namespace, h.pid, h.started) }

// self is this process. Without /proc there is no mark, and nothing is found
// by one.
var self = sync.OnceValue(func() holder {
	me, _ := readProcess(os.Getpid())
	return holder{namespaceOf("self"), identity{os.Getpid(), me.started}}
})

func namespaceOf(process string) string {
	link, _ := os.Readlink("/proc/" + process + "/ns/pid") // "pid:[4026531836]"
	return strings.TrimSuffix(strings.TrimPrefix(link, "pid:["), "]")
}

// A mark is a parsed value of Variable.
type mark struct {
	holder    holder
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
	return mark{holder{who[0], identity{pid, started}}, parts[1], parts[2]}, true
}

// dead says that the holder was a process here and is none any more.
func (h holder) dead() bool {
	if h.namespace != self().namespace {
		return false
	}
	now, there := readProcess(h.pid)
	return !there || now.zombie || now.started != h.started
}

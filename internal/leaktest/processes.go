package leaktest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// lookEvery is the time between two looks at the processes. Those that live for less are
// not always seen: a test that needs each of them has them started by a program of its
// own, which writes down what it got.
const lookEvery = 20 * time.Millisecond

// watching is what looks at the processes that this one has started, and at theirs, as
// long as a Watch needs it. All tests of a package share it: a process does not say to
// which test it belongs.
var watching struct {
	mu         sync.Mutex
	watches    []*Watch
	stop, done chan struct{}
}

func watchProcesses(w *Watch) {
	if _, err := os.Stat("/proc/self/environ"); err != nil {
		return
	}
	watching.mu.Lock()
	defer watching.mu.Unlock()
	watching.watches = append(watching.watches, w)
	if len(watching.watches) == 1 {
		watching.stop, watching.done = make(chan struct{}), make(chan struct{})
		go lookAtProcesses(watching.stop, watching.done)
	}
}

func unwatchProcesses(w *Watch) {
	watching.mu.Lock()
	defer watching.mu.Unlock()
	i := slices.Index(watching.watches, w)
	if i < 0 {
		return
	}
	watching.watches = slices.Delete(watching.watches, i, i+1)
	if len(watching.watches) == 0 {
		close(watching.stop)
		done := watching.done
		watching.mu.Unlock()
		<-done
		watching.mu.Lock()
	}
}

func lookAtProcesses(stop, done chan struct{}) {
	defer close(done)
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		list := startedProcesses(os.Getpid(), nil)
		watching.mu.Lock()
		watches := slices.Clone(watching.watches)
		watching.mu.Unlock()
		for _, w := range watches {
			for _, p := range list {
				w.process(p)
			}
		}
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
	}
}

// process is one that was started while the test ran.
type process struct {
	// arguments, environment and settings, those of git in its working directory.
	arguments, environment, settings string
	// names are the names that the process goes by, callers those of the processes that
	// have started it.
	names, callers []string
}

// startedProcesses are the descendants of a process.
func startedProcesses(pid int, callers []string) (list []process) {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return nil // it has ended
	}
	for _, thread := range threads {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, thread.Name()))
		if err != nil {
			continue
		}
		for _, child := range strings.Fields(string(children)) {
			id, err := strconv.Atoi(child)
			if err != nil {
				continue
			}
			p := process{callers: callers}
			folder := "/proc/" + child
			arguments, _ := os.ReadFile(folder + "/cmdline")
			environment, _ := os.ReadFile(folder + "/environ")
			// One that becomes another program meanwhile is looked at next time.
			if again, err := os.ReadFile(folder + "/cmdline"); err != nil || len(again) == 0 || string(again) != string(arguments) {
				continue
			}
			p.arguments, p.environment = strings.ReplaceAll(string(arguments), "\x00", " "), string(environment)
			words := strings.Split(string(arguments), "\x00")
			for _, word := range words[:min(3, len(words))] { // "sh script", "env node script"
				p.names = append(p.names, filepath.Base(word))
			}
			if program, err := os.Readlink(folder + "/exe"); err == nil {
				p.names = append(p.names, filepath.Base(program))
			}
			for _, name := range []string{".git/config", "config"} {
				if text, err := os.ReadFile(folder + "/cwd/" + name); err == nil {
					p.settings += string(text)
				}
			}
			list = append(list, p)
			list = append(list, startedProcesses(id, slices.Concat(callers, p.names))...)
		}
	}
	return list
}

// process looks at a process, unless it has seen one like it.
func (w *Watch) process(p process) {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := strings.Join([]string{p.arguments, p.environment, p.settings, strings.Join(p.names, " "), strings.Join(p.callers, " ")}, "\x00")
	if w.observed[id] {
		return
	}
	w.observed[id] = true
	for _, name := range p.names {
		w.saw[name] = true
	}
	var mayHave, mayPass []string
	for secret, programs := range w.state.Environments {
		for _, program := range programs {
			if slices.Contains(p.names, program.Name) || program.Children && slices.Contains(p.callers, program.Name) {
				mayHave = append(mayHave, secret)
			}
			// What another program tells those that it starts is its own doing.
			if program.Children && slices.Contains(p.callers, program.Name) {
				mayPass = append(mayPass, secret)
			}
		}
	}
	name := strings.Join(p.names, " ")
	w.without("an argument of "+name, p.arguments, mayPass)
	w.without("the environment of "+name, p.environment, mayHave)
	w.look("the settings of git where "+name+" works", p.settings)
}

// Saw says whether a process of that name was seen.
func (w *Watch) Saw(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.saw[name]
}

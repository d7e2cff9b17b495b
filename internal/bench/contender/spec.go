package contender

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"time"
)

// Spec says what a contender's process does.
type Spec struct {
	// Broker and Database are addresses. Database is a postgres:// URL.
	Broker, Database string
	// Queue exists already.
	Queue string
	// Slots is how many tasks run at the same time, Prefetch how many messages the
	// broker sends without an acknowledgement.
	Slots, Prefetch int
	// Results stores and commits a result for each task.
	Results bool
	// Folder is for the logs of steps; "" if there are none.
	Folder string
	// Workspace is the folder in which the commands of steps run, and Service the address
	// of the service that a run is about; "" if there are no steps.
	Workspace, Service string
	// Pipe is the path of the named pipe.
	Pipe string
	// Job is another job than that of a worker: JobSend or JobLog, with Count, and for
	// logs Secrets.
	Job            string
	Count, Secrets int
	// Pool and Driver are Celery's pool and the Python driver of its result backend.
	Pool, Driver string
}

// The tasks.
const (
	Noop  = "bench.noop"
	Timed = "bench.timed"
	Mark  = "bench.mark"
	// Rest is a Mark of a worker that has returned the memory that it does not use. Only
	// ours has it.
	Rest = "bench.rest"
)

// environment is the variable in which a process gets its Spec.
const environment = "MM_BENCH_CONTENDER"

// Environ returns the environment of a contender's process.
func (s Spec) Environ() ([]string, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return append(os.Environ(), environment+"="+string(text)), nil
}

// FromEnvironment returns the Spec of this process.
func FromEnvironment() (Spec, error) {
	var s Spec
	if err := json.Unmarshal([]byte(os.Getenv(environment)), &s); err != nil {
		return s, fmt.Errorf("%s: %w; `make bench` starts contenders", environment, err)
	}
	return s, nil
}

// pipe writes lines to the measuring process. Many goroutines may use it: a line
// is one write, which the kernel does not split.
type pipe struct{ file *os.File }

func (s Spec) open() (pipe, error) {
	file, err := os.OpenFile(s.Pipe, os.O_WRONLY, 0)
	return pipe{file}, err
}

// mark writes the moment at which the task bench.mark runs.
func (p pipe) mark() error { return p.line("mark", time.Now().UnixNano()) }

// age writes how long ago a message was sent.
func (p pipe) age(sent int64) error { return p.line("age", time.Now().UnixNano()-sent) }

func (p pipe) line(what string, nanoseconds int64) error {
	_, err := p.file.WriteString(what + " " + strconv.FormatInt(nanoseconds, 10) + "\n")
	return err
}

// endWithParent ends this process when the one that has started it does: that
// one holds the other end of the standard input.
func endWithParent() {
	buffer := make([]byte, 1)
	_, _ = os.Stdin.Read(buffer)
	os.Exit(0)
}

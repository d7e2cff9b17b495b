package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
)

// A worker at rest has returned the memory that only its start needed. A message in the
// queue would keep it busy.
func TestWorkerReturnsTheMemoryOfItsStart(t *testing.T) {
	t.Parallel()
	p := start(t, newTestEnv(t).env(), "worker")
	eventually(t, "the worker returns memory", func() error {
		now, most := p.memory("VmRSS:"), p.memory("VmHWM:")
		if now == 0 || now > most*85/100 {
			return fmt.Errorf("%d kB of %d kB are in use", now, most)
		}
		return nil
	})
}

// memory reads a line of /proc/PID/status, in kibibytes.
func (p *process) memory(line string) int {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), line)
	number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	kibibytes, _ := strconv.Atoi(number)
	return kibibytes
}

// Not parallel: other tests use pages of the program too.
func TestUnmappedPagesAreMappedAgain(t *testing.T) {
	mapped := func() (kibibytes int) {
		all := programMappings()
		if len(all) == 0 {
			t.Skip("this system does not list the mappings of a process")
		}
		for _, m := range all {
			kibibytes += m.mapped
		}
		return kibibytes
	}
	before := mapped()
	unmapProgram()
	if after := mapped(); after == 0 || after >= before {
		t.Errorf("%d KiB of the program are mapped, %d before", after, before)
	}
}

package main

import (
	"bufio"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// unmapProgram unmaps the pages of the program's own file. The kernel maps again what
// the worker needs, from its cache. It also maps the neighbours of each page that the
// start touches: on Linux 6.18 nearly the whole file was mapped after the start. This
// lowers the resident size of the process; the cache keeps the file.
//
// A debugger or a probe replaces pages by changed copies, which are lost when they are
// unmapped. Mappings that have such pages stay as they are.
func unmapProgram() {
	for _, m := range programMappings() {
		if m.changed == 0 {
			// It fails for locked memory, which is to stay mapped.
			_, _, _ = syscall.Syscall(syscall.SYS_MADVISE, m.from, m.to-m.from, syscall.MADV_DONTNEED)
		}
	}
}

// A mapping is a part of the program's file in memory that cannot be written to.
type mapping struct {
	from, to uintptr
	// mapped and changed are in kibibytes: all pages in memory, and those that are no
	// longer as in the file.
	mapped, changed int
}

// programMappings returns none where /proc cannot be read.
func programMappings() (all []mapping) {
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil
	}
	defer file.Close()
	var current *mapping // nil in mappings of something else
	for lines := bufio.NewScanner(file); lines.Scan(); {
		// address perms offset dev inode path, and then lines with "Name: value kB".
		head, rest, _ := strings.Cut(lines.Text(), " ")
		if from, to, found := strings.Cut(head, "-"); found {
			current = nil
			first, err1 := strconv.ParseUint(from, 16, 64)
			last, err2 := strconv.ParseUint(to, 16, 64)
			if err1 == nil && err2 == nil && strings.HasPrefix(rest, "r") && rest[1] == '-' && strings.HasSuffix(rest, " "+program) {
				all = append(all, mapping{from: uintptr(first), to: uintptr(last)})
				current = &all[len(all)-1]
			}
			continue
		}
		if current == nil {
			continue
		}
		kibibytes, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(rest), " kB"))
		switch head {
		case "Rss:":
			current.mapped = kibibytes
		case "Anonymous:":
			current.changed = kibibytes
		}
	}
	return all
}

package disklimit

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// A file is what several names may mean.
type file struct{ device, inode uint64 }

// usage is the room that a file takes, which of a file with holes is less than its
// length, and how many names it has.
func usage(info fs.FileInfo) (size int64, id file, links uint64) {
	stat, known := info.Sys().(*syscall.Stat_t)
	if !known {
		return info.Size(), file{}, 1
	}
	return stat.Blocks * 512, file{uint64(stat.Dev), stat.Ino}, uint64(stat.Nlink)
}

// deleted is the room of files below a directory that have no name any more, and that a
// process which this one has started still has open.
func deleted(dir string) int64 {
	var total int64
	seen := map[file]bool{}
	processes := map[string]bool{"self": true}
	for queue := []string{"self"}; len(queue) > 0; queue = queue[1:] {
		process := filepath.Join("/proc", queue[0])
		threads, _ := filepath.Glob(process + "/task/*/children")
		for _, children := range threads {
			text, _ := os.ReadFile(children)
			for _, child := range strings.Fields(string(text)) {
				if !processes[child] {
					processes[child] = true
					queue = append(queue, child)
				}
			}
		}
		if queue[0] == "self" {
			continue
		}
		open, _ := os.ReadDir(process + "/fd")
		for _, fd := range open {
			name := filepath.Join(process, "fd", fd.Name())
			target, err := os.Readlink(name)
			if err != nil || !strings.HasPrefix(target, dir+"/") || !strings.HasSuffix(target, " (deleted)") {
				continue
			}
			info, err := os.Stat(name)
			if err != nil {
				continue
			}
			if size, id, links := usage(info); links == 0 && !seen[id] {
				seen[id] = true
				total += size
			}
		}
	}
	return total
}

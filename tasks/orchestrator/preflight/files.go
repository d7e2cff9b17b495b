package preflight

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// LookAtWorkspace looks whether the workspace is a directory that can be written.
func (s Subject) LookAtWorkspace() Look {
	return Look{Name: lookWorkspace, At: "the file system of workspace " + s.Workspace, Late: Refuse, LateCure: "Repair or remount the file system",
		Do: func(context.Context) []Result {
			if result := Workspace(s.Workspace, s.SettingName); result.Status != OK {
				return []Result{result}
			}
			// access(2) checks the real user id, which in a worker is the effective one.
			if err := syscall.Access(s.Workspace, 2|1); err != nil {
				return refuse("Run the worker as its owner, mount it writable, or change its permissions", "workspace %s is not writable for user %d%s", s.Workspace, os.Getuid(), because(err))
			}
			return ok("%s is writable for user %d", s.Workspace, os.Getuid())
		}}
}

// because adds the reason to "not writable", unless it is the usual one.
func because(err error) string {
	if errors.Is(err, fs.ErrPermission) {
		return ""
	}
	return ": " + Reason(err)
}

// Workspace says whether a workspace is a directory.
func Workspace(path string, setting func(variable string) string) Result {
	info, err := os.Stat(path)
	cure := "Mount the repository there, or set " + setting("WORKSPACE_ROOT") + " to its directory"
	var results []Result
	switch {
	case errors.Is(err, fs.ErrNotExist):
		results = refuse(cure, "workspace %s does not exist", path)
	case errors.Is(err, fs.ErrPermission):
		results = refuse("Run as its owner, or change its permissions", "workspace %s is not accessible for user %d", path, os.Getuid())
	case err != nil:
		results = refuse(cure, "workspace %s cannot be used: %s", path, Reason(err))
	case !info.IsDir():
		results = refuse(cure, "workspace %s is not a directory", path)
	default:
		results = ok("%s is a directory", path)
	}
	return results[0]
}

// Reason is the text of an operating system error without call and path.
func Reason(err error) string {
	if path := (*fs.PathError)(nil); errors.As(err, &path) {
		return path.Err.Error()
	}
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		return errno.Error()
	}
	return err.Error()
}

// LookAtArtifacts looks whether files can be written to the artifact directory, or
// where it will be created, and whether its file system has space. It tries that
// with a file.
func (s Subject) LookAtArtifacts() Look {
	return Look{Name: lookArtifacts, At: "the file system of artifact directory " + s.ArtifactDirectory, Late: Refuse, LateCure: "Repair or remount the file system",
		Do: func(context.Context) []Result {
			dir, at, created := s.ArtifactDirectory, s.ArtifactDirectory, ""
			for {
				if _, err := os.Stat(at); !errors.Is(err, fs.ErrNotExist) || at == filepath.Dir(at) {
					break
				}
				at, created = filepath.Dir(at), " (which the worker will create)"
			}
			cure := "Mount the artifact volume writable, change its permissions, or set " + s.SettingName("WORKFLOW_ARTIFACTS_ROOT")
			info, err := os.Stat(at)
			switch {
			case err != nil:
				return refuse(cure, "artifact directory %s cannot be used: %s", dir, Reason(err))
			case !info.IsDir():
				return refuse(cure, "artifact directory %s cannot be used: %s is not a directory", dir, at)
			}
			// Searching it needs a permission of its own.
			if err = syscall.Access(at, 2|1); err == nil {
				err = tryFile(at)
			}
			const more = "Free disk space: logs, images and builds need it"
			switch {
			case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
				return refuse(more, "%s%s cannot be written: %s", dir, created, Reason(err))
			case err != nil:
				return refuse(cure, "artifact directory %s is not writable for user %d%s", at, os.Getuid(), because(err))
			}
			free, err := FreeSpace(at)
			switch {
			case err != nil:
				return refuse(cure, "free space of artifact directory %s is unknown: %s", dir, Reason(err))
			case free < s.DiskReserve:
				return refuse(more, "%s%s has %s free, less than the %s required by %s", dir, created, mebibytes(free), mebibytes(s.DiskReserve), s.SettingName("MM_ORCHESTRATOR_DISK_RESERVE"))
			case free < 1<<30:
				return note(more, "%s%s is writable, but only %s are free", dir, created, mebibytes(free))
			}
			return ok("%s%s is writable, %s free", dir, created, mebibytes(free))
		}}
}

// oTmpfile is O_TMPFILE of open(2): the file has no name, so that trying leaves
// nothing behind, not even another time of the directory.
const oTmpfile = 0o20000000 | syscall.O_DIRECTORY

// tryFile writes some bytes to a file in the directory.
func tryFile(dir string) error {
	var file *os.File
	err := error(syscall.EOPNOTSUPP)
	if runtime.GOOS == "linux" {
		file, err = os.OpenFile(dir, oTmpfile|os.O_RDWR, 0o600)
	}
	switch {
	case errors.Is(err, syscall.EOPNOTSUPP), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.EINVAL):
		// The file system has no files without a name.
		if file, err = os.CreateTemp(dir, ".mm-orchestrator-*"); err != nil {
			return err
		}
		defer os.Remove(file.Name())
	case err != nil:
		return err
	}
	_, err = file.Write(make([]byte, 4096))
	return cmp.Or(err, file.Close())
}

// moreSpace is the cure for a file system without enough space.
const moreSpace = "Free disk space there: images, builds and the copy of what was before need it"

// LookAtDisk looks whether there is space on the file systems of the workspace, of
// the docker engine and of saved images. The looks at artifacts and at git see to
// theirs.
func (s Subject) LookAtDisk() Look {
	return Look{Name: lookDisk, At: "a file system that runs write to", Late: Note, LateCure: "Repair or remount it",
		Do: func(ctx context.Context) []Result {
			type place struct{ what, path string }
			places := []place{{"the workspace", s.Workspace}}
			if s.PinDirectory != "" {
				places = append(places, place{"saved images", s.PinDirectory})
			}
			if s.Engine != nil {
				// The engine may be in another container or on another machine: then
				// its directory is not here. If it hangs, another look says so.
				asked, cancel := context.WithTimeout(ctx, time.Second)
				dir, err := s.Engine.RootDirectory(asked)
				cancel()
				if err == nil && filepath.IsAbs(dir) {
					if info, err := os.Stat(dir); err == nil && info.IsDir() {
						places = append(places, place{"the docker engine", dir})
					}
				}
			}
			seen := map[uint64]bool{}
			if device, err := deviceOf(s.ArtifactDirectory); err == nil && s.ArtifactDirectory != "" {
				seen[device] = true
			}
			var results []Result
			least := ^uint64(0)
			for _, place := range places {
				device, err := deviceOf(place.path)
				if err != nil || seen[device] {
					continue
				}
				seen[device] = true
				free, err := FreeSpace(place.path)
				if err != nil {
					continue
				}
				least = min(least, free)
				if free < s.DiskReserve {
					results = append(results, refuse(moreSpace, "the file system of %s, %s, has %s free, less than the %s required by %s",
						place.what, place.path, mebibytes(free), mebibytes(s.DiskReserve), s.SettingName("MM_ORCHESTRATOR_DISK_RESERVE"))...)
				}
			}
			switch {
			case len(results) > 0:
				return results
			case least == ^uint64(0):
				return ok("runs write to the file system of the artifacts only")
			}
			return ok("%s free where workspace and images are", mebibytes(least))
		}}
}

// deviceOf identifies the file system of a path, or of its nearest existing
// parent.
func deviceOf(path string) (uint64, error) {
	for {
		var stat syscall.Stat_t
		err := syscall.Stat(path, &stat)
		if err == nil {
			return uint64(stat.Dev), nil
		}
		if !errors.Is(err, fs.ErrNotExist) || path == filepath.Dir(path) {
			return 0, err
		}
		path = filepath.Dir(path)
	}
}

func sameDevice(a, b string) bool {
	one, failed := deviceOf(a)
	other, err := deviceOf(b)
	return one == other && failed == nil && err == nil
}

// FreeSpace returns how many bytes this user may still write to the file system of
// dir, or of its nearest existing parent. It is 0 if the file system has no free
// inodes.
func FreeSpace(dir string) (uint64, error) {
	for {
		var stat syscall.Statfs_t
		err := syscall.Statfs(dir, &stat)
		switch {
		case err == nil && stat.Files > 0 && stat.Ffree == 0:
			return 0, nil
		case err == nil:
			return uint64(stat.Bavail) * uint64(stat.Bsize), nil
		case !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir):
			return 0, err
		}
		dir = filepath.Dir(dir)
	}
}

func mebibytes(n uint64) string { return fmt.Sprintf("%d MiB", n>>20) }

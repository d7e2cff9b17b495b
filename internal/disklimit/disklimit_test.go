package disklimit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func write(t *testing.T, path string, size int) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", size)), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWhatCounts(t *testing.T) {
	t.Parallel()
	const limit = 256 << 10
	for name, test := range map[string]struct {
		prepare func(dir string)
		over    bool
	}{
		"nothing":          {func(string) {}, false},
		"a small file":     {func(dir string) { write(t, dir+"/a/b", 1000) }, false},
		"a large file":     {func(dir string) { write(t, dir+"/a/b", limit+1) }, true},
		"many small files": {func(dir string) { many(t, dir, 100) }, true},
		"one file by many names": {func(dir string) {
			write(t, dir+"/a", 200<<10)
			for _, name := range []string{"b", "c"} {
				if err := os.Link(dir+"/a", dir+"/"+name); err != nil {
					t.Fatal(err)
				}
			}
		}, false},
		"a link out": {func(dir string) {
			if err := os.Symlink("/usr", dir+"/usr"); err != nil {
				t.Fatal(err)
			}
		}, false},
		"a hole": {func(dir string) {
			write(t, dir+"/a", 1)
			if err := os.Truncate(dir+"/a", 1<<30); err != nil {
				t.Fatal(err)
			}
		}, runtime.GOOS != "linux"},
	} {
		dir := t.TempDir()
		test.prepare(dir)
		var large *Error
		if err := Check(dir, limit); errors.As(err, &large) != test.over {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Check(filepath.Join(t.TempDir(), "none"), 0); err != nil {
		t.Errorf("a directory that does not exist: %v", err)
	}
}

func many(t *testing.T, dir string, n int) {
	for i := range n {
		write(t, fmt.Sprintf("%s/%d", dir, i), 0)
	}
}

func TestWorkEndsWhenItsDirectoryIsTooLarge(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "later")
	ctx, stop := Watch(t.Context(), dir, 64<<10)
	defer stop()
	write(t, dir+"/a", 100<<10)
	<-ctx.Done()
	var large *Error
	if err := context.Cause(ctx); !errors.As(err, &large) || large.Error() != dir+" takes more than 64 KiB of the disk" {
		t.Errorf("cause %v", err)
	}
	outer, cancel := context.WithCancel(t.Context())
	ctx, stop = Watch(outer, dir, 1<<20)
	cancel()
	<-ctx.Done()
	stop()
	if errors.As(context.Cause(ctx), &large) {
		t.Errorf("cause %v", context.Cause(ctx))
	}
}

// A program may remove the name of a file and go on to write to it.
func TestAFileWithoutANameCounts(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" {
		t.Skip("only /proc shows such files")
	}
	dir := t.TempDir()
	// The child of a child, as the commands of a model are.
	cmd := exec.Command("sh", "-c", `(exec 3>hidden; rm hidden; head -c 1000000 /dev/zero >&3; touch written; read line); true`)
	cmd.Dir = dir
	input, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = input.Close()
		_ = cmd.Wait()
	}()
	for {
		if _, err := os.Stat(dir + "/written"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	var large *Error
	if err := Check(dir, 500_000); !errors.As(err, &large) {
		t.Errorf("%v", err)
	}
	if err := Check(dir, 2_000_000); err != nil {
		t.Errorf("%v", err)
	}
}

func TestText(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{5: "5 bytes", 1 << 10: "1 KiB", 3 << 29: "1.5 GiB", 10 << 30: "10 GiB", 64 << 20: "64 MiB"} {
		if got := Text(n); got != want {
			t.Errorf("Text(%d) = %s, want %s", n, got, want)
		}
	}
}

package bench

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/bench/contender"
)

// celeryRelease is the newest that devenv provides.
const celeryRelease = "5.7.0"

func writeCelery(folder string) (string, error) { return contender.WriteCelery(folder) }

// Fact is a line about the machine or a version.
type Fact struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// machine describes where the run takes place.
func (h *harness) machine(ctx context.Context) ([]Fact, error) {
	var database string
	if err := h.servers.db.QueryRow(ctx, `SELECT split_part(current_setting('server_version'), ' ', 1)`).Scan(&database); err != nil {
		return nil, err
	}
	const script = `import sys, platform, celery, kombu, amqp, sqlalchemy, psycopg2, psycopg
print(f"{celery.__version__}, kombu {kombu.__version__}, py-amqp {amqp.__version__}, SQLAlchemy {sqlalchemy.__version__}, "
      f"psycopg2 {psycopg2.__version__.split()[0]}, psycopg {psycopg.__version__}, Python {platform.python_version()}")`
	versions := []byte("does not take part")
	if h.has(celery) {
		var err error
		if versions, err = exec.CommandContext(ctx, h.python, "-c", script).Output(); err != nil {
			return nil, fmt.Errorf("versions of Celery: %w", err)
		}
	}
	commit, _ := exec.CommandContext(ctx, "git", "describe", "--tags", "--always", "--dirty").Output()
	return []Fact{
		{"processor", fmt.Sprintf("%d × %s", runtime.NumCPU(), firstOf("/proc/cpuinfo", "model name"))},
		{"memory", gigabytes(firstOf("/proc/meminfo", "MemTotal"))},
		{"kernel", strings.TrimSpace(runtime.GOOS + " " + read("/proc/sys/kernel/osrelease"))},
		{"flush of 8 KiB to disk", flushTime()},
		{"RabbitMQ", fmt.Sprint(h.servers.conn.Properties["version"])},
		{"PostgreSQL", database + ", fsync and synchronous_commit on"},
		{"Celery", strings.TrimSpace(string(versions))},
		{"Go", strings.TrimPrefix(runtime.Version(), "go")},
		{"commit", strings.TrimSpace(string(commit))},
	}, nil
}

// gigabytes returns a number of kilobytes, as /proc has it, in a readable form.
func gigabytes(kilobytes string) string {
	n, err := strconv.ParseFloat(strings.TrimSuffix(kilobytes, " kB"), 64)
	if err != nil {
		return kilobytes
	}
	return fmt.Sprintf("%.1f GB", n*1024/1e9)
}

func read(path string) string {
	text, _ := os.ReadFile(path) // only Linux has these files
	return strings.TrimSpace(string(text))
}

// firstOf returns the first value of a name in a file of "name: value" lines.
func firstOf(path, name string) string {
	for line := range strings.SplitSeq(read(path), "\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}

// busyShare is the share of all processors, in percent, that was in use for two
// seconds. Nothing of this run may work meanwhile, so that it is the share of other
// programs.
func busyShare(ctx context.Context) (float64, error) {
	busy, total := processorTimes()
	select {
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-time.After(2 * time.Second):
	}
	busyNow, totalNow := processorTimes()
	if totalNow == total {
		return 0, nil // not Linux
	}
	return 100 * (busyNow - busy) / (totalNow - total), nil
}

func processorTimes() (busy, total float64) {
	line, _, _ := strings.Cut(read("/proc/stat"), "\n")
	for i, field := range strings.Fields(line) {
		n, _ := strconv.ParseFloat(field, 64)
		// user, nice, system, idle, iowait, irq, softirq, steal; guests are in user
		if i == 0 || i > 8 {
			continue
		}
		total += n
		if i != 4 && i != 5 {
			busy += n
		}
	}
	return busy, total
}

// flushTime measures what a commit has to wait for: fsync after a write, in the
// folder of temporary files, where the database is.
func flushTime() string {
	file, err := os.CreateTemp("", "mm-bench-flush-")
	if err != nil {
		return "unknown"
	}
	defer os.Remove(file.Name())
	defer file.Close()
	var times []float64
	block := make([]byte, 8<<10)
	for range 200 {
		began := time.Now()
		if _, err := file.WriteAt(block, 0); err != nil {
			return "unknown"
		}
		if err := file.Sync(); err != nil {
			return "unknown"
		}
		times = append(times, time.Since(began).Seconds()*1000)
	}
	return fmt.Sprintf("%.2f ms (p50), %.2f ms (p99) in %s", percentile(times, 50), percentile(times, 99), filepath.Dir(file.Name()))
}

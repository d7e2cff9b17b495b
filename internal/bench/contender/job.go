package contender

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	amqp "github.com/rabbitmq/amqp091-go"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/client"
)

// The jobs that are not those of a worker.
const (
	// JobSend sends Count messages, one after the other.
	JobSend = "send"
	// JobLog writes Count bytes of a program's output to a log.
	JobLog = "log"
)

// SentToWarmUp is how many messages are sent before the measurement.
const SentToWarmUp = 20

// Run is the process of a contender.
func Run(name string, s Spec) error {
	jobs := map[string]func(Spec) error{
		"floor": Floor, "ours": Ours,
		"floor send": func(s Spec) error { return s.send(floorSender) }, "ours send": func(s Spec) error { return s.send(oursSender) },
		"floor log": func(s Spec) error { return s.log(floorLog) }, "ours log": func(s Spec) error { return s.log(oursLog) },
	}
	job, found := jobs[strings.TrimSpace(name+" "+s.Job)]
	if !found {
		return fmt.Errorf("there is no contender %q for the job %q", name, s.Job)
	}
	return job(s)
}

// send sends messages between two marks, and waits for SIGTERM.
func (s Spec) send(open func(context.Context, Spec) (send func() error, close func(), err error)) error {
	p, err := s.open()
	if err != nil {
		return err
	}
	go endWithParent()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	send, end, err := open(ctx, s)
	if err != nil {
		return err
	}
	defer end()
	for _, n := range []int{SentToWarmUp, s.Count} {
		for range n {
			if err := send(); err != nil {
				return err
			}
		}
		if err := p.mark(); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

// floorSender publishes a message of the same size.
func floorSender(ctx context.Context, s Spec) (func() error, func(), error) {
	conn, err := amqp.Dial(s.Broker)
	if err != nil {
		return nil, nil, err
	}
	channel, err := conn.Channel()
	if err == nil {
		err = channel.Confirm(false)
	}
	id := "00000000-0000-4000-8000-000000000000"
	message := amqp.Publishing{
		Headers: amqp.Table{
			"lang": "py", "task": Noop, "id": id, "shadow": nil, "eta": nil, "expires": nil, "group": nil, "group_index": nil,
			"retries": int32(0), "timelimit": []any{nil, nil}, "root_id": id, "parent_id": nil, "argsrepr": "(3,)",
			"kwargsrepr": "{}", "origin": "gen1@bench", "ignore_result": true, "replaced_task_nesting": int32(0),
			"stamped_headers": nil, "stamps": amqp.Table{},
		},
		ContentType: "application/json", ContentEncoding: "utf-8", DeliveryMode: amqp.Persistent, CorrelationId: id, ReplyTo: id,
		Body: []byte(`[[3], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]`),
	}
	send := func() error {
		confirmation, err := channel.PublishWithDeferredConfirmWithContext(ctx, "", s.Queue, true, false, message)
		if err != nil {
			return err
		}
		if confirmed, err := confirmation.WaitContext(ctx); err != nil || !confirmed {
			return fmt.Errorf("the broker did not confirm a message: %v", err)
		}
		return nil
	}
	return send, func() { _ = conn.Close() }, err
}

func oursSender(ctx context.Context, s Spec) (func() error, func(), error) {
	c, err := client.New(client.Config{Broker: s.Broker, DefaultQueue: s.Queue})
	if err != nil {
		return nil, nil, err
	}
	send := func() error {
		_, err := c.Send(ctx, client.Task(Noop, 3), client.IgnoreResult())
		return err
	}
	return send, c.Close, nil
}

// logPart is how much a program writes at a time, as pipes have it.
const logPart = 32 << 10

// log writes a log between two marks and tells by how many bytes the memory of the
// process has grown.
func (s Spec) log(open func(Spec) (w io.Writer, finish func() error, err error)) error {
	p, err := s.open()
	if err != nil {
		return err
	}
	go endWithParent()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	text := buildLog(min(8<<20, s.Count))
	w, finish, err := open(s)
	if err != nil {
		return err
	}
	// Making the text has taken memory that the log would use now, and has set the peak.
	debug.FreeOSMemory()
	_ = os.WriteFile("/proc/self/clear_refs", []byte("5"), 0) // a new peak, see proc(5)
	before := peakMemory("VmRSS:")
	if err := p.mark(); err != nil {
		return err
	}
	for left := s.Count; left > 0; {
		for from := 0; from < len(text) && left > 0; from += logPart {
			part := text[from:min(from+logPart, len(text), from+left)]
			left -= len(part)
			if _, err := w.Write(part); err != nil {
				return err
			}
		}
	}
	if err := finish(); err != nil {
		return err
	}
	if err := p.mark(); err != nil {
		return err
	}
	if err := p.line("value", peakMemory("VmHWM:")-before); err != nil {
		return err
	}
	<-stop
	return nil
}

// floorLog writes and hashes the text, and neither decodes nor searches it.
func floorLog(s Spec) (io.Writer, func() error, error) {
	file, err := os.CreateTemp(s.Folder, "floor-*.log")
	if err != nil {
		return nil, nil, err
	}
	hash := sha256.New()
	finish := func() error {
		defer os.Remove(file.Name())
		defer file.Close()
		hash.Sum(nil)
		return file.Sync()
	}
	return io.MultiWriter(file, hash), finish, nil
}

func oursLog(s Spec) (io.Writer, func() error, error) {
	folder, err := os.MkdirTemp(s.Folder, "log-")
	if err != nil {
		return nil, nil, err
	}
	dir, err := artifacts.Open(filepath.Join(folder, "run"), artifacts.NewRedactor(sampleSecrets(s.Secrets)))
	if err != nil {
		return nil, nil, err
	}
	log, err := dir.Log("build.log")
	if err != nil {
		return nil, nil, err
	}
	output := log.Output()
	finish := func() error {
		defer os.RemoveAll(folder)
		output.Close()
		_, err := log.Finish()
		return err
	}
	return output.Stdout, finish, nil
}

// sampleSecrets are variables with secrets: hexadecimal keys, tokens, and passwords
// with what URLs and JSON escape.
func sampleSecrets(n int) (environ []string) {
	for i := range n {
		sum := sha256.Sum256(fmt.Append(nil, "sample", i))
		digits := hex.EncodeToString(sum[:])
		value := [...]string{"ghp_" + digits[:36], digits, "postgres://mm:" + digits[:20] + "%2F%40x@db/moonmind", digits[:12] + "/+ &é"}[i%4]
		environ = append(environ, fmt.Sprintf("SERVICE_%d_%s=%s", i, [...]string{"TOKEN", "KEY", "URL", "PASSWORD"}[i%4], value))
	}
	return environ
}

// buildLog is text as a build prints it.
func buildLog(size int) []byte {
	var out strings.Builder
	for i := 0; out.Len() < size; i++ {
		fmt.Fprintf(&out, "#%d %d.%03d Get:%d http://deb.debian.org/debian bookworm/main amd64 libfoo%d-dev amd64 1.%d.2-3+deb12u1 [%d kB]\n", i%20, i/1000, i%1000, i, i%97, i%13, i*7%9999)
		fmt.Fprintf(&out, "#%d sha256:%x %d.12MB / 30.43MB 1.3s\n", i%20, sha256.Sum256(fmt.Append(nil, i)), i%30)
		fmt.Fprintf(&out, "2026-01-02T03:04:05.%06dZ level=info msg=\"GET /api/orchestrator/runs/%d\" status=200 duration=%dms\n", i%1000000, i, i%977)
	}
	return []byte(out.String()[:size])
}

// peakMemory reads a line of /proc/self/status in bytes; 0 without /proc.
func peakMemory(name string) int64 {
	text, _ := os.ReadFile("/proc/self/status")
	_, rest, _ := strings.Cut(string(text), name)
	kilobytes, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	n, _ := strconv.ParseInt(kilobytes, 10, 64)
	return n * 1024
}

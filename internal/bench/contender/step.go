package contender

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Step is a task of the floor only: a step of a run with a command that does nothing,
// and what no worker can leave out that survives a crash at any moment. It commits
// that the step has begun, runs the command, has its log on disk under its name, and
// commits how the step has ended. The next message, the result and the
// acknowledgement follow as for every task.
const Step = "bench.step"

// StepTable is the table for steps.
const StepTable = `
	CREATE TABLE IF NOT EXISTS floor_steps (
	    run text, step integer, worker text NOT NULL, started_at timestamptz NOT NULL, finished_at timestamptz, outcome json, PRIMARY KEY (run, step))`

const (
	beginStep  = `INSERT INTO floor_steps (run, step, worker, started_at) VALUES ($1, $2, 'floor', $3)`
	finishStep = `UPDATE floor_steps SET finished_at = $3, outcome = $4::text::json WHERE run = $1 AND step = $2`
)

func step(ctx context.Context, database *pgx.Conn, folder string, d amqp.Delivery, left int32) error {
	run := d.CorrelationId[:len(d.CorrelationId)-4]
	if _, err := database.Exec(ctx, "begin", run, left, time.Now()); err != nil {
		return err
	}
	output, err := exec.CommandContext(ctx, "true").CombinedOutput()
	if err != nil {
		return err
	}
	log := filepath.Join(folder, fmt.Sprintf("%s-%d.log", run, left))
	if err := writeFile(log, append(output, "$ true\nexit code 0\n"...)); err != nil {
		return err
	}
	_, err = database.Exec(ctx, "finish", run, left, time.Now(), `{"status": "succeeded", "message": "done", "artifacts": [{"type": "log", "path": "step.log"}]}`)
	return err
}

// writeFile writes a file so that it is whole under its name or not there at all.
func writeFile(name string, content []byte) error {
	file, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync()
	}
	if closeErr := file.Close(); err == nil {
		err = closeErr
	}
	if err == nil {
		err = os.Rename(name+".new", name)
	}
	if err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

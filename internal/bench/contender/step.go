package contender

import (
	"context"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Step is a task of the floor only: a step of a run whose commands do nothing, with
// what no worker can leave out that keeps the program's promises at any moment of a
// crash. It commits that the step has begun, and how it has ended. Before a command it
// commits that the command starts, for the audit trail must not miss one, and after it
// that the command has ended, which must not run twice. It commits what the run changes
// before it is changed. It looks at the workspace before and after the commands, and
// keeps what it was before the first of them. It asks whether the service is healthy. Its
// artifacts are on disk under their names. The next message, the result and the
// acknowledgement follow as for every task.
const Step = "bench.step"

// StepTables are the tables for steps.
const StepTables = `
	CREATE TABLE IF NOT EXISTS floor_steps (
	    run text, step integer, worker text NOT NULL, started_at timestamptz NOT NULL, finished_at timestamptz, progress json, outcome json, PRIMARY KEY (run, step));
	CREATE TABLE IF NOT EXISTS floor_trail (run text, entry bigint GENERATED ALWAYS AS IDENTITY, record json NOT NULL, PRIMARY KEY (run, entry))`

// stepStatements are prepared for steps.
var stepStatements = map[string]string{
	"begin":    `INSERT INTO floor_steps (run, step, worker, started_at) VALUES ($1, $2, 'floor', $3)`,
	"append":   `INSERT INTO floor_trail (run, record) VALUES ($1, $2::text::json)`,
	"progress": `UPDATE floor_steps SET progress = $3::text::json WHERE run = $1 AND step = $2`,
	"finish":   `UPDATE floor_steps SET finished_at = $3, outcome = $4::text::json WHERE run = $1 AND step = $2`,
}

// stepParts says what a step of the plan has to do, by how many steps are left: how
// many commands it runs, how often it records the change of the run, whether it keeps
// the workspace, whether it asks the service, and its artifacts.
var stepParts = map[int32]struct {
	commands, records int
	keeps, asks       bool
	artifacts         []string
}{
	5: {artifacts: []string{"analyze.log"}},
	4: {commands: 2, records: 2, keeps: true, artifacts: []string{"patch.diff", "patch.log"}},
	3: {commands: 1, records: 1, artifacts: []string{"build.log"}},
	2: {commands: 1, artifacts: []string{"restart.log"}},
	1: {asks: true, artifacts: []string{"verify.log"}},
}

func step(ctx context.Context, database *pgx.Conn, s Spec, d amqp.Delivery, left int32) error {
	run, parts := d.CorrelationId[:len(d.CorrelationId)-4], stepParts[left]
	folder := filepath.Join(s.Folder, "floor-"+run)
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return err
	}
	look := func() ([]byte, error) {
		if parts.commands == 0 {
			return nil, nil
		}
		return look(s.Workspace)
	}
	if _, err := database.Exec(ctx, "begin", run, left, time.Now()); err != nil {
		return err
	}
	before, err := look()
	if err == nil && parts.keeps {
		err = os.WriteFile(filepath.Join(folder, "before"), before, 0o644)
	}
	if err != nil {
		return err
	}
	for range parts.records {
		if _, err := database.Exec(ctx, "append", run, `{"version": 1, "files": {"workspace": "/workspace", "baseline": "4b825dc642cb6eb9a060e54bf8d69288fbee4904"}}`); err != nil {
			return err
		}
	}
	var log []byte
	for range parts.commands {
		if _, err := database.Exec(ctx, "append", run, `{"kind": "command_started", "command": {"argv": ["true"], "dir": "/workspace"}}`); err != nil {
			return err
		}
		output, err := exec.CommandContext(ctx, "true").CombinedOutput()
		if err != nil {
			return err
		}
		if _, err := database.Exec(ctx, "progress", run, left, `{"commands": 1, "exit_code": 0}`); err != nil {
			return err
		}
		log = append(append(log, "$ true\n"...), output...)
	}
	if _, err := look(); err != nil {
		return err
	}
	if parts.asks {
		if err := ask(ctx, s.Service); err != nil {
			return err
		}
	}
	for _, name := range parts.artifacts {
		if err := writeFile(filepath.Join(folder, name), append(log, "done\n"...)); err != nil {
			return err
		}
	}
	_, err = database.Exec(ctx, "finish", run, left, time.Now(), `{"status": "succeeded", "message": "done", "artifacts": [{"type": "log", "path": "step.log"}]}`)
	return err
}

// look returns the names, sizes and times of all files of the workspace and of its
// repository, without git's objects.
func look(workspace string) (seen []byte, err error) {
	err = filepath.WalkDir(workspace, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.Name() == "objects" && filepath.Base(filepath.Dir(path)) == ".git" {
			return filepath.SkipDir
		}
		info, err := entry.Info()
		if err == nil {
			seen = fmt.Appendf(seen, "%s %s %d %d\n", path, info.Mode(), info.Size(), info.ModTime().UnixNano())
		}
		return err
	})
	return seen, err
}

// ask makes one request to the service.
func ask(ctx context.Context, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	return response.Body.Close()
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

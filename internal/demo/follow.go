package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/sample"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// services is the state of both services' containers at one time.
type services struct{ api, other sample.Container }

func (d *demo) observe(ctx context.Context) (seen services, err error) {
	if seen.api, err = d.project.Container(ctx, "api"); err != nil {
		return seen, err
	}
	seen.other, err = d.project.Container(ctx, "other")
	return seen, err
}

// show submits a run with the Python producer and follows it to its end.
func (d *demo) show(ctx context.Context, instruction, note string, args ...string) (store.RunStatus, error) {
	before, err := d.observe(ctx)
	if err != nil {
		return "", err
	}
	var submitted struct {
		RunID   string            `json:"run_id"`
		TaskIDs map[string]string `json:"task_ids"`
		Celery  string            `json:"celery"`
	}
	args = append([]string{"--instruction", instruction, "--artifacts", d.artifacts,
		"--project", d.project.Name, "--health-url", d.project.HealthURL()}, args...)
	if err := d.producer(ctx, &submitted, "submit_run.py", args...); err != nil {
		return "", err
	}
	d.screen.print("")
	d.screen.line("producer", fmt.Sprintf("celery %s submitted run %.8s “%s”", submitted.Celery, submitted.RunID, instruction), "")
	d.screen.print("")
	d.screen.print(fmt.Sprintf("run %.8s  api%s   artifacts: %s", submitted.RunID, note, d.short(filepath.Join(d.artifacts, submitted.RunID))))

	detail, err := d.follow(ctx, submitted.RunID, before)
	if err != nil {
		return "", err
	}
	if err := d.conclude(ctx, detail); err != nil {
		return "", err
	}
	return detail.Run.Status, d.readBack(ctx, detail)
}

// follow polls the tables and prints each step once it has ended, until the run
// has ended.
func (d *demo) follow(ctx context.Context, run string, before services) (store.RunDetail, error) {
	printed := make(map[store.Step]bool)
	var detail store.RunDetail
	_, err := d.await(ctx, "run "+run+" to end", func() (string, bool, error) {
		var err error
		if detail, err = d.store.FindRunDetail(ctx, run); err != nil {
			return "", false, err
		}
		for _, state := range detail.States {
			switch {
			case state.Status == "in_progress" && state.StartedAt != nil:
				d.screen.progress(string(state.Step), time.Since(*state.StartedAt), lastLine(filepath.Join(d.artifacts, run, string(state.Step)+".log")))
			case (state.Status == "succeeded" || state.Status == "failed") && !printed[state.Step] && state.StartedAt != nil && state.FinishedAt != nil:
				printed[state.Step] = true
				note, err := d.note(ctx, run, state, before)
				if err != nil {
					return "", false, err
				}
				d.screen.print(fmt.Sprintf("  %s %s %s %s", pad(string(state.Step), 9), d.screen.mark(state.Status),
					pad(seconds(state.FinishedAt.Sub(*state.StartedAt)), 8), note))
			}
		}
		return "", detail.Run.CompletedAt != nil, nil
	})
	return detail, err
}

// note returns what a step has done, read from its artifacts and the engine.
func (d *demo) note(ctx context.Context, run string, state store.StepState, before services) (string, error) {
	if state.Status == "failed" {
		return failure(state.Message), nil
	}
	text := func(name string) string {
		text, err := os.ReadFile(filepath.Join(d.artifacts, run, name))
		if err != nil {
			return ""
		}
		return string(text)
	}
	switch state.Step {
	case store.StepPatch:
		added, removed := 0, 0
		for line := range strings.Lines(text("patch.diff")) {
			switch {
			case strings.HasPrefix(line, "+++"), strings.HasPrefix(line, "---"):
			case strings.HasPrefix(line, "+"):
				added++
			case strings.HasPrefix(line, "-"):
				removed++
			}
		}
		return fmt.Sprintf("%s  +%d −%d", strings.TrimPrefix(state.Message, "Patched files: "), added, removed), nil
	case store.StepBuild:
		image, err := output(ctx, "docker", "image", "inspect", "--format", "{{.Id}}", d.project.Name+"-api")
		return fmt.Sprintf("api → %.13s   (was %.13s)", image, before.api.Image), err
	case store.StepRestart:
		now, err := d.observe(ctx)
		switch {
		case err != nil:
			return "", err
		case now.other.ID != before.other.ID:
			return "api and other were recreated", nil
		case now.api.ID == before.api.ID:
			return "nothing was recreated", nil
		}
		return "only api was recreated", nil
	case store.StepVerify:
		attempt, code := lastAttempt(text("verify.log"))
		return fmt.Sprintf("%s from %s on attempt %s, then %s without a fault", code, d.project.HealthURL(), attempt, quietPeriod), nil
	case store.StepRollback:
		changed, err := d.project.Git(ctx, "status", "--porcelain")
		if err != nil {
			return "", err
		}
		now, err := d.observe(ctx)
		if err != nil {
			return "", err
		}
		files, image := "files as committed", "image as before"
		if strings.TrimSpace(changed) != "" {
			files = "still changed: " + strings.Join(strings.Fields(changed), " ")
		}
		if now.api.Image != before.api.Image {
			image = fmt.Sprintf("image %.13s", now.api.Image)
		}
		return files + ", " + image, nil
	}
	return state.Message, nil
}

// failure returns a failed step's message from its row: the first line
// unchanged, and the following lines shortened for the screen.
func failure(message string) string {
	rows := strings.Split(strings.TrimSpace(message), "\n")
	if len(rows) > 3 {
		rows = append(rows[:2], rows[len(rows)-1])
	}
	return strings.Join(rows, "\n"+strings.Repeat(" ", 22))
}

// conclude prints the run from the tables, and the state of the service.
func (d *demo) conclude(ctx context.Context, detail store.RunDetail) error {
	run := detail.Run
	took := run.CompletedAt.Sub(*run.StartedAt)
	d.screen.print(fmt.Sprintf("%s in %s", strings.ReplaceAll(string(run.Status), "_", " "), seconds(took)))
	d.screen.print("")
	var states, artifacts []string
	for _, state := range detail.States {
		states = append(states, fmt.Sprintf("%s %s", state.Step, state.Status))
	}
	for _, artifact := range detail.Artifacts {
		artifacts = append(artifacts, fmt.Sprintf("%s %d B", artifact.Path, artifact.SizeBytes))
	}
	d.screen.line("  run", fmt.Sprintf("%s  %s", run.ID, run.Status), "")
	d.screen.line("  states", strings.Join(states, " · "), "")
	d.screen.line("  artifacts", strings.Join(artifacts, " · "), "")
	api, err := d.await(ctx, "service api to be healthy", func() (string, bool, error) {
		api, err := d.project.Container(ctx, "api")
		return fmt.Sprintf("container %.12s %s, %s", api.ID, api.State.Status, api.Health()), api.Health() == "healthy", err
	})
	if err != nil {
		return err
	}
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(d.project.HealthURL())
	if err != nil {
		return fmt.Errorf("asking the service: %w", err)
	}
	response.Body.Close()
	d.screen.line("  service", fmt.Sprintf("api: %s; GET %s: %s", api, d.project.HealthURL(), response.Status), "")
	return nil
}

// readBack reads the results of the tasks with Celery's AsyncResult.
func (d *demo) readBack(ctx context.Context, detail store.RunDetail) error {
	var ids []string
	for _, state := range detail.States {
		if state.CeleryTaskID != "" {
			ids = append(ids, state.CeleryTaskID)
		}
	}
	var answer struct {
		Celery  string `json:"celery"`
		Results map[string]struct {
			State string `json:"state"`
			Get   struct {
				Raised *struct {
					Class string `json:"class"`
					Text  string `json:"text"`
				} `json:"raised"`
			} `json:"get"`
		} `json:"results"`
	}
	if err := d.producer(ctx, &answer, "read_results.py", ids...); err != nil {
		return err
	}
	counts := make(map[string]int)
	raised := ""
	for _, id := range ids {
		result := answer.Results[id]
		counts[result.State]++
		if result.Get.Raised != nil {
			first, _, _ := strings.Cut(result.Get.Raised.Text, "\n")
			raised = fmt.Sprintf("; get() raises %s: %s", result.Get.Raised.Class, first)
		}
	}
	var parts []string
	for _, state := range []string{"SUCCESS", "FAILURE", "PENDING", "STARTED"} {
		if counts[state] > 0 {
			parts = append(parts, fmt.Sprintf("%d × %s", counts[state], state))
		}
	}
	d.screen.line("  results", fmt.Sprintf("celery_taskmeta: %s, read back by AsyncResult in celery %s%s", strings.Join(parts, ", "), answer.Celery, raised), "")
	return nil
}

// lastAttempt parses the last "Attempt n: status=code" of a log.
func lastAttempt(log string) (attempt, code string) {
	attempt, code = "?", "?"
	for line := range strings.Lines(log) {
		if n, rest, ok := strings.Cut(strings.TrimPrefix(line, "Attempt "), ": status="); ok && strings.HasPrefix(line, "Attempt ") {
			attempt, code = n, strings.TrimSpace(rest)
		}
	}
	return attempt, code
}

// lastLine returns the last complete line of a file that is still written, or "".
func lastLine(path string) string {
	file, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer file.Close()
	end, err := file.Seek(0, 2)
	if err != nil {
		return ""
	}
	tail := make([]byte, min(end, 2048))
	if _, err := file.ReadAt(tail, end-int64(len(tail))); err != nil {
		return ""
	}
	rows := bytes.Split(bytes.TrimSpace(tail), []byte("\n"))
	return strings.ToValidUTF8(string(bytes.TrimSpace(rows[len(rows)-1])), "?")
}

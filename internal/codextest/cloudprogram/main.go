// Cloudprogram is the stand-in of the program codex that package codextest makes. It
// keeps its state in the directory that it is in.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
)

const address = "https://chatgpt.com/codex/tasks/"

func main() {
	program, err := os.Executable()
	if err != nil {
		fail(err.Error())
	}
	dir := filepath.Dir(program)
	args := os.Args[1:]
	if len(args) == 1 && args[0] == "--version" {
		fmt.Println("codex-cli 0.171.0")
		return
	}
	if len(args) < 2 || args[0] != "cloud" {
		usage("unrecognized subcommand")
	}
	state := codextest.CloudState{}
	if err := codextest.ChangeCloud(dir, func(s *codextest.CloudState) {
		s.Calls = append(s.Calls, args)
		state = *s
	}); err != nil {
		fail(err.Error())
	}
	// The real program writes a log into its working directory.
	_ = os.WriteFile("error.log", []byte("startup\n"), 0o600)
	if text := state.Script.Fail[args[1]]; text != "" {
		fail(text)
	}
	flags := flag.NewFlagSet(args[1], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	environment, branch := flags.String("env", "", ""), flags.String("branch", "main", "")
	asJSON, limit, cursor := flags.Bool("json", false, ""), flags.Int("limit", 20, ""), flags.Int("cursor", 0, "")
	if err := flags.Parse(args[2:]); err != nil {
		usage("unexpected argument")
	}
	switch args[1] {
	case "exec":
		create(dir, *environment, *branch, flags.Arg(0))
	case "list":
		list(state, *environment, *asJSON, *limit, *cursor)
	case "status":
		status(dir, flags.Arg(0))
	case "diff":
		diff(state, flags.Arg(0))
	default:
		usage("unrecognized subcommand")
	}
}

func create(dir, environment, branch, prompt string) {
	if environment == "" {
		usage("the following required arguments were not provided: --env")
	}
	if prompt == "-" || prompt == "" {
		text, err := io.ReadAll(os.Stdin)
		if err != nil || len(text) == 0 {
			fail("no query provided via stdin (received empty input).")
		}
		prompt = string(text)
	}
	var task codextest.CloudTask
	var script codextest.CloudScript
	if err := codextest.ChangeCloud(dir, func(s *codextest.CloudState) {
		task, script = s.NewTask(environment, branch, prompt), s.Script
	}); err != nil {
		fail(err.Error())
	}
	if script.Hang {
		select {}
	}
	if script.FailAfter != "" {
		fail(script.FailAfter)
	}
	fmt.Println(address + task.ID)
}

func list(state codextest.CloudState, environment string, asJSON bool, limit, from int) {
	if !asJSON {
		usage("the stand-in has only --json")
	}
	page := map[string]any{"tasks": []any{}, "cursor": nil}
	var tasks []any
	slices.Reverse(state.Tasks) // the newest first
	for _, task := range state.Tasks {
		if environment == "" || task.Environment == environment {
			tasks = append(tasks, map[string]any{
				"id": task.ID, "url": address + task.ID, "title": task.Title, "status": "pending", "updated_at": "2026-01-01T00:00:00Z",
				"environment_id": task.Environment, "environment_label": nil, "is_review": false, "attempt_total": 1,
				"summary": map[string]int{"files_changed": 0, "lines_added": 0, "lines_removed": 0},
			})
		}
	}
	if from < len(tasks) {
		until := min(from+limit, len(tasks))
		page["tasks"] = tasks[from:until]
		if until < len(tasks) {
			page["cursor"] = fmt.Sprint(until)
		}
	}
	text, _ := json.MarshalIndent(page, "", "  ")
	fmt.Println(string(text))
}

func status(dir, id string) {
	state, title, found := "PENDING", "", false
	if err := codextest.ChangeCloud(dir, func(s *codextest.CloudState) {
		for i := range s.Tasks {
			if task := &s.Tasks[i]; task.ID == id {
				found, title = true, task.Title
				if task.Polled++; task.Polled > s.Script.Polls {
					state = s.Script.State
				}
			}
		}
	}); err != nil {
		fail(err.Error())
	}
	if !found {
		fail("http error: get_task_details failed: GET https://chatgpt.com/backend-api/wham/tasks/" + id + " failed: 404 Not Found; content-type=application/json; body={}")
	}
	fmt.Printf("[%s] %s\nwidgets  •  1m ago\n+1/-0 • 1 file\n", state, title)
	if state != "READY" {
		os.Exit(1)
	}
}

func diff(state codextest.CloudState, id string) {
	if state.Script.Diff == "" {
		fail("No diff available for task " + id + "; it may still be running.")
	}
	fmt.Print(state.Script.Diff)
}

// fail ends as the real program does.
func fail(text string) {
	fmt.Fprintf(os.Stderr, "Error: %s\n\nStack backtrace:\n   0: <unknown>\n", text)
	os.Exit(1)
}

func usage(text string) {
	fmt.Fprintf(os.Stderr, "error: %s\n\nUsage: codex cloud [OPTIONS] [COMMAND]\n", text)
	os.Exit(2)
}

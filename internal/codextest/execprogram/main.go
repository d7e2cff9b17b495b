// Command execprogram is a stand-in of the program codex, of which it has `codex exec
// --json`, `codex --version` and `codex login status`: it prints what the real one has
// printed, and takes half a second instead of two. It writes a file that is named like
// the run of its prompt, in the directory docs.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// mark is the beginning of a prompt.
var mark = regexp.MustCompile(`^\[run ([0-9a-f-]+), attempt \d+\]`)

// pause is between two lines of the output.
const pause = 40 * time.Millisecond

func run(args []string) error {
	switch {
	case slices.Contains(args, "--version"):
		fmt.Println("codex-cli 0.171.0")
		return nil
	case len(args) == 2 && args[0] == "login":
		fmt.Println("Not logged in")
		os.Exit(1)
	case len(args) == 0 || args[0] != "exec":
		return fmt.Errorf("the stand-in of codex knows exec only, not %q", args)
	}
	prompt, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	of := mark.FindSubmatch(prompt)
	if of == nil {
		return fmt.Errorf("the prompt does not begin with a run: %.80q", prompt)
	}
	print := func(line string) {
		fmt.Println(line)
		time.Sleep(pause)
	}
	print(`{"type":"thread.started","thread_id":"01a21eae-5dce-7fa3-a0f6-f8c9f6db7dec"}`)
	print(`{"type":"turn.started"}`)
	text := "Done by run " + string(of[1]) + ".\n"
	command := fmt.Sprintf("mkdir -p docs && printf '%%s' '%s' >docs/%s.md", text, of[1])
	for n := 1; n <= 3; n++ {
		item := map[string]any{"id": fmt.Sprintf("item_%d", n), "type": "command_execution", "command": command, "aggregated_output": "", "exit_code": nil, "status": "in_progress"}
		line, _ := json.Marshal(map[string]any{"type": "item.started", "item": item})
		print(string(line))
		if n == 2 {
			if err := os.MkdirAll("docs", 0o755); err != nil {
				return err
			}
			if err := os.WriteFile("docs/"+string(of[1])+".md", []byte(text), 0o644); err != nil {
				return err
			}
		}
		item["exit_code"], item["status"] = 0, "completed"
		line, _ = json.Marshal(map[string]any{"type": "item.completed", "item": item})
		print(string(line))
	}
	// A model may print its key.
	message, _ := json.Marshal("I have written docs/" + string(of[1]) + ".md with the key " + os.Getenv("CODEX_API_KEY") + ".")
	print(`{"type":"item.completed","item":{"id":"item_4","type":"agent_message","text":` + string(message) + `}}`)
	print(`{"type":"turn.completed","usage":{"input_tokens":2400,"cached_input_tokens":0,"cache_write_input_tokens":0,"output_tokens":160,"reasoning_output_tokens":0}}`)
	return nil
}

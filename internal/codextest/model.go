package codextest

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A Script is what the model does when Codex asks it. The zero value ends the turn
// with an empty message.
type Script struct {
	// Commands are shell commands that the model makes Codex run in the clone, one
	// after the other, each in an answer of its own.
	Commands []string
	// Message is the last message of the model. In it, $KEY stands for the key that
	// the request came with, and $OUTPUT for the output of the last command.
	Message string
	// Status is the HTTP status of every answer, if it is not 0. Body is its body, and
	// RetryAfter its header, in seconds, if it is not 0.
	Status     int
	Body       string
	RetryAfter int
	// Garbage is sent in place of an event stream, if it is not empty.
	Garbage string
	// Stall makes the model never end its answer. It does this after the commands.
	Stall bool
	// Failure ends the turn with the event response.failed, with this code.
	Failure string
	// Before is called before each answer with the number of the commands that have
	// run, for tests that do something at that moment.
	Before func(done int)
}

// The scripts that tests and the demo use.
var (
	// None changes nothing.
	None = Script{Message: "Everything that the task asks for is there already: I have changed nothing."}
	// Question asks instead of working.
	Question = Script{Message: "I have changed nothing.\nQUESTION: Which of the two retry endpoints shall I document?"}
	// Rubbish answers with what is no event stream.
	Rubbish = Script{Garbage: "<html><body>502 Bad Gateway</body></html>"}
	// Stalls never ends its answer.
	Stalls = Script{Stall: true}
	// Unauthorized refuses the key.
	Unauthorized = Script{Status: 401, Body: `{"error":{"message":"Incorrect API key provided.","type":"invalid_request_error","param":null,"code":"invalid_api_key"}}`}
	// TooManyRequests is the limit on requests per minute.
	TooManyRequests = Script{Status: 429, RetryAfter: 2, Body: `{"error":{"message":"Rate limit reached for requests. Please try again in 2s.","type":"requests","param":null,"code":"rate_limit_exceeded"}}`}
	// PrintsKey prints the key in every way that it can.
	PrintsKey = Script{
		Commands: []string{"env; tr '\\0' '\\n' </proc/$PPID/environ; echo done"},
		Message:  "The key is $KEY, and this is what the command printed: $OUTPUT",
	}
)

// Changes is a model that writes a file and says so.
func Changes(path, text string) Script {
	return Script{
		Commands: []string{fmt.Sprintf("mkdir -p %s && printf '%%s' %s >%s", quote(filepath.Dir(path)), quote(text), quote(path))},
		Message:  "I have written " + path + ".",
	}
}

// AccountLimit is the limit of a plan, which ends in so many seconds.
func AccountLimit(seconds int) Script {
	return Script{Status: 429, RetryAfter: seconds, Body: fmt.Sprintf(`{"error":{"type":"usage_limit_reached","message":"The usage limit has been reached","plan_type":"pro","resets_in_seconds":%d,"resets_at":%d}}`, seconds, time.Now().Unix()+int64(seconds))}
}

func quote(text string) string { return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'" }

// A Request is one that the model got.
type Request struct {
	// Path is of the request's address.
	Path string
	// Key is the bearer token.
	Key string
	// Prompt is the first message of the user that Codex did not add itself.
	Prompt string
	// Outputs are those of the commands that have run.
	Outputs []string
	// session is that of the last command if it still runs, "" if not.
	session string
	Body    string
}

// A Model answers POST …/responses as the Responses API does. [StartModel] makes one.
type Model struct {
	server *http.Server
	url    string
	choose func(Request) Script
	closed chan struct{}

	mu       sync.Mutex
	requests []Request
}

// StartModel starts a model on a free port of loopback. choose is asked for the script
// of each request; it may be called by several goroutines.
func StartModel(choose func(Request) Script) (*Model, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	m := &Model{url: "http://" + listener.Addr().String() + "/v1", choose: choose, closed: make(chan struct{})}
	m.server = &http.Server{Handler: m, ReadHeaderTimeout: time.Minute}
	go func() { _ = m.server.Serve(listener) }()
	return m, nil
}

// Always is for StartModel: every request gets the same script.
func Always(script Script) func(Request) Script { return func(Request) Script { return script } }

// URL is the base address, as in Codex's model_providers.
func (m *Model) URL() string { return m.url }

// Close ends the model, also answers that it has begun.
func (m *Model) Close() {
	close(m.closed)
	_ = m.server.Close()
}

// Requests are all that the model got.
func (m *Model) Requests() []Request {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]Request(nil), m.requests...)
}

// Turns counts the requests that began a conversation: the runs of Codex.
func (m *Model) Turns() int {
	n := 0
	for _, r := range m.Requests() {
		if len(r.Outputs) == 0 {
			n++
		}
	}
	return n
}

// WriteHome writes a Codex configuration into a directory that makes Codex use this
// model, with the key in the variable keyVariable. Retries are few and quick.
func (m *Model) WriteHome(dir, keyVariable string) error {
	return WriteHome(dir, m.url, keyVariable)
}

// WriteHome is [Model.WriteHome] for the model at any address.
func WriteHome(dir, url, keyVariable string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.toml"), fmt.Appendf(nil, `model = "gpt-5-codex"
model_provider = "standin"
[model_providers.standin]
name = "standin"
base_url = %q
env_key = %q
wire_api = "responses"
request_max_retries = 1
stream_max_retries = 1
stream_idle_timeout_ms = 600000
`, url, keyVariable), 0o600)
}

// ServeHTTP implements [http.Handler].
func (m *Model) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost || !strings.HasSuffix(r.URL.Path, "/responses") {
		if strings.HasSuffix(r.URL.Path, "/models") {
			w.Header().Set("Content-Type", "application/json")
			_, _ = w.Write([]byte(`{"object":"list","data":[],"models":[]}`))
			return
		}
		http.NotFound(w, r)
		return
	}
	request, err := readRequest(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	m.mu.Lock()
	m.requests = append(m.requests, request)
	m.mu.Unlock()
	script := m.choose(request)
	if script.Before != nil {
		script.Before(len(request.Outputs))
	}
	if script.Status != 0 {
		if script.RetryAfter != 0 {
			w.Header().Set("Retry-After", strconv.Itoa(script.RetryAfter))
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(script.Status)
		_, _ = w.Write([]byte(script.Body))
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	if script.Garbage != "" {
		_, _ = w.Write([]byte(script.Garbage))
		return
	}
	id := fmt.Sprintf("resp_%d", len(m.Requests()))
	send := func(kind string, fields map[string]any) {
		fields["type"] = kind
		text, _ := json.Marshal(fields)
		_, _ = fmt.Fprintf(w, "event: %s\ndata: %s\n\n", kind, text)
		_ = http.NewResponseController(w).Flush()
	}
	send("response.created", map[string]any{"response": map[string]any{"id": id}})
	done := len(request.Outputs)
	switch {
	case request.session != "":
		send("response.output_item.done", map[string]any{"output_index": 0, "item": map[string]any{
			"type": "function_call", "id": "fc_" + id, "call_id": "wait_" + id, "name": "write_stdin",
			"arguments": fmt.Sprintf(`{"session_id":%s,"chars":"","yield_time_ms":30000}`, request.session),
		}})
	case done < len(script.Commands):
		arguments, _ := json.Marshal(map[string]any{"cmd": script.Commands[done], "yield_time_ms": 30_000})
		send("response.output_item.done", map[string]any{"output_index": 0, "item": map[string]any{
			"type": "function_call", "id": "fc_" + id, "call_id": fmt.Sprintf("call_%d", done+1), "name": "exec_command", "arguments": string(arguments),
		}})
	case script.Stall:
		select {
		case <-r.Context().Done():
		case <-m.closed:
		}
		return
	case script.Failure != "":
		send("response.failed", map[string]any{"response": map[string]any{"id": id, "error": map[string]any{"code": script.Failure, "message": "The model has failed."}}})
		return
	default:
		output := ""
		if done > 0 {
			output = request.Outputs[done-1]
		}
		message := strings.NewReplacer("$KEY", request.Key, "$OUTPUT", output).Replace(script.Message)
		send("response.output_item.done", map[string]any{"output_index": 0, "item": map[string]any{
			"type": "message", "id": "msg_" + id, "role": "assistant", "content": []any{map[string]any{"type": "output_text", "text": message}},
		}})
	}
	send("response.completed", map[string]any{"response": map[string]any{"id": id, "usage": map[string]any{
		"input_tokens": 1200, "input_tokens_details": nil, "output_tokens": 80, "output_tokens_details": nil, "total_tokens": 1280,
	}}})
}

// running is what Codex says of a command that has not ended in the time it was given.
var running = regexp.MustCompile(`(?m)^Process running with session ID (\d+)`)

// readRequest reads what Codex has sent. A script is at the command whose number is that
// of the outputs, so that the model needs no memory.
func readRequest(r *http.Request) (Request, error) {
	request := Request{Path: r.URL.Path, Key: strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")}
	var body struct {
		Input []struct {
			Type    string          `json:"type"`
			CallID  string          `json:"call_id"`
			Role    string          `json:"role"`
			Output  json.RawMessage `json:"output"`
			Content []struct {
				Text string `json:"text"`
			} `json:"content"`
		} `json:"input"`
	}
	var text json.RawMessage
	if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 64<<20)).Decode(&text); err != nil {
		return request, fmt.Errorf("the request is no JSON: %w", err)
	}
	if err := json.Unmarshal(text, &body); err != nil {
		return request, fmt.Errorf("the request is not one of the Responses API: %w", err)
	}
	request.Body = string(text)
	for _, item := range body.Input {
		switch {
		case item.Type == "function_call_output":
			var output string
			if json.Unmarshal(item.Output, &output) != nil {
				output = string(item.Output)
			}
			request.session = ""
			if match := running.FindStringSubmatch(output); match != nil {
				request.session = match[1]
			}
			if n := len(request.Outputs); n > 0 && strings.HasPrefix(item.CallID, "wait_") {
				request.Outputs[n-1] += output
				continue
			}
			request.Outputs = append(request.Outputs, output)
		case item.Role == "user" && len(item.Content) > 0 && !strings.HasPrefix(item.Content[0].Text, "<"):
			request.Prompt = item.Content[len(item.Content)-1].Text
		}
	}
	return request, nil
}

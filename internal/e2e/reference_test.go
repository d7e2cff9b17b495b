package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// intendedDifferences are the places where our runs may differ from the two
// captured runs of MoonMind's Python worker, each with its reason. Every entry
// must occur in some run, so that no entry outlives its reason.
var intendedDifferences = []struct {
	path   string // regular expression on a whole difference.Path
	reason string
	accept func(want, got any) bool
}{
	{
		`run\.metrics_snapshot\.steps\.(patch|build|restart|verify)\.(status|durationMs)`,
		"Python's ORM loses the entries of all steps but the first and the last; the complete snapshot is written (docs/moonmind.md#c16)",
		func(want, got any) bool { return want == nil && got != nil },
	},
	{
		`taskmeta\.\d \w+\.(children|stamps)`,
		"the reference was written by Celery 5.4, whose table has no such columns; ours has the shape of 5.7 (docs/celery.md#result-table)",
		func(want, _ any) bool { return want == nil },
	},
	{
		`files\.verify\.log\.\d+`,
		"the pauses between attempts grow up to the plan's interval, so that there are more of them in the same time; lines in brackets say what the verdict is based on (docs/moonmind.md#c2)",
		func(_, got any) bool {
			line, _ := got.(string)
			return strings.HasPrefix(line, "[") || regexp.MustCompile(`^(Attempt 1?\d: status=404|Health check timed out before reaching expected status)$`).MatchString(line)
		},
	},
	{
		`files\.rollback\.log(\.\d+)?`, // the log itself: none of its lines is compared
		"a rollback brings back what the run has changed from its record, without the plan's commands (docs/moonmind.md#c1)",
		func(want, got any) bool { return (want == nil) != (got == nil) },
	},
	{
		`artifacts\.\d verify\.log\.(checksum|size_bytes)`,
		"the log differs as described above, so its size and checksum differ",
		func(_, got any) bool { return got != nil },
	},
}

func TestRunsEqualTheReferences(t *testing.T) {
	t.Parallel()
	met := make([]bool, len(intendedDifferences))
	t.Run("runs", func(t *testing.T) {
		for name, args := range map[string][]string{
			"api_ok": {"--priority=high"},
			"verify_times_out": {
				set("verify.healthcheck.timeoutSeconds", 3),
				set("verify.healthcheck.intervalSeconds", 1),
			},
		} {
			t.Run(name, func(t *testing.T) {
				s := newStack(t, stackConfig{Project: true, Healthy: true})
				if name == "verify_times_out" {
					args = append(args, "--health-url", strings.Replace(s.project.HealthURL(), "/health", "/nothing", 1))
				}
				other, err := s.project.Container(t.Context(), "other")
				if err != nil {
					t.Fatal(err)
				}
				run := s.submit(newest, args...)
				s.awaitRun(run.RunID)
				var reference map[string]any
				readJSON(t, "testdata/reference/"+name+".json", &reference)
				delete(reference, "api") // answers of the HTTP API, which these tests do not have
				delete(reference, "api_artifacts")
				for _, d := range differences(plainReference(reference), s.document(run)) {
					if i := intended(d); i >= 0 {
						met[i] = true
						continue
					}
					t.Error(d)
				}
				for i, attempt := range regexp.MustCompile(`(?m)^Attempt \d+`).FindAllString(s.files(run.RunID)["verify.log"], -1) {
					if want := fmt.Sprintf("Attempt %d", i+1); attempt != want {
						t.Errorf("verify.log has %s where %s is expected", attempt, want)
					}
				}
				after, err := s.project.Container(t.Context(), "other")
				if err != nil || after.ID != other.ID {
					t.Errorf("service other: container %s, want %s unchanged (%v)", after.ID, other.ID, err)
				}
				if t.Failed() {
					t.Logf("files: %q", s.files(run.RunID))
				}
				s.requireEmptyQueue()
			})
		}
	})
	for i, entry := range intendedDifferences {
		if !met[i] && !t.Failed() {
			t.Errorf("no run has the intended difference %q any more", entry.path)
		}
	}
}

func intended(d difference) int {
	for i, entry := range intendedDifferences {
		if regexp.MustCompile(`^(?:`+entry.path+`)$`).MatchString(d.Path) && entry.accept(d.Want, d.Got) {
			return i
		}
	}
	return -1
}

// document returns a run in the form of the references, prepared for comparison.
func (s *stack) document(run submission) any {
	s.t.Helper()
	runs := s.mustRows(`SELECT to_jsonb(r) || jsonb_build_object('approval_token_text', encode(approval_token, 'escape')) FROM orchestrator_runs r WHERE id = $1`, run.RunID)
	plans := s.mustRows(`SELECT to_jsonb(p) FROM orchestrator_action_plans p JOIN orchestrator_runs r ON r.action_plan_id = p.id WHERE r.id = $1`, run.RunID)
	states, artifacts, meta := s.states(run.RunID), s.registered(run.RunID), s.taskmeta(run.RunID)
	var ids []string
	for _, row := range meta {
		ids = append(ids, row["task_id"].(string))
	}
	results := s.read(newest, ids...)
	for _, row := range meta {
		row["result_decoded"] = results[row["task_id"].(string)].Stored
	}
	files := s.files(run.RunID)
	for _, artifact := range artifacts {
		text := files[artifact["path"].(string)]
		sum := sha256.Sum256([]byte(text))
		if artifact["checksum"] != hex.EncodeToString(sum[:]) || artifact["size_bytes"] != float64(len(text)) {
			s.t.Errorf("artifact %s is registered with %v bytes, %v; the file has %d, %x", artifact["path"], artifact["size_bytes"], artifact["checksum"], len(text), sum)
		}
	}
	whole := map[string]any{"run": runs, "plan": plans, "states": states, "artifacts": artifacts, "taskmeta": meta, "files": files}
	text, err := json.Marshal(whole)
	if err != nil {
		s.t.Fatal(err)
	}
	// A stack has other names where MoonMind's are fixed.
	ours := []string{s.artifacts, "$MM_ARTIFACTS"}
	if s.project != nil {
		ours = append(ours, s.project.Name, "moonmind", strings.TrimSuffix(s.project.HealthURL(), "/health"), "http://api:5000")
	}
	replaced := strings.NewReplacer(ours...).Replace(string(text))
	var plain map[string]any
	if err := json.Unmarshal([]byte(replaced), &plain); err != nil {
		s.t.Fatal(err)
	}
	return plainReference(plain)
}

// dockerLogs are the artifacts with output of docker or git, whose size and
// checksum differ from run to run. Only the lines that plannedLines matches are
// compared.
var dockerLogs = map[string]bool{"build.log": true, "restart.log": true, "rollback.log": true}

// plannedLines matches the lines of a log that the worker itself writes.
var plannedLines = regexp.MustCompile(`^(\$ .*|Executing rollback strategy: .*|git reset .*|docker compose --project-name .*)$`)

// plainReference replaces what differs from run to run: ids by what they belong
// to, times and durations by a word, and output of docker and git by nothing.
func plainReference(document map[string]any) any {
	run := document["run"].([]any)[0].(map[string]any)
	names := map[string]string{run["id"].(string): "<run>", run["action_plan_id"].(string): "<plan>"}
	for _, row := range document["states"].([]any) {
		state := row.(map[string]any)
		names[state["id"].(string)] = "<state>"
		if id, ok := state["celery_task_id"].(string); ok {
			names[id] = fmt.Sprintf("<task %s>", state["plan_step"])
		}
	}
	for _, row := range document["artifacts"].([]any) {
		artifact := row.(map[string]any)
		names[artifact["id"].(string)] = fmt.Sprintf("<artifact %s>", artifact["path"])
		if dockerLogs[artifact["path"].(string)] {
			artifact["checksum"], artifact["size_bytes"] = "<checksum>", "<size>"
		}
	}
	for _, row := range document["taskmeta"].([]any) {
		meta := row.(map[string]any)
		delete(meta, "id")     // a sequence
		delete(meta, "result") // pickle protocol 5 there, 2 here: compared after decoding
		meta["worker"] = regexp.MustCompile(`@.*`).ReplaceAllString(fmt.Sprint(meta["worker"]), "@<host>")
		meta["traceback"] = endsOf(meta["traceback"])
		var args []string
		if text, ok := meta["args"].(string); ok && json.Unmarshal([]byte(text), &args) == nil && len(args) == 2 {
			meta["step"] = args[1]
		}
	}
	files := document["files"].(map[string]any)
	for name, text := range files {
		var kept []any
		for line := range strings.Lines(text.(string)) {
			line = strings.TrimSuffix(line, "\n")
			if !dockerLogs[name] || plannedLines.MatchString(line) {
				kept = append(kept, line)
			}
		}
		files[name] = kept
	}
	document["run"] = run
	document["states"] = named(document["states"], "plan_step")
	document["artifacts"] = named(document["artifacts"], "path")
	document["taskmeta"] = named(document["taskmeta"], "step")
	return replaceValues("", document, names)
}

// named converts a list of rows to an object whose keys are each row's index and
// name, so that the path of a difference shows the row.
func named(list any, key string) map[string]any {
	rows := make(map[string]any)
	for i, row := range list.([]any) {
		rows[fmt.Sprint(i, " ", row.(map[string]any)[key])] = row
	}
	return rows
}

// endsOf returns the first and the last line of a traceback, which is what the
// references contain.
func endsOf(traceback any) any {
	var rows []string
	switch traceback := traceback.(type) {
	case string:
		rows = strings.Split(strings.TrimSpace(traceback), "\n")
	case []any:
		for _, row := range traceback {
			rows = append(rows, row.(string))
		}
	default:
		return traceback
	}
	return []any{rows[0], rows[len(rows)-1]}
}

func replaceValues(key string, value any, names map[string]string) any {
	switch value := value.(type) {
	case map[string]any:
		for key, member := range value {
			value[key] = replaceValues(key, member, names)
		}
		return value
	case []any:
		for i, element := range value {
			value[i] = replaceValues(key, element, names)
		}
		return value
	case string:
		if strings.HasSuffix(key, "_at") || key == "date_done" || key == "grantedAt" {
			return "<time>"
		}
		return uuids.ReplaceAllStringFunc(value, func(id string) string {
			if name, ok := names[id]; ok {
				return name
			}
			return "<unknown id>"
		})
	case float64:
		if key == "durationMs" {
			return "<duration>"
		}
	}
	return value
}

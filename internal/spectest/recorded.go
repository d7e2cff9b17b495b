package spectest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// The recorded run, and that of a test unless it says otherwise.
const (
	RecordedRun = "e2b7c4d0-19af-4c55-8b3e-0a6d5f4c3b2a"
	Feature     = "014-refresh-docs"
	Repository  = "octo/widgets"
	// Directory has the directories of all runs.
	Directory = "var/artifacts/spec_workflows"
)

// Tasks is a tasks.md in which line 57 is the recorded task.
func Tasks() string {
	return "# Tasks\n\n" + strings.Repeat("- [x] T000 Done\n", 52) + "\n## Phase 4: User Story 2\n- [ ] T012 [P] [US2] Document the retry endpoint in `docs/api" + ".md`\n- [ ] T013 Later\n"
}

// Row is a row of a table, as JSON.
type Row = map[string]any

// Names are what differs from run to run.
type Names struct {
	// Run is the run's id, Job Codex's task id, and URL the address of the pull request.
	Run, Job, URL string
}

// RecordedAs reads a file of recorded values with the names of another run, and without
// the directory that MoonMind puts in front of a path twice (docs/spec-workflow.md#s5).
func RecordedAs(t *testing.T, dir, name string, names Names) map[string]any {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	recorded, path := Directory+"/"+RecordedRun, Directory+"/"+names.Run
	replaced := strings.NewReplacer("TEST-7c1e09ab", names.Job, "https://example.com/014-refresh-docs/4be7d1", names.URL, recorded+"/"+recorded, path, RecordedRun, names.Run).Replace(string(text))
	var v map[string]any
	if err := json.Unmarshal([]byte(replaced), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// SkillFields are those of the skills policy, in their order.
var SkillFields = []string{"selectedSkill", "executionPath", "usedSkills", "usedFallback", "shadowModeRequested"}

// WithoutSkills removes what later revisions of MoonMind add to the recorded one
// (docs/spec-workflow.md#skills), and checks that it is there.
func WithoutSkills(t *testing.T, what string, value any) any {
	t.Helper()
	text, err := json.Marshal(value)
	if err != nil {
		t.Fatal(err)
	}
	var o map[string]any
	if err := json.Unmarshal(text, &o); err != nil {
		t.Fatalf("%s: %v: %s", what, err, text)
	}
	skills, found := o["skill_execution"]
	delete(o, "skill_execution")
	if !found {
		skills, found = o["skillExecution"]
		delete(o, "skillExecution")
	}
	if !found {
		for i, want := range []any{"speckit", "skill", true, false, false} {
			if o[SkillFields[i]] != want {
				t.Errorf("%s: %s is %v, want %v", what, SkillFields[i], o[SkillFields[i]], want)
			}
			delete(o, SkillFields[i])
		}
	} else if _, is := skills.(map[string]any); !is {
		t.Errorf("%s: skills are %v", what, skills)
	}
	return o
}

// CompareRow compares the columns that do not differ from run to run.
func CompareRow(t *testing.T, what string, got Row, want any) {
	t.Helper()
	for column, value := range want.(map[string]any) {
		switch column {
		case "id", "workflow_run_id", "created_at", "updated_at", "celery_chain_id":
			continue
		case "started_at", "finished_at", "checked_at", "codex_checked_at", "github_checked_at":
			if (got[column] == nil) != (value == nil) {
				t.Errorf("%s: %s is %v, recorded is %v", what, column, got[column], value)
			}
			continue
		case "size_bytes", "digest":
			if got[column] == nil {
				t.Errorf("%s: no %s", what, column)
			}
			continue
		case "payload":
			Same(t, what+": payload", WithoutSkills(t, what, got[column]), value)
			continue
		}
		Same(t, what+": "+column, got[column], value)
	}
}

// Same compares values as JSON.
func Same(t *testing.T, what string, got, want any) {
	t.Helper()
	var values [2]any
	for i, v := range []any{got, want} {
		text, err := json.Marshal(v)
		if err == nil {
			err = json.Unmarshal(text, &values[i])
		}
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	if !reflect.DeepEqual(values[0], values[1]) {
		text, _ := json.MarshalIndent(values[0], "", " ")
		wanted, _ := json.MarshalIndent(values[1], "", " ")
		t.Errorf("%s: got %s\nwant %s", what, text, wanted)
	}
}

// A Run is all that a run of the recorded feature has left.
type Run struct {
	Run                       Row
	States, Artifacts, Audits []Row
	// Results are those of the three tasks.
	Results []json.RawMessage
	// File reads a file of the run's directory.
	File func(name string) string
}

// CompareTestMode compares a run in test mode with the recorded one, field by field: rows,
// results, and files byte by byte. dir has the recorded values.
func CompareTestMode(t *testing.T, dir string, run Run) {
	t.Helper()
	names := Names{Run: fmt.Sprint(run.Run["id"]), Job: fmt.Sprint(run.Run["codex_task_id"]), URL: fmt.Sprint(run.Run["pr_url"])}
	if !strings.HasPrefix(names.Job, "TEST-") || !strings.HasPrefix(names.URL, "https://example.com/"+Feature+"/") {
		t.Errorf("names are %+v", names)
	}
	stages := RecordedAs(t, dir, "spec_context_stages.json", names)
	if len(run.Results) != 3 {
		t.Fatalf("%d results", len(run.Results))
	}
	for i, name := range []string{"1_returned_by_discover", "3_returned_by_submit_and_first_argument_of_publish", "4_returned_by_publish"} {
		Same(t, name, WithoutSkills(t, name, run.Results[i]), stages[name])
	}
	rows := RecordedAs(t, dir, "spec_rows_and_files.json", names)
	CompareRow(t, "run", run.Run, rows["run_finished"])
	states := rows["task_states"].(map[string]any)
	compareRows(t, "task", run.States, []any{states["discover_succeeded"], states["submit_succeeded"], states["publish_succeeded"]}, "task_name")
	compareRows(t, "artifact", run.Artifacts, rows["workflow_artifacts"].([]any)[:5], "artifact_type") // the last one is the API's
	compareRows(t, "audit", run.Audits, []any{rows["workflow_credential_audits"].(map[string]any)["valid"]}, "codex_status")

	// Texts are compared byte by byte, JSON files also by what they mean.
	for name, want := range rows["artifact_files"].(map[string]any) {
		name = strings.ReplaceAll(name, "TEST-7c1e09ab", names.Job)
		got := run.File(name)
		if text, is := want.(string); is {
			if got != text {
				t.Errorf("%s is %q, want %q", name, got, text)
			}
			continue
		}
		var value map[string]any
		if err := json.Unmarshal([]byte(got), &value); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if name == "run_summary.json" {
			Same(t, name, WithoutSkills(t, name, value), want)
		} else {
			Same(t, name, value, want)
		}
	}
	want := "{\n  \"description\": \"Simulated Codex patch for T012: [P] [US2] Document the retry endpoint in `docs/api" + ".md`\",\n  \"hasChanges\": true,\n  \"patchPath\": \"" + Directory + "/" + names.Run + "/" + names.Job + ".patch\"\n}"
	if got := run.File("apply_output.json"); got != want {
		t.Errorf("apply_output.json is %s", got)
	}
	if got := run.File("run_summary.json"); !strings.Contains(got, "\"codexQueue\": \"codex-0\",\n  \"skillExecution\": {\n    \"discover_next_phase\": {\n      \"selectedSkill\": \"speckit\",\n") {
		t.Errorf("run_summary.json is %s", got)
	}
}

// compareRows compares the rows of a table, each with the recorded one that has the same
// value in a column.
func compareRows(t *testing.T, what string, got []Row, want []any, column string) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%d rows of kind %s, want %d: %v", len(got), what, len(want), got)
	}
	for _, wanted := range want {
		value := wanted.(map[string]any)[column]
		at := slices.IndexFunc(got, func(row Row) bool { return row[column] == value })
		if at < 0 {
			t.Errorf("no %s %v", what, value)
			continue
		}
		CompareRow(t, fmt.Sprintf("%s %v", what, value), got[at], wanted)
	}
}

// Alike checks that an object has the keys of another one, with values of the same kind:
// null or not, text, number, list, object. Objects in it are compared in the same way.
func Alike(t *testing.T, what string, got map[string]any, want any) {
	t.Helper()
	for key, value := range want.(map[string]any) {
		name := what + ": " + key
		found, has := got[key]
		switch value := value.(type) {
		case nil:
			if !has || found != nil && !mayBeSet[key] {
				t.Errorf("%s is %v, recorded is null", name, found)
			}
			continue
		case map[string]any:
			if object, is := found.(map[string]any); is {
				Alike(t, name, object, value)
				continue
			}
		}
		if !has || reflect.TypeOf(found) != reflect.TypeOf(value) {
			t.Errorf("%s is %v, recorded is %v", name, found, value)
		}
	}
}

// mayBeSet are keys that are null in the recorded run and need not be in every run.
var mayBeSet = map[string]bool{"size_bytes": true, "digest": true, "codex_message": true, "github_message": true, "celery_chain_id": true}

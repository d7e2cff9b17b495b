package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/githubtest"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
)

// The worker's credentials, which nobody else may see. Codex has the key.
const (
	specToken = "ghp_Xe5Rw9Kz2Jn7Vb4Qc8Ld1Ty6Mh3Gs0Pf5Ua"
	specKey   = "sk-proj-Zt8Cn3Wq6Yx1Lk9Rb5Vd2Jm7"
)

// otherVariable is one of the worker that Codex has no use for.
const otherVariable = "WORKER_ONLY"

// recordedValues has what MoonMind's Python worker has left.
var recordedValues = filepath.Join(module, "tasks", "speckit", "testdata")

// codexQueues are those of three shards, MoonMind's default.
var codexQueues = []string{"codex-0", "codex-1", "codex-2"}

// specBranch and specFile are the branch of the recorded task and the file that the model
// changes; specText is what it then has.
const (
	specBranch = "speckit/" + spectest.Feature + "/t012"
	specFile   = "docs/api"
	specText   = "POST /retry\n"
)

// specStack is a stack for runs of the Spec workflow.
type specStack struct {
	*stack
	root    string // what REPO_ROOT names
	github  *githubtest.Server
	model   *codextest.Model
	watch   *leaktest.Watch
	metrics *lockedBuffer
	// credentials are the settings with token and key, for workers of the chain.
	credentials []string
	calls       string // file with arguments and environment of each git and codex
}

// specConfig configures a specStack.
type specConfig struct {
	// TestMode makes workers simulate Codex and GitHub.
	TestMode bool
	// Files keeps token and key in files. Otherwise they are in the worker's environment.
	Files bool
	// Answer is the model. Defaults to one that does the task.
	Answer func(codextest.Request) codextest.Script
}

// doesTheTask is a model that prints its environment and its key, and does the task.
func doesTheTask(codextest.Request) codextest.Script {
	script := codextest.Changes(specFile, specText)
	script.Commands = append([]string{"env"}, script.Commands...)
	script.Message = "I have documented the endpoint, with the key $KEY."
	return script
}

// newSpecStack creates a stack without a worker. At its end everything is searched for
// the token and the key.
func newSpecStack(t *testing.T, cfg specConfig) *specStack {
	t.Helper()
	s := &specStack{root: t.TempDir(), github: githubtest.New(t), calls: filepath.Join(t.TempDir(), "calls")}
	if cfg.Answer == nil {
		cfg.Answer = doesTheTask
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	s.model, err = codextest.StartModel(cfg.Answer)
	must(err)
	t.Cleanup(s.model.Close)
	home := filepath.Join(t.TempDir(), "codex-home")
	must(s.model.WriteHome(home, "CODEX_API_KEY"))
	s.github.SetToken(specToken, githubtest.Token{Login: "bot", Scopes: []string{"repo"}})
	must(s.github.AddRepository(t.Context(), spectest.Repository, map[string]string{"README": "widgets\n", specFile: "none\n"}))
	s.writeTasks(t, spectest.Feature, spectest.Tasks())

	port, metrics := receiveStatsD(t)
	s.metrics = metrics
	environment := []string{
		"REPO_ROOT=" + s.root, "SPEC_WORKFLOW_METRICS_HOST=127.0.0.1", "SPEC_WORKFLOW_METRICS_PORT=" + port, otherVariable + "=x",
	}
	var secretFiles []string
	if cfg.TestMode {
		environment = append(environment, "TEST_MODE=true")
	} else {
		environment = append(environment, "PATH="+s.recordCalls(t)+":"+os.Getenv("PATH"),
			"MM_ORCHESTRATOR_GITHUB_URL="+s.github.URL, "MM_ORCHESTRATOR_GITHUB_CA_FILE="+s.github.CAFile,
			"CODEX_HOME="+home, "MM_ORCHESTRATOR_CLONE_DIR="+filepath.Join(t.TempDir(), "clones"),
			// Codex's own sandbox does not work in every container.
			"MM_ORCHESTRATOR_CODEX_SANDBOX=danger-full-access")
		if cfg.Files {
			dir := t.TempDir()
			secretFiles = append(secretFiles, filepath.Join(dir, "token"), filepath.Join(dir, "key"))
			must(os.WriteFile(secretFiles[0], []byte(specToken+"\n"), 0o400))
			must(os.WriteFile(secretFiles[1], []byte(specKey+"\n"), 0o400))
			s.credentials = []string{"MM_ORCHESTRATOR_GITHUB_CREDENTIAL=file:" + secretFiles[0], "MM_ORCHESTRATOR_CODEX_CREDENTIAL=file:" + secretFiles[1]}
		} else {
			s.credentials = []string{"GITHUB_TOKEN=" + specToken, "CODEX_API_KEY=" + specKey}
		}
	}
	s.stack = newStack(t, stackConfig{NoWorker: true, Environment: environment})
	itself := leaktest.Program{Name: "mm-orchestrator"}
	s.watch = leaktest.Guard(t, leaktest.State{
		Secrets: map[string]string{"token": specToken, "key": specKey}, Files: secretFiles,
		Database: s.database, Broker: s.broker, GitHub: s.github, GitHubSecrets: []string{"token"}, Model: s.model, ModelSecrets: []string{"key"},
		Environments: map[string][]leaktest.Program{"token": {itself}, "key": {itself, {Name: "codex", Children: true}}},
	})
	return s
}

// recordCalls makes programs git and codex that write down how they were called, and with
// which settings of git, before they become the real ones. It returns their directory.
func (s *specStack) recordCalls(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	git, err := exec.LookPath("git")
	if err != nil {
		t.Fatal(err)
	}
	for name, program := range map[string]string{"git": git, "codex": devenv.Codex(t)} {
		// Codex has the key in a variable, and hands that on to each git that it starts
		// itself. CODEX_HOME tells those from the worker's.
		script := fmt.Sprintf(`#!/bin/sh
{
	echo "call of %[1]s $*"
	env | if [ "$CODEX_HOME" ]; then grep -v ^CODEX_API_KEY=; else cat; fi
	for file in .git/config config "$GIT_DIR/config"; do
		if [ -f "$file" ]; then cat "$file"; fi
	done
} >>'%[2]s'
exec '%[3]s' "$@"
`, name, s.calls, program)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// writeTasks writes the list of tasks of a feature.
func (s *specStack) writeTasks(t *testing.T, feature, text string) {
	t.Helper()
	dir := filepath.Join(s.root, "specs", feature)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tasks"+".md"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// startSpecWorker starts a worker of all queues of the chain, and searches its log at the
// end.
func (s *specStack) startSpecWorker(queues []string, settings ...string) {
	s.t.Helper()
	s.startWorkerOf(queues, append(slices.Clone(s.credentials), settings...)...)
	worker := s.worker
	s.t.Cleanup(func() { s.watch.Text("the log of a worker", worker.log()) })
	if !strings.Contains(worker.log(), "worker ready") {
		s.await("the worker to be ready", func() (bool, error) { return strings.Contains(worker.log(), "worker ready"), nil })
	}
}

// everyQueue is what one worker of everything consumes.
func everyQueue() []string { return append([]string{queue, "speckit"}, codexQueues...) }

// specAnswer is what the Python scripts print about a chain.
type specAnswer struct {
	RunID   string            `json:"run_id"`
	ChainID string            `json:"chain_id"`
	TaskIDs map[string]string `json:"task_ids"`
	Context json.RawMessage   `json:"context"`
	Results []struct {
		ID     string          `json:"id"`
		Name   string          `json:"name"`
		State  string          `json:"state"`
		Worker string          `json:"worker"`
		Result json.RawMessage `json:"result"`
	} `json:"results"`
}

// results are those of the tasks, as AsyncResult reads them.
func (a specAnswer) results() (list []json.RawMessage) {
	for _, r := range a.Results {
		list = append(list, r.Result)
	}
	return list
}

// submitSpec creates and publishes a run as MoonMind's API does, and waits for its end.
func (s *specStack) submitSpec(version string, args ...string) (answer specAnswer) {
	s.t.Helper()
	s.python(version, "submit_spec_run.py", &answer, append([]string{"--feature", spectest.Feature, "--repository", spectest.Repository, "--timeout", fmt.Sprint(waitTimeout.Seconds())}, args...)...)
	s.watch.Text("what Celery reads", fmt.Sprintf("%s", answer.results()))
	return answer
}

// retrySpec lets a run go on as MoonMind's API does, and waits for its end.
func (s *specStack) retrySpec(version, run string, args ...string) (answer specAnswer) {
	s.t.Helper()
	s.python(version, "retry_spec_run.py", &answer, append([]string{run, "--root", s.root, "--timeout", fmt.Sprint(waitTimeout.Seconds())}, args...)...)
	s.watch.Text("what Celery reads", fmt.Sprintf("%s", answer.results()))
	return answer
}

// spec reads the rows and files of a run.
func (s *specStack) spec(run string, results []json.RawMessage) spectest.Run {
	s.t.Helper()
	rowsOf := func(table, column string) (list []spectest.Row) {
		for _, row := range s.mustRows(`SELECT to_jsonb(r) FROM `+table+` r WHERE `+column+` = $1 ORDER BY created_at`, run) {
			list = append(list, row)
		}
		return list
	}
	runs := rowsOf("spec_workflow_runs", "id")
	if len(runs) != 1 {
		s.t.Fatalf("%d rows of run %s", len(runs), run)
	}
	return spectest.Run{
		Run: runs[0], States: rowsOf("spec_workflow_task_states", "workflow_run_id"), Artifacts: rowsOf("workflow_artifacts", "workflow_run_id"),
		Audits: rowsOf("workflow_credential_audits", "workflow_run_id"), Results: results,
		File: func(name string) string {
			s.t.Helper()
			return read(s.t, filepath.Join(s.root, spectest.Directory, run, name))
		},
	}
}

// requireSuccess checks the states of the results, and that as many came.
func (s *specStack) requireSuccess(answer specAnswer, tasks int) {
	s.t.Helper()
	if len(answer.Results) != tasks {
		s.t.Fatalf("%d results, want %d", len(answer.Results), tasks)
	}
	for _, r := range answer.Results {
		if r.State != "SUCCESS" {
			s.t.Errorf("task %s is %s: %s", r.ID, r.State, r.Result)
		}
	}
}

// requirePublished checks that the branch holds the change in one commit, and that there
// is one pull request.
func (s *specStack) requirePublished() {
	s.t.Helper()
	git := func(args ...string) string {
		s.t.Helper()
		text, err := s.github.Git(s.t.Context(), spectest.Repository, args...)
		if err != nil {
			s.t.Fatal(err)
		}
		return text
	}
	if text := git("show", specBranch+":"+specFile); text+"\n" != specText {
		s.t.Errorf("on the branch %s has %q", specFile, text)
	}
	if changed := git("diff", "--name-only", "main", specBranch); changed != specFile {
		s.t.Errorf("the branch changes %q", changed)
	}
	if commits := git("rev-list", "--count", "main.."+specBranch); commits != "1" {
		s.t.Errorf("the branch has %s commits", commits)
	}
	if branches := git("for-each-ref", "--format=%(refname:short)"); branches != "main\n"+specBranch {
		s.t.Errorf("branches are %q", branches)
	}
	pulls := s.github.Pulls(spectest.Repository)
	if len(pulls) != 1 || pulls[0].Head != specBranch || pulls[0].Base != "main" || pulls[0].State != "open" || pulls[0].Title != "T012: [P] [US2] Document the retry endpoint in `docs/api"+".md`" {
		s.t.Errorf("pull requests are %+v", pulls)
	}
	if n := s.model.Turns(); n != 1 {
		s.t.Errorf("codex was asked %d times", n)
	}
}

// requireRowsForMoonMind checks that the rows, files and results of a run that was
// published have what those of a run in test mode have: each column is set or not, each
// key is there and its value is of the same kind. Values differ, and there may be more.
func (s *specStack) requireRowsForMoonMind(run spectest.Run) {
	t := s.t
	t.Helper()
	names := spectest.Names{Run: fmt.Sprint(run.Run["id"]), Job: fmt.Sprint(run.Run["codex_task_id"]), URL: fmt.Sprint(run.Run["pr_url"])}
	recorded := spectest.RecordedAs(t, recordedValues, "spec_rows_and_files.json", names)
	spectest.Alike(t, "run", run.Run, recorded["run_finished"])
	pulls := s.github.Pulls(spectest.Repository)
	for column, want := range map[string]any{
		"status": "succeeded", "phase": "complete", "feature_key": spectest.Feature, "repository": spectest.Repository, "branch_name": specBranch,
		"pr_url": fmt.Sprintf("%s/%s/pull/%d", s.github.URL, spectest.Repository, len(pulls)), "codex_preflight_status": "skipped",
	} {
		if run.Run[column] != want {
			t.Errorf("run: %s is %v, want %v", column, run.Run[column], want)
		}
	}
	states := recorded["task_states"].(map[string]any)
	for i, name := range []string{"discover_succeeded", "submit_succeeded", "publish_succeeded"} {
		want := states[name].(map[string]any)
		at := slices.IndexFunc(run.States, func(row spectest.Row) bool {
			return row["task_name"] == want["task_name"] && row["status"] == "succeeded"
		})
		if at < 0 {
			t.Errorf("%s: no row among %v", name, run.States)
			continue
		}
		got := run.States[at]
		spectest.Alike(t, name, got, want)
		if got["message"] != want["message"] || i == 0 && got["attempt"] != float64(1) {
			t.Errorf("%s: message %v, attempt %v", name, got["message"], got["attempt"])
		}
	}
	types := map[string]bool{}
	for _, row := range run.Artifacts {
		types[fmt.Sprint(row["artifact_type"])] = true
		text := []byte(s.artifact(fmt.Sprint(row["path"])))
		sum := sha256.Sum256(text)
		if row["size_bytes"] != float64(len(text)) || row["digest"] != "sha256:"+hex.EncodeToString(sum[:]) {
			t.Errorf("artifact %v; its file has %d bytes", row, len(text))
		}
	}
	for _, row := range recorded["workflow_artifacts"].([]any)[:5] {
		if kind := fmt.Sprint(row.(map[string]any)["artifact_type"]); !types[kind] {
			t.Errorf("no artifact %s", kind)
		}
	}
	if !types["gh_push_log"] {
		t.Error("no artifact gh_push_log")
	}
	if len(run.Audits) != 1 || run.Audits[0]["codex_status"] != "valid" || run.Audits[0]["github_status"] != "valid" {
		t.Errorf("audits are %v", run.Audits)
	}
	for name, want := range recorded["artifact_files"].(map[string]any) {
		if name = map[string]string{"014-refresh-docs_t012_pr.json": "speckit_014-refresh-docs_t012_pr.json", "run_summary.json": "run_summary.json", "apply_output.json": "apply_output.json"}[name]; name == "" {
			continue
		}
		var got map[string]any
		if err := json.Unmarshal([]byte(run.File(name)), &got); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		spectest.Alike(t, name, got, want)
	}
	if patch := run.File(filepath.Base(fmt.Sprint(run.Run["codex_patch_path"]))); !strings.Contains(patch, "+"+specText) {
		t.Errorf("the patch is %s", patch)
	}
	for line := range strings.Lines(run.File(filepath.Base(fmt.Sprint(run.Run["codex_logs_path"])))) {
		if !json.Valid([]byte(line)) {
			t.Errorf("codex_logs has the line %q", line)
		}
	}
}

// requireResultsForMoonMind checks the results of a whole chain, which are the contexts of
// the next task, as requireRowsForMoonMind does.
func (s *specStack) requireResultsForMoonMind(run spectest.Run) {
	s.t.Helper()
	names := spectest.Names{Run: fmt.Sprint(run.Run["id"]), Job: fmt.Sprint(run.Run["codex_task_id"]), URL: fmt.Sprint(run.Run["pr_url"])}
	stages := spectest.RecordedAs(s.t, recordedValues, "spec_context_stages.json", names)
	for i, name := range []string{"1_returned_by_discover", "3_returned_by_submit_and_first_argument_of_publish", "4_returned_by_publish"} {
		var got map[string]any
		if err := json.Unmarshal(run.Results[i], &got); err != nil {
			s.t.Fatalf("%s: %v: %s", name, err, run.Results[i])
		}
		spectest.Alike(s.t, name, got, stages[name])
	}
}

// artifact reads a file by the path in a row.
func (s *specStack) artifact(path string) string {
	s.t.Helper()
	if !filepath.IsAbs(path) {
		path = filepath.Join(s.root, path)
	}
	return read(s.t, path)
}

// requireMetrics waits for the metrics of tasks that have succeeded, which travel by UDP
// and may come after the results.
func (s *specStack) requireMetrics(attempt int, tasks ...string) {
	s.t.Helper()
	var missing []string
	s.await("metrics of the tasks", func() (bool, error) {
		missing = nil
		got := s.metrics.String()
		retry := "False"
		if attempt > 1 {
			retry = "True"
		}
		for _, task := range tasks {
			tags := fmt.Sprintf("|#task:%s,attempt:%d,status:", task, attempt)
			for _, line := range []string{"task_start:1|c" + tags + "running,retry:" + retry, "task_success:1|c" + tags + "success", "|ms" + tags + "success"} {
				if !strings.Contains(got, line+"\n") {
					missing = append(missing, line)
				}
			}
		}
		return len(missing) == 0, nil
	})
	for line := range strings.Lines(s.metrics.String()) {
		if !strings.HasPrefix(line, "moonmind.spec_workflow.task_") && !strings.HasPrefix(line, "moonmind.orchestrator") {
			s.t.Errorf("metric %q", line)
		}
	}
}

// requireCalls checks that the calls of git and codex were recorded: what is not recorded
// is not searched.
func (s *specStack) requireCalls() {
	s.t.Helper()
	calls := read(s.t, s.calls)
	for _, part := range []string{"call of codex exec", "call of git ", "[core]", "CODEX_HOME="} {
		if !strings.Contains(calls, part) {
			s.t.Errorf("the record of calls has no %q", part)
		}
	}
	for call := range strings.SplitSeq(calls, "call of ") {
		if strings.HasPrefix(call, "codex ") && strings.Contains(call, otherVariable) {
			s.t.Errorf("codex has a variable that it does not need: %s", call)
		}
	}
	if !s.watch.Saw("codex") {
		s.t.Error("no process of codex was seen")
	}
}

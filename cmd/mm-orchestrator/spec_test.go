package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/store/storetest"
)

// What workers of these tests have, and nobody else may see.
const (
	apiToken     = "Wq8Zn3Lx5Vc7Tb2K"
	codexKey     = "sk-proj-Pm2Yd8Ck4Xs9Lw6Bn1Vr7Tq3"
	acceptedKey  = "sk-proj-Fq6Vm2Zt9Kb4Xn8Wd1Lr5Cy7"
	otherToken   = "ghp_Nc4Jb8Yx2Wq6Lz9Vm3Kt7Rd1Hs5Gf0Pa2Eu"
	specPassword = "hunter2-hunter2" // in tasks, too
)

// watches are those of tests whose programs' output is searched.
var watches sync.Map

// guardSpec looks for secrets in all that a test leaves of programs that it starts later.
func guardSpec(t *testing.T, state leaktest.State) {
	t.Helper()
	state.Secrets = map[string]string{"GitHub token": testToken, "other GitHub token": otherToken, "API_TOKEN": apiToken, "key": codexKey, "accepted key": acceptedKey, "password": specPassword}
	state.Environments = map[string][]leaktest.Program{}
	for name := range state.Secrets {
		// The commands of the orchestrator's steps have all of its environment.
		state.Environments[name] = []leaktest.Program{{Name: "mm-orchestrator", Children: name == "API_TOKEN" || name == "password"}}
	}
	for _, name := range []string{"key", "accepted key"} {
		state.Environments[name] = append(state.Environments[name], leaktest.Program{Name: "codex", Children: true})
	}
	watches.Store(t, leaktest.Guard(t, state))
	t.Cleanup(func() { watches.Delete(t) })
}

// guard is guardSpec for a test with a broker and a database.
func (s testEnv) guard(t *testing.T) {
	t.Helper()
	guardSpec(t, leaktest.State{Files: []string{filepath.Join(s.workspace, "specs")}, Database: s.database, Broker: s.broker})
}

// specChain is what the Python producer has seen of a chain.
type specChain struct {
	RunID   string `json:"run_id"`
	ChainID string `json:"chain_id"`
	Results []struct {
		ID     string          `json:"id"`
		State  string          `json:"state"`
		Result json.RawMessage `json:"result"`
	} `json:"results"`
}

// submitSpec publishes a chain with unmodified Celery and waits for its results.
func (s testEnv) submitSpec(t *testing.T, version string, args ...string) specChain {
	t.Helper()
	script := filepath.Join("..", "..", "testdata", "producers", "submit_spec_run.py")
	cmd := exec.CommandContext(t.Context(), devenv.Celery(t, version), append([]string{script}, args...)...)
	cmd.Env = append(os.Environ(), "CELERY_BROKER_URL="+s.broker, "CELERY_RESULT_BACKEND="+s.sqlalchemy())
	out, err := cmd.Output()
	var chain specChain
	if err == nil {
		err = json.Unmarshal(out, &chain)
	}
	if err != nil {
		var stderr []byte
		if exit, is := err.(*exec.ExitError); is {
			stderr = exit.Stderr
		}
		t.Fatalf("producer: %v: %s%s", err, out, stderr)
	}
	return chain
}

func (s testEnv) sqlalchemy() string {
	return "db+postgresql+psycopg2://" + strings.SplitN(s.database, "://", 2)[1]
}

func (s testEnv) specEnv(more ...string) environment {
	return append(append(s.env(), "CELERY_RESULT_BACKEND="+s.sqlalchemy(), "MM_ORCHESTRATOR_SPEC_QUEUES=all", "TEST_MODE=true", "REPO_ROOT="+s.workspace), more...)
}

func (s testEnv) writeTasks(t *testing.T, feature, text string) {
	t.Helper()
	dir := filepath.Join(s.workspace, "specs", feature)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "tasks.md"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// The messages of unmodified Celery run the chain of the Spec workflow, beside the
// orchestrator's queue and apart from it.
func TestSpecWorkflowOfAPythonProducer(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		celery string
		env    []string
		queues []string
		// alone says that the worker has the rights for the Spec workflow only, and no
		// docker engine.
		alone bool
	}{
		"beside the orchestrator": {celery: "5.4.0", queues: []string{"codex-0", "codex-1", "codex-2", "orchestrator.run", "speckit"}},
		"apart from it":           {celery: "5.7.0", env: []string{"MM_ORCHESTRATOR_SPEC_ONLY=true", "WORKSPACE_ROOT=/nowhere", "SPEC_WORKFLOW_CODEX_QUEUE=codex", "DOCKER_HOST=tcp://127.0.0.1:1", "DOCKER_TLS_VERIFY=1", "DOCKER_CERT_PATH=/nowhere"}, queues: []string{"codex", "codex-0", "codex-1", "codex-2", "speckit"}, alone: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newTestEnv(t)
			s.guard(t)
			s.writeTasks(t, "014-refresh-docs", "## Phase 1\n- [x] T001 done\n- [ ] T002 Write `a/b.py` with API_TOKEN="+specPassword+"\n")
			sink, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
			if err != nil {
				t.Fatal(err)
			}
			defer sink.Close()
			worker := s
			if test.alone {
				d := &storetest.Database{URL: s.database, OwnerURL: s.database, Pool: pool(t, s.database)}
				worker.database = d.Role(t, "spec", storetest.Grants(store.SpecPrivileges(&store.ResultsConfig{})...)...)
			}
			env := worker.specEnv(append(test.env, "API_TOKEN="+specPassword, "OTHER_TOKEN="+apiToken, "SPEC_WORKFLOW_METRICS_HOST=127.0.0.1", fmt.Sprintf("SPEC_WORKFLOW_METRICS_PORT=%d", sink.LocalAddr().(*net.UDPAddr).Port))...)
			p := start(t, env, "worker")
			ready := p.logLine("worker ready")
			chain := s.submitSpec(t, test.celery, "--feature", "014-refresh-docs", "--repository", "octo/widgets")
			for _, r := range chain.Results {
				if r.State != "SUCCESS" {
					t.Errorf("%s: %s", r.State, r.Result)
				}
			}
			d := &storetest.Database{URL: s.database, Pool: pool(t, s.database)}
			run := d.Rows(t, `SELECT status::text, phase::text, branch_name, celery_chain_id, artifacts_path FROM spec_workflow_runs WHERE id = $1`, chain.RunID)[0]
			if run["status"] != "succeeded" || run["phase"] != "complete" || run["branch_name"] != "014-refresh-docs/t002" || run["celery_chain_id"] != chain.ChainID {
				t.Errorf("run is %v", run)
			}
			if n := len(d.Rows(t, `SELECT 1 FROM spec_workflow_task_states WHERE workflow_run_id = $1 AND status = 'succeeded'`, chain.RunID)); n != 3 {
				t.Errorf("%d tasks have succeeded", n)
			}
			dir := filepath.Join(s.workspace, run["artifacts_path"].(string))
			files, err := filepath.Glob(filepath.Join(dir, "*"))
			if err != nil || len(files) != 5 {
				t.Errorf("files: %v, %v", files, err)
			}
			for _, file := range files {
				if info, err := os.Stat(file); err != nil || info.Size() == 0 {
					t.Errorf("%s: %v", file, err)
				}
			}
			if strings.Contains(fmt.Sprint(chain), specPassword) {
				t.Error("a secret of tasks.md is in the results")
			}
			var got []string
			for _, line := range receiveLines(t, sink, 9) {
				name, rest, _ := strings.Cut(line, ":")
				if name == "moonmind.spec_workflow.task_duration" {
					value, tags, _ := strings.Cut(rest, "|ms")
					if _, decimals, _ := strings.Cut(value, "."); len(decimals) != 6 {
						t.Errorf("%s", line)
					}
					rest = tags
				}
				got = append(got, strings.TrimPrefix(name, "moonmind.spec_workflow.")+" "+rest)
			}
			var want []string
			for _, task := range []string{"discover_next_phase", "submit_codex_job", "apply_and_publish"} {
				want = append(want, "task_start 1|c|#task:"+task+",attempt:1,status:running,retry:False",
					"task_success 1|c|#task:"+task+",attempt:1,status:success", "task_duration |#task:"+task+",attempt:1,status:success")
			}
			if !slices.Equal(got, want) {
				t.Errorf("StatsD got %q, want %q", got, want)
			}
			if queues := strings.Fields(fmt.Sprint(ready["queue"])); !slices.Equal(slices.Sorted(slices.Values(queues)), test.queues) {
				t.Errorf("queues are %v, want %v", queues, test.queues)
			}
		})
	}
}

func pool(t *testing.T, database string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(context.Background(), database)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

func receiveLines(t *testing.T, conn *net.UDPConn, n int) []string {
	t.Helper()
	_ = conn.SetReadDeadline(time.Now().Add(testTimeout))
	var lines []string
	buffer := make([]byte, 1500)
	for range n {
		size, err := conn.Read(buffer)
		if err != nil {
			t.Fatalf("after %q: %v", lines, err)
		}
		lines = append(lines, string(buffer[:size]))
	}
	return lines
}

// Outside of test mode a run that cannot work fails within seconds, with what to do, and
// nothing is left of it.
func TestSpecWorkflowOutsideOfTestMode(t *testing.T) {
	t.Parallel()
	s := newTestEnv(t)
	s.guard(t)
	s.writeTasks(t, "f", "- [ ] T1 x\n")
	clones := filepath.Join(t.TempDir(), "clones")
	start(t, append(s.specEnv(), "TEST_MODE=false", "MM_ORCHESTRATOR_CODEX_PROGRAM=no-such-codex", "MM_ORCHESTRATOR_CLONE_DIR="+clones), "worker").logLine("worker ready")
	began := time.Now()
	chain := s.submitSpec(t, "5.4.0", "--feature", "f", "--repository", "octo/widgets")
	last := chain.Results[2]
	for _, want := range []string{"Credential validation failed: there is no program no-such-codex", "npm install -g @openai/codex", "MM_ORCHESTRATOR_CODEX_PROGRAM",
		"the GitHub token cannot be read from env:GITHUB_TOKEN,SPEC_WORKFLOW_GITHUB_TOKEN", "set GITHUB_TOKEN"} {
		if last.State != "FAILURE" || !strings.Contains(string(last.Result), want) {
			t.Errorf("%s: %s, want %q", last.State, last.Result, want)
		}
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("it took %s", took)
	}
	if _, err := os.Stat(clones); !os.IsNotExist(err) {
		t.Errorf("a clone was made: %v", err)
	}
	d := &storetest.Database{URL: s.database, Pool: pool(t, s.database)}
	if audit := d.Rows(t, `SELECT codex_status::text, github_status::text, codex_message, github_message FROM workflow_credential_audits`)[0]; audit["codex_status"] != "invalid" || audit["github_status"] != "invalid" || audit["codex_message"] == nil || audit["github_message"] == nil {
		t.Errorf("audit %v", audit)
	}
}

func TestSpecSettings(t *testing.T) {
	t.Parallel()
	for assignments, want := range map[string]string{
		"MM_ORCHESTRATOR_SPEC_ONLY=true":                                  "MM_ORCHESTRATOR_SPEC_QUEUES",
		"MM_ORCHESTRATOR_SPEC_QUEUES=,":                                   "it must be all, or names of queues",
		"MM_ORCHESTRATOR_SPEC_QUEUES=orchestrator.run":                    "they need different queues",
		"CODEX_SHARDS=65":                                                 "it must be a whole number from 1 to 64",
		"GITHUB_REPOSITORY=--upload-pack=x/y":                             "it must have the form owner/name",
		"GITHUB_REPOSITORY=https://github.com/octo/wid":                   "it must have the form owner/name",
		"SKILL_POLICY_MODE=none":                                          "permissive",
		"MM_ORCHESTRATOR_GITHUB_CREDENTIAL=ghp_0123456789abcdef":          "not the credential itself",
		"MM_ORCHESTRATOR_CODEX_CREDENTIAL=command:pass show x | head":     "no shell runs it",
		"MM_ORCHESTRATOR_GITHUB_URL=http://github.example.com":            "it must begin with https://",
		"MM_ORCHESTRATOR_GITHUB_API=https://me:secret@github.example.com": "it must not have a login",
		"MM_ORCHESTRATOR_CODEX_SANDBOX=none":                              "workspace-write",
		"MM_ORCHESTRATOR_CODEX_BACKEND=local":                             "it must be exec or cloud",
		"CODEX_PROFILE=../work":                                           "plain name",
		"MM_ORCHESTRATOR_CODEX_CONFIG=model":                              "name=value",
		"MM_ORCHESTRATOR_BRANCH_PREFIX=../":                               "branch",
		"MM_ORCHESTRATOR_COMMIT_AUTHOR=nobody":                            "Name <name@example.com>",
		"MM_ORCHESTRATOR_COMMIT_TRAILERS=x":                               "Key: value",
		"MM_ORCHESTRATOR_BASE_BRANCH=--force":                             "branch",
		"STATSD_PORT=0":                                                   "it must be a whole number",
	} {
		p := start(t, environment{assignments}, "config")
		if _, value, _ := strings.Cut(assignments, "="); strings.HasPrefix(value, "ghp_") && strings.Contains(p.stderr.String()+p.stdout.String(), value) {
			t.Errorf("%s: the credential is printed", assignments)
		}
		if code := p.exit(); code != exitConfig || strings.Count(p.stderr.String(), want) != 1 {
			t.Errorf("%s: exit %d, %s", assignments, code, p.stderr.String())
		}
	}
}

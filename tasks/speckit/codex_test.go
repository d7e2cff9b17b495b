package speckit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/codex"
	"github.com/moonladderstudios/mm-orchestrator/credential"
	"github.com/moonladderstudios/mm-orchestrator/gitrepo"
	"github.com/moonladderstudios/mm-orchestrator/internal/codextest"
	"github.com/moonladderstudios/mm-orchestrator/internal/devenv"
	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/store"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit/preflight"
)

const codexKey = "sk-proj-Wz3Kx8Rn5Tq1Vb7Jd4Hf9Lm2"

// gitIn runs git in a directory.
func gitIn(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "git", append([]string{"-c", "user.name=Tester", "-c", "user.email=tester@example.org", "-c", "protocol.file.allow=always"}, args...)...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %v: %v: %s", args, err, out)
	}
	return string(out)
}

// server makes the repository octo/widgets below a directory, with some files.
func server(t *testing.T) (address string) {
	t.Helper()
	root := t.TempDir()
	work := filepath.Join(root, "work")
	for name, text := range map[string]string{"README": "widgets\n", "old/name": strings.Repeat("a line\n", 30), "data": "\x00\x01binary"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(work, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(work, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	gitIn(t, work, "init", "--quiet", "--initial-branch=main")
	gitIn(t, work, "add", ".")
	gitIn(t, work, "commit", "--quiet", "-m", "first")
	if err := os.MkdirAll(filepath.Join(root, "octo"), 0o755); err != nil {
		t.Fatal(err)
	}
	gitIn(t, root, "clone", "--quiet", "--bare", work, filepath.Join(root, "octo", "widgets.git"))
	return "file://" + root
}

// codexChain is a chain with the real codex program and a model.
type codexChain struct {
	*chain
	model   *codextest.Model
	address string
	work    string
	home    string
	// program is codex, "" for the real one. limit is that of the clone, 0 for the default.
	program string
	limit   int64
}

// configure makes tasks use the real program.
func (c *codexChain) configure(t *testing.T, config *Config, stall time.Duration) {
	t.Helper()
	secrets := artifacts.NewRedactor(nil)
	source, err := credential.Parse("env:CODEX_API_KEY")
	if err != nil {
		t.Fatal(err)
	}
	key, err := credential.New(credential.Config{Name: "Codex key", Source: source, Environ: []string{"CODEX_API_KEY=" + codexKey}, Redactors: []credential.Redactor{config.Redactor, secrets}})
	if err != nil {
		t.Fatal(err)
	}
	if c.program == "" {
		c.program = devenv.Codex(t)
	}
	program, err := codex.NewExec(codex.ExecConfig{
		Program: c.program, Environ: append(codex.Environment(os.Environ()), "HOME="+c.home), Home: c.home, Key: key, Sandbox: "danger-full-access",
		StallLimit: stall, KillGrace: time.Second, Logger: config.Logger,
	})
	if err != nil {
		t.Fatal(err)
	}
	git, err := gitrepo.New(gitrepo.Config{Environ: os.Environ(), Schemes: []string{"file"}, MaxClone: c.limit})
	if err != nil {
		t.Fatal(err)
	}
	config.TestMode = false
	config.Codex = CodexConfig{Exec: program, Secrets: secrets, Login: codex.NewLogin(c.home, config.Redactor, secrets), Instructions: "Use British spelling."}
	config.Repositories = &Repositories{Git: git, Server: c.address, Dir: c.work}
}

func newCodexChain(t *testing.T, choose func(codextest.Request) codextest.Script, change ...func(*Config)) *codexChain {
	t.Helper()
	model, err := codextest.StartModel(choose)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(model.Close)
	home := t.TempDir()
	if err := model.WriteHome(home, "CODEX_API_KEY"); err != nil {
		t.Fatal(err)
	}
	c := &codexChain{model: model, address: server(t), work: t.TempDir()}
	stall := time.Minute
	if choose(codextest.Request{}).Stall {
		stall = 5 * time.Second
	}
	c.home = home
	c.chain = newChain(t, spectest.Tasks(), append([]func(*Config){func(config *Config) { c.configure(t, config, stall) }}, change...)...)
	c.watch.Also(func(state *leaktest.State) { state.Model, state.ModelSecrets = model, []string{"key"} })
	c.ownRun()
	return c
}

// submitted runs discover and submit.
func (c *codexChain) submitted() (map[string]any, error) {
	c.t.Helper()
	first := c.ok(c.discover(discoverArgs{}))
	context, err := c.follow(store.SpecSubmit, first)
	if err != nil {
		return nil, err
	}
	var object map[string]any
	if err := json.Unmarshal(context, &object); err != nil {
		c.t.Fatal(err)
	}
	return object, nil
}

// payload is the payload of a row.
func (c *chain) payload(task store.SpecTask, attempt int) map[string]any {
	c.t.Helper()
	payload, is := c.state(task, attempt)["payload"].(map[string]any)
	if !is {
		c.t.Fatalf("payload is %v", c.state(task, attempt)["payload"])
	}
	return payload
}

// noWorkLeft fails the test if the run has left clones.
func (c *codexChain) noWorkLeft() {
	c.t.Helper()
	if left, err := os.ReadDir(c.work); err != nil || len(left) > 0 {
		c.t.Errorf("left in the directory for clones: %v, %v", left, err)
	}
}

// apply applies the patch of the run to a new clone and returns that.
func (c *codexChain) apply(patch string) string {
	c.t.Helper()
	dir := c.t.TempDir()
	gitIn(c.t, dir, "clone", "--quiet", c.address+"/octo/widgets.git", "clone")
	clone := filepath.Join(dir, "clone")
	gitIn(c.t, clone, "apply", "--index", filepath.Join(c.root, patch))
	return clone
}

func TestCodexDoesTheTask(t *testing.T) {
	t.Parallel()
	c := newCodexChain(t, codextest.Always(codextest.Script{
		Commands: []string{
			"mkdir -p docs && echo 'POST /retry' >docs/retry",
			"git mv old/name new-name && chmod +x README && printf '\\000\\002changed' >data",
			// Neither commits nor hooks nor settings in the clone have a part in the patch.
			"git -c user.name=x -c user.email=x@example.org commit -qam wip; printf '#!/bin/sh\\ntouch /tmp/hook-of-a-clone-ran\\n' >.git/hooks-are-here; mkdir -p .git/hooks; for h in pre-commit post-index-change post-checkout; do printf '#!/bin/sh\\ntouch \"'$PWD'/hook-ran\"\\n' >.git/hooks/$h; chmod +x .git/hooks/$h; done; git config core.fsmonitor \"touch $PWD/hook-ran\"",
		},
		Message: "I have documented the endpoint.\nAll done.",
	}))
	context, err := c.submitted()
	if err != nil {
		t.Fatal(err)
	}
	patch, logs := fmt.Sprint(context["codex_patch_path"]), fmt.Sprint(context["codex_logs_path"])
	if patch != c.path()+"/codex_1.patch" || logs != c.path()+"/codex_1.jsonl" || context["codex_summary"] != "I have documented the endpoint.\nAll done." || len(fmt.Sprint(context["codex_base_commit"])) != 40 {
		t.Errorf("context is %v", context)
	}
	run := c.run()
	if run["status"] != "running" || run["phase"] != "submit" || run["codex_task_id"] != context["codex_task_id"] || run["codex_logs_path"] != logs || run["codex_patch_path"] != patch {
		t.Errorf("run is %v", run)
	}
	state, payload := c.state(store.SpecSubmit, 1), c.payload(store.SpecSubmit, 1)
	if state["status"] != "succeeded" || state["message"] != "Codex job submitted" || payload["summary"] != "I have documented the endpoint" || fmt.Sprint(payload["codexRuns"]) != "1" || fmt.Sprint(payload["changedFiles"]) != "5" {
		t.Errorf("row is %v", state)
	}
	rows := c.exec(`SELECT artifact_type, path, size_bytes, digest FROM workflow_artifacts ORDER BY artifact_type`)
	if len(rows) != 2 {
		t.Fatalf("artifacts are %v", rows)
	}
	clone := c.apply(patch)
	for name, want := range map[string]string{"docs/retry": "POST /retry\n", "data": "\x00\x02changed", "new-name": strings.Repeat("a line\n", 30)} {
		if text, err := os.ReadFile(filepath.Join(clone, name)); err != nil || string(text) != want {
			t.Errorf("%s is %.40q, %v", name, text, err)
		}
	}
	if status := gitIn(t, clone, "status", "--short"); strings.Contains(status, "hook-ran") || !strings.Contains(status, "R  old/name -> new-name") {
		t.Errorf("the patch changes\n%s", status)
	}
	if info, err := os.Stat(filepath.Join(clone, "README")); err != nil || info.Mode()&0o100 == 0 {
		t.Errorf("README is %v, %v", info.Mode(), err)
	}
	for line := range strings.Lines(c.file("codex_1.jsonl")) {
		if !json.Valid([]byte(line)) {
			t.Errorf("log has the line %s", line)
		}
	}
	asked := c.model.Requests()[0].Prompt
	for _, part := range []string{"[run " + c.runID + ", attempt 1] T012", "Repository: octo/widgets", "Feature: " + feature, "Use British spelling.", "QUESTION:"} {
		if !strings.Contains(asked, part) {
			t.Errorf("the prompt has no %q:\n%s", part, asked)
		}
	}
	if c.model.Turns() != 1 {
		t.Errorf("%d runs of codex", c.model.Turns())
	}
	c.noWorkLeft()
}

// Each way in which Codex can end has a code of its own, with what to do; the run fails
// and nothing is asked again.
func TestWaysInWhichCodexEnds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		script codextest.Script
		code   string
		text   string
	}{
		"no change":         {codextest.None, "codex_no_change", "tick it in tasks.md"},
		"a question":        {codextest.Question, "codex_question", "Which of the two retry endpoints shall I document?. Retry with the answer"},
		"only a question":   {codextest.Script{Message: "Shall I document the old endpoint?"}, "codex_question", "Shall I document the old endpoint?"},
		"garbage":           {codextest.Rubbish, "codex_garbage", "stream closed"},
		"a stall":           {codextest.Stalls, "codex_stalled", "MM_ORCHESTRATOR_CODEX_STALL_LIMIT"},
		"429":               {codextest.TooManyRequests, "codex_limit", "429 Too Many Requests"},
		"limit of the plan": {codextest.AccountLimit(3600), "codex_limit", "usage limit"},
		"401":               {codextest.Unauthorized, "codex_not_logged_in", "put a new key where MM_ORCHESTRATOR_CODEX_CREDENTIAL points"},
		"failure":           {codextest.Script{Failure: "server_error"}, "codex_model_error", "Retry when the model's server works"},
		"a link to outside": {codextest.Script{Commands: []string{"ln -s /etc/passwd link"}, Message: "done"}, "codex_change_unusable", "leads out of the repository"},
		"a repository":      {codextest.Script{Commands: []string{"git init -q sub && cd sub && touch f && git add f && git -c user.name=x -c user.email=x@example.org commit -qm x"}, Message: "done"}, "codex_change_unusable", "a repository of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			chain := newCodexChain(t, codextest.Always(c.script))
			_, err := chain.submitted()
			chain.fails("RuntimeError", c.text, err)
			if payload := chain.payload(store.SpecSubmit, 1); payload["code"] != c.code || payload["codexOutcome"] == nil || payload["logsPath"] != chain.path()+"/codex_1.jsonl" {
				t.Errorf("payload is %v", payload)
			}
			if run := chain.run(); run["status"] != "failed" || run["finished_at"] == nil || run["codex_patch_path"] != nil {
				t.Errorf("run is %v", run)
			}
			if chain.model.Turns() > 2 { // codex itself repeats a request once here
				t.Errorf("%d requests", chain.model.Turns())
			}
			chain.noWorkLeft()
		})
	}
}

// A model that prints the key finds it masked everywhere, and a change that has it is not
// used.
func TestTheKeyIsInNoFileAndRow(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]codextest.Script{
		"printed":       codextest.PrintsKey,
		"in a file":     {Commands: []string{"echo key=" + codexKey + " >leak"}, Message: "wrote $KEY"},
		"in a binary":   {Commands: []string{"printf '\\000\\001" + codexKey + "\\000' >leak"}, Message: "wrote it"},
		"in base64":     {Commands: []string{"echo " + codexKey + " | base64 >leak"}, Message: "wrote it"},
		"in a name":     {Commands: []string{"touch " + codexKey}, Message: "wrote it"},
		"in a link":     {Commands: []string{"ln -s " + codexKey + " leak"}, Message: "wrote it"},
		"in a question": {Message: "QUESTION: is $KEY right?"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCodexChain(t, codextest.Always(script))
			_, err := c.submitted()
			if err == nil || strings.Contains(err.Error(), codexKey) {
				t.Errorf("error is %v", err)
			}
			if code := c.payload(store.SpecSubmit, 1)["code"]; len(script.Commands) > 0 && name != "printed" && code != "codex_change_has_secret" {
				t.Errorf("code is %v", code)
			}
			for _, table := range []string{"spec_workflow_runs", "spec_workflow_task_states", "workflow_artifacts", "workflow_credential_audits", "mm_orchestrator.spec_claims"} {
				for _, row := range c.exec(`SELECT to_json(r)::text AS row FROM ` + table + ` r`) {
					if strings.Contains(fmt.Sprint(row["row"]), codexKey) {
						t.Errorf("%s has %v", table, row["row"])
					}
				}
			}
			entries, err := os.ReadDir(filepath.Join(c.root, c.path()))
			if err != nil || len(entries) == 0 {
				t.Fatal(err)
			}
			for _, entry := range entries {
				if text := c.file(entry.Name()); strings.Contains(text, codexKey) {
					t.Errorf("%s has the key", entry.Name())
				}
			}
			c.noWorkLeft()
		})
	}
}

// A key that was refused is checked again, and the audit row says so.
func TestARefusedKeyIsInTheAudit(t *testing.T) {
	t.Parallel()
	good := &findings{reports: []preflight.Report{{
		Codex: preflight.Finding{Status: preflight.Valid, Message: "fine"}, GitHub: preflight.Finding{Status: preflight.Valid, Message: "fine"}, Login: preflight.Login{Status: preflight.LoginSkipped, Message: preflight.NoVolume},
	}}}
	c := newCodexChain(t, codextest.Always(codextest.Unauthorized), func(config *Config) { config.Preflight = good })
	_, err := c.submitted()
	c.fails("RuntimeError", "401 Unauthorized", err)
	audit := c.exec(`SELECT codex_status, github_status, codex_message FROM workflow_credential_audits`)[0]
	if audit["codex_status"] != "invalid" || audit["github_status"] != "valid" || !strings.Contains(fmt.Sprint(audit["codex_message"]), "401 Unauthorized") {
		t.Errorf("audit is %v", audit)
	}
}

func TestARepositoryThatCannotBeCloned(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		repository string
		base       string
		class      string
		text       string
	}{
		"none":      {"octo/nothing", "", "RuntimeError", "the repository cannot be cloned"},
		"no branch": {"octo/widgets", "release", "RuntimeError", "has no branch release"},
		"an option": {"--upload-pack=touch /tmp/x", "", "ValueError", "does not have the form owner/name"},
		"a path":    {"../../etc", "", "ValueError", "does not have the form owner/name"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			chain := newCodexChain(t, codextest.Always(codextest.None), func(config *Config) { config.Repositories.Base = c.base })
			chain.exec(`UPDATE spec_workflow_runs SET repository = $1 RETURNING id`, c.repository)
			_, err := chain.submitted()
			chain.fails(c.class, c.text, err)
			if len(chain.model.Requests()) > 0 {
				t.Error("codex was asked")
			}
			chain.noWorkLeft()
		})
	}
}

// interrupted makes a store that fails at the n-th write, as if the worker had died there.
type interrupted struct {
	Runs
	left int
}

var errDied = errors.New("the worker died")

func (i *interrupted) WriteSpec(ctx context.Context, claim store.SpecClaim, write store.SpecWrite) error {
	if i.left--; i.left == 0 {
		return errDied
	}
	return i.Runs.WriteSpec(ctx, claim, write)
}

// Another worker goes on from the last stage that was recorded: Codex is asked again only
// if how it ended was not.
func TestTheNextWorkerGoesOn(t *testing.T) {
	t.Parallel()
	for writes, want := range map[int]struct {
		turns int
		name  string
	}{
		1: {1, "codex_1"},   // before codex was started
		2: {2, "codex_1_2"}, // before its end was recorded
		3: {1, "codex_1"},   // after that
	} {
		t.Run(fmt.Sprint(writes), func(t *testing.T) {
			t.Parallel()
			c := newCodexChain(t, codextest.Always(codextest.Changes("docs/retry", "POST /retry\n")))
			first := c.ok(c.discover(discoverArgs{}))
			alive, dying := c.config.Runs, c.db.Open(t, func(config *store.Config) { config.Worker = "dying@box" })
			c.config.Runs = &interrupted{Runs: dying, left: writes}
			s, prepared := c.speckit(), contextArgs{first}
			if _, err := s.submit(c.task("submit"), prepared); err == nil {
				t.Fatal("the task has ended")
			}
			dying.Close()
			c.config.Runs = alive
			c.ok(c.takeOver(func() (json.RawMessage, error) { return c.speckit().submit(c.task("submit"), prepared) }))
			if turns := c.model.Turns(); turns != want.turns {
				t.Errorf("%d runs of codex, want %d", turns, want.turns)
			}
			if run := c.run(); run["codex_patch_path"] != c.path()+"/"+want.name+".patch" {
				t.Errorf("run is %v", run)
			}
			for _, row := range c.exec(`SELECT path, size_bytes FROM workflow_artifacts WHERE artifact_type = 'codex_logs'`) {
				info, err := os.Stat(filepath.Join(c.root, fmt.Sprint(row["path"])))
				if err != nil || fmt.Sprint(info.Size()) != fmt.Sprint(row["size_bytes"]) {
					t.Errorf("row %v, file %v, %v", row, info, err)
				}
			}
			c.noWorkLeft()
			// A further delivery has the same result, and asks nobody.
			c.ok(c.speckit().submit(c.task("submit"), prepared))
			if turns := c.model.Turns(); turns != want.turns {
				t.Errorf("%d runs of codex after another delivery", turns)
			}
		})
	}
}

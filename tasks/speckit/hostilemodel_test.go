package speckit

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/leaktest"
	"github.com/moonladderstudios/mm-orchestrator/internal/spectest"
	"github.com/moonladderstudios/mm-orchestrator/store"
)

// newScriptChain is a chain whose codex is a shell script: it prints what no real one
// would, and needs no model.
func newScriptChain(t *testing.T, limit int64, script string) *codexChain {
	t.Helper()
	// Not in a directory of the test, all of which are searched for the key: the script may
	// have it.
	dir, err := os.MkdirTemp("", "codex-script-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c := &codexChain{address: server(t), work: t.TempDir(), home: t.TempDir(), program: filepath.Join(dir, "codex"), limit: limit}
	// A program that another test starts meanwhile would keep the file open for writing,
	// and it could not be executed.
	syscall.ForkLock.RLock()
	err = os.WriteFile(c.program, []byte("#!/bin/sh\n"+script), 0o700)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	c.chain = newChain(t, spectest.Tasks(), func(config *Config) { c.configure(t, config, time.Minute) })
	c.ownRun()
	return c
}

// Commands of a model that write without end are ended at the limit of the clone, and
// nothing is left.
func TestAModelThatFillsTheDisk(t *testing.T) {
	t.Parallel()
	const forever = "while :; do sleep 1; done\n"
	for name, script := range map[string]string{
		"one file":                 "cat /dev/zero >large\n" + forever,
		"many files":               "i=0; while :; do i=$((i+1)); : >file-$i; done\n",
		"a temporary file":         "cat /dev/urandom >\"$TMPDIR/large\"\n" + forever,
		"a file of git":            "cat /dev/urandom >.git/objects/large\n" + forever,
		"a file without name":      "exec 3>hidden; rm hidden; cat /dev/zero >&3\n" + forever,
		"in the background":        "(trap '' TERM; cat /dev/zero >large; " + strings.TrimSpace(forever) + ") & wait\n",
		"it ends by itself":        "head -c 20000000 /dev/urandom >large; echo '{\"type\":\"turn.completed\"}'\n",
		"it says that all is well": "echo '{\"type\":\"turn.completed\"}'; cat /dev/zero >large\n" + forever,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newScriptChain(t, 8<<20, script)
			_, err := c.submitted()
			if err == nil || !strings.Contains(err.Error(), "took more than 8 MiB of the disk") || !strings.Contains(err.Error(), "MM_ORCHESTRATOR_CLONE_LIMIT") {
				t.Errorf("error %.500v", err)
			}
			if code := c.payload(store.SpecSubmit, 1)["code"]; code != "codex_clone_too_large" {
				t.Errorf("code %v", code)
			}
			if run := c.run(); run["status"] != "failed" || run["codex_patch_path"] != nil {
				t.Errorf("run %v", run)
			}
			c.noWorkLeft()
		})
	}
}

// What a model, or a program that calls itself codex, may print. The run ends with a clear
// error, the log has a limit, and no spelling of the key is kept.
func TestHostileOutput(t *testing.T) {
	t.Parallel()
	const change, done = "echo changed >README\n", "echo '{\"type\":\"turn.completed\",\"usage\":{\"input_tokens\":1,\"output_tokens\":1}}'\n"
	message := func(text string) string {
		return "printf '%s\\n' '{\"type\":\"item.completed\",\"item\":{\"type\":\"agent_message\",\"text\":\"" + text + "\"}}'\n"
	}
	for name, test := range map[string]struct {
		script string
		// code is that of the failure, "" for none.
		code string
	}{
		"escapes of a terminal":      {change + message(`\\u001b[31mred\\u001b]0;title\\u0007\\u009b2J`) + done, ""},
		"raw escapes":                {change + "printf '\\033[2J\\033]52;c;YWJj\\007\\n'\n" + done, ""},
		"a line without end":         {change + "head -c 200000000 /dev/zero | tr '\\000' x\necho\n" + done, ""},
		"one line of JSON":           {change + "printf '{\"type\":\"item.completed\",\"item\":{\"type\":\"agent_message\",\"text\":\"'; head -c 100000000 /dev/zero | tr '\\000' y; echo '\"}}'\n" + done, ""},
		"no JSON":                    {change + "echo 'I am done'\n", "codex_garbage"},
		"JSON of another kind":       {change + "echo '[1]'; echo '\"turn.completed\"'; echo '{\"type\":7}'; echo '{\"type\":{\"type\":\"turn.completed\"}}'; echo null\n", "codex_garbage"},
		"nested without end":         {change + "head -c 3000000 /dev/zero | tr '\\000' '['; echo\n" + done, ""},
		"bytes that are no text":     {change + "printf '{\"type\":\"item.completed\",\"item\":{\"type\":\"agent_message\",\"text\":\"\\377\\376\\000\"}}\\n'\n" + done, ""},
		"NUL characters":             {change + message(`a\\u0000b`) + done, ""},
		"numbers that are too large": {change + "echo '{\"type\":\"turn.completed\",\"usage\":{\"input_tokens\":1e400,\"output_tokens\":-99999999999999999999}}'\n", "codex_garbage"},
		"an id with a path":          {change + "echo '{\"type\":\"thread.started\",\"thread_id\":\"../../../etc/passwd\"}'\n" + done, ""},
		"a long id":                  {change + "printf '{\"type\":\"thread.started\",\"thread_id\":\"'; head -c 900000 /dev/zero | tr '\\000' i; echo '\"}'\n" + done, ""},
		"only on the standard error": {"head -c 50000000 /dev/zero | tr '\\000' e >&2; exit 3\n", "codex_model_error"},
		"the key in every spelling":  {change + spelled(t) + done, ""},
		"the key as the message":     {change + "printf '{\"type\":\"item.completed\",\"item\":{\"type\":\"agent_message\",\"text\":\"%s\"}}\\n' \"$CODEX_API_KEY\"\n" + done, ""},
		"the key as the thread":      {change + "printf '{\"type\":\"thread.started\",\"thread_id\":\"%s\"}\\n' \"$CODEX_API_KEY\"\n" + done, ""},
		"the key in pieces":          {change + "printf %s \"$CODEX_API_KEY\" | cut -c1-20 | tr -d '\\n'; sleep 0.05; printf '%s\\n' \"$CODEX_API_KEY\" | cut -c21-\n" + done, ""},
		"the key in an error":        {"echo \"{\\\"type\\\":\\\"turn.failed\\\",\\\"error\\\":{\\\"message\\\":\\\"key $CODEX_API_KEY\\\"}}\"; exit 1\n", "codex_model_error"},
		// Where texts are cut, half of a key is left, which no redactor knows.
		"the key at the end of a long message": {change + "printf '{\"type\":\"item.completed\",\"item\":{\"type\":\"agent_message\",\"text\":\"'; head -c 16365 /dev/zero | tr '\\000' a; printf '%s, of %s\"}}\\n' \"$CODEX_API_KEY\" 9\n" + done, ""},
		"the key before much error output":     {"printf '%s ' \"$CODEX_API_KEY\" >&2; head -c 4078 /dev/zero | tr '\\000' e >&2; exit 1\n", "codex_model_error"},
		"the key in much error output":         {"printf 'e%s' \"$CODEX_API_KEY\" >&2; head -c 4078 /dev/zero | tr '\\000' e >&2; exit 1\n", "codex_model_error"},
		"the key on the error output":          {"echo \"$CODEX_API_KEY\" >&2; exit 1\n", "codex_model_error"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newScriptChain(t, 0, test.script)
			_, err := c.submitted()
			payload := c.payload(store.SpecSubmit, 1)
			if code, _ := payload["code"].(string); code != test.code || (err == nil) != (test.code == "") || err != nil && len(err.Error()) > 6000 {
				t.Errorf("code %q, want %q; error %.300v", code, test.code, err)
			}
			search := leaktest.NewSearch(map[string]string{"key": codexKey})
			clean := func(what, text string) {
				if _, piece := search.Find(text); piece != "" {
					t.Errorf("%s has %q of the key", what, piece)
				}
			}
			clean("the error", fmt.Sprint(err))
			for _, table := range []string{"spec_workflow_runs", "spec_workflow_task_states", "workflow_artifacts", "workflow_credential_audits", "mm_orchestrator.spec_claims"} {
				for _, row := range c.exec(`SELECT to_json(r)::text AS row FROM ` + table + ` r`) {
					text := fmt.Sprint(row["row"])
					clean(table, text)
					if len(text) > 50_000 {
						t.Errorf("a row of %s has %d bytes", table, len(text))
					}
				}
			}
			entries, err := os.ReadDir(filepath.Join(c.root, c.path()))
			if err != nil || len(entries) == 0 {
				t.Fatalf("files %v, %v", entries, err)
			}
			for _, entry := range entries {
				info, err := entry.Info()
				if err != nil || info.Size() > 65<<20 {
					t.Errorf("%s has %d bytes, %v", entry.Name(), info.Size(), err)
				}
				if info.Size() < 1<<20 {
					clean(entry.Name(), c.file(entry.Name()))
				}
			}
			c.noWorkLeft()
		})
	}
}

// spelled are commands that print the key as programs may.
func spelled(t *testing.T) string {
	t.Helper()
	var script strings.Builder
	for _, spelling := range leaktest.Spell(codexKey, rand.New(rand.NewPCG(1, 2))) {
		fmt.Fprintf(&script, "cat <<'END'\n%s\nEND\n", spelling.Text)
	}
	return script.String()
}

// The login of Codex itself, which commands of the model can read, is as secret as a key,
// also one that Codex has got while it works.
func TestTheLoginOfCodexIsInNoFileAndRow(t *testing.T) {
	t.Parallel()
	const (
		done  = "echo '{\"type\":\"turn.completed\"}'\n"
		renew = "sed 's/Vq7Rm2Xk/NewLoginNw8Tz/g' \"$CODEX_HOME/auth.json\" >auth.new; mv auth.new \"$CODEX_HOME/auth.json\"\n"
	)
	login := map[string]string{
		"key": "sk-proj-Vq7Rm2Xk4Wn9Jb3Lh", "access": "eyJhbGciOi.eyJVq7Rm2Xk.c2lnbmF0dXJl", "refresh": "rt_Vq7Rm2XkFz6Hs1Pd8", "id": "eyJhbGciOi.aWRVq7Rm2Xk.dG9rZW4",
	}
	for kind, token := range login {
		login["new "+kind] = strings.ReplaceAll(token, "Vq7Rm2Xk", "NewLoginNw8Tz")
	}
	for name, test := range map[string]struct{ script, code string }{
		"printed":              {"echo x >README; cat \"$CODEX_HOME/auth.json\"; echo\n" + done, ""},
		"in an error":          {"cat \"$CODEX_HOME/auth.json\" >&2; exit 1\n", "codex_model_error"},
		"copied":               {"cp \"$CODEX_HOME/auth.json\" login\n" + done, "codex_change_has_secret"},
		"in base64":            {"base64 -w0 \"$CODEX_HOME/auth.json\" >login\n" + done, "codex_change_has_secret"},
		"only the key":         {"grep -o 'sk-proj-[^\"]*' \"$CODEX_HOME/auth.json\" >login\n" + done, "codex_change_has_secret"},
		"only the id token":    {"grep -o '[^\"]*dG9rZW4' \"$CODEX_HOME/auth.json\" >login\n" + done, "codex_change_has_secret"},
		"renewed and printed":  {"echo x >README; " + renew + "cat \"$CODEX_HOME/auth.json\"; echo\n" + done, ""},
		"renewed and copied":   {renew + "cp \"$CODEX_HOME/auth.json\" login\n" + done, "codex_change_has_secret"},
		"the earlier one":      {"cp \"$CODEX_HOME/auth.json\" login; " + renew + done, "codex_change_has_secret"},
		"removed after a copy": {"mv \"$CODEX_HOME/auth.json\" login\n" + done, "codex_change_has_secret"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newScriptChain(t, 0, test.script)
			text := fmt.Sprintf(`{"auth_mode": "chatgpt", "OPENAI_API_KEY": %q, "tokens": {"id_token": %q, "access_token": %q, "refresh_token": %q, "account_id": "account-1"}}`, login["key"], login["id"], login["access"], login["refresh"])
			if err := os.WriteFile(filepath.Join(c.home, "auth.json"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := c.submitted()
			if code, _ := c.payload(store.SpecSubmit, 1)["code"].(string); code != test.code || (err == nil) != (test.code == "") {
				t.Errorf("code %q, want %q; error %.300v", code, test.code, err)
			}
			search := leaktest.NewSearch(login)
			clean := func(what, text string) {
				if kind, piece := search.Find(text); piece != "" {
					t.Errorf("%s has %q of the %s", what, piece, kind)
				}
			}
			clean("the error", fmt.Sprint(err))
			for _, table := range []string{"spec_workflow_runs", "spec_workflow_task_states", "workflow_artifacts", "workflow_credential_audits", "mm_orchestrator.spec_claims"} {
				for _, row := range c.exec(`SELECT to_json(r)::text AS row FROM ` + table + ` r`) {
					clean(table, fmt.Sprint(row["row"]))
				}
			}
			entries, err := os.ReadDir(filepath.Join(c.root, c.path()))
			if err != nil || len(entries) == 0 {
				t.Fatalf("files %v, %v", entries, err)
			}
			for _, entry := range entries {
				clean(entry.Name(), c.file(entry.Name()))
			}
			c.noWorkLeft()
		})
	}
}

package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
)

func TestLogFormats(t *testing.T) {
	t.Parallel()
	redactor := artifacts.NewRedactor(environment{"MY_TOKEN=hunter2hunter2"})
	for _, tt := range []struct {
		format   string
		terminal bool
		want     string
	}{
		{"auto", true, `msg=waited at_most=1m30s error="refused ***"`},
		{"auto", false, `"msg":"waited","at_most":"1m30s","error":"refused ***"}`},
		{"json", true, `"msg":"waited","at_most":"1m30s","error":"refused ***"}`},
		{"text", false, `msg=waited at_most=1m30s error="refused ***"`},
	} {
		var out bytes.Buffer
		log := newLogger(&out, &configuration{LogFormat: tt.format}, tt.terminal, redactor)
		log.Info("waited", "at_most", 90*time.Second, "error", errors.New("refused hunter2hunter2"))
		log.Debug("not shown")
		if !strings.HasSuffix(strings.TrimSpace(out.String()), tt.want) {
			t.Errorf("%+v: %s", tt, out.String())
		}
	}
}

// The settings about secrets and the workspace's .env count for the worker's redactor and
// for the output of every command.
func TestRedactionSettings(t *testing.T) {
	t.Parallel()
	workspace, list, token := t.TempDir(), filepath.Join(t.TempDir(), "list"), filepath.Join(t.TempDir(), "github_token")
	for path, text := range map[string]string{filepath.Join(workspace, ".env"): "APP_TOKEN=from-the-workspace\n", list: "from-the-list\n", token: "from-a-mount\n"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	env := environment{
		"MM_ORCHESTRATOR_REDACT_NAMES=ACME_*", "MM_ORCHESTRATOR_REDACT_FILES=" + list, "MM_ORCHESTRATOR_REDACT_COMMON_WORDS=guard",
		"WORKSPACE_ROOT=" + workspace, "ACME_LOGIN=by-its-name", "DB_PASSWORD=guest", "MM_ORCHESTRATOR_GITHUB_CREDENTIAL=file:" + token,
	}
	for name, redactor := range map[string]*artifacts.Redactor{
		"worker":  artifacts.NewRedactor(env, mustLoad(t, env).redaction()),
		"command": (&program{env: env}).redactor(),
	} {
		const text = "from-the-workspace from-the-list from-a-mount by-its-name a guest password=guest"
		if got, want := redactor.String(text), "*** *** *** *** a guest password=***"; got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	for _, wrong := range []string{"REDACT_NAMES=A=B", "REDACT_NAMES=*", "REDACT_NAMES=[", "REDACT_FILES=relative", "REDACT_COMMON_WORDS=perhaps"} {
		if _, _, err := resolve(environment{"MM_ORCHESTRATOR_" + wrong}, addSettingFlags(pflag.NewFlagSet("test", pflag.ContinueOnError), topicSecrets)); err == nil || !strings.Contains(err.Error(), "MM_ORCHESTRATOR_REDACT_") {
			t.Errorf("%s: %v", wrong, err)
		}
	}
}

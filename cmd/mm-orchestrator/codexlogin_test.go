package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/tasks/speckit"
)

// A worker's logs, rows and artifacts, and its check of a change, know the login of the
// Codex that it starts.
func TestAllRedactorsKnowTheLoginOfCodex(t *testing.T) {
	t.Parallel()
	const token = "rt_9Zq2-unmistakable-refresh-token"
	home := t.TempDir()
	if err := os.WriteFile(filepath.Join(home, "auth.json"), []byte(`{"tokens": {"refresh_token": "`+token+`"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	env := environment{"CODEX_HOME=" + home, "HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")}
	rows, logs := artifacts.NewRedactor(nil), artifacts.NewRedactor(nil)
	config := speckit.Config{Redactor: rows}
	s, err := mustLoad(t, env).addServices(&config, env, slog.New(slog.DiscardHandler), rows, logs)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	config.Codex.Login.Read()
	for name, redactor := range map[string]*artifacts.Redactor{"rows": rows, "logs": logs, "change": config.Codex.Secrets} {
		if text := redactor.String("printed " + token); strings.Contains(text, token) {
			t.Errorf("%s: %s", name, text)
		}
	}
}

package main

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

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

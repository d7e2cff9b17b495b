package orchestrator

import (
	"context"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/artifacts"
	"github.com/moonladderstudios/mm-orchestrator/compose"
)

// silentEngine answers nothing until the request is given up.
type silentEngine struct{ Engine }

func (silentEngine) Containers(ctx context.Context, _, _ string) ([]compose.Container, error) {
	<-ctx.Done()
	return nil, compose.ErrUnreachable
}

// An engine that is slow is not an engine that does not exist: the URL alone is not
// enough then.
func TestASlowEngineIsNoMissingEngine(t *testing.T) {
	t.Parallel()
	s := &stepRun{Orchestrator: &Orchestrator{config: Config{Engine: silentEngine{}, Now: time.Now}}, log: newTestEnv(t).config.Logger}
	dir, err := artifacts.Open(t.TempDir(), artifacts.NewRedactor(nil))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	log, err := dir.Log("verify.log")
	if err != nil {
		t.Fatal(err)
	}
	defer log.Discard()
	j := &judge{run: s, log: log, requirements: requirements{services: []string{"web"}}}
	var l look
	j.see(t.Context(), &l)
	if l.engine || !j.engineWasSeen {
		t.Errorf("seen %t, expected again %t", l.engine, j.engineWasSeen)
	}
}

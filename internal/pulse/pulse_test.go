package pulse_test

import (
	"strings"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/pulse"
)

func TestStuck(t *testing.T) {
	t.Parallel()
	var b pulse.Board
	if err := b.Stuck(0); err != nil {
		t.Errorf("an empty board: %v", err)
	}
	waits := b.Enter("the first", "waiting")
	over, inner := waits.Wait(), waits.Wait()
	inner()
	inner()
	moves := b.Enter("the second", "reading")
	if err := b.Stuck(time.Hour); err != nil {
		t.Errorf("all have moved: %v", err)
	}
	err := b.Stuck(0)
	if err == nil || !strings.Contains(err.Error(), "the second has not moved for 0s, while reading") || strings.Contains(err.Error(), "the first") {
		t.Error(err)
	}
	moves.Move("writing")
	over()
	if err := b.Stuck(0); err == nil || !strings.Contains(err.Error(), "while writing; the first") {
		t.Error(err)
	}
	for range 3 {
		b.Enter("another", "counting")
	}
	if err := b.Stuck(0); err == nil || !strings.Contains(err.Error(), "so have 2 more") {
		t.Error(err)
	}
	moves.Leave()
	if pulse.Of(waits.Context(t.Context())) != waits {
		t.Error("the context does not carry the part")
	}
	none := pulse.Of(t.Context())
	none.Move("nothing")
	none.Wait()()
	none.Leave()
	waits.Leave()
	if err := b.Stuck(0); err == nil || strings.Contains(err.Error(), "the second") {
		t.Error(err)
	}
}

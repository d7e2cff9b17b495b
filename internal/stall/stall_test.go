package stall_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
)

// What should have ended by itself and has not is stuck.
func TestAWaitWithALimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d stall.Detector
		a := d.Start("a task", "working")
		defer a.End()
		over := a.WaitAtMost(time.Hour)
		time.Sleep(59 * time.Minute)
		if err := d.Stuck(time.Second); err != nil {
			t.Errorf("within the limit: %v", err)
		}
		time.Sleep(2 * time.Minute)
		if err := d.Stuck(time.Minute); err == nil || !strings.Contains(err.Error(), "a task has made no progress for 1m0s, while working") {
			t.Errorf("after the limit: %v", err)
		}
		over() // ends it once
		inner := a.WaitAtMost(time.Hour)
		defer inner()
		if err := d.Stuck(0); err != nil {
			t.Errorf("during the next wait: %v", err)
		}
	})
}

func TestStuck(t *testing.T) {
	t.Parallel()
	var d stall.Detector
	if err := d.Stuck(0); err != nil {
		t.Errorf("without activities: %v", err)
	}
	waiting := d.Start("the first", "waiting")
	over, inner := waiting.Wait(), waiting.Wait()
	inner()
	inner()
	working := d.Start("the second", "reading")
	if err := d.Stuck(time.Hour); err != nil {
		t.Errorf("all have made progress: %v", err)
	}
	err := d.Stuck(0)
	if err == nil || !strings.Contains(err.Error(), "the second has made no progress for 0s, while reading") || strings.Contains(err.Error(), "the first") {
		t.Error(err)
	}
	working.Progress("writing")
	over()
	if err := d.Stuck(0); err == nil || !strings.Contains(err.Error(), "while writing; the first") {
		t.Error(err)
	}
	for range 3 {
		d.Start("another", "counting")
	}
	if err := d.Stuck(0); err == nil || !strings.Contains(err.Error(), "nor have 2 more") {
		t.Error(err)
	}
	working.End()
	if stall.FromContext(waiting.Context(t.Context())) != waiting {
		t.Error("the context does not carry the activity")
	}
	none := stall.FromContext(t.Context())
	none.Progress("nothing")
	none.Wait()()
	none.End()
	waiting.End()
	if err := d.Stuck(0); err == nil || strings.Contains(err.Error(), "the second") {
		t.Error(err)
	}
}

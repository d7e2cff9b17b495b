package worker

import (
	"testing"
	"time"
)

func TestBackoffDoublesUpToItsCap(t *testing.T) {
	for failures, want := range map[int]time.Duration{
		1: 50 * time.Millisecond, 2: 100 * time.Millisecond, 5: 800 * time.Millisecond, 8: 6400 * time.Millisecond,
		9: backoffMax, 1 << 20: backoffMax,
	} {
		if got := backoff(failures); got != want {
			t.Errorf("after %d failures: %v, want %v", failures, got, want)
		}
	}
	for range 1000 {
		if d := jitter(time.Second); d < time.Second/2 || d > time.Second {
			t.Fatalf("jitter gave %v", d)
		}
	}
}

func TestWorkerRedialsAtLeastEverySecond(t *testing.T) {
	for failures := 1; failures <= 1000; failures++ {
		if d := redialPause(failures); d <= 0 || d > time.Second {
			t.Fatalf("after %d failures the pause is %v, want at most 1 s", failures, d)
		}
	}
}

func TestRecentOutcomesAreBounded(t *testing.T) {
	a := newExecutions(2)
	d := &delivery{redelivered: true}
	for _, id := range []string{"a", "b", "c"} {
		e, known, _ := a.begin(d, identity{id: id})
		if known != matchNone {
			t.Fatalf("%s is already known", id)
		}
		a.end(e, settlementAck)
	}
	if known, _ := a.attach(d, identity{id: "a"}); known != matchNone {
		t.Error("the oldest is still known")
	}
	if known, v := a.attach(d, identity{id: "c"}); known != matchEnded || v != settlementAck {
		t.Errorf("the newest is %v %v", known, v)
	}
	if known, _ := a.attach(&delivery{}, identity{id: "c"}); known != matchNone {
		t.Error("a message that was sent again counts as a redelivery")
	}
	set := newIDSet(2)
	for _, id := range []string{"a", "b", "c", "c"} {
		set.add(id)
	}
	if set.has("a") || !set.has("b") || !set.has("c") || len(set.index) != 2 {
		t.Errorf("set is %v", set.index)
	}
}

package worker

import (
	"testing"
	"time"
)

func TestBackoffDoublesUpToItsCap(t *testing.T) {
	for failures, want := range map[int]time.Duration{
		1: 50 * time.Millisecond, 2: 100 * time.Millisecond, 5: 800 * time.Millisecond, 8: 6400 * time.Millisecond,
		9: backoffMost, 1 << 20: backoffMost,
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

func TestWorkerLooksForItsBrokerEverySecondAtLeast(t *testing.T) {
	for failures := 1; failures <= 1000; failures++ {
		if d := redialPause(failures); d <= 0 || d > time.Second {
			t.Fatalf("after %d failures it waits %v, want at most 1 s", failures, d)
		}
	}
}

func TestRecentOutcomesAreBounded(t *testing.T) {
	a := newAttachments(2)
	d := &delivery{redelivered: true}
	for _, id := range []string{"a", "b", "c"} {
		e, arrival, _ := a.begin(d, identity{id: id})
		if arrival != arrivalNew {
			t.Fatalf("%s is known", id)
		}
		a.end(e, verdictAck)
	}
	if arrival, _ := a.arrive(d, identity{id: "a"}); arrival != arrivalNew {
		t.Error("the oldest is still known")
	}
	if arrival, v := a.arrive(d, identity{id: "c"}); arrival != arrivalEnded || v != verdictAck {
		t.Errorf("the newest is %v %v", arrival, v)
	}
	if arrival, _ := a.arrive(&delivery{}, identity{id: "c"}); arrival != arrivalNew {
		t.Error("a message that was sent anew is taken for a repeated delivery")
	}
	set := newIDSet(2)
	for _, id := range []string{"a", "b", "c", "c"} {
		set.add(id)
	}
	if set.has("a") || !set.has("b") || !set.has("c") || len(set.index) != 2 {
		t.Errorf("set is %v", set.index)
	}
}

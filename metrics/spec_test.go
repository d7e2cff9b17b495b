package metrics_test

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/metrics"
)

// The datagrams of the Spec workflow are MoonMind's, with DogStatsD tags.
func TestSpecDatagrams(t *testing.T) {
	t.Parallel()
	s := listen(t, netip.MustParseAddrPort("127.0.0.1:0"))
	statsd := newStatsD(t, metrics.StatsDConfig{Host: "127.0.0.1", Port: int(s.addr().Port()), Prefix: "moonmind.spec_workflow."})
	start(t, statsd)
	r, err := metrics.NewSpecRecorder(statsd, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.SpecStarted("submit_codex_job", 2, true)
	r.SpecFinished("submit_codex_job", 2, true, 1500*time.Microsecond)
	r.SpecStarted("odd|name#", 1, false)
	r.SpecFinished("odd|name#", 1, false, time.Second)
	want := []string{
		"moonmind.spec_workflow.task_start:1|c|#task:submit_codex_job,attempt:2,status:running,retry:True",
		"moonmind.spec_workflow.task_success:1|c|#task:submit_codex_job,attempt:2,status:success",
		"moonmind.spec_workflow.task_duration:1.500000|ms|#task:submit_codex_job,attempt:2,status:success",
		"moonmind.spec_workflow.task_start:1|c|#task:odd_name_,attempt:1,status:running,retry:False",
		"moonmind.spec_workflow.task_failure:1|c|#task:odd_name_,attempt:1,status:failure",
		"moonmind.spec_workflow.task_duration:1000.000000|ms|#task:odd_name_,attempt:1,status:failure",
	}
	if got := s.receive(len(want)); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

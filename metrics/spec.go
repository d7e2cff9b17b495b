package metrics

import (
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	nameSpecStarted = "mm_orchestrator_spec_tasks_started_total"
	nameSpecSeconds = "mm_orchestrator_spec_task_duration_seconds"
)

var specLabels = []string{"discover_next_phase", "submit_codex_job", "apply_and_publish"}

// SpecRecorder counts the tasks of the Spec workflow, in StatsD with MoonMind's names
// and tags (docs/spec-workflow.md#metrics), and in Prometheus. Its methods may be
// called from any goroutine; they neither block nor fail.
type SpecRecorder struct {
	statsd  *StatsD
	started *prometheus.CounterVec
	seconds *prometheus.HistogramVec
}

// NewSpecRecorder returns a recorder that sends to statsd, whose prefix is that of
// the Spec workflow, and registers its Prometheus metrics with reg. Either may be
// nil.
func NewSpecRecorder(statsd *StatsD, reg prometheus.Registerer) (*SpecRecorder, error) {
	r := &SpecRecorder{
		statsd: statsd,
		started: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: nameSpecStarted, Help: "Tasks of the Spec workflow that were started, by task.",
		}, []string{"task"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: nameSpecSeconds, Help: "How long a task of the Spec workflow took, by task and status (succeeded or failed).", Buckets: durationBuckets,
		}, []string{"task", "status"}),
	}
	if reg == nil {
		return r, nil
	}
	for _, c := range []prometheus.Collector{r.started, r.seconds} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// SpecStarted counts the start of a task.
func (r *SpecRecorder) SpecStarted(task string, attempt int, retry bool) {
	r.started.WithLabelValues(oneOf(specLabels, task)).Inc()
	again := "False"
	if retry {
		again = "True"
	}
	r.statsd.enqueue("task_start", "1|c"+specTags(task, attempt, "running")+",retry:"+again)
}

// SpecFinished counts the end of a task and records its duration.
func (r *SpecRecorder) SpecFinished(task string, attempt int, succeeded bool, took time.Duration) {
	name, status, label := "task_failure", "failure", "failed"
	if succeeded {
		name, status, label = "task_success", "success", "succeeded"
	}
	r.seconds.WithLabelValues(oneOf(specLabels, task), label).Observe(took.Seconds())
	tags := specTags(task, attempt, status)
	r.statsd.enqueue(name, "1|c"+tags)
	ms := float64(took) / float64(time.Millisecond)
	r.statsd.enqueue("task_duration", strconv.FormatFloat(ms, 'f', 6, 64)+"|ms"+tags)
}

// specTags are DogStatsD tags, in MoonMind's order.
func specTags(task string, attempt int, status string) string {
	return "|#task:" + tagValue(task) + ",attempt:" + strconv.Itoa(attempt) + ",status:" + status
}

// tagValue replaces the characters that MoonMind replaces.
func tagValue(text string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.', r == '-':
			return r
		}
		return '_'
	}, text)
}

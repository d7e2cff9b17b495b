package metrics

import (
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// The Prometheus metrics of runs and steps. Those of deliveries, publishing and
// connections are in package worker.
const (
	nameBuildInfo     = "mm_orchestrator_build_info"
	nameStepsStarted  = "mm_orchestrator_steps_started_total"
	nameStepSeconds   = "mm_orchestrator_step_duration_seconds"
	nameRunStatuses   = "mm_orchestrator_run_status_total"
	nameRunSeconds    = "mm_orchestrator_run_duration_seconds"
	nameStatsDDropped = "mm_orchestrator_statsd_dropped_total"
	namePaused        = "mm_orchestrator_paused"
)

// Label values come from these sets only; any other value in a message or row
// becomes "other". Otherwise a hostile message could create any number of time
// series.
var (
	stepLabels   = []string{"analyze", "patch", "build", "restart", "verify", "rollback"}
	statusLabels = []string{"pending", "running", "awaiting_approval", "succeeded", "failed", "rolled_back"}
)

// durationBuckets cover a short git command and a build of an hour, in seconds.
var durationBuckets = []float64{0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600}

// Recorder counts runs and steps, both in StatsD and in Prometheus, and says in
// Prometheus whether the queue is paused. Its methods
// may be called from any goroutine and on a nil *Recorder; they neither block
// nor fail.
type Recorder struct {
	statsd *StatsD

	stepsStarted *prometheus.CounterVec
	stepSeconds  *prometheus.HistogramVec
	runStatuses  *prometheus.CounterVec
	runSeconds   *prometheus.HistogramVec
	paused       prometheus.Gauge
}

// NewRecorder returns a recorder that sends to statsd and registers its
// Prometheus metrics with reg. Either may be nil.
func NewRecorder(statsd *StatsD, reg prometheus.Registerer) (*Recorder, error) {
	r := &Recorder{
		statsd: statsd,
		stepsStarted: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: nameStepsStarted, Help: "Steps started, by step.",
		}, []string{"step"}),
		stepSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: nameStepSeconds, Help: "How long a step took, by step and status (succeeded or failed).", Buckets: durationBuckets,
		}, []string{"step", "status"}),
		runStatuses: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: nameRunStatuses, Help: "Runs that entered a status, by status. The same as StatsD's runs.status.*.",
		}, []string{"status"}),
		runSeconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: nameRunSeconds, Help: "How long a run took from its first step to its end, by final status.", Buckets: durationBuckets,
		}, []string{"status"}),
	}
	r.paused = prometheus.NewGauge(prometheus.GaugeOpts{
		Name: namePaused, Help: "1 while the queue is paused (mm-orchestrator pause), otherwise 0.",
	})
	if reg == nil {
		return r, nil
	}
	for _, c := range []prometheus.Collector{r.stepsStarted, r.stepSeconds, r.runStatuses, r.runSeconds, r.paused} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// RegisterDropped registers a metric of what all of a process's StatsD have dropped; each
// may be nil.
func RegisterDropped(reg prometheus.Registerer, all ...*StatsD) error {
	return reg.Register(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: nameStatsDDropped, Help: "StatsD datagrams that were not sent: the server could not be reached, or the queue was full.",
	}, func() float64 {
		var dropped uint64
		for _, s := range all {
			dropped += s.Dropped()
		}
		return float64(dropped)
	}))
}

// StepStarted counts the start of a step.
func (r *Recorder) StepStarted(step string) {
	if r == nil {
		return
	}
	r.statsd.StepStarted(step)
	r.stepsStarted.WithLabelValues(oneOf(stepLabels, step)).Inc()
}

// StepFinished counts the end of a step and records its duration.
func (r *Recorder) StepFinished(step string, succeeded bool, took time.Duration) {
	if r == nil {
		return
	}
	r.statsd.StepFinished(step, succeeded, took)
	status := "failed"
	if succeeded {
		status = "succeeded"
	}
	r.stepSeconds.WithLabelValues(oneOf(stepLabels, step), status).Observe(took.Seconds())
}

// RunStatus counts a run that has entered a status but not ended: running when
// its first step starts, failed when a rollback will follow.
func (r *Recorder) RunStatus(status string) {
	if r == nil {
		return
	}
	r.statsd.RunStatus(status)
	r.runStatuses.WithLabelValues(oneOf(statusLabels, status)).Inc()
}

// RunFinished counts the end of a run and records its duration.
func (r *Recorder) RunFinished(status string, took time.Duration) {
	if r == nil {
		return
	}
	r.statsd.RunFinished(status, took)
	r.runStatuses.WithLabelValues(oneOf(statusLabels, status)).Inc()
	r.runSeconds.WithLabelValues(oneOf(statusLabels, status)).Observe(took.Seconds())
}

// Paused records whether the queue is paused. MoonMind has no StatsD metric for it.
func (r *Recorder) Paused(paused bool) {
	if r == nil {
		return
	}
	value := 0.0
	if paused {
		value = 1
	}
	r.paused.Set(value)
}

func oneOf(known []string, label string) string {
	if slices.Contains(known, label) {
		return label
	}
	return "other"
}

// NewRegistry returns a Prometheus registry with the standard metrics of a Go
// process and the version of this program.
func NewRegistry(version string) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: nameBuildInfo, Help: "1, with the version as label.", ConstLabels: prometheus.Labels{"version": version},
	})
	info.Set(1)
	reg.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return reg
}

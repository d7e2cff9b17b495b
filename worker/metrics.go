package worker

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// The values of the label outcome.
const (
	outcomeSuccess     = "success"
	outcomeFailure     = "failure"
	outcomeRetry       = "retry"
	outcomeReject      = "reject"
	outcomeIgnore      = "ignore"
	outcomeRevoked     = "revoked"
	outcomeExpired     = "expired"
	outcomeInterrupted = "interrupted"
)

// The values of the label why of messages that no handler has seen.
const (
	badUnknown      = "not_a_task"
	badBody         = "body"
	badCompression  = "compression"
	badContentType  = "content_type"
	badShape        = "shape"
	badID           = "id"
	badArguments    = "arguments"
	badTime         = "time"
	badUnregistered = "unregistered"
	badPanic        = "panic"
)

// badLabel maps the reasons of package protocol to the closed set above.
func badLabel(reason protocol.Reason) string {
	switch reason {
	case protocol.ReasonUnknown:
		return badUnknown
	case protocol.ReasonBody:
		return badBody
	case protocol.ReasonCompression:
		return badCompression
	case protocol.ReasonContentType, protocol.ReasonNoContentType:
		return badContentType
	case protocol.ReasonNoID:
		return badID
	case protocol.ReasonArgs, protocol.ReasonKwargs:
		return badArguments
	case protocol.ReasonETA, protocol.ReasonExpires:
		return badTime
	}
	return badShape
}

// workerMetrics are the collectors of one worker. The label task takes only
// registered names, so all label sets are closed.
type workerMetrics struct {
	received   prometheus.Counter
	bad        *prometheus.CounterVec // why
	tasks      *prometheus.CounterVec // task, outcome
	seconds    *prometheus.HistogramVec
	running    prometheus.Gauge
	held       prometheus.Gauge
	abandoned  prometheus.Gauge
	attached   prometheus.Counter
	published  prometheus.Counter
	faults     *prometheus.CounterVec // in: publish, store
	handedBack prometheus.Counter
	connected  prometheus.Gauge
	reconnects prometheus.Counter
}

func newMetrics(registerer prometheus.Registerer) (*workerMetrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &workerMetrics{
		received: counter("celery_worker_messages_received_total", "Messages that the broker delivered."),
		bad: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "celery_worker_bad_messages_total", Help: "Messages that no handler could be given, by cause."}, []string{"why"}),
		tasks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "celery_worker_tasks_total", Help: "Tasks that ended, by name and outcome."}, []string{"task", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "celery_worker_task_duration_seconds", Help: "Time that handlers took.",
			Buckets: []float64{.005, .025, .1, .5, 1, 5, 15, 60, 300, 900, 3600}}, []string{"task"}),
		running:    gauge("celery_worker_tasks_running", "Tasks that hold a slot."),
		held:       gauge("celery_worker_messages_held", "Messages that wait for their ETA or a pause to end."),
		abandoned:  gauge("celery_worker_handlers_abandoned", "Handlers that go on after their hard time limit and keep a slot."),
		attached:   counter("celery_worker_deliveries_attached_total", "Repeated deliveries of a task that was running or had just ended here."),
		published:  counter("celery_worker_messages_published_total", "Messages that the broker confirmed."),
		faults:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "celery_worker_settle_faults_total", Help: "Failed attempts to publish or to store."}, []string{"in"}),
		handedBack: counter("celery_worker_messages_handed_back_total", "Messages returned to the broker because their outcome could not be published or stored."),
		connected:  gauge("celery_worker_connected", "1 while connected and consuming."),
		reconnects: counter("celery_worker_connections_lost_total", "Broker connections, channels and consumers that were lost."),
	}
	if registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.received, m.bad, m.tasks, m.seconds, m.running, m.held, m.abandoned, m.attached,
		m.published, m.faults, m.handedBack, m.connected, m.reconnects} {
		if err := registerer.Register(c); err != nil {
			var already prometheus.AlreadyRegisteredError
			if errors.As(err, &already) {
				err = errors.New("another worker already uses this registerer: wrap it with labels that tell the workers apart")
			}
			return nil, err
		}
	}
	return m, nil
}

func (m *workerMetrics) taskEnded(task, outcome string, took time.Duration) {
	m.tasks.WithLabelValues(task, outcome).Inc()
	m.seconds.WithLabelValues(task).Observe(took.Seconds())
}

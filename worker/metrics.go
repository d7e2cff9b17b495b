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
	outcomeReplaced    = "replaced"
)

// The values of the label why of messages for which no handler was called.
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
	delayed    prometheus.Gauge
	givenUp    prometheus.Gauge
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
		received: counter("celery_worker_messages_received_total", "Messages that the broker delivered to this worker."),
		bad: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "celery_worker_bad_messages_total", Help: "Messages for which no handler could be called, by cause."}, []string{"why"}),
		tasks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "celery_worker_tasks_total", Help: "Tasks that ended, by name and outcome."}, []string{"task", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "celery_worker_task_duration_seconds", Help: "Duration of handler calls.",
			Buckets: []float64{.005, .025, .1, .5, 1, 5, 15, 60, 300, 900, 3600}}, []string{"task"}),
		running:    gauge("celery_worker_tasks_running", "Tasks that occupy a slot."),
		delayed:    gauge("celery_worker_messages_held", "Messages that wait for their ETA or for the end of a pause, without a slot."),
		givenUp:    gauge("celery_worker_handlers_abandoned", "Handlers that ignore their hard time limit or the shutdown, and occupy a slot."),
		attached:   counter("celery_worker_deliveries_attached_total", "Repeated deliveries of a task that was running or had recently ended in this worker."),
		published:  counter("celery_worker_messages_published_total", "Messages that the broker confirmed."),
		faults:     prometheus.NewCounterVec(prometheus.CounterOpts{Name: "celery_worker_settle_faults_total", Help: "Failed attempts to publish or store an outcome."}, []string{"in"}),
		handedBack: counter("celery_worker_messages_handed_back_total", "Messages that were requeued because their outcome could not be published or stored."),
		connected:  gauge("celery_worker_connected", "1 while the worker is connected and consumes every queue, else 0."),
		reconnects: counter("celery_worker_connections_lost_total", "Broker connections, channels and consumers that were lost."),
	}
	if registerer == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.received, m.bad, m.tasks, m.seconds, m.running, m.delayed, m.givenUp, m.attached,
		m.published, m.faults, m.handedBack, m.connected, m.reconnects} {
		if err := registerer.Register(c); err != nil {
			var already prometheus.AlreadyRegisteredError
			if errors.As(err, &already) {
				err = errors.New("another worker already uses this registerer: wrap it with labels that distinguish the workers")
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

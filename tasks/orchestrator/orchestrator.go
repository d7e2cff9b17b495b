package orchestrator

import (
	"log/slog"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/change"
	"github.com/moonladderstudios/mm-orchestrator/internal/stall"
	"github.com/moonladderstudios/mm-orchestrator/policy"
)

// Orchestrator executes the steps of runs.
type Orchestrator struct {
	config Config
	log    *slog.Logger
	runner *runner
	client healthClient
	// policy has the settings for all services.
	policy *policy.Policy
	// broker is nil before Register.
	broker Broker
	stalls stall.Detector
	// answers are those of git about the workspace's repository.
	answers  *change.Answers
	sweeping sweeping
	// sinceStart is a monotonic clock. The sweep measures LostGrace with it.
	sinceStart func() time.Duration
}

// New returns an Orchestrator for a valid config. It uses neither files nor
// network.
func New(config Config) (*Orchestrator, error) {
	config = config.WithDefaults()
	if err := config.Validate(); err != nil {
		return nil, err
	}
	started := time.Now()
	return &Orchestrator{
		config: config,
		log:    slog.New(config.Redactor.Handler(config.Logger.Handler())),
		runner: newRunner(config),
		client: newHealthClient(config.Environ),
		policy: config.effectivePolicy(), answers: new(change.Answers),

		sinceStart: func() time.Duration { return time.Since(started) },
	}, nil
}

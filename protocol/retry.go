package protocol

import (
	"encoding/json"
	"time"
)

// RetryOptions say how a task runs again.
type RetryOptions struct {
	// ETA is when; zero means at once.
	ETA time.Time
	// Now is the moment from which the expiration property counts.
	Now time.Time
	// Args and Kwargs replace those of the message unless nil.
	Args   []json.RawMessage
	Kwargs Object
	// Queue, if set, is where the retry goes through the default exchange,
	// instead of where the message came from.
	Queue string
	// KeepParent leaves a missing parent_id missing, as Celery's
	// retry_on_worker_lost does; an ordinary retry gets the task's own id.
	KeepParent bool
}

// RetryMessage is the message that runs m's task again under the same id with
// retries + 1 (contract 3.4). Exchange and RoutingKey are filled in.
func RetryMessage(m *Message, o RetryOptions) (Publishing, error) { return retryMessage(m, o) }

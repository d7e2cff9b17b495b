package worker

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/moonladderstudios/mm-orchestrator/protocol"
)

// Retry is returned by a handler to run the task again later. The worker stores the state
// RETRY, publishes a message with the same task id, a retry count that is one higher, and
// an ETA, and acknowledges the old message (docs/celery.md#retries).
//
// [RetryIn] makes one with a pause of its own. The zero Retry takes its pause from the
// task's [RetryPolicy]. Without a policy that is Celery's default_retry_delay, 180 s.
//
// A Retry is a value: its methods return a changed copy.
type Retry struct {
	pause    time.Duration
	pauseSet bool
	most     int // negative means no limit
	mostSet  bool
	reason   error
	queue    string
	args     []json.RawMessage // nil keeps those of the message
	kwargs   protocol.Object   // likewise
	err      error             // an argument that has no form in Python's JSON
}

const (
	defaultRetries    = 3                 // Celery's max_retries
	defaultRetryPause = 180 * time.Second // Celery's default_retry_delay
	defaultBackoffMax = 10 * time.Minute  // Celery's retry_backoff_max
)

// RetryIn runs the task again after a pause. Zero or less means at once: the message
// has no ETA.
func RetryIn(pause time.Duration) Retry {
	return Retry{pause: max(pause, 0), pauseSet: true}
}

// Max limits the retries of the task, however they were asked for. Beyond n the task
// fails with the reason, or with MaxRetriesExceededError without one. Max(0) means no
// retry: the task fails now. A negative n means no limit. Defaults to that of the
// task's [RetryPolicy], or to 3, as in Celery.
func (r Retry) Max(n int) Retry {
	r.most, r.mostSet = n, true
	return r
}

// Because sets the failure that is the reason. The row of the state RETRY has it, and so
// has the failure when no retry is left.
func (r Retry) Because(err error) Retry {
	r.reason = err
	return r
}

// Queue publishes the retry to a queue through the default exchange. Defaults to the
// exchange and the routing key of the original message.
func (r Retry) Queue(name string) Retry {
	r.queue = name
	return r
}

// Args replaces the positional arguments. As in Celery, a keyword argument of the message
// is dropped if its parameter is now given by position. For a handler made by [Typed] or
// [Handle] the worker knows the parameters; for any other it drops none.
func (r Retry) Args(args ...any) Retry {
	r.args = make([]json.RawMessage, len(args))
	for i, arg := range args {
		text, err := protocol.EncodeJSON(arg)
		if err != nil && r.err == nil {
			r.err = fmt.Errorf("argument %d of the retry: %w", i+1, err)
		}
		r.args[i] = text
	}
	return r
}

// Kwargs replaces the keyword arguments. As in Celery, one that names a parameter which
// the message gives by position takes that place. For a handler that is not made by
// [Typed] or [Handle] the positional arguments stay as they are.
func (r Retry) Kwargs(kwargs map[string]any) Retry {
	r.kwargs = protocol.Object{}
	for _, name := range slices.Sorted(maps.Keys(kwargs)) {
		text, err := protocol.EncodeJSON(kwargs[name])
		if err != nil && r.err == nil {
			r.err = fmt.Errorf("argument %s of the retry: %w", name, err)
		}
		r.kwargs = append(r.kwargs, protocol.Member{Key: name, Value: text})
	}
	return r
}

// Pause is how long the retry waits; zero means at once. In an [Outcome] it is what the
// task's policy has chosen.
func (r Retry) Pause() time.Duration {
	if !r.pauseSet {
		return defaultRetryPause
	}
	return r.pause
}

// Reason is the failure that is the reason, or nil.
func (r Retry) Reason() error { return r.reason }

// Error is the text of Celery's Retry, such as "Retry in 180s", with the text of the
// reason.
func (r Retry) Error() string {
	text := fmt.Sprintf("Retry in %vs", r.Pause().Seconds())
	if r.reason != nil {
		text += ": " + r.reason.Error()
	}
	return text
}

// Unwrap returns the reason.
func (r Retry) Unwrap() error { return r.reason }

// Message returns the message that runs the task again, for a program that publishes
// it itself. now is the time from which the pause counts.
func (r Retry) Message(m *protocol.Message, now time.Time) (protocol.Publishing, error) {
	options := protocol.RetryOptions{Now: now, Queue: r.queue, Args: r.args, Kwargs: r.kwargs}
	if pause := r.Pause(); pause > 0 {
		options.ETA = now.Add(pause)
	}
	return protocol.RetryMessage(m, options)
}

// bind decides about arguments as Celery's Task.retry does when only the positional or
// only the keyword ones are replaced. positional are the names of the parameters.
func (r Retry) bind(m *protocol.Message, positional []string) Retry {
	switch {
	case r.args != nil && r.kwargs == nil && len(m.Kwargs) > 0:
		taken := positional[:min(len(r.args), len(positional))]
		r.kwargs = slices.DeleteFunc(slices.Clone(m.Kwargs), func(given protocol.Member) bool {
			return slices.Contains(taken, given.Key)
		})
	case r.kwargs != nil && r.args == nil && len(m.Args) > 0:
		args := slices.Clone(m.Args)
		r.kwargs = slices.DeleteFunc(slices.Clone(r.kwargs), func(given protocol.Member) bool {
			i := slices.Index(positional, given.Key)
			if i < 0 || i >= len(args) {
				return false
			}
			args[i] = given.Value
			return true
		})
		r.args = args
	}
	return r
}

// RetryPolicy says which failures of a task are retried, how often and after which
// pauses: Celery's autoretry_for, dont_autoretry_for, retry_backoff, retry_backoff_max,
// retry_jitter and max_retries.
//
//   - Wrong arguments, a hard time limit and a shutdown are never retried.
//   - What a handler says itself by [Retry], [Reject], [Ignore] or [Replace] takes
//     precedence.
//   - When no retry is left, the task fails with the last error.
type RetryPolicy struct {
	// For says which errors are retried: see [ErrorIs] and [ErrorAs]. Nil means all,
	// also a panic and a soft time limit.
	For func(error) bool
	// Never says which of them are not retried all the same. Nil means none.
	Never func(error) bool
	// Max is the largest number of retries. Defaults to 3; negative means no limit.
	Max int
	// Pause is the time before each retry, if Backoff is 0. Defaults to 180 s; negative
	// means at once.
	Pause time.Duration
	// Backoff is the time before the first retry. It is doubled for each further one, up
	// to BackoffMax. Defaults to 0: every pause is Pause.
	Backoff time.Duration
	// BackoffMax is the longest pause of a back-off. Defaults to 10 min.
	BackoffMax time.Duration
	// NoJitter makes the pauses of a back-off exact. Otherwise each is a random time
	// between zero and what Backoff says, as in Celery, so that tasks that have failed
	// together do not come back together.
	NoJitter bool
}

// AutoRetry gives the task a policy for retries. Without one, a failure is final.
func AutoRetry(policy RetryPolicy) TaskOption {
	return func(r *registration) { r.retries = &policy }
}

// retry returns the retry for an error that a handler has returned, and whether there
// is to be one. It calls the program's functions.
func (p *RetryPolicy) retry(err error) (Retry, bool) {
	if typed, ok := asValue[Error](err); p == nil || ok && typed.wrongArguments {
		return Retry{}, false
	}
	switch {
	case p.For != nil && !p.For(err), p.Never != nil && p.Never(err):
		return Retry{}, false
	}
	return Retry{reason: err}, true
}

// complete fills in what a retry leaves to the policy, which may be nil.
func (r Retry) complete(p *RetryPolicy, retries int) Retry {
	if p == nil {
		p = &RetryPolicy{}
	}
	if !r.mostSet {
		r.most, r.mostSet = p.Max, true
		if p.Max == 0 {
			r.most = defaultRetries
		}
	}
	if !r.pauseSet {
		r.pause, r.pauseSet = p.pauseBefore(retries), true
	}
	return r
}

// pauseBefore is the pause before the retry that follows the given number of retries.
func (p *RetryPolicy) pauseBefore(retries int) time.Duration {
	if p.Backoff <= 0 {
		if p.Pause == 0 {
			return defaultRetryPause
		}
		return max(p.Pause, 0)
	}
	most := p.BackoffMax
	if most <= 0 {
		most = defaultBackoffMax
	}
	pause := min(p.Backoff, most)
	for range min(max(retries, 0), 62) {
		if pause > most/2 {
			pause = most
			break
		}
		pause *= 2
	}
	if p.NoJitter {
		return pause
	}
	return rand.N(pause + 1)
}

package worker

import (
	"container/list"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// RateLimit limits how often this worker starts the task: Celery's rate_limit, such as
// "10/m" for ten a minute. The units are s, m and h, and without one it is seconds. "0" is
// no limit. RateLimit panics when the text is no rate.
//
//   - Two starts are at least the interval apart, here 6 s. Celery may start several at
//     once after a time in which no slot was free.
//   - Messages beyond the limit wait, unacknowledged and without a slot, in the order in
//     which they came. Others are delivered in their place, up to Config.MaxETA of them.
//   - The limit is for each worker. A retry counts as a start, but a repeated delivery of
//     a task that runs does not.
func RateLimit(rate string) TaskOption {
	every, err := parseRate(rate)
	if err != nil {
		panic("worker: " + err.Error())
	}
	return func(r *registration) { r.every = every }
}

// parseRate returns the time between two starts, as celery.utils.time.rate does.
func parseRate(rate string) (time.Duration, error) {
	number, unit, _ := strings.Cut(rate, "/")
	n, err := strconv.ParseFloat(strings.TrimSpace(number), 64)
	per := map[string]time.Duration{"": time.Second, "s": time.Second, "m": time.Minute, "h": time.Hour}[unit]
	if err != nil || per == 0 || n < 0 || math.IsInf(n, 0) || math.IsNaN(n) {
		return 0, fmt.Errorf("rate limit %q is not a number with a unit, such as 10/m (s, m or h)", rate)
	}
	if n == 0 {
		return 0, nil
	}
	return max(time.Duration(min(float64(per)/n, math.MaxInt64/2)), 1), nil
}

// rateLimit is the limit of one task. It is guarded by registry.mu. At most one delivery
// is ahead: it may take a slot. All others of its task are limited, and stand in line.
type rateLimit struct {
	every time.Duration
	next  time.Time  // the earliest time of the next start
	line  *list.List // of limited deliveries
	ahead *delivery  // waiting, or nil
}

// admits reports whether a delivery may go ahead that stands at the end of the line.
func (l *rateLimit) admits(now time.Time) bool {
	return l.ahead == nil && l.line.Len() == 0 && !now.Before(l.next)
}

// turn reports whether a limited delivery is the next, and how long it still waits.
func (l *rateLimit) turn(d *delivery, now time.Time) (next bool, pause time.Duration) {
	if l.ahead != nil || l.line.Front() != d.limited {
		return false, 0
	}
	return true, l.next.Sub(now)
}

// wakeNext wakes the goroutine of the delivery whose turn it may be.
func (l *rateLimit) wakeNext() {
	if front := l.line.Front(); front != nil && l.ahead == nil {
		front.Value.(*delivery).wake()
	}
}

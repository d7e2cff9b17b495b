package worker

import "sync/atomic"

// runners are goroutines that serve deliveries. One that has served a delivery waits for
// another: a new goroutine would have to let its stack grow again for each message.
type runners struct {
	next    chan *delivery // to those that wait
	stopped chan struct{}  // those that wait end
	waiting atomic.Int32
	most    int32 // how many wait at the same time
}

// waitingRunnersMax bounds how many goroutines wait for a delivery.
const waitingRunnersMax = 64

func newRunners(prefetch int) runners {
	return runners{next: make(chan *delivery), stopped: make(chan struct{}), most: int32(min(max(prefetch, 1), waitingRunnersMax))}
}

// run serves a delivery in a goroutine that waits, or in a new one. A goroutine for which
// serve returns false ends.
func (r *runners) run(d *delivery, serve func(*delivery) (again bool)) {
	select {
	case r.next <- d:
	default:
		go func() {
			for d != nil && serve(d) {
				d = r.wait()
			}
		}()
	}
}

// wait returns the next delivery, or nil if the goroutine is to end.
func (r *runners) wait() *delivery {
	defer r.waiting.Add(-1)
	if r.waiting.Add(1) > r.most {
		return nil
	}
	select {
	case d := <-r.next:
		return d
	case <-r.stopped:
		return nil
	}
}

package amqp

// background runs functions in goroutines of their own. A few goroutines wait for the
// next function: a new one would first have to grow its stack, which takes as long as
// it takes to write a small message.
type background struct {
	next chan func()
	// idle has an element for each goroutine that waits.
	idle  chan struct{}
	ended <-chan struct{}
}

// idleMax is how many goroutines wait.
const idleMax = 4

// newBackground returns a background whose goroutines wait until ended is closed.
func newBackground(ended <-chan struct{}) background {
	return background{next: make(chan func()), idle: make(chan struct{}, idleMax), ended: ended}
}

// run begins f and does not wait for its end.
func (b *background) run(f func()) {
	select {
	case b.next <- f:
	default:
		go b.work(f)
	}
}

func (b *background) work(f func()) {
	for {
		f()
		select {
		case b.idle <- struct{}{}:
		default:
			return
		}
		select {
		case f = <-b.next:
			<-b.idle
		case <-b.ended:
			return
		}
	}
}

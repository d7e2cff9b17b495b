package worker

// A handler runs in the goroutine of its delivery, unless its task has a hard time limit:
// a goroutine for each handler costs as much as a short task. If the worker does not wait
// for the handler any longer, at a shutdown, or if the handler ends its goroutine,
// another goroutine goes on with the attempt. Whichever of the two sets attempt.ended
// records the outcome.

// callInPlace calls the handler of an attempt in this goroutine. It returns false if
// another goroutine has gone on with the attempt.
func (w *Worker) callInPlace(a *attempt) (o outcome, mine bool) {
	if !a.enterHandler() {
		return outcome{kind: outcomeInterrupted}, true
	}
	call, end := newCall(w.lifecycle.work, a.task, a.registration, w.timeLimit(a.message, a.registration))
	defer end()
	exiting := func(o outcome) {
		// The goroutine ends, and what it would have done next needs another one.
		if mine = a.leaveHandler(); mine {
			a.first.left = true
			a.first.receiveOthers()
			go w.goOn(a, o)
		}
	}
	o = call.run(exiting)
	return o, a.leaveHandler()
}

// enterHandler reports whether the handler may be called.
func (a *attempt) enterHandler() bool {
	a.registry.mu.Lock()
	defer a.registry.mu.Unlock()
	a.inHandler = !a.registry.ending
	return a.inHandler
}

// leaveHandler reports whether its caller goes on with the attempt. If not, the attempt
// has gone on without the handler, whose slot is free now.
func (a *attempt) leaveHandler() bool {
	if a.ended.CompareAndSwap(false, true) {
		return true
	}
	a.first.left = true
	a.registry.handlerReturned()
	return false
}

// giveUpHandlers lets all attempts go on whose handlers run in the goroutines of their
// deliveries. No other handler is called in place any more.
func (w *Worker) giveUpHandlers() {
	r := w.registry
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ending = true
	for _, a := range r.running {
		if a.inHandler && a.ended.CompareAndSwap(false, true) {
			r.giveUp(a)
			go w.goOn(a, outcome{kind: outcomeInterrupted})
		}
	}
}

// goOn does the rest of execute and of serve.
func (w *Worker) goOn(a *attempt, o outcome) {
	defer w.served(a.first)
	defer a.releaseSlot()
	defer w.rejectAfterPanic(a)
	a.outcome = o
	w.finish(a)
}

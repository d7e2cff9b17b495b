// Package worker is a Celery worker: it consumes task messages from RabbitMQ,
// runs the handlers registered for them, publishes what follows, stores the
// result, and acknowledges, in this order. Python producers, callers of
// AsyncResult and other Celery workers need no change.
//
// It owns the connection, the declarations, the deliveries and everything
// that happens to them until they are acknowledged, reconnection and
// shutdown. It knows no SQL (results go to a [ResultBackend]) and no domain
// (handlers are given). Everything about bytes on the wire is left to
// package protocol.
//
// # What is promised
//
//   - Nothing is acknowledged before its outcome has been published, with the
//     broker's confirm, and stored. Execution is at least once.
//   - A task whose connection is lost goes on. When its message comes again to
//     this process, the new delivery joins the running task; when the task has
//     just ended, the delivery is acknowledged without a second run.
//   - A fault of the broker or of the result backend never makes a failure of
//     finished work: it is retried, and at last the message goes back.
//   - A quorum queue's delivery limit does not lose a message that is handed
//     back or whose task runs: it is sent anew in time.
//   - A stored SUCCESS stands: a repeated run that fails sends no error
//     callbacks and marks nothing.
//   - No message ends the worker, or keeps it busy for ever by being malformed.
//
// # What differs from a Python worker
//
//   - Every error callback is published as a task. Python calls some inline,
//     by the arity of the function; an errback written for (request, exc,
//     traceback) gets the failed id only.
//   - A callback without an id of its own gets one that is made from the failed or
//     finished task's, the same whenever it is published again. Python draws it.
//   - Chords cannot be started: a task that needs one fails before it runs.
//   - A hard time limit cannot kill a handler. Its context ends, and the task
//     fails when the handler has returned; if it does not, after
//     Config.HardLimitGrace, and the handler keeps its slot until it returns.
//   - QoS is per consumer. Messages that wait for their ETA are made up for by
//     further consumers, so that they block nobody.
//
// A delivery's way through the files: connect.go, declare.go, consume.go,
// receive.go, attach.go, run.go, bind.go, settle.go, publish.go, requeue.go;
// around it shutdown.go, health.go and wire.go.
package worker

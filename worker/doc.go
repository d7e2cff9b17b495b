// Package worker is a Celery worker: it consumes task messages from a broker,
// runs the handlers that the program has registered, publishes the follow-up
// messages, stores the result, and acknowledges the message, in this order.
// Python producers, callers of AsyncResult and other Celery workers need no
// change.
//
// The follow-ups of a task are the next task of its chain, its callbacks, and,
// after a failure, its error callbacks. A slot is the right to run one task;
// Config.Slots is how many tasks run at the same time. A delayed message waits,
// without a slot, for its ETA or for a pause that its handler has asked for.
//
// [New] makes a [Worker] from a [Config], [Handle] registers a function as the
// handler of a task, and [Worker.Run] runs until its context ends. Results go to
// a [results.Backend], such as that of package results/postgres. Package workertest
// helps to test handlers without a broker.
//
// The package owns the deliveries until they are settled, the slots, reconnection
// and shutdown. It contains no SQL and no application logic. Package broker says what
// it needs of a broker; package broker/amqp does it with RabbitMQ, and package
// broker/memory in this process, for tests. Package protocol encodes and decodes
// messages.
//
// # Guarantees
//
//   - The worker acknowledges a message only after it has published the follow-ups,
//     with the broker's confirm, and stored the result. Execution is at least
//     once, unless a task asks for [AckEarly].
//   - A task continues when its connection is lost. When the broker delivers the
//     message again to this process, the new delivery is attached to the running
//     task. If the task has just ended, the worker acknowledges the new delivery
//     without running the task again. A message that a producer or an operator sends
//     once more after the end runs.
//   - A fault of the broker or of the result backend never turns finished work
//     into a failure. The worker retries, and in the end requeues the message.
//   - A follow-up that no queue takes within Config.RecordTimeout makes its task
//     fail with this reason; the handler does not run again. A queue or exchange of
//     the worker's configuration that was deleted is declared again.
//   - Messages are published on a connection of their own: while the broker accepts
//     none, the worker goes on to receive and to acknowledge. Each call of the
//     broker ends with its context.
//   - The delivery limit of a quorum queue does not drop a message that the worker
//     requeues, that of a running task, or one that waits while connections are
//     lost: the worker replaces it by a copy in time.
//   - The messages of a queue start in the order in which the broker delivers them;
//     a delayed one takes its place when its delay ends. Free slots go to the queues
//     in turn.
//   - A stored SUCCESS is kept: a repeated run that fails publishes no error
//     callbacks and stores nothing.
//   - A malformed message neither ends the worker nor is delivered for ever.
//
// # Options of a task
//
// They stand after the handler in [Handle] or [Worker.Register]. Each says its default and
// what it guarantees. In Celery they are attributes of the task:
//
//	AutoRetry                           autoretry_for, dont_autoretry_for, max_retries,
//	                                    retry_backoff, retry_backoff_max, retry_jitter
//	WithTimeLimit                       time_limit, soft_time_limit
//	RateLimit                           rate_limit
//	AckEarly                            acks_late=False
//	RejectFailures, RequeueTimeouts     acks_on_failure=False, acks_on_timeout=False
//	MaxStarts                           none: a limit for reject_on_worker_lost
//	IgnoreResult                        ignore_result
//	SendTo, ExpireAfter, Prepare        queue, expires, an own apply_async
//	ErrorClasses                        none: Python's errors have their class
//
// # Differences from a Python worker
//
//   - Every error callback is published as a task. A Python worker calls some
//     inline, depending on the number of the function's parameters. An error
//     callback for (request, exc, traceback) receives only the id of the failed
//     task.
//   - The id of a callback without one is derived from the id of its task, so that
//     it is the same when the callback is published again. A Python worker draws
//     a random one.
//   - Chords cannot be started: a task that needs one fails before its handler
//     runs.
//   - Message bodies must be JSON. Celery's built-in tasks, such as
//     celery.starmap, are not registered.
//   - A hard time limit cannot kill a handler. It ends the handler's context, and
//     the task fails when the handler returns or after Config.HardLimitGrace. A
//     handler that does not return keeps its slot.
//   - For messages that wait for their ETA the worker adds consumers, so that they do
//     not keep other messages from being delivered. Celery raises one limit.
//
// # Files
//
// A delivery goes through the files in this order:
//
//	broker/amqp/consume.go   a consumer of the broker hands it over
//	receive.go               it is read, and waits for its ETA, its rate limit and a slot
//	run.go, bind.go          its handler runs
//	outcome.go               what the handler returned becomes an outcome
//	conclude.go, publish.go  the outcome is published and stored
//	requeue.go               it goes back to its queue, if it has no outcome
//	broker/amqp/settle.go    the broker is told
//
// delivery.go has the states of a delivery with all moves between them, registry.go
// owns the deliveries, the slots and the memory of what has ended, and attempt.go is
// one run of a task. An option of a task has a file of its own: retry.go, classes.go,
// rate_limit.go, acknowledgement.go, starts.go, send_options.go. replace.go replaces a
// task, and task_context.go has what a handler finds in its context.
//
// transport.go chooses the broker. connect.go makes the connections and replaces lost
// ones: it knows the subscriptions, link.go the current connection, and
// connection_faults.go when to try again and what to log. shutdown.go has Run and the
// order in which it ends. health.go says what is known without asking the broker, and
// inspect.go asks it.
package worker
